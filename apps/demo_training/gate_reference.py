"""Make eval/demo_reference.npz: names and EfficientNet-Lite0 features of the demo model's training images.

    python apps/train_demo_model.py data --preset cpu --grow-from runs/first/model --out runs/cpu
    python apps/demo_training/gate_reference.py runs/cpu --grow-from runs/first/model

The images are those the model was trained on: the first --per-name canvases of each icon of Fluent Emoji (MIT,
Microsoft), or, with preset first, the icon on white. The file holds float16 features, from which mean and covariance
for any choice of names, and KID, follow. For a model of another preset:

    python apps/demo_training/gate_reference.py runs/first --preset first --out reference.npz
    python apps/demo_gate.py --model runs/first/model --reference reference.npz
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
sys.path[0] = str(ROOT)
sys.path.insert(1, str(ROOT / "apps"))

from train_demo_model import make_run, parse_arguments  # noqa: E402

from demo_training.icons import load_index  # noqa: E402
from demo_training.images import training_images  # noqa: E402
from demo_training.presets import CLEAR_NAMES  # noqa: E402
from demo_training.run import UsageError  # noqa: E402
from eval.features import load_features  # noqa: E402
from eval.protocol import DEMO_REFERENCE  # noqa: E402


def main() -> None:
    """Compose, extract, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the --out of train_demo_model.py, whose data stage is done")
    parser.add_argument("--preset", default="cpu", help="it was trained with (default: %(default)s)")
    parser.add_argument("--grow-from", type=Path, help="the model it was grown from, as it was given to that script")
    parser.add_argument("--per-name", type=int, default=3, help="canvases of each name (default: %(default)s)")
    parser.add_argument("--pictures", type=Path, help="also write the composed images to this folder")
    parser.add_argument("--out", type=Path, default=DEMO_REFERENCE, help="default: %(default)s")
    options = parser.parse_args()
    arguments = ["data", "--preset", options.preset, "--out", str(options.run)]
    if options.grow_from:
        arguments += ["--grow-from", str(options.grow_from)]
    try:
        run = make_run(parse_arguments(arguments))
        index = load_index(run)
    except UsageError as error:
        parser.error(str(error))
    icons = [icon for icon in index if icon.style == "fluent-emoji" and icon.name in CLEAR_NAMES]
    pixels = training_images(run, icons)[: options.per_name * len(icons)]
    pictures = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    names = [icons[i % len(icons)].name for i in range(len(pictures))]
    if options.pictures:
        options.pictures.mkdir(parents=True, exist_ok=True)
        for number, (name, picture) in enumerate(zip(names, pictures)):
            picture.save(options.pictures / f"{name.replace(' ', '_')}_{number // len(icons)}.png")
    network = load_features("efficientnet-lite0")
    features = network.of_images(pictures)
    np.savez_compressed(
        options.out,
        names=np.array(names),
        features=features.astype(np.float16),
        network=np.array(network.name),
    )
    print(f"{options.out}: {len(names)} images of {len(set(names))} names, {features.shape[1]} features each")


if __name__ == "__main__":
    main()
