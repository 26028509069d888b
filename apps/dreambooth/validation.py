"""write_validation: a row of images of the model as it is after a step."""

from __future__ import annotations

import contextlib
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image

import agentsd
from agentsd.files import write_atomically

from .draws import number
from .sampling import generate, ready_to_sample
from .settings import DreamBoothSettings


def write_validation(pipe: DiffusionPipeline, settings: DreamBoothSettings, device: torch.device, path: Path) -> None:
    """Generate num_validation_images side by side, with the same seeds at every step, and write them as one PNG.

    With --agents sampling the patch is on for these images alone; with both it is on already.
    """
    patch: contextlib.AbstractContextManager = contextlib.nullcontext()
    if settings.agents == "sampling":
        patch = agentsd.patched(pipe, settings.agent_config)
    seeds = [number(settings.seed, "validation", i) for i in range(settings.num_validation_images)]
    with ready_to_sample(pipe, device), patch:
        images = list(
            generate(
                pipe, settings.validation_prompt or "", seeds, resolution=settings.resolution,
                steps=settings.validation_inference_steps, guidance=settings.guidance_scale,
            )
        )  # fmt: skip
    row = Image.new("RGB", (sum(image.width for image in images), images[0].height))
    left = 0
    for image in images:
        row.paste(image, (left, 0))
        left += image.width
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda file: row.save(file, format="PNG"))
