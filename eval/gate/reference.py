"""run: make demo_reference.npz: names and EfficientNet-Lite0 features of the demo model's training images.

The images are those the model was trained on: the first canvases of each icon of Fluent Emoji (MIT, Microsoft), or,
with preset first, the icon on white. The file holds float16 features, from which mean and covariance for any choice of
names, and KID, follow.
"""

from __future__ import annotations

import argparse
from typing import BinaryIO

import numpy as np
from demo_training.icons import load_index
from demo_training.images import training_images
from demo_training.presets import CLEAR_NAMES
from demo_training.run import UsageError
from PIL import Image
from train_demo_model import make_run, parse_arguments

from agentsd.files import write_atomically
from eval.common.protocol import BenchError
from eval.fid.features import load_features


def run(options: argparse.Namespace) -> None:
    """Compose, extract, save.

    Raises:
        BenchError: the run's data stage is not done, or its settings were others.
    """
    if options.out.exists() and not options.overwrite:
        raise BenchError(f"--out {options.out}: is there already: give another name, or --overwrite to replace it")
    arguments = ["data", "--preset", options.preset, "--out", str(options.run)]
    if options.grow_from:
        arguments += ["--grow-from", str(options.grow_from)]
    try:
        run = make_run(parse_arguments(arguments))
        index = load_index(run)
    except UsageError as error:
        raise BenchError(str(error)) from None
    icons = [icon for icon in index if icon.style == "fluent-emoji" and icon.name in CLEAR_NAMES]
    pixels = training_images(run, icons)[: options.per_name * len(icons)]
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in pixels]
    names = [icons[i % len(icons)].name for i in range(len(images))]
    if options.images:
        options.images.mkdir(parents=True, exist_ok=True)
        for number, (name, image) in enumerate(zip(names, images)):
            image.save(options.images / f"{name.replace(' ', '_')}_{number // len(icons)}.png")
    network = load_features("efficientnet-lite0")
    features = network.of_images(images)

    def write(file: BinaryIO) -> None:
        np.savez_compressed(
            file,
            names=np.array(names),
            features=features.astype(np.float16),
            network=np.array(network.name),
        )

    write_atomically(options.out, write)
    print(f"{options.out}: {len(names)} images of {len(set(names))} names, {features.shape[1]} features each")
