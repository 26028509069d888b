"""Stage samples: images of a model, as the contact sheet and, for the training stages, as their grids."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw
from torch import Tensor
from tqdm import tqdm

from .run import Run, announce, check_folder, require, training_settings, write_png


def samples_stage(run: Run) -> None:
    """Generate samples.png from model/: --count of the names of the last phase.

    Raises:
        UsageError: there is no model/, or the folder was made with other settings.
    """
    from diffusers import StableDiffusionPipeline

    folder = require(run, run.out / "model" / "model_index.json", "export").parent
    if (run.out / "unet" / "settings.json").exists():  # model/ may have been copied here alone
        # What the model was trained on plays no part here, and may have been deleted.
        check_folder(run.out / "unet", training_settings(run, "unet"), besides=("data", "autoencoder"))
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.to(run.device).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    names = evenly(run.preset.phases[-1].names, run.count)
    sheet = contact_sheet(run, pipeline, names, columns=min(8, len(names)), progress=True)
    write_png(run.out / "samples.png", sheet)
    announce("samples", f"{len(names)} images in {run.out / 'samples.png'}")


@torch.no_grad()
def contact_sheet(run: Run, pipeline, names: Sequence[str], columns: int, progress: bool = False) -> Image.Image:
    """One labelled sample per name, each from a seed of its own; columns across."""
    images = []
    for start in tqdm(range(0, len(names), 8), desc="samples", unit="batch", disable=not progress):
        batch = names[start : start + 8]
        images += pipeline(
            [f"a high quality photograph of a {name}." for name in batch],
            num_inference_steps=run.preset.sample_steps,
            guidance_scale=run.preset.guidance,
            generator=[run.generator("sample", name) for name in batch],
        ).images
    width, height = images[0].size
    label = 14
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * (height + label)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (name, image) in enumerate(zip(names, images, strict=True)):
        left, top = number % columns * width, number // columns * (height + label)
        pen.text((left + 3, top + 1), name, fill="black")
        sheet.paste(image, (left, top + label))
    return sheet


def as_grid(images: Tensor, columns: int) -> Image.Image:
    """Images [B, 3, H, W] in -1 … 1, B a multiple of `columns`, as one image."""
    pixels = ((images.cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    rows = [torch.cat(list(row), dim=-1) for row in pixels.split(columns)]
    return Image.fromarray(torch.cat(rows, dim=-2).permute(1, 2, 0).numpy())


def evenly(items: Sequence, count: int) -> list:
    """At most `count` of the items, spread over the whole sequence."""
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]
