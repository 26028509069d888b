"""write_renderings: the demo model's icons on grounds that it was not trained on, with captions."""

from __future__ import annotations

import json
from pathlib import Path

from demo_training.images import compose_image, ground_colour, open_icon
from demo_training.run import write_json, write_png

from eval.common.protocol import BenchError


def write_renderings(data: Path, out: Path, count: int) -> None:
    """Write `count` images and captions.json to `out`; the objects are those of the training, grounds and margins new.

    Args:
        data: folder `data` of apps/train_demo_model.py.

    Raises:
        BenchError: there is no such folder.
    """
    if not (data / "index.json").is_file():
        raise BenchError(f"{data} has no index.json: run the stage data first")
    icons = json.loads((data / "index.json").read_text())
    out.mkdir(parents=True, exist_ok=True)
    captions = {}
    for number in range(count):
        icon = icons[number * len(icons) // count % len(icons)]
        # The training's seeds are 64-bit digests; its margin is 0.07.
        ground, margin = ground_colour(number), (0.05, 0.10)[number % 2]
        name = f"{number:04d}-{icon['name'].replace(' ', '_')}.png"
        write_png(out / name, compose_image(open_icon(data / icon["file"]), 512, margin, ground))
        captions[name] = f"A high quality photograph of a {icon['name']}."
    write_json(out / "captions.json", captions)
