"""Renders one icon in several sizes and on several grounds, as the subject of a DreamBooth training.

Usage:

    python apps/render_subject.py parrot eval/dreambooth/subject                 # the images that are shipped
    python apps/render_subject.py "service dog" runs/subject --icons FILE.tgz    # another one, without npm

The icons are Fluent Emoji (MIT, Microsoft Corporation), fetched with npm unless their package is given. The demo model
knows 121 of them (`agentsd prompts`); take one that it does not know.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

SIDE = 256
LAYOUTS = (
    # margin, shift to the right and down (fractions of the side), colour of the ground
    (0.07, (0.0, 0.0), (255, 255, 255)),
    (0.11, (0.0, 0.0), (226, 238, 250)),
    (0.14, (0.02, 0.02), (248, 240, 222)),
    (0.09, (0.0, 0.0), (230, 244, 226)),
    (0.12, (-0.02, -0.01), (244, 228, 236)),
)
"""The images of a subject: its size, place and ground in each."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the images; returns the exit status: 0, or 2 for a mistake of the user's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("icon", help="its name, words separated by spaces")
    parser.add_argument("out", type=Path, help="folder of the images")
    parser.add_argument("--icons", type=Path, metavar="FILE", help="package file of Fluent Emoji; default: npm's")
    options = parser.parse_args(arguments)
    from demo_training.icons import PACKAGES, download_packages, icons_by_caption, rasterise, read_icon_set
    from demo_training.run import UsageError

    try:
        with tempfile.TemporaryDirectory() as folder:
            package = options.icons or next(path for path in download_packages(Path(folder)) if "fluent" in path.name)
            icons = icons_by_caption(read_icon_set(package))
        if options.icon not in icons:
            raise UsageError(f"{options.icon!r}: {PACKAGES['fluent-emoji']} has no icon of that name")
        icon = rasterise(icons[options.icon], 2 * SIDE)
    except UsageError as error:
        print(f"render_subject: {error}", file=sys.stderr)
        return 2
    from PIL import Image

    options.out.mkdir(parents=True, exist_ok=True)
    for number, (margin, (right, down), ground) in enumerate(LAYOUTS, 1):
        side = round(SIDE * (1 - 2 * margin))
        image = Image.new("RGBA", (SIDE, SIDE), (*ground, 255))
        place = round(SIDE * (margin + right)), round(SIDE * (margin + down))
        image.alpha_composite(icon.resize((side, side), Image.Resampling.LANCZOS), place)
        image.convert("RGB").save(options.out / f"{number}.webp", lossless=True, method=6)
    return 0


if __name__ == "__main__":
    sys.exit(main())
