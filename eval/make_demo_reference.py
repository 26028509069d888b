"""Makes demo_reference.npz: names and EfficientNet-Lite0 features of the demo model's training pictures.

    python apps/train_demo_model.py data --out runs/first
    python eval/make_demo_reference.py runs/first

The pictures are those the model was trained on: icons of Fluent Emoji (MIT, Microsoft) on white, or, where its preset
composes them, the first --per-name canvases of each. The file holds float16 features, from which mean and covariance
for any choice of names, and KID, follow. For a model of another preset:

    python eval/make_demo_reference.py runs/cpu --preset cpu --grow-from agentsd/demo_model --out reference.npz
    python eval/demo_gate.py --model runs/cpu/model --reference reference.npz
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
    """Compose, extract, save."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="the --out of train_demo_model.py, whose data stage is done")
    parser.add_argument("--preset", default="first", help="it was trained with (default: %(default)s)")
    parser.add_argument("--grow-from", type=Path, help="the model it was grown from, as it was given to that script")
    parser.add_argument("--per-name", type=int, default=6, help="canvases of each name (default: %(default)s)")
    parser.add_argument("--pictures", type=Path, help="also write the composed pictures to this folder")
    parser.add_argument("--out", type=Path, default=DEMO_REFERENCE, help="default: %(default)s")
    options = parser.parse_args()
    recipe = load_recipe()
    arguments = ["data", "--preset", options.preset, "--out", str(options.run)]
    if options.grow_from:
        arguments += ["--grow-from", str(options.grow_from)]
    try:
        run = recipe.make_run(recipe.parse_arguments(arguments))
        index = recipe.load_index(run)
    except recipe.UsageError as error:
        parser.error(str(error))
    icons = [icon for icon in index if icon.style == "fluent-emoji" and icon.name in recipe.CLEAR_NAMES]
    if run.preset.canvases:
        canvases = recipe.CanvasSet(run, icons, "pool")
        numbers = range(options.per_name * len(icons))
        pictures = [Image.fromarray(canvases.pixels([i])[0].permute(1, 2, 0).numpy()) for i in numbers]
        names = [icons[i % len(icons)].name for i in numbers]
    else:
        pictures, names = [], [icon.name for icon in icons]
        for icon in icons:
            with Image.open(run.out / "data" / icon.file) as image:
                pictures.append(recipe.compose_picture(image.convert("RGBA"), run.preset.image_size))
    if options.pictures:
        options.pictures.mkdir(parents=True, exist_ok=True)
        for number, (name, picture) in enumerate(zip(names, pictures)):
            picture.save(options.pictures / f"{name.replace(' ', '_')}_{number // len(icons)}.png")
    network = load_features("efficientnet-lite0")
    features = network.of_pictures(pictures)
    np.savez_compressed(
        options.out,
        names=np.array(names),
        features=features.astype(np.float16),
        network=np.array(network.name),
    )
    print(f"{options.out}: {len(names)} pictures of {len(set(names))} names, {features.shape[1]} features each")


def load_recipe():
    """apps/train_demo_model.py as a module."""
    path = ROOT / "apps" / "train_demo_model.py"
    spec = importlib.util.spec_from_file_location("train_demo_model", path)
    recipe = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = recipe
    sys.path.insert(1, str(path.parent))
    spec.loader.exec_module(recipe)
    return recipe


if __name__ == "__main__":
    main()
