"""load_model: the pipeline a benchmark runs on, with trained weights or with random ones in the real architecture."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from diffusers import (
    AutoencoderKL,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from agentsd import load_pipeline
from agentsd.images.pipelines import DEMO_MODEL, ModelError, choose_device, choose_dtype, set_scheduler
from agentsd.unet.layers import own_latent_size

from .fair_schedules import set_fair_schedule
from .protocol import BenchError


@dataclass(frozen=True)
class ModelSpec:
    """Which pipeline to make; a plain value that other processes can be handed.

    Attributes:
        model: what `agentsd generate --model` takes: "demo", a folder, a checkpoint's file, a Hugging Face id.
        random_weights: a key of ARCHITECTURES, in place of `model`.
        scheduler: a name from agentsd.images.pipelines.SCHEDULERS; None keeps the model's own.
        device, dtype: None takes the best there is.
        revision: of a Hugging Face id.
        fair: begin at one noise level for all numbers of steps (`set_fair_schedule`).
    """

    model: str = "demo"
    random_weights: str | None = None
    scheduler: str | None = "plms"
    device: str | None = None
    dtype: str | None = None
    revision: str | None = None
    fair: bool = False

    @property
    def name(self) -> str:
        """For reports and manifests."""
        if self.random_weights:
            return f"{self.random_weights} with random weights"
        return self.model + (f"@{self.revision}" if self.revision else "")


_SD_UNET = dict(block_out_channels=(320, 640, 1280, 1280), layers_per_block=2)
_SD_VAE = dict(
    block_out_channels=(128, 256, 512, 512),
    down_block_types=("DownEncoderBlock2D",) * 4,
    up_block_types=("UpDecoderBlock2D",) * 4,
    layers_per_block=2,
    latent_channels=4,
)
_CLIP_L = dict(
    vocab_size=49408, hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12,
    projection_dim=768, bos_token_id=49406, eos_token_id=49407, pad_token_id=49407,
)  # fmt: skip

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "sd15": dict(unet=dict(_SD_UNET, sample_size=64, cross_attention_dim=768, attention_head_dim=8), text=[_CLIP_L]),
    "sd21": dict(
        unet=dict(
            _SD_UNET, sample_size=96, cross_attention_dim=1024, attention_head_dim=(5, 10, 20, 20),
            use_linear_projection=True, upcast_attention=True,
        ),
        text=[dict(_CLIP_L, hidden_size=1024, intermediate_size=4096, num_hidden_layers=23, num_attention_heads=16)],
    ),
    "sdxl": dict(
        unet=dict(
            block_out_channels=(320, 640, 1280), layers_per_block=2, sample_size=128, cross_attention_dim=2048,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 10), attention_head_dim=(5, 10, 20), use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
        ),
        text=[
            _CLIP_L,
            dict(
                _CLIP_L, hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20,
                projection_dim=1280,
            ),
        ],
    ),
}  # fmt: skip
"""The published configurations of Stable Diffusion 1.5, 2.1 and SDXL base: UNet and text encoders."""


def pick_device(device: str | None, dtype: str | None = None) -> torch.device:
    """The device: the best there is for None. Raises BenchError for one that is missing, or an unknown dtype."""
    try:
        chosen = choose_device(device)
        choose_dtype(dtype, chosen)
        return chosen
    except ValueError as error:
        raise BenchError(str(error)) from error


def load_model(spec: ModelSpec, **options: Any) -> Any:
    """The pipeline, unpatched, on its device, without progress bar and without safety checker.

    Further options are those of diffusers' from_pretrained. The checker blackens images that it finds indecent, and
    a method would be scored on them. Raises BenchError where it cannot be loaded, or for a wrong device,
    dtype or scheduler.
    """
    try:
        if spec.random_weights:
            pipe = random_pipeline(spec.random_weights, spec.device, spec.dtype, spec.scheduler)
        else:
            options |= {"revision": spec.revision} if spec.revision else {}
            pipe = load_pipeline(spec.model, device=spec.device, dtype=spec.dtype, scheduler=spec.scheduler, **options)
    except (ModelError, ValueError) as error:
        raise BenchError(str(error)) from error
    if getattr(pipe, "safety_checker", None) is not None:
        pipe.safety_checker = None
    pipe.set_progress_bar_config(disable=True)
    if spec.fair and spec.scheduler is not None:
        set_fair_schedule(pipe, spec.scheduler)
    return pipe


def native_size(pipe: Any) -> int:
    """Height and width, in pixels, of the images a pipeline generates unless told otherwise; the larger of the two."""
    return max(own_latent_size(pipe.unet)) * pipe.vae_scale_factor


def random_pipeline(name: str, device: Any = None, dtype: Any = None, scheduler: str | None = None) -> Any:
    """A pipeline with one of ARCHITECTURES and random weights: as fast as the real one. Arguments as load_pipeline."""
    if name not in ARCHITECTURES:
        raise BenchError(f"--random-weights {name!r}: must be one of {', '.join(ARCHITECTURES)}")
    device = choose_device(device)
    dtype = choose_dtype(dtype, device)
    architecture = ARCHITECTURES[name]
    with torch.device("meta"):
        unet = UNet2DConditionModel(**architecture["unet"]).to(dtype)
    unet = unet.to_empty(device=device).eval()
    _fill(unet)
    encoders = []
    for i, text in enumerate(architecture["text"]):
        kind = CLIPTextModelWithProjection if i else CLIPTextModel
        encoders.append(kind(CLIPTextConfig(**text)).eval())
    # The words do not matter to speed: the demo model's small vocabulary serves, padded to the same 77 tokens.
    tokenizer = CLIPTokenizer.from_pretrained(DEMO_MODEL / "tokenizer")
    parts = dict(vae=AutoencoderKL(**_SD_VAE, sample_size=unet.config.sample_size * 8).eval(), unet=unet)
    parts["scheduler"] = PNDMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", skip_prk_steps=True, steps_offset=1
    )
    verbosity = diffusers.utils.logging.get_verbosity()
    diffusers.utils.logging.set_verbosity_error()
    transformers.utils.logging.set_verbosity_error()
    if len(encoders) == 2:
        pipe = StableDiffusionXLPipeline(
            **parts, text_encoder=encoders[0], text_encoder_2=encoders[1], tokenizer=tokenizer, tokenizer_2=tokenizer,
            add_watermarker=False,
        )  # fmt: skip
    else:
        pipe = StableDiffusionPipeline(
            **parts, text_encoder=encoders[0], tokenizer=tokenizer, safety_checker=None, feature_extractor=None,
            requires_safety_checker=False,
        )  # fmt: skip
    diffusers.utils.logging.set_verbosity(verbosity)
    if scheduler is not None:
        set_scheduler(pipe, scheduler)
    return pipe.to(device, dtype)


def _fill(network: torch.nn.Module) -> None:
    """Set values that neither overflow nor become denormal, on the device itself: a CPU would take a minute."""
    generator = torch.Generator(next(network.parameters()).device).manual_seed(0)
    with torch.no_grad():
        for key, weight in network.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, weight[0].numel() ** -0.5, generator=generator)
            else:
                weight.fill_(1.0 if key.endswith("weight") else 0.0)
