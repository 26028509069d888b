"""The stored example that the page shows before anything was generated: one castle by each method, with its times."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from PIL import Image

from agentsd.images.methods import METHODS
from agentsd.images.pipelines import SCHEDULERS
from agentsd.images.png import read_settings
from agentsd.images.rounds import is_stable

from .figures import Figures
from .images import distance

EXAMPLE = Path(__file__).with_name("example.webp")
"""The demo model's castle by each method from left to right, 256 px each; beside it a .json with the times."""

_SIDE = 256


@dataclass(frozen=True)
class Example:
    """The stored example.

    Attributes:
        images: by method, smaller than they were generated.
        seconds: of every round, by method.
        distances: `images.distance` of the images at full size, by "sd tomesd" and the other pairs.
        about: what was generated and where, in half a sentence.
    """

    images: Mapping[str, Image.Image]
    seconds: Mapping[str, tuple[float, ...]]
    distances: Mapping[str, float]
    about: str

    def distance(self, left: str, right: str) -> float:
        """Distance of two of the images at full size."""
        pairs = (f"{left} {right}", f"{right} {left}")
        return 0.0 if left == right else next(self.distances[pair] for pair in pairs if pair in self.distances)

    def figures(self, method: str) -> Figures:
        """Figures of one of the images beside the first."""
        first = next(iter(METHODS))
        ours, base = self.seconds[method], self.seconds[first]
        stable = is_stable(ours) and is_stable(base)
        is_first = method == first
        return Figures(
            statistics.median(ours),
            len(ours),
            None if is_first else statistics.median(base) / statistics.median(ours),
            None,
            False,
            None if is_first else self.distance(first, method),
            stable,
        )


def read_example() -> Example:
    """The stored example."""
    with Image.open(EXAMPLE) as strip:
        side = strip.height
        images = {
            method: strip.crop((i * side, 0, (i + 1) * side, side)).convert("RGB") for i, method in enumerate(METHODS)
        }
    stored = json.loads(EXAMPLE.with_suffix(".json").read_text(encoding="utf-8"))
    seconds = {method: tuple(stored["seconds"][method]) for method in METHODS}
    return Example(images, seconds, stored["distances"], stored["about"])


def store_example(path: str | Path, machine: str) -> None:
    """Store an image of `agentsd generate --compare`, which carries its settings and times, as the example.

    Args:
        path: the PNG, of the demo model and all METHODS.
        machine: where it was generated, in print ("2 CPU cores"); the image does not say.
    """
    settings = read_settings(path)
    if settings is None:
        raise ValueError(f"{path} holds no settings: give an image of `agentsd generate --compare`")
    runs = {run["method"]: run for run in settings["compare"]}
    with Image.open(path) as sheet:
        images = split_comparison(sheet.convert("RGB"), len(METHODS))
    by_method = dict(zip(METHODS, images))
    strip = Image.new("RGB", (_SIDE * len(METHODS), _SIDE))
    for i, image in enumerate(images):
        strip.paste(image.resize((_SIDE, _SIDE), Image.Resampling.LANCZOS), (i * _SIDE, 0))
    strip.save(EXAMPLE, lossless=True, quality=100, method=6)
    one = runs["sd"]
    kinds = {kind: name for name, (kind, _) in reversed(SCHEDULERS.items())}
    scheduler = kinds.get(one["scheduler"], one["scheduler"]).upper()
    width, height = images[0].size
    stored = {
        "about": f"the demo model's castle, {one['steps']} steps by {scheduler}, {width} × {height} px, on {machine}",
        "versions": one["versions"],
        "seconds": {method: [round(each, 3) for each in runs[method]["seconds"]] for method in METHODS},
        "distances": {
            f"{left} {right}": round(distance(by_method[left], by_method[right]), 3)
            for left, right in combinations(METHODS, 2)
        },
    }
    EXAMPLE.with_suffix(".json").write_text(json.dumps(stored, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def split_comparison(sheet: Image.Image, count: int) -> list[Image.Image]:
    """The images of a comparison's sheet (`agentsd.images.compare.comparison_image`): squares with equal margins."""
    side = next(side for side in range(sheet.width // count, 0, -1)
                if (side + max(8, side // 32)) * count + max(8, side // 32) == sheet.width)  # fmt: skip
    margin = max(8, side // 32)
    return [
        sheet.crop((left, margin, left + side, margin + side)) for left in range(margin, sheet.width, side + margin)
    ]
