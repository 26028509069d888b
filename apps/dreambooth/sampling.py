"""generate: images from a model that is being trained; neither weights, modes nor random state change by it."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from agentsd.images.latents import unscale_latents

from .models import text_encoders


@contextlib.contextmanager
def ready_to_sample(pipe: DiffusionPipeline, device: torch.device) -> Iterator[None]:
    """Have every part on the device and in evaluation mode for a `with` block, and a scheduler that may be changed."""
    modules = [pipe.unet, pipe.vae, *text_encoders(pipe)]
    before = [(module.training, next(module.parameters()).device) for module in modules]
    scheduler, checker = pipe.scheduler, getattr(pipe, "safety_checker", None)
    pipe.scheduler = type(scheduler).from_config(scheduler.config)
    if checker is not None:
        pipe.safety_checker = None  # it stays on the CPU, and a blacked-out validation image shows nothing
    for module in modules:
        module.eval().to(device)
    try:
        yield
    finally:
        pipe.scheduler = scheduler
        if checker is not None:
            pipe.safety_checker = checker
        for module, (training, place) in zip(modules, before):
            module.train(training).to(place)


def generate(
    pipe: DiffusionPipeline,
    prompt: str,
    seeds: Iterable[int],
    *,
    resolution: int,
    steps: int,
    guidance: float,
    precision: Callable[[], AbstractContextManager] = contextlib.nullcontext,
) -> Iterator[Image.Image]:
    """Generate one image for each seed, one at a time. The pipeline must be `ready_to_sample`.

    Args:
        precision: makes the autocast that the model runs in. An autoencoder with `force_upcast` decodes outside of it,
            in the dtype of its weights, as its values are too large for half precision.
    """
    vae = pipe.vae
    upcast = getattr(vae.config, "force_upcast", False)
    for seed in seeds:
        with torch.no_grad():
            with precision():
                latents = pipe(
                    prompt,
                    height=resolution,
                    width=resolution,
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    generator=torch.Generator().manual_seed(seed),
                    output_type="latent",
                ).images
            with contextlib.nullcontext() if upcast else precision():
                pixels = vae.decode(unscale_latents(vae, latents.to(vae.dtype)), return_dict=False)[0]
            yield pipe.image_processor.postprocess(pixels.float(), output_type="pil")[0]
