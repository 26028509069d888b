"""Makes demo_reference.npz: names and EfficientNet-Lite0 features of the demo model's training pictures.

    python apps/train_demo_model.py data --out runs/demo
    python eval/make_demo_reference.py runs/demo/data

The pictures are the 121 clear names of Fluent Emoji (MIT, Microsoft), composed as for training: 256 px, on white. The
file holds float16 features, from which mean and covariance for any choice of names, and KID, follow.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from eval.metrics import load_features  # noqa: E402
from eval.protocol import DEMO_REFERENCE  # noqa: E402


def main() -> None:
    """Render, extract, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="what `train_demo_model.py data` wrote: data/fluent-emoji/*.png")
    parser.add_argument("--pictures", type=Path, help="also write the composed pictures to this folder")
    options = parser.parse_args()
    spec = importlib.util.spec_from_file_location("train_demo_model", ROOT / "apps" / "train_demo_model.py")
    recipe = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = recipe
    spec.loader.exec_module(recipe)

    names = sorted(recipe.CLEAR_NAMES)
    pictures = []
    for name in names:
        with Image.open(options.data / "fluent-emoji" / f"{name.replace(' ', '-')}.png") as icon:
            pictures.append(recipe.compose_picture(icon.convert("RGBA"), recipe.PRESETS["first"].image_size))
    if options.pictures:
        options.pictures.mkdir(parents=True, exist_ok=True)
        for name, picture in zip(names, pictures):
            picture.save(options.pictures / f"{name.replace(' ', '_')}.png")
    network = load_features("efficientnet-lite0")
    features = network.of_pictures(pictures)
    np.savez_compressed(
        DEMO_REFERENCE,
        names=np.array(names),
        features=features.astype(np.float16),
        network=np.array(network.name),
    )
    print(f"{DEMO_REFERENCE}: {len(names)} pictures, {features.shape[1]} features each")


if __name__ == "__main__":
    main()
