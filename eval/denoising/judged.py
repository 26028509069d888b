"""load_judged: the model whose loss is measured, with its noise schedule and what it predicts."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    DDPMPipeline,
    DDPMScheduler,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLInpaintPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from torch import Tensor

from agentsd.images.noise import why_not_ddpm
from agentsd.images.pipelines import choose_dtype, set_scheduler
from eval.common.models import ModelSpec, load_model, pick_device
from eval.common.protocol import BenchError

PROBE = Path(__file__).parents[1] / "probe"
PROBE_64 = Path(__file__).parents[1] / "probe-64"
"""The shipped probes, of 24 × 24 and 64 × 64 pixels; eval/train_probe.py made them."""

PATTERNS = "patterns.json"
"""File in a probe's folder with the scale of its patterns; a folder without it has scale 1."""

INPAINTING = (StableDiffusionInpaintPipeline, StableDiffusionXLInpaintPipeline)
PIPELINES = (StableDiffusionPipeline, StableDiffusionXLPipeline, *INPAINTING)


@dataclass(frozen=True)
class Inputs:
    """Images as the network sees them, all tensors on the CPU.

    Attributes:
        keys: one for each image; its noise depends on the key, not on its place among the images.
        latents: [N, C, H, W], float32.
        text: [N, L, D].
        added: what SDXL takes beside the text (text_embeds, time_ids), by the UNet's own names, each [N, …].
        beside: [N, 1 + C, H, W], mask and latents of the masked image, which an inpainting UNet takes beside the noisy
            latents; None for others.
    """

    keys: tuple[str, ...]
    latents: Tensor
    text: Tensor
    added: dict[str, Tensor] = field(default_factory=dict)
    beside: Tensor | None = None

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, numbers: Sequence[int]) -> Inputs:
        """Some of the images, in this order."""
        index = list(numbers)
        return Inputs(
            tuple(self.keys[i] for i in index),
            self.latents[index],
            self.text[index],
            {name: value[index] for name, value in self.added.items()},
            None if self.beside is None else self.beside[index],
        )


@dataclass(frozen=True)
class Judged:
    """A model whose loss can be measured.

    Attributes:
        name: for reports.
        pipe: a pipeline with an unpatched `unet` and a `scheduler`.
        signal: [T], the cumulative product of 1 − beta; T is the number of training timesteps.
        is_probe: it takes patterns and no text.
        scale: of those patterns.
    """

    name: str
    pipe: Any
    signal: Tensor
    is_probe: bool = False
    scale: float = 1.0

    @property
    def device(self) -> torch.device:
        return self.pipe.unet.device

    @property
    def dtype(self) -> torch.dtype:
        return self.pipe.unet.dtype

    def add_noise(self, latents: Tensor, noise: Tensor, timestep: int) -> Tensor:
        """x_t = √ᾱ x + √(1 − ᾱ) ε, [B, C, H, W] float32."""
        signal = self.signal[timestep]
        return signal.sqrt() * latents + (1 - signal).sqrt() * noise

    @torch.no_grad()
    def predict_noise(self, noisy: Tensor, timestep: int, inputs: Inputs) -> Tensor:
        """ε̂ of x_t, [B, C, H, W] float32; a v-prediction is converted by ε = √ᾱ v + √(1 − ᾱ) x_t.

        Args:
            noisy: x_t, [B, C, H, W] float32.
            inputs: the B images that x_t was made of, for what the network takes beside it.
        """
        device, dtype = self.device, self.dtype
        moment = torch.tensor(timestep, device=device)
        sample = noisy if inputs.beside is None else torch.cat([noisy, inputs.beside], dim=1)
        added = {name: value.to(device, dtype) for name, value in inputs.added.items()}
        options = {"added_cond_kwargs": added} if added else {}
        out = self.pipe.unet(sample.to(device, dtype), moment, inputs.text.to(device, dtype), **options)
        out = out.sample.float().cpu()
        if self.pipe.scheduler.config.prediction_type == "epsilon":
            return out
        signal = self.signal[timestep]
        return signal.sqrt() * out + (1 - signal).sqrt() * noisy


def load_judged(model: str, device: str | None = None, dtype: str | None = None, revision: str | None = None) -> Judged:
    """The model: "probe" or "probe-64" (shipped), or a folder of one, "demo", a folder or a Hugging Face id.

    Raises:
        BenchError: it cannot be loaded, or its loss is not one of a noise that is predicted from latents and text.
    """
    shipped = {"probe": PROBE, "probe-64": PROBE_64}
    folder = shipped.get(model) or Path(model)
    if model in shipped or (folder / "model_index.json").is_file() and not (folder / "vae").is_dir():
        judged = judge(model, _load_probe(folder, device, dtype), is_probe=True, scale=_scale_of(folder))
    else:
        pipe = load_model(ModelSpec(model=model, scheduler=None, device=device, dtype=dtype, revision=revision))
        judged = judge(model, pipe)  # by the model's own scheduler, which says what it was trained for
        set_scheduler(pipe, "ddim")
    return judged


def judge(name: str, pipe: Any, is_probe: bool = False, scale: float = 1.0) -> Judged:
    """A pipeline as Judged. Raises BenchError where its loss cannot be measured."""
    if (why := why_not_ddpm(pipe.scheduler)) is not None:
        raise BenchError(
            f"{name}: its scheduler {why}; only models that were trained with DDPM's noise to predict the noise or the "
            "velocity are supported"
        )
    if getattr(pipe.unet.config, "time_cond_proj_dim", None) is not None:
        raise BenchError(f"{name}: its UNet takes the guidance scale as an input, as distilled for few steps (LCM)")
    if not is_probe and not isinstance(pipe, PIPELINES):
        kinds = ", ".join(kind.__name__ for kind in PIPELINES)
        raise BenchError(f"{name}: is a {type(pipe).__name__}, but only {kinds} and the probe are supported")
    channels = pipe.unet.config.in_channels
    if not is_probe:
        own = pipe.vae.config.latent_channels
        possible = (own, 2 * own + 1) if isinstance(pipe, INPAINTING) else (own,)
        if channels not in possible:
            raise BenchError(
                f"{name}: its UNet takes {channels} channels, which is not what a {type(pipe).__name__} with an "
                f"autoencoder of {own} channels gives it: {' or '.join(map(str, possible))}"
            )
        if pipe.unet.config.out_channels != own:
            raise BenchError(
                f"{name}: its UNet predicts {pipe.unet.config.out_channels} channels and not the {own} of the noise, "
                "as with a learned variance"
            )
    return Judged(name, pipe, pipe.scheduler.alphas_cumprod.float().cpu(), is_probe, scale)


def _load_probe(folder: Path, device: str | None, dtype: str | None) -> DDPMPipeline:
    chosen = pick_device(device, dtype)
    precision = choose_dtype(dtype or "float32", chosen)
    try:
        unet = UNet2DConditionModel.from_pretrained(folder, subfolder="unet", use_safetensors=True)
        scheduler = DDPMScheduler.from_pretrained(folder, subfolder="scheduler")
    except Exception as error:  # diffusers raises many kinds here; all of them mean that there is no model
        raise BenchError(f"{folder}: cannot be loaded as a probe ({str(error).splitlines()[0][:200]})") from error
    return DDPMPipeline(unet.eval().to(chosen, precision), scheduler)


def _scale_of(folder: Path) -> float:
    try:
        scale = json.loads((folder / PATTERNS).read_text(encoding="utf-8"))["scale"]
    except FileNotFoundError:
        return 1.0
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BenchError(f"{folder / PATTERNS}: cannot be read ({error})") from error
    if not isinstance(scale, (int, float)) or not scale >= 1:
        raise BenchError(f"{folder / PATTERNS}: scale {scale!r} must be a number from 1")
    return float(scale)
