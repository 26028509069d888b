"""The stored example that the page shows before anything was generated: one castle by each method."""

from __future__ import annotations

from pathlib import Path

from PIL import Image

from agentsd.images.generate import generate
from agentsd.images.methods import METHODS
from agentsd.images.pipelines import load_pipeline
from agentsd.images.request import Request

EXAMPLE = Path(__file__).with_name("example.webp")
"""The demo model's castle (25 steps, guidance 5, seed 3) by each method from left to right, 256 px each, lossless."""


def example_images() -> dict[str, Image.Image]:
    """The images by method."""
    with Image.open(EXAMPLE) as strip:
        side = strip.height
        return {
            method: strip.crop((i * side, 0, (i + 1) * side, side)).convert("RGB") for i, method in enumerate(METHODS)
        }


def store_example() -> None:
    """Generate the example anew: `python apps/screenshots.py --example`."""
    pipe = load_pipeline("demo")
    request = Request("a high quality photograph of a castle.", steps=25, guidance=5.0, seed=3)
    side = 256
    strip = Image.new("RGB", (side * len(METHODS), side))
    for i, method in enumerate(METHODS):
        image = generate(pipe, request, method).image
        strip.paste(image.resize((side, side), Image.Resampling.LANCZOS), (i * side, 0))
    strip.save(EXAMPLE, lossless=True, quality=100, method=6)
