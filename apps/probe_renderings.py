"""Renders the demo model's icons on grounds that it was not trained on, as images for eval/denoising_loss.py.

Usage:

    python apps/train_demo_model.py data --preset cpu --grow-from agentsd/demo_model --out runs/icons
    python apps/probe_renderings.py runs/icons/data runs/renderings --count 32
    python eval/denoising_loss.py --model demo --images runs/renderings --captions runs/renderings/captions.json

The objects are those of the training; ground colours and margins are new.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the images and captions.json; returns the exit status: 0, or 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("data", type=Path, help="folder `data` of apps/train_demo_model.py")
    parser.add_argument("out", type=Path, help="folder of the images")
    parser.add_argument("--count", type=int, default=32, help="number of images (default: 32)")
    options = parser.parse_args(arguments)
    if not (options.data / "index.json").is_file():
        print(f"probe_renderings: {options.data} has no index.json: run the stage data first", file=sys.stderr)
        return 2
    from demo_training.images import compose_image, ground_colour, open_icon
    from demo_training.run import write_json, write_png

    icons = json.loads((options.data / "index.json").read_text())
    options.out.mkdir(parents=True, exist_ok=True)
    captions = {}
    for number in range(options.count):
        icon = icons[number * len(icons) // options.count % len(icons)]
        # The training's seeds are 64-bit digests; its margin is 0.07.
        ground, margin = ground_colour(number), (0.05, 0.10)[number % 2]
        name = f"{number:04d}-{icon['name'].replace(' ', '_')}.png"
        write_png(options.out / name, compose_image(open_icon(options.data / icon["file"]), 512, margin, ground))
        captions[name] = f"A high quality photograph of a {icon['name']}."
    write_json(options.out / "captions.json", captions)
    return 0


if __name__ == "__main__":
    sys.exit(main())
