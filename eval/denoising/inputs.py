"""load_inputs: what is denoised: latents of images and their text, each with a key that its noise depends on."""

from __future__ import annotations

import csv
import hashlib
import json
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from agentsd.images.latents import scale_latents
from eval.common.models import native_size
from eval.common.protocol import PROMPT, BenchError, imagenet_classes
from eval.fid.images import _is_image, read_image

from .judged import Inputs, Judged
from .patterns import pattern_images

FEWEST = 2
"""A standard error needs two images."""

_BATCH = 8


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
    batches = []
    for start in range(0, len(captioned), _BATCH):
        names, words = zip(*captioned[start : start + _BATCH])
        pixels = _read_squares([images / name for name in names], native_size(judged.pipe))
        text, added = _embed(judged, words)
        batches.append(Inputs(names, _encode(judged, pixels), text, added, _masked(judged, pixels)))
    return Inputs(
        tuple(key for batch in batches for key in batch.keys),
        torch.cat([batch.latents for batch in batches]),
        torch.cat([batch.text for batch in batches]),
        {name: torch.cat([batch.added[name] for batch in batches]) for name in batches[0].added},
        torch.cat(masked) if (masked := [batch.beside for batch in batches if batch.beside is not None]) else None,
    )


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
        listed = [file.as_posix() for file in files]
        if missing := [name for name in listed if name not in known]:
            raise BenchError(
                f"--captions {captions}: has no caption for {missing[0]} and {len(missing) - 1} other images: add them"
            )
        if extra := sorted(set(known) - set(listed)):
            raise BenchError(f"--captions {captions}: names {extra[0]}, which is not in {folder}: remove it")
        return [(name, known[name]) for name in listed]
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


def _read_squares(files: Sequence[Path], size: int) -> Tensor:
    """Images cropped to centred squares: [B, 3, size, size], float32, −1 … 1."""
    crops = [ImageOps.fit(read_image(file), (size, size), Image.Resampling.LANCZOS) for file in files]
    pixels = torch.from_numpy(np.stack([np.asarray(crop) for crop in crops])).permute(0, 3, 1, 2)
    return pixels.float() / 127.5 - 1


@torch.no_grad()
def _encode(judged: Judged, pixels: Tensor) -> Tensor:
    """The mean of the latents, scaled as in training: [B, C, H, W], float32, on the CPU."""
    vae = judged.pipe.vae
    before = vae.dtype
    if before == torch.float16 and getattr(vae.config, "force_upcast", False):
        vae.to(torch.float32)  # SDXL's overflows in float16
    encoded = vae.encode(pixels.to(vae.device, vae.dtype))
    # AutoencoderTiny, the demo model's, has no spread.
    mean = encoded.latents if hasattr(encoded, "latents") else encoded.latent_dist.mode()
    vae.to(before)
    return scale_latents(vae, mean).float().cpu()


def _masked(judged: Judged, pixels: Tensor) -> Tensor | None:
    """What an inpainting UNet takes beside the latents: [B, 1 + C, H, W], the mask and the latents of the masked image.

    The mask is a centred square of half the side, the masked pixels are grey, as diffusers' pipelines have them.
    """
    if judged.pipe.unet.config.in_channels == judged.pipe.vae.config.latent_channels:
        return None
    size = pixels.shape[-1]
    mask = torch.zeros(len(pixels), 1, size, size)
    mask[..., size // 4 : size - size // 4, size // 4 : size - size // 4] = 1
    latents = _encode(judged, pixels * (1 - mask))
    return torch.cat([torch.nn.functional.interpolate(mask, latents.shape[-2:]), latents], dim=1)


@torch.no_grad()
def _embed(judged: Judged, captions: Sequence[str]) -> tuple[Tensor, dict[str, Tensor]]:
    """Text embeddings [B, L, D], and for SDXL pooled ones and the sizes of an image that is not cropped; on the CPU."""
    encoded = judged.pipe.encode_prompt(
        list(captions), device=judged.device, num_images_per_prompt=1, do_classifier_free_guidance=False
    )
    text = encoded[0].float().cpu()
    if judged.pipe.unet.config.addition_embed_type != "text_time":
        return text, {}
    size = native_size(judged.pipe)
    sizes = torch.tensor([[size, size, 0, 0, size, size]], dtype=torch.float32).expand(len(text), -1)
    return text, {"text_embeds": encoded[2].float().cpu(), "time_ids": sizes}
