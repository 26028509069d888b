"""load_inputs: what is denoised: latents of images and their text, each with a key that its noise depends on."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from eval.images import _is_image, read_image
from eval.models import native_size
from eval.protocol import PROMPT, BenchError, imagenet_classes

from .judged import Judged
from .patterns import pattern_images

FEWEST = 2
"""A standard error needs two images."""

_BATCH = 8


@dataclass(frozen=True)
class Inputs:
    """Images as the network sees them.

    Attributes:
        keys: one for each image; its noise depends on the key, not on its place among the images.
        latents: [N, C, H, W], float32, on the CPU.
        text: [N, L, D], on the CPU.
    """

    keys: tuple[str, ...]
    latents: Tensor
    text: Tensor

    def __len__(self) -> int:
        return len(self.keys)

    def take(self, numbers: Sequence[int]) -> Inputs:
        """Some of the images, in this order."""
        index = list(numbers)
        return Inputs(tuple(self.keys[i] for i in index), self.latents[index], self.text[index])


def load_inputs(judged: Judged, images: Path | None, captions: Path | None, samples: int, seed: int) -> Inputs:
    """Patterns for the probe, otherwise image files through the model's own autoencoder.

    Args:
        images: folder of images; the first `samples` of an order that mixes the classes evenly are taken.
        captions: JSON object or CSV (file, caption) of captions by file name; None: the images lie in a folder per
            class, as ImageNet's or with the class's name, and the caption is "A high quality photograph of a CLASS."
        samples: number of images; all there are if there are fewer files.
        seed: of the patterns.

    Raises:
        BenchError: no images, an unreadable one, or captions that do not match the files.
    """
    if judged.is_probe:
        if images is not None:
            raise BenchError("--images: the probe takes patterns that it generates, leave --images out")
        config = judged.pipe.unet.config
        patterns = pattern_images(seed, range(samples), config.sample_size, judged.scale)
        text = torch.zeros(samples, 1, config.cross_attention_dim)
        return Inputs(tuple(f"pattern {number}" for number in range(samples)), patterns, text)
    if images is None:
        raise BenchError(f"--model {judged.name} needs --images DIR: images that it was not trained on")
    captioned = captioned_files(images, captions)[:samples]
    if len(captioned) < FEWEST:
        raise BenchError(f"--images {images}: has {len(captioned)} images, a standard error needs at least {FEWEST}")
    latents, text = [], []
    for start in range(0, len(captioned), _BATCH):
        batch = captioned[start : start + _BATCH]
        latents.append(_encode(judged, [images / name for name, _ in batch]))
        text.append(_embed(judged, [caption for _, caption in batch]))
    return Inputs(tuple(name for name, _ in captioned), torch.cat(latents), torch.cat(text))


def captioned_files(folder: Path, captions: Path | None) -> list[tuple[str, str]]:
    """(name relative to the folder, caption) of each image, in an order that takes one of each class in turn.

    Raises:
        BenchError: as load_inputs.
    """
    if not folder.is_dir():
        raise BenchError(f"--images {folder}: there is no such folder")
    files = sorted(path.relative_to(folder) for path in folder.rglob("*") if _is_image(path))
    if not files:
        raise BenchError(f"--images {folder}: has no images in it")
    if captions is not None:
        known = _read_captions(captions)
        names = [file.as_posix() for file in files]
        if missing := [name for name in names if name not in known]:
            raise BenchError(
                f"--captions {captions}: has no caption for {missing[0]} and {len(missing) - 1} other images: add them"
            )
        if extra := sorted(set(known) - set(names)):
            raise BenchError(f"--captions {captions}: names {extra[0]}, which is not in {folder}: remove it")
        return [(name, known[name]) for name in names]
    if flat := [file for file in files if len(file.parts) == 1]:
        raise BenchError(
            f"--images {folder}: {flat[0]} has no caption: put the images into one folder per class, or give --captions"
        )
    names = _class_names(folder)
    place: dict[str, int] = {}
    turns = []
    for file in files:
        own = file.parts[0]
        place[own] = place.get(own, -1) + 1
        # Among the files of a turn in no order of the alphabet: the first few classes of ImageNet are all fish.
        shuffle = hashlib.blake2b(file.as_posix().encode(), digest_size=8).digest()
        turns.append((place[own], shuffle, file.as_posix(), PROMPT.format(names[own])))
    return [(file, caption) for _, _, file, caption in sorted(turns)]


def _class_names(folder: Path) -> dict[str, str]:
    """Name of the class of each folder: its own, or for ImageNet's numbers the protocol's."""
    folders = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if not all(re.fullmatch(r"n\d{8}", name) for name in folders):
        return {name: name.replace("_", " ") for name in folders}
    classes = imagenet_classes()
    if len(folders) != len(classes):
        raise BenchError(
            f"--images {folder}: its {len(folders)} folders have ImageNet's numbers, whose names are known only where "
            f"all {len(classes)} are there: add the others, empty if need be, or give --captions"
        )
    return dict(zip(folders, classes))


def _read_captions(path: Path) -> dict[str, str]:
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix.lower() == ".json":
            found = json.loads(text)
        else:
            found = {row[0]: row[1] for row in csv.reader(text.splitlines()) if row}
        if isinstance(found, dict) and found and all(isinstance(value, str) for value in found.values()):
            return found
        why = "it holds no captions by file name"
    except (OSError, ValueError, IndexError) as error:
        why = str(error)
    raise BenchError(f"--captions {path}: must be a JSON object or a CSV of file and caption ({why})")


@torch.no_grad()
def _encode(judged: Judged, files: Sequence[Path]) -> Tensor:
    """Images cropped to squares of the model's own size -> the mean of their latents, scaled as in training."""
    size, vae = native_size(judged.pipe), judged.pipe.vae
    crops = [ImageOps.fit(read_image(file), (size, size), Image.Resampling.LANCZOS) for file in files]
    pixels = torch.from_numpy(np.stack([np.asarray(crop) for crop in crops])).permute(0, 3, 1, 2)
    encoded = vae.encode((pixels.float() / 127.5 - 1).to(vae.device, vae.dtype))
    # AutoencoderTiny, the demo model's, has no spread.
    mean = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    return (mean * vae.config.scaling_factor).float().cpu()


@torch.no_grad()
def _embed(judged: Judged, captions: Sequence[str]) -> Tensor:
    """[B, L, D] text embeddings, on the CPU."""
    embedded = judged.pipe.encode_prompt(list(captions), judged.device, 1, False)[0]
    return embedded.float().cpu()
