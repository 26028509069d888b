"""Stage unet: UNet and text encoder, trained together on latents, grown from a smaller model where there is one."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from .autoencoder import encode_all, load_autoencoder
from .growing import grow
from .icons import load_index, trained_names
from .images import training_images
from .key_subset import SubsetAttnProcessor, one_per_cell
from .models import build_pipeline, build_scheduler, build_text_encoder, build_unet, seed_initial_weights, take_over
from .run import Run, UsageError, announce, claim_folder, origin_of_unet, training_settings
from .samples import contact_sheet, evenly
from .sharpening import calibrate, keep_sharp, sharpen
from .tokenizer import build_tokenizer, tokenise
from .training import finish, train

if TYPE_CHECKING:
    from diffusers import UNet2DConditionModel
    from diffusers.models.attention_processor import Attention

CAPTIONS = (("a {}", 0.3), ("a high quality photograph of a {}.", 0.4), ("{}", 0.2), ("", 0.1))
"""Caption templates with their probabilities; the empty one is what classifier-free guidance compares with."""

SHARPENING_IMAGES = 8
SHARPENING_TIMES = (0.65, 0.95)
"""Of the diffusion run: well within the noisiest 40 %, in which agents work by default."""


def unet_stage(run: Run) -> None:
    """Train UNet and text encoder together on latents: unet/weights.safetensors."""
    preset, folder = run.preset, run.out / "unet"
    origin = origin_of_unet(run)
    icons = load_index(run)
    claim_folder(folder, training_settings(run, "unet") | origin)
    if (folder / "weights.safetensors").exists():
        return announce("unet", "already done")

    vae = load_autoencoder(run).to(run.device)
    tokenizer = build_tokenizer(run, trained_names(run), folder / "tokenizer")
    latents = encode_all(vae, training_images(run, icons).to(run.device)) * vae.config.scaling_factor
    shown_icons = [icons[number % len(icons)] for number in range(len(latents))]
    captions = torch.stack([tokenise(tokenizer, [form.format(i.name) for form, _ in CAPTIONS]) for i in shown_icons])
    chances = torch.tensor([chance for _, chance in CAPTIONS])
    seen = [
        torch.tensor(
            [n for n, i in enumerate(shown_icons) if i.name in phase.names and i.style in (phase.styles or i.style)]
        )
        for phase in preset.phases
    ]

    seed_initial_weights(run, "unet")
    trained = {"unet": build_unet(preset), "text_encoder": build_text_encoder(preset, tokenizer)}
    if run.grow_from:
        grow_models(run, run.grow_from, trained)
    averages = {name: copy.deepcopy(module).requires_grad_(False).eval() for name, module in trained.items()}
    for module in (*trained.values(), *averages.values()):
        module.to(run.device)
    subset = SubsetAttnProcessor()
    if any(phase.key_stride for phase in preset.phases):
        use_key_subset(trained["unet"], subset)  # after the averages were copied: samples are generated with all keys
    predict = torch.compile(trained["unet"]) if run.compile else trained["unet"]
    scheduler = build_scheduler()
    alphas = scheduler.alphas_cumprod
    batch = preset.unet_batch

    def loss_of(phase: int, generator: torch.Generator) -> Tensor:
        picks = seen[phase][torch.randint(len(seen[phase]), (batch,), generator=generator)]
        forms = torch.multinomial(chances, batch, replacement=True, generator=generator)
        # One timestep out of each of `batch` equal parts of the diffusion run: less variance than independent draws.
        strata = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        timesteps = (strata * len(alphas)).long().clamp(max=len(alphas) - 1)
        noise = torch.randn((batch, *latents.shape[1:]), generator=generator)
        weights = loss_weight(alphas[timesteps]).to(run.device)
        noise, timesteps = noise.to(run.device), timesteps.to(run.device)
        noisy = scheduler.add_noise(latents[picks.to(run.device)], noise, timesteps)
        stride = preset.phases[phase].key_stride
        subset.chosen = one_per_cell(latents.shape[-1], stride, generator).to(run.device) if stride else None
        for layer in self_attention_layers(trained["unet"]):  # in every step: a resumed run begins within a phase
            keep_sharp(layer, preset.phases[phase].sharpen is not None)
        with run.autocast():
            text = trained["text_encoder"](captions[picks, forms].to(run.device))[0]
            predicted = predict(noisy, timesteps, text).sample
        return ((predicted.float() - noise).square().mean(dim=(1, 2, 3)) * weights).mean()

    def prepare(phase: int, local: int) -> None:
        settings = preset.phases[phase]
        if not settings.sharpen or local % settings.calibration_steps:
            return
        generator = run.generator("unet", "sharpen", phase, local)
        picks = torch.randint(len(latents), (SHARPENING_IMAGES,), generator=generator)
        noise = torch.randn((SHARPENING_IMAGES, *latents.shape[1:]), generator=generator).to(run.device)
        timesteps = (torch.linspace(*SHARPENING_TIMES, SHARPENING_IMAGES) * len(alphas)).long().to(run.device)
        noisy = scheduler.add_noise(latents[picks.to(run.device)], noise, timesteps)
        texts = captions[picks, 0].to(run.device)
        change_attention(averages, calibrate if local else sharpen, settings.sharpen, noisy, timesteps, texts)
        own, other = (self_attention_layers(models["unet"]) for models in (averages, trained))
        for average, layer in zip(own, other, strict=True):
            taken = average.state_dict()
            if local:  # what is trained stays as it is
                taken = layer.state_dict() | {key: taken[key] for key in ("to_q.weight", "to_k.weight")}
            layer.load_state_dict(taken)

    pipeline = build_pipeline(vae, averages["text_encoder"], tokenizer, averages["unet"])
    shown = evenly(run.preset.phases[-1].names, preset.grid_samples)
    train(
        run,
        "unet",
        trained,
        averages,
        [phase.steps for phase in preset.phases],
        [phase.lr or preset.unet_lr for phase in preset.phases],
        loss_of,
        lambda: contact_sheet(run, pipeline, shown, columns=4),
        prepare,
    )
    finish(
        folder,
        {f"{n}.{key}": value for n, module in averages.items() for key, value in module.state_dict().items()},
        {},
    )
    announce(
        "unet", f"finished, {sum(p.numel() for m in trained.values() for p in m.parameters()) / 1e6:.1f} M weights"
    )


def loss_weight(alphas: Tensor) -> Tensor:
    """Weight of the noise-prediction error: SNR ** -0.5 within 0.15 … 6; `alphas` is the scheduler's alphas_cumprod."""
    return ((1 - alphas) / alphas).sqrt().clamp(0.15, 6)


def grow_models(run: Run, folder: Path, models: dict[str, nn.Module]) -> None:
    """Fill UNet and text encoder from the folder of the model that this one grows from.

    Raises:
        UsageError: that model's format does not fit.
    """
    config = json.loads((folder / "unet" / "config.json").read_text())
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    try:
        fresh = grow(models["unet"], weights, len(config["block_out_channels"]))
    except ValueError as error:
        raise UsageError(f"{folder} does not fit preset {run.preset_name}: {error}") from None
    take_over(models["text_encoder"], folder / "text_encoder" / "model.safetensors")
    total = len(models["unet"].state_dict())
    announce("unet", f"{total - len(fresh)} of {total} tensors taken from {folder}")


@torch.no_grad()
def change_attention(
    models: dict[str, nn.Module],
    change: Callable[[Attention, Tensor, float], object],
    share: float,
    noisy: Tensor,
    timesteps: Tensor,
    texts: Tensor,
) -> None:
    """Sharpen or calibrates the UNet's self-attention layers, from the first to the last, each on what it is given.

    Args:
        models: "unet" and "text_encoder".
        change: `sharpen` or `calibrate`.
        share: see there.
        noisy: latents [B, 4, h, w] of the agent phase.
        timesteps: theirs, [B].
        texts: token numbers of their captions, [B, 77].
    """
    text = models["text_encoder"](texts)[0]
    for layer in self_attention_layers(models["unet"]):
        given: list[Tensor] = []

        def note(_layer, args, kwargs, given=given) -> None:
            given.append(args[0] if args else kwargs["hidden_states"])

        handle = layer.register_forward_pre_hook(note, with_kwargs=True)
        models["unet"](noisy, timesteps, text)
        handle.remove()
        change(layer, given[0], share)


def self_attention_layers(unet: UNet2DConditionModel) -> list[Attention]:
    """The UNet's self-attention layers, in the order in which they are called: down blocks, then up blocks."""
    return [layer for name, layer in unet.named_modules() if name.endswith("attn1") and not layer.is_cross_attention]


def use_key_subset(unet: UNet2DConditionModel, subset: SubsetAttnProcessor) -> None:
    """Give the full-resolution self-attention layers that processor."""
    tops = ("down_blocks.0.", f"up_blocks.{len(unet.up_blocks) - 1}.")
    for name, module in unet.named_modules():
        if name.startswith(tops) and name.endswith(".attn1"):
            module.set_processor(subset)
