"""Trains a small text-to-image model in Stable Diffusion's format from two emoji icon sets, on a CPU or a GPU.

Usage:

    pip install -e ".[train]"
    python apps/train_demo_model.py --out runs/first             # all five stages
    python apps/train_demo_model.py --preset cpu --grow-from agentsd/demo_model --out runs/cpu
    python apps/train_demo_model.py --preset full --device cuda --compile --out runs/full
    python apps/train_demo_model.py --smoke --out runs/smoke     # the same in a minute: tiny model, drawings of its own

    python apps/train_demo_model.py data        --out runs/first [--icons fluent.tgz noto.tgz]
    python apps/train_demo_model.py autoencoder --out runs/first [--device cuda]
    python apps/train_demo_model.py unet        --out runs/first [--device cuda] [--compile]
    python apps/train_demo_model.py export      --out runs/first
    python apps/train_demo_model.py samples     --out runs/first [--count 24]

| stage | reads | writes |
|---|---|---|
| data | npm packages @iconify-json/fluent-emoji and @iconify-json/noto, or --icons | data/*/*.png, data/index.json |
| autoencoder | data | autoencoder/weights.safetensors, autoencoder/grids |
| unet (and its text encoder) | data, autoencoder | pool/*.safetensors, unet/weights.safetensors, unet/grids |
| export | autoencoder, unet | model/: loads with StableDiffusionPipeline.from_pretrained |
| samples | model | samples.png, a contact sheet |

| preset | pictures | latents | made for |
|---|---|---|---|
| first | 121 icons centred on white, 256 px | 32 × 32 | 2 CPU cores, 1 hour |
| cpu | the same, large on plain and patterned grounds, 512 px | 64 × 64, grown from first | 2 CPU cores, 2½ hours |
| full | all icons, alone, in groups and as patterns, 512 px | 64 × 64 | one GPU, 25 minutes |
| smoke, smoke-grown | four drawings, 64 px | 8 × 8, toys in the formats of first and cpu | tests |

In the models of cpu and full the full-resolution self-attention is the only self-attention there is. In the last
phase its queries and keys are set to find the tokens that look alike, and fixed: left to be trained they spread over
all tokens. The models that came of it do not pass eval/demo_gate.py yet: see eval/results/demo-training.md.

A stage that is finished is skipped; one that was stopped, even by kill -9, goes on from its last checkpoint when the
same command is given again. Every random draw is a function of (seed, stage, step), so on the same CPU an interrupted
run ends with the weights of an undisturbed one. A folder made with other settings is refused.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm import tqdm

# Its neighbours must be found also where this file is loaded by its path, from the tests for one.
if str(Path(__file__).resolve().parent) not in sys.path:
    sys.path.append(str(Path(__file__).resolve().parent))

from demo_training.canvases import Canvas, CanvasRecipe, captions_of, draw_canvas, plan_canvas  # noqa: E402
from demo_training.growing import grow  # noqa: E402
from demo_training.key_subset import SubsetAttnProcessor, one_per_cell  # noqa: E402
from demo_training.sharpening import keep_sharp, sharpen  # noqa: E402

# diffusers and transformers take seconds to import: the functions that build their models import them.

STAGES = ("data", "autoencoder", "unet", "export", "samples")
PACKAGES = {"fluent-emoji": "@iconify-json/fluent-emoji@1.2.7", "noto": "@iconify-json/noto@1.2.9"}
"""Icon set (the `prefix` inside icons.json) to the npm package that holds it."""

CAPTIONS = (("a {}", 0.3), ("a high quality photograph of a {}.", 0.4), ("{}", 0.2), ("", 0.1))
"""Caption templates with their probabilities; the empty one is what classifier-free guidance compares with."""

EXTRA_WORDS = ("a", "an", "emoji", "high", "of", "photo", "photograph", "picture", "quality", "the")
"""Words of the tokenizer beside the names."""

CANVAS_WORDS = ("and", "pattern", "flat", "3d", "style")
"""Words that the captions of composed canvases add to them."""

SHARD = 128
"""Canvases in one file of the pool: what an interruption costs at most."""

CLEAR_NAMES = tuple(
    name.strip()
    for name in """
    abacus, accordion, alarm clock, ambulance, ant, baby bottle, backpack, bagel, balloon, banana, banjo, baseball,
    basketball, bear, beaver, beer mug, beetle, bell pepper, bird, bison, broccoli, broom, bucket, burrito, bus,
    butterfly, camel, camera, candle, canoe, castle, cat, chair, chicken, church, cocktail glass, computer mouse, crab,
    crocodile, cucumber, dog, door, drum, eagle, elephant, ferris wheel, fish, flamingo, flute, fox, frog, goose,
    gorilla, green apple, guitar, hammer, hippopotamus, hot dog, ice cream, jellyfish, koala, lady beetle, laptop,
    lemon, leopard, lion, lipstick, lobster, microphone, military helmet, mosque, mouse, mushroom, owl, panda,
    parachute, peacock, penguin, pig, pineapple, pizza, polar bear, poodle, pretzel, purse, rabbit, ram, running shoe,
    scorpion, shark, shield, ship, sloth, snail, snake, soccer ball, socks, speedboat, spider, stopwatch, strawberry,
    sunglasses, swan, teapot, teddy bear, telephone, television, tent, tiger, top hat, tractor, tropical fish, turtle,
    umbrella, violin, volcano, watch, whale, wine glass, wolf, zebra
    """.split(",")
)
"""The 121 names of the second UNet phase: icons that show an ImageNet class clearly, in a shape of their own."""

OTHER_NAMES = tuple(
    name.strip()
    for name in """
    badger, balance scale, barber pole, bathtub, bell, bikini, boar, bullet train, carpentry saw, circus tent, coat,
    cockroach, compass, cricket, delivery truck, desktop computer, envelope, fire engine, fly, fountain, fountain pen,
    hamster, hiking boot, hot pepper, jeans, joystick, keyboard, kick scooter, kimono, lizard, llama, locomotive,
    minibus, motor scooter, orangutan, otter, ox, paintbrush, pick, pickup truck, police car, printer, racing car,
    radio, rice ball, safety pin, screwdriver, shopping cart, skunk, spider web, stethoscope, syringe, telescope,
    train, trolleybus, volleyball, water buffalo
    """.split(",")
)
"""57 more names of ImageNet classes, less clear as icons: for the autoencoder and the first UNet phase only."""


class UsageError(ValueError):
    """Something the user can put right; its text is the one sentence that the command line prints."""


# --------------------------------------------------------------------------------------------------------- presets


@dataclass(frozen=True)
class UnetPhase:
    """One stretch of UNet training with a learning-rate schedule of its own.

    Attributes:
        steps: optimiser steps.
        names: captions whose pictures it sees; None for every icon of the sets.
        styles: icon sets it sees; None for all that the data stage was given.
        key_stride: the full-resolution self-attention sees one random key of each key_stride × key_stride cell, which
            makes a step cheaper; None for all keys.
        lr: peak learning rate, where it is not the preset's.
        sharpen: the phase begins with self-attention at full resolution set to average tokens that look alike, the
            median query over this share of the keys; queries and keys then stay so.
        first_canvases: sees the first so many of the pool; None for all of them.
    """

    steps: int
    names: tuple[str, ...] | None
    styles: tuple[str, ...] | None
    key_stride: int | None = None
    lr: float | None = None
    sharpen: float | None = None
    first_canvases: int | None = None


@dataclass(frozen=True)
class Preset:
    """Sizes and schedules of one model. A larger one is a further entry of PRESETS.

    Attributes:
        icon_size: pixels per side at which an icon is rasterised.
        image_size: pixels per side of the model's pictures; its latents have an eighth of that.
        autoencoder_*: see diffusers' AutoencoderTiny; crop in pixels.
        unet_channels, unet_heads: one entry per level, highest resolution first.
        phases: the UNet's training; the pictures of the first are the autoencoder's too.
        grid_steps: optimiser steps between two grids of samples.
        checkpoint_seconds: least time between two checkpoints.
        sample_steps, guidance: of the sample grids and the contact sheet.
        canvases: how pictures are composed; None for one icon centred on white. All phases see the same canvases.
        pool: how many canvases the UNet is trained on.
        autoencoder_canvases: how many others the autoencoder is trained on, or judged by.
        grows: from a model given with --grow-from, whose autoencoder, text encoder and tokenizer are taken over and
            whose UNet the new one grows out of.
        unet_attends_at_top_only: self-attention at full resolution and nowhere else; the lower levels attend to the
            text twice. Stable Diffusion's kind of middle block always has self-attention, so it is a plain one here.
        grid_samples: pictures in a grid of samples (default 8).
    """

    icon_size: int
    image_size: int

    autoencoder_channels: int
    autoencoder_encoder_blocks: tuple[int, ...]
    autoencoder_decoder_blocks: tuple[int, ...]
    autoencoder_crop: int
    autoencoder_batch: int
    autoencoder_steps: int
    autoencoder_lr: float
    latent_noise: float

    text_width: int
    text_layers: int
    text_heads: int
    text_hidden: int
    unet_channels: tuple[int, ...]
    unet_heads: tuple[int, ...]
    unet_groups: int
    unet_batch: int
    unet_lr: float
    ema_decay: float
    phases: tuple[UnetPhase, ...]

    warmup_steps: int
    precision: str
    grid_steps: int
    checkpoint_seconds: float
    sample_steps: int
    guidance: float

    canvases: CanvasRecipe | None = None
    pool: int | None = None
    autoencoder_canvases: int | None = None
    grows: bool | None = None
    unet_attends_at_top_only: bool | None = None
    grid_samples: int | None = None


SHARPENING_PICTURES = 8

SMOKE_NAMES = ("basketball", "door", "lemon", "tent")

PRESETS = {
    "first": Preset(
        icon_size=512,
        image_size=256,
        autoencoder_channels=48,
        autoencoder_encoder_blocks=(0, 1, 2, 3),
        autoencoder_decoder_blocks=(3, 3, 2, 0),
        autoencoder_crop=128,
        autoencoder_batch=8,
        autoencoder_steps=2200,
        autoencoder_lr=1e-3,
        latent_noise=0.08,
        text_width=128,
        text_layers=2,
        text_heads=4,
        text_hidden=384,
        unet_channels=(48, 96, 192),
        unet_heads=(1, 2, 4),
        unet_groups=16,
        unet_batch=16,
        unet_lr=5e-4,
        ema_decay=0.998,
        phases=(
            UnetPhase(steps=1600, names=CLEAR_NAMES + OTHER_NAMES, styles=("fluent-emoji", "noto")),
            # Fewer pictures seen more often: this is where blobs become objects.
            UnetPhase(steps=2538, names=CLEAR_NAMES, styles=("fluent-emoji",)),
        ),
        warmup_steps=50,
        precision="bf16",
        grid_steps=400,
        checkpoint_seconds=60,
        sample_steps=25,
        guidance=5.0,
    ),
    "smoke": Preset(
        icon_size=64,
        image_size=64,
        autoencoder_channels=16,
        autoencoder_encoder_blocks=(0, 1, 1, 1),
        autoencoder_decoder_blocks=(1, 1, 1, 0),
        autoencoder_crop=32,
        autoencoder_batch=4,
        autoencoder_steps=40,
        autoencoder_lr=2e-3,
        latent_noise=0.08,
        text_width=32,
        text_layers=1,
        text_heads=2,
        text_hidden=64,
        unet_channels=(16, 32),
        unet_heads=(1, 2),
        unet_groups=8,
        unet_batch=4,
        unet_lr=2e-3,
        ema_decay=0.9,
        phases=(UnetPhase(20, SMOKE_NAMES, None), UnetPhase(40, SMOKE_NAMES[:3], None)),
        warmup_steps=4,
        precision="bf16",
        grid_steps=30,
        checkpoint_seconds=1,
        sample_steps=4,
        guidance=2.0,
    ),
}
PRESETS["cpu"] = replace(
    PRESETS["first"],
    image_size=512,
    autoencoder_steps=0,  # the first model's is good enough
    unet_channels=(48, 48, 96, 192),
    unet_heads=(1, 1, 2, 4),
    unet_batch=8,
    phases=(
        UnetPhase(steps=1800, names=CLEAR_NAMES, styles=("fluent-emoji",), key_stride=2),
        UnetPhase(steps=200, names=CLEAR_NAMES, styles=("fluent-emoji",), lr=1e-4),
        # Fewer canvases seen more often: as before, this is where blobs become objects.
        UnetPhase(
            steps=2100,
            names=CLEAR_NAMES,
            styles=("fluent-emoji",),
            key_stride=2,
            sharpen=1 / 32,
            first_canvases=121 * 2,
        ),
    ),
    ema_decay=0.996,
    grid_steps=300,
    sample_steps=15,
    canvases=CanvasRecipe(size=(0.82, 0.90), jitter=0.045),
    pool=121 * 12,
    autoencoder_canvases=64,
    grows=True,
    unet_attends_at_top_only=True,
    grid_samples=4,
)
PRESETS["full"] = replace(
    PRESETS["first"],
    image_size=512,
    autoencoder_crop=256,
    autoencoder_batch=16,
    autoencoder_steps=8000,
    text_hidden=512,
    unet_channels=(64, 96, 160, 192),
    unet_heads=(2, 3, 4, 4),
    unet_batch=64,
    phases=(
        UnetPhase(steps=2_000, names=None, styles=("fluent-emoji", "noto")),
        UnetPhase(steps=12_000, names=None, styles=("fluent-emoji", "noto"), sharpen=1 / 32),
    ),
    ema_decay=0.9995,
    warmup_steps=200,
    grid_steps=2000,
    canvases=CanvasRecipe(
        size=(0.35, 0.85),
        jitter=None,
        rotation=20.0,
        groups=0.25,
        repeats=0.15,
        cells=5,
        held_out=0.2,
        style_words=(("fluent-emoji", "3d"), ("noto", "flat")),
    ),
    pool=40_000,
    autoencoder_canvases=2000,
    unet_attends_at_top_only=True,
    grid_samples=16,
)
PRESETS["smoke-grown"] = replace(
    PRESETS["smoke"],
    autoencoder_steps=0,
    unet_channels=(16, 16, 32),
    unet_heads=(1, 1, 2),
    phases=(UnetPhase(12, SMOKE_NAMES, None, key_stride=2), UnetPhase(6, SMOKE_NAMES, None, lr=1e-4, sharpen=1 / 4)),
    grid_steps=12,
    canvases=CanvasRecipe(size=(0.4, 0.9), jitter=None, rotation=20.0, groups=0.3, repeats=0.2, cells=3, held_out=0.2),
    pool=SHARD + 8,
    autoencoder_canvases=8,
    grows=True,
    unet_attends_at_top_only=True,
    grid_samples=2,
)


@dataclass(frozen=True)
class Run:
    """What one invocation works with: the preset, the seed, and where; not what has been done so far."""

    out: Path
    preset_name: str
    preset: Preset
    seed: int
    precision: str
    device: torch.device
    compile: bool
    icons: tuple[Path, ...]
    grow_from: Path | None
    count: int
    checkpoint_seconds: float

    def generator(self, *key: object) -> torch.Generator:
        """A CPU generator that depends on the seed and `key` alone: a resumed run draws what it would have drawn."""
        digest = hashlib.blake2b(repr((self.seed, *key)).encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)

    def autocast(self) -> contextlib.AbstractContextManager:
        """bfloat16 autocast, or nothing with precision fp32."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


# ----------------------------------------------------------------------------------------------------------- files


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a path to write to, which takes `path`'s place at the end: a reader never sees half a file."""
    part = path.with_name(path.name + ".part")
    yield part
    with part.open("rb+") as file:
        os.fsync(file.fileno())
    part.replace(path)


def write_json(path: Path, value: object) -> None:
    """Writes `value` as JSON, whole or not at all."""
    with replacing(path) as part:
        part.write_text(json.dumps(value, indent=1) + "\n")


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def claim_folder(folder: Path, settings: dict) -> None:
    """Makes `folder` for work with `settings`, or checks that the work in it was done with the same.

    Raises:
        UsageError: the folder was made with other settings.
    """
    settings = json.loads(json.dumps(settings))  # tuples become lists, as they will when read back
    path = folder / "settings.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
        return
    found = json.loads(path.read_text())
    for key in [*settings, *(key for key in found if key not in settings)]:
        if found.get(key) != settings.get(key):
            raise UsageError(
                f"{folder} was made with another {key} ({brief(found.get(key))}, not {brief(settings.get(key))}): "
                "give the settings it was made with, or another --out"
            )


def brief(value: object) -> str:
    """`value` as text short enough for an error message."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


# ------------------------------------------------------------------------------------------------------ stage: data


@dataclass(frozen=True)
class Picture:
    """One row of data/index.json: an icon that was rasterised."""

    name: str
    style: str
    file: str
    sha256: str


def icons_by_caption(icon_set: dict) -> dict[str, str]:
    """Caption ("hot dog") to SVG text for every icon of an Iconify set, without hidden icons and skin-tone variants.

    Args:
        icon_set: a parsed icons.json (the IconifyJSON format: prefix, icons, width, height).
    """
    tone = re.compile(r"(-(light|medium|dark))+$")
    icons = icon_set["icons"]
    found = {}
    for key, icon in icons.items():
        # Noto spells a variant astronaut-dark-skin-tone, Fluent astronaut-dark; horizontal-traffic-light is none.
        if icon.get("hidden") or "skin-tone" in key or (tone.search(key) and tone.sub("", key) in icons):
            continue
        left, top, width, height = (
            icon.get(side, icon_set.get(side, default))
            for side, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
        )
        found[key.replace("-", " ")] = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
        )
    return found


def read_icon_set(path: Path) -> dict:
    """Reads an icons.json, alone or inside an npm package file (.tgz).

    Raises:
        UsageError: there is no such file, or it is not an Iconify set.
    """
    try:
        if path.suffix == ".json":
            icon_set = json.loads(path.read_bytes())
        else:
            with tarfile.open(path) as archive:
                icon_set = json.load(archive.extractfile("package/icons.json"))
        icon_set["prefix"], icon_set["icons"].items()
    except OSError as error:
        raise UsageError(f"--icons {path} cannot be read ({error.strerror or error})") from None
    except (tarfile.TarError, KeyError, TypeError, AttributeError, ValueError):
        raise UsageError(
            f"--icons {path} is neither an npm package with package/icons.json nor an icons.json in Iconify format"
        ) from None
    return icon_set


def download_packages(folder: Path) -> list[Path]:
    """Fetches PACKAGES with `npm pack` into `folder`; returns the package files.

    Raises:
        UsageError: npm is not there, or it failed.
    """
    npm = shutil.which("npm")
    names = " and ".join(PACKAGES.values())
    if npm is None:
        raise UsageError(f"npm is not installed: install it, or give the package files of {names} with --icons")
    folder.mkdir(parents=True, exist_ok=True)
    command = [npm, "pack", "--silent", "--pack-destination", str(folder.resolve()), *PACKAGES.values()]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise UsageError(f"npm pack failed ({reason}): give the package files of {names} with --icons")
    return [folder / line for line in done.stdout.split() if line.endswith(".tgz")]


def rasterise(svg: str, size: int) -> Image.Image:
    """An SVG as an RGBA picture of size × size pixels: scaled to fit, centred, on a transparent ground."""
    try:
        import resvg_py
    except ImportError:
        raise UsageError("resvg-py is not installed: pip install resvg-py") from None

    # The root element's own size keeps the aspect ratio of the few icons that are not square.
    svg = svg.replace("<svg ", f'<svg width="{size}" height="{size}" ', 1)
    drawn = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(drawn))).convert("RGBA")


def draw_stand_in(name: str, size: int) -> Image.Image:
    """A drawing of one of SMOKE_NAMES for runs without icons: RGBA, size × size pixels."""
    icon = Image.new("RGBA", (size, size))
    pen = ImageDraw.Draw(icon)
    end = size - 1
    if name == "basketball":
        pen.ellipse((0, 0, end, end), fill="#f08020")
        pen.line((0, end / 2, end, end / 2), fill="#402010", width=max(1, size // 16))
    elif name == "door":
        pen.rectangle((end * 0.25, 0, end * 0.75, end), fill="#80502a")
    elif name == "lemon":
        pen.ellipse((0, end * 0.2, end, end * 0.8), fill="#f8e030")
    else:
        pen.polygon([(0, end), (end / 2, 0), (end, end)], fill="#3070d0")
    return icon


def compose_picture(icon: Image.Image, size: int) -> Image.Image:
    """The training picture of an icon: RGB, size × size pixels.

    The one place that decides where an icon stands and on what: centred, on white, with a margin of 4 %.
    """
    margin = round(size * 0.04)
    picture = Image.new("RGBA", (size, size), "white")
    picture.alpha_composite(icon.resize((size - 2 * margin,) * 2, Image.Resampling.LANCZOS), (margin, margin))
    return picture.convert("RGB")


def wanted_pictures(preset: Preset, sources: Mapping[str, Iterable[str]]) -> list[tuple[str, str]]:
    """(name, style) of every picture that some phase of the preset sees, in a fixed order.

    Args:
        sources: the names that each style has.
    """
    seen = {
        (name, style)
        for phase in preset.phases
        for style in (phase.styles or sources)
        for name in (sources[style] if phase.names is None else phase.names)
    }
    return sorted(seen, key=lambda pair: (pair[1], pair[0]))


def needed_styles(preset: Preset) -> set[str]:
    """The icon sets that the preset names; none for one that takes what it is given."""
    return {style for phase in preset.phases for style in phase.styles or ()}


def icon_files(run: Run) -> list[Path]:
    """The files of the icon sets: those given, else npm's where the preset needs any.

    Raises:
        UsageError: the packages cannot be had.
    """
    if run.icons or not needed_styles(run.preset):
        return list(run.icons)
    return download_packages(run.out / "packages")


def icon_sources(run: Run, files: Sequence[Path]) -> dict[str, dict[str, Callable[[], Image.Image]]]:
    """Style and name to a function that draws it as RGBA picture; without files, the stand-ins.

    Raises:
        UsageError: an icon set or a name that the preset needs is missing.
    """
    if not files:
        return {"drawn": {name: functools.partial(draw_stand_in, name, run.preset.icon_size) for name in SMOKE_NAMES}}

    icon_sets = {}
    for path in files:
        icon_set = read_icon_set(path)
        icon_sets[icon_set["prefix"]] = icons_by_caption(icon_set)
    if missing := sorted(needed_styles(run.preset) - icon_sets.keys()):
        raise UsageError(
            f"--icons gives {', '.join(sorted(icon_sets))}, but preset {run.preset_name} also needs "
            f"{' and '.join(PACKAGES[style] for style in missing)}"
        )
    for name, style in wanted_pictures(run.preset, icon_sets):
        if name not in icon_sets[style]:
            raise UsageError(
                f"the icon set {style} has no icon named {name!r}: use {PACKAGES.get(style, 'another set')}"
            )
    return {
        style: {name: functools.partial(rasterise, svg, run.preset.icon_size) for name, svg in icon_sets[style].items()}
        for style in sorted(icon_sets)
    }


def data_stage(run: Run) -> None:
    """Rasterises the icons: data/<style>/<name>.png (RGBA) and, when all are there, data/index.json."""
    folder = run.out / "data"
    index = folder / "index.json"
    settings = {
        "icon_size": run.preset.icon_size,
        "phases": [[phase.names, phase.styles] for phase in run.preset.phases],
    }
    if index.exists() and not run.icons:
        claim_folder(folder, settings | {"icons": json.loads((folder / "settings.json").read_text())["icons"]})
        return announce("data", "already done")
    files = icon_files(run)
    # By content, so that the same package may lie elsewhere the next time.
    claim_folder(folder, settings | {"icons": sorted(file_digest(path) for path in files)})
    if index.exists():
        return announce("data", "already done")

    sources = icon_sources(run, files)
    pictures = []
    for name, style in tqdm(wanted_pictures(run.preset, sources), desc="data", unit="icon"):
        path = folder / style / f"{name.replace(' ', '-')}.png"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            with replacing(path) as part:
                sources[style][name]().save(part, format="png")
        pictures.append(Picture(name, style, str(path.relative_to(folder)), file_digest(path)))
    write_json(index, [asdict(picture) for picture in pictures])
    announce("data", f"{len(pictures)} pictures of {len({p.name for p in pictures})} names in {folder}")


def load_index(run: Run) -> list[Picture]:
    """The icons that the data stage rasterised.

    Raises:
        UsageError: the data stage has not been finished, or a file was changed since.
    """
    folder = run.out / "data"
    index = require(run, folder / "index.json", "data")
    pictures = [Picture(**row) for row in json.loads(index.read_text())]
    for picture in pictures:
        path = folder / picture.file
        if not path.is_file() or file_digest(path) != picture.sha256:
            raise UsageError(f"{path} is missing or was changed: delete {folder} and run the stage data again")
    return pictures


def as_pixels(pictures: Iterable[Image.Image]) -> Tensor:
    """RGB pictures of one size as uint8 [P, 3, H, W]."""
    return torch.from_numpy(np.stack([np.asarray(p) for p in pictures])).permute(0, 3, 1, 2).contiguous()


def open_icon(path: Path) -> Image.Image:
    """A rasterised icon, RGBA."""
    with Image.open(path) as icon:
        return icon.convert("RGBA")


def load_pictures(run: Run, pictures: Sequence[Picture]) -> Tensor:
    """Each icon alone, centred on white: [P, 3, image_size, image_size], uint8 RGB."""
    size = run.preset.image_size
    return as_pixels(compose_picture(open_icon(run.out / "data" / picture.file), size) for picture in pictures)


@dataclass(frozen=True)
class CanvasSet:
    """Numbered canvases, each planned and drawn when asked for; `purpose` keeps two sets of one seed apart."""

    run: Run
    pictures: Sequence[Picture]
    purpose: str

    @functools.cached_property
    def files(self) -> dict[tuple[str, str], Path]:
        """(name, style) to file."""
        return {(picture.name, picture.style): self.run.out / "data" / picture.file for picture in self.pictures}

    def plan(self, number: int) -> Canvas:
        """Canvas `number`; the icons take turns as its subject."""
        seed = self.run.generator("canvas", self.purpose, number).initial_seed()
        main, size = number % len(self.pictures), self.run.preset.image_size
        return plan_canvas(self.run.preset.canvases, list(self.files), main, size, seed)

    def pixels(self, numbers: Iterable[int]) -> Tensor:
        """The canvases as uint8 [P, 3, H, W], drawn on all cores."""

        def draw(number: int) -> Image.Image:
            return draw_canvas(self.plan(number), lambda *icon: open_icon(self.files[icon]), self.run.preset.image_size)

        with ThreadPoolExecutor(os.cpu_count()) as threads:
            return as_pixels(threads.map(draw, numbers))


def encode_pool(run: Run, vae: nn.Module, pictures: Sequence[Picture], origin: dict) -> Tensor:
    """The scaled latents of the preset's canvases, float16 [pool, 4, h, w], from pool/ where they are there already.

    Args:
        origin: digests of data and autoencoder, which pool/ is bound to.
    """
    preset, folder = run.preset, run.out / "pool"
    claim_folder(
        folder,
        {"seed": run.seed, "image_size": preset.image_size, "pool": preset.pool, "canvases": asdict(preset.canvases)}
        | origin,
    )
    canvases, shards = CanvasSet(run, pictures, "pool"), []
    for start in tqdm(range(0, preset.pool, SHARD), desc="pool", unit="shard"):
        path = folder / f"{start:06d}.safetensors"
        if not path.exists():
            pixels = canvases.pixels(range(start, min(start + SHARD, preset.pool)))
            with run.autocast():  # half the time; the error is a hundredth of the latents' deviation
                latents = encode_all(vae, pixels.to(run.device)).float() * vae.config.scaling_factor
            with replacing(path) as part:
                save_file({"latents": latents.half().cpu().contiguous()}, part)
        shards.append(load_file(path)["latents"])
    return torch.cat(shards)


# -------------------------------------------------------------------------------------------------------- tokenizer


def split_word(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """The BPE pieces of a word under merges ranked by priority; the last piece ends in "</w>"."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    while len(pieces) > 1:
        pair = min(itertools.pairwise(pieces), key=lambda candidate: ranks.get(candidate, len(ranks)))
        if pair not in ranks:
            break
        merged, at = [], 0
        while at < len(pieces):
            step = 2 if tuple(pieces[at : at + 2]) == pair else 1
            merged.append("".join(pieces[at : at + step]))
            at += step
        pieces = merged
    return pieces


def build_vocabulary(words: Iterable[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """A CLIP vocabulary and its merges with every word of `words` as one token and single bytes for everything else."""
    ranks: dict[tuple[str, str], int] = {}
    for word in sorted(set(words)):
        # A later merge has a lower priority than all earlier ones, so the words already done stay whole.
        while len(pieces := split_word(word, ranks)) > 1:
            ranks[pieces[0], pieces[1]] = len(ranks)
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    characters = [chr(code) for code in printable] + [chr(256 + code) for code in range(256 - len(printable))]
    tokens = characters + [character + "</w>" for character in characters] + ["".join(pair) for pair in ranks]
    tokens += ["<|startoftext|>", "<|endoftext|>"]
    return {token: number for number, token in enumerate(dict.fromkeys(tokens))}, list(ranks)


def build_tokenizer(run: Run, names: Iterable[str], folder: Path):
    """A CLIPTokenizer that knows every word of `names`; its vocab.json and merges.txt are written to `folder`.

    A model that grows from another keeps that one's tokenizer, which spells unknown words in bytes.
    """
    from transformers import CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    if run.grow_from:
        for name in ("vocab.json", "merges.txt"):
            shutil.copyfile(run.grow_from / "tokenizer" / name, folder / name)
    else:
        words = EXTRA_WORDS + (CANVAS_WORDS if run.preset.canvases else ())
        vocabulary, merges = build_vocabulary([*words, *(word for name in names for word in words_of(name))])
        (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
        lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
        (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    # The length is stated or the tokenizer would pad to no length at all.
    return CLIPTokenizer.from_pretrained(folder, model_max_length=77)


def words_of(name: str) -> list[str]:
    """The words of a caption as CLIP's tokenizer separates them: runs of letters."""
    return re.findall(r"[a-z]+", name.lower())


# ----------------------------------------------------------------------------------------------------------- models


def build_autoencoder(preset: Preset, scaling_factor: float = 1.0):
    """An AutoencoderTiny: pictures [B, 3, H, W] in -1 … 1 to latents [B, 4, H/8, W/8]."""
    from diffusers import AutoencoderTiny

    channels = (preset.autoencoder_channels,) * len(preset.autoencoder_encoder_blocks)
    return AutoencoderTiny(
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        num_encoder_blocks=preset.autoencoder_encoder_blocks,
        num_decoder_blocks=preset.autoencoder_decoder_blocks,
        scaling_factor=scaling_factor,
    )


def build_unet(preset: Preset):
    """A UNet2DConditionModel with cross-attention at every level, and self-attention at every one or the first."""
    from diffusers import UNet2DConditionModel

    levels = len(preset.unet_channels)
    attention = {}
    if preset.unet_attends_at_top_only:
        # UNetMidBlock2DCrossAttn ignores mid_block_only_cross_attention: it always has self-attention.
        attention = {
            "only_cross_attention": (False,) + (True,) * (levels - 1),
            "mid_block_only_cross_attention": True,
            "mid_block_type": "UNetMidBlock2D",
        }
    return UNet2DConditionModel(
        sample_size=preset.image_size // 8,
        block_out_channels=preset.unet_channels,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        layers_per_block=1,
        # The number of heads, in spite of its name: as in Stable Diffusion's own configs.
        attention_head_dim=preset.unet_heads,
        cross_attention_dim=preset.text_width,
        norm_num_groups=preset.unet_groups,
        **attention,
    )


def build_text_encoder(preset: Preset, tokenizer):
    """A CLIPTextModel of the preset's size for that tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=preset.text_width,
            intermediate_size=preset.text_hidden,
            projection_dim=preset.text_width,
            num_hidden_layers=preset.text_layers,
            num_attention_heads=preset.text_heads,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_scheduler():
    """The PNDM scheduler of Stable Diffusion 1.5."""
    from diffusers import PNDMScheduler

    return PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def build_pipeline(vae, text_encoder, tokenizer, unet):
    """The parts as a StableDiffusionPipeline without safety checker."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


# --------------------------------------------------------------------------------------------------------- training


def learning_rate(step: int, steps: int, warmup: int) -> float:
    """Fraction of the peak learning rate: a linear warm-up, then half a cosine down to 0."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def save_checkpoint(path: Path, step: int, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> None:
    """Writes modules, optimiser state and the number of steps done as one safetensors file."""
    tensors = {f"{name}.{key}": value for name, module in modules.items() for key, value in module.state_dict().items()}
    for number, state in optimizer.state_dict()["state"].items():
        tensors |= {f"optimizer.{number}.{key}": value for key, value in state.items()}
    with replacing(path) as part:
        save_file({key: value.contiguous() for key, value in tensors.items()}, part, metadata={"step": str(step)})


def load_checkpoint(path: Path, modules: dict[str, nn.Module], optimizer: torch.optim.Optimizer) -> int:
    """Fills modules and optimiser from `save_checkpoint`'s file; returns the number of steps done."""
    tensors = load_file(path)
    for name, module in modules.items():
        module.load_state_dict(part_of(tensors, name))
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in part_of(tensors, "optimizer").items():
        number, _, entry = key.partition(".")
        state.setdefault(int(number), {})[entry] = value
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})
    return int(read_metadata(path)["step"])


def part_of(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """The tensors whose key starts with "name.", by the rest of it."""
    return {key[len(name) + 1 :]: value for key, value in tensors.items() if key.startswith(name + ".")}


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


@contextlib.contextmanager
def noting_interrupts() -> Iterator[list[int]]:
    """Yields a list that gets the signal number of a Ctrl-C or SIGTERM, so that a step is finished before stopping."""
    received: list[int] = []
    previous = {
        number: signal.signal(number, lambda n, _: received.append(n)) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def train(
    run: Run,
    stage: str,
    trained: dict[str, nn.Module],
    averages: dict[str, nn.Module],
    phase_steps: Sequence[int],
    peak_lrs: Sequence[float],
    loss_of: Callable[[int, torch.Generator], Tensor],
    draw_grid: Callable[[], Image.Image],
    begin_phase: Callable[[int], None] = lambda phase: None,
) -> None:
    """Trains modules in place, from the stage's checkpoint if there is one.

    AdamW with betas 0.9 and 0.99, gradients clipped to norm 1. Each phase has its own warm-up and cosine; a phase
    after the first starts from the averaged weights with a fresh optimiser.

    Args:
        stage: names the folder of checkpoint and grids, and the progress bar.
        trained: the modules to train, on the run's device.
        averages: for some of them, a copy that follows their weights as an exponential moving average.
        phase_steps: optimiser steps of each phase.
        peak_lrs: peak learning rate of each phase.
        loss_of: (phase, generator) to a scalar loss; the generator is the step's own.
        draw_grid: a picture of the present state, written to the stage's grids folder now and then.
        begin_phase: called with the number of a phase before its first step.
    """
    preset, folder = run.preset, run.out / stage
    grids, checkpoint = folder / "grids", folder / "checkpoint.safetensors"
    grids.mkdir(exist_ok=True)
    parameters = [parameter for module in trained.values() for parameter in module.parameters()]

    def fresh_optimizer() -> torch.optim.AdamW:
        return torch.optim.AdamW(parameters, lr=peak_lrs[0], betas=(0.9, 0.99))

    modules = trained | {f"average_{name}": module for name, module in averages.items()}
    optimizer, done = fresh_optimizer(), 0
    if checkpoint.exists():
        done = load_checkpoint(checkpoint, modules, optimizer)
    starts = [0, *itertools.accumulate(phase_steps)]
    total = starts[-1]
    saved_at, losses = time.monotonic(), []

    with noting_interrupts() as interrupts, tqdm(total=total, initial=done, desc=stage, unit="step") as bar:
        for step in range(done, total):
            phase = next(number for number in range(len(phase_steps)) if step < starts[number + 1])
            local = step - starts[phase]
            if local == 0 and phase > 0:
                for name, average in averages.items():
                    trained[name].load_state_dict(average.state_dict())
                optimizer = fresh_optimizer()
            if local == 0:
                begin_phase(phase)

            lr = peak_lrs[phase] * learning_rate(local, phase_steps[phase], preset.warmup_steps)
            for group in optimizer.param_groups:
                group["lr"] = lr
            loss = loss_of(phase, run.generator(stage, "step", step))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            # A young average forgets its start quickly: random weights would linger for 1 / (1 - decay) steps.
            decay = min(preset.ema_decay, (1 + step) / (10 + step))
            with torch.no_grad():
                for name, average in averages.items():
                    for slow, fast in zip(average.parameters(), trained[name].parameters(), strict=True):
                        slow.lerp_(fast, 1 - decay)

            losses.append(loss.detach())
            bar.update()
            due = time.monotonic() - saved_at >= run.checkpoint_seconds
            grid_due = (step + 1) % preset.grid_steps == 0 or step + 1 == total
            if len(losses) == 50 or due or interrupts or grid_due:
                # Reading a loss waits for the device, so it is not done in every step.
                mean, losses = torch.stack(losses).mean().item(), []
                bar.set_postfix(loss=f"{mean:.4f}", lr=f"{lr:.1e}")
                if not math.isfinite(mean):
                    raise UsageError(
                        f"{stage}: the loss is {mean} at step {step + 1}; the same command with --precision fp32 and "
                        "another --out may get past it"
                    )
            if due or interrupts or step + 1 == total:
                save_checkpoint(checkpoint, step + 1, modules, optimizer)
                saved_at = time.monotonic()
            if grid_due:
                with replacing(grids / f"step_{step + 1:06d}.png") as part:
                    draw_grid().save(part, format="png")
            if interrupts and step + 1 < total:
                raise KeyboardInterrupt


def autoencoder_stage(run: Run) -> None:
    """Trains the autoencoder on crops of the pictures: autoencoder/weights.safetensors."""
    preset, folder = run.preset, run.out / "autoencoder"
    pictures = load_index(run)
    claim_folder(folder, training_settings(run, "autoencoder") | {"data": file_digest(run.out / "data" / "index.json")})
    if (folder / "weights.safetensors").exists():
        return announce("autoencoder", "already done")

    seed_initial_weights(run, "autoencoder")
    model = build_autoencoder(preset).to(run.device)
    if run.grow_from:
        take_over(model, run.grow_from / "vae" / "diffusion_pytorch_model.safetensors")
    if preset.canvases:
        pixels = CanvasSet(run, pictures, "autoencoder").pixels(range(preset.autoencoder_canvases))
    else:
        pixels = load_pictures(run, pictures)
    pixels = pixels.to(run.device)
    shown = evenly(range(len(pixels)), 8)

    def loss_of(phase: int, generator: torch.Generator) -> Tensor:
        crops = random_crops(pixels, preset.autoencoder_batch, preset.autoencoder_crop, generator)
        with run.autocast():
            latents = model.encode(crops).latents
            noise = torch.randn(latents.shape, generator=generator).to(run.device)
            restored = model.decode(latents + preset.latent_noise * noise).sample
        return autoencoder_loss(restored.float(), crops, latents.float())

    def draw_grid() -> Image.Image:
        originals = as_floats(pixels[shown])
        return as_grid(torch.cat([originals, reconstruct(model, originals)]), columns=len(shown))

    steps, peaks = [preset.autoencoder_steps], [preset.autoencoder_lr]
    train(run, "autoencoder", {"model": model}, {}, steps, peaks, loss_of, draw_grid)

    if run.grow_from:  # the UNet knows the latents in that scale
        scaling = json.loads((run.grow_from / "vae" / "config.json").read_text())["scaling_factor"]
    else:
        scaling = 1 / encode_all(model, pixels).std().item()
    error = sum(
        (reconstruct(model, as_floats(batch)) - as_floats(batch)).square().sum().item() for batch in pixels.split(8)
    )
    psnr = 10 * math.log10(4 / (error / pixels.numel()))
    metadata = {"scaling_factor": repr(scaling), "psnr": f"{psnr:.2f}"}
    finish(folder, model.state_dict(), metadata)
    announce("autoencoder", f"reconstructs the pictures with {psnr:.1f} dB PSNR")


def random_crops(pixels: Tensor, count: int, size: int, generator: torch.Generator) -> Tensor:
    """`count` random square crops, half of them mirrored: [count, 3, size, size] in -1 … 1, from uint8 [P, 3, H, W]."""
    room = pixels.shape[-1] - size + 1
    picks = torch.randint(len(pixels), (count,), generator=generator).tolist()
    corners = torch.randint(room, (count, 2), generator=generator).tolist()
    mirrored = torch.rand(count, generator=generator).tolist()
    crops = []
    for pick, (top, left), mirror in zip(picks, corners, mirrored, strict=True):
        crop = pixels[pick, :, top : top + size, left : left + size]
        crops.append(crop.flip(-1) if mirror < 0.5 else crop)
    return as_floats(torch.stack(crops))


def autoencoder_loss(restored: Tensor, target: Tensor, latents: Tensor) -> Tensor:
    """L1 + 2 · MSE + half the L1 of the image gradients, and a small pull of the latents to mean 0 and deviation 1."""
    difference = restored - target
    rows, columns = difference.diff(dim=-2).abs().mean(), difference.diff(dim=-1).abs().mean()
    pull = latents.mean().square() + (latents.std() - 1).square()
    return difference.abs().mean() + 2 * difference.square().mean() + 0.5 * (rows + columns) / 2 + 0.01 * pull


@torch.no_grad()
def encode_all(model: nn.Module, pixels: Tensor) -> Tensor:
    """The unscaled latents of uint8 pictures [P, 3, H, W], in float32."""
    return torch.cat([model.encode(as_floats(batch)).latents for batch in pixels.split(8)])


@torch.no_grad()
def reconstruct(model: nn.Module, images: Tensor) -> Tensor:
    """Pictures [B, 3, H, W] in -1 … 1 through the autoencoder and back."""
    return model.decode(model.encode(images).latents).sample.clamp(-1, 1)


def unet_stage(run: Run) -> None:
    """Trains UNet and text encoder together on the cached latents: unet/weights.safetensors."""
    preset, folder = run.preset, run.out / "unet"
    first_weights = require(run, run.out / "autoencoder" / "weights.safetensors", "autoencoder")
    pictures = load_index(run)
    origin = {"data": file_digest(run.out / "data" / "index.json"), "autoencoder": file_digest(first_weights)}
    claim_folder(folder, training_settings(run, "unet") | origin)
    if (folder / "weights.safetensors").exists():
        return announce("unet", "already done")

    vae = load_autoencoder(run).to(run.device)
    tokenizer = build_tokenizer(run, trained_names(run), folder / "tokenizer")
    if preset.canvases:
        latents = encode_pool(run, vae, pictures, origin).to(run.device)
        canvases = CanvasSet(run, pictures, "pool")
        forms = [captions_of(canvases.plan(number), preset.canvases) for number in range(preset.pool)]
        captions = torch.stack([tokenise(tokenizer, [text for text, _ in texts]) for texts in forms])
        chances = torch.tensor([chance for _, chance in forms[0]])
        seen = [torch.arange(phase.first_canvases or preset.pool) for phase in preset.phases]
    else:
        latents = encode_all(vae, load_pictures(run, pictures).to(run.device)) * vae.config.scaling_factor
        captions = torch.stack([tokenise(tokenizer, [form.format(p.name) for form, _ in CAPTIONS]) for p in pictures])
        chances = torch.tensor([chance for _, chance in CAPTIONS])
        seen = [
            torch.tensor(
                [i for i, p in enumerate(pictures) if p.name in phase.names and p.style in (phase.styles or p.style)]
            )
            for phase in preset.phases
        ]

    seed_initial_weights(run, "unet")
    trained = {"unet": build_unet(preset), "text_encoder": build_text_encoder(preset, tokenizer)}
    if run.grow_from:
        grow_models(run, trained)
    averages = {name: copy.deepcopy(module).requires_grad_(False).eval() for name, module in trained.items()}
    for module in (*trained.values(), *averages.values()):
        module.to(run.device)
    subset = SubsetAttnProcessor()
    if any(phase.key_stride for phase in preset.phases):
        use_key_subset(trained["unet"], subset)  # after the averages were copied: samples are drawn with all keys
    predict = torch.compile(trained["unet"]) if run.compile else trained["unet"]
    scheduler = build_scheduler()
    alphas = scheduler.alphas_cumprod
    batch = preset.unet_batch

    def loss_of(phase: int, generator: torch.Generator) -> Tensor:
        picks = seen[phase][torch.randint(len(seen[phase]), (batch,), generator=generator)]
        forms = torch.multinomial(chances, batch, replacement=True, generator=generator)
        # One timestep out of each of `batch` equal parts of the diffusion run: less variance than independent draws.
        strata = (torch.arange(batch) + torch.rand(batch, generator=generator)) / batch
        timesteps = (strata * len(alphas)).long().clamp(max=len(alphas) - 1)
        noise = torch.randn((batch, *latents.shape[1:]), generator=generator)
        weights = loss_weight(alphas[timesteps]).to(run.device)
        noise, timesteps = noise.to(run.device), timesteps.to(run.device)
        noisy = scheduler.add_noise(latents[picks.to(run.device)].float(), noise, timesteps)
        stride = preset.phases[phase].key_stride
        subset.chosen = stride and one_per_cell(latents.shape[-1], stride, generator).to(run.device)
        for layer in self_attention_layers(trained["unet"]):  # in every step: a resumed run begins within a phase
            keep_sharp(layer, preset.phases[phase].sharpen is not None)
        with run.autocast():
            text = trained["text_encoder"](captions[picks, forms].to(run.device))[0]
            predicted = predict(noisy, timesteps, text).sample
        return ((predicted.float() - noise).square().mean(dim=(1, 2, 3)) * weights).mean()

    def begin_phase(phase: int) -> None:
        share = preset.phases[phase].sharpen
        if not share:
            return
        generator = run.generator("unet", "sharpen", phase)
        picks = torch.randint(len(latents), (SHARPENING_PICTURES,), generator=generator)
        noise = torch.randn((SHARPENING_PICTURES, *latents.shape[1:]), generator=generator).to(run.device)
        early = torch.linspace(0.65, 0.95, SHARPENING_PICTURES) * len(alphas)
        timesteps = early.long().to(run.device)
        noisy = scheduler.add_noise(latents[picks.to(run.device)].float(), noise, timesteps)
        texts = captions[picks, 0].to(run.device)
        sharpen_attention(averages, share, noisy, timesteps, texts)
        for name, average in averages.items():
            trained[name].load_state_dict(average.state_dict())

    pipeline = build_pipeline(vae, averages["text_encoder"], tokenizer, averages["unet"])
    shown = evenly(shown_names(run), preset.grid_samples or 8)
    train(
        run,
        "unet",
        trained,
        averages,
        [phase.steps for phase in preset.phases],
        [phase.lr or preset.unet_lr for phase in preset.phases],
        loss_of,
        lambda: contact_sheet(run, pipeline, shown, columns=4),
        begin_phase,
    )
    finish(
        folder,
        {f"{n}.{key}": value for n, module in averages.items() for key, value in module.state_dict().items()},
        {},
    )
    announce(
        "unet", f"finished, {sum(p.numel() for m in trained.values() for p in m.parameters()) / 1e6:.1f} M weights"
    )


def loss_weight(alphas: Tensor) -> Tensor:
    """Weight of the noise-prediction error: SNR ** -0.5 within 0.15 … 6; `alphas` is the scheduler's alphas_cumprod."""
    return ((1 - alphas) / alphas).sqrt().clamp(0.15, 6)


def tokenise(tokenizer, captions: Sequence[str]) -> Tensor:
    """Token numbers [captions, 77], int64."""
    return tokenizer(
        list(captions), padding="max_length", max_length=77, truncation=True, return_tensors="pt"
    ).input_ids


def trained_names(run: Run) -> list[str]:
    """Every name that some phase shows, sorted."""
    return sorted({picture.name for picture in load_index(run)})


def shown_names(run: Run) -> Sequence[str]:
    """The names that samples are drawn from: those of the last phase, or the clear ones of a phase that sees all."""
    return run.preset.phases[-1].names or CLEAR_NAMES


def training_settings(run: Run, stage: str) -> dict:
    """What must stay the same for `stage` to be continued; the device may change."""
    at_leisure = ("grid_steps", "checkpoint_seconds", "sample_steps", "guidance", "precision", "icon_size")
    at_leisure += ("grid_samples", "grows")
    other = {"autoencoder": ("unet_", "text_", "ema_", "phases", "pool"), "unet": ("autoencoder_", "latent_noise")}[
        stage
    ]
    settings = {key: value for key, value in recorded(run.preset).items() if key not in at_leisure}
    if run.grow_from:
        files = sorted(path for path in run.grow_from.rglob("*") if path.suffix in (".safetensors", ".json"))
        settings["grown_from"] = [file_digest(path) for path in files]
    return {
        "preset": run.preset_name,
        "seed": run.seed,
        "precision": run.precision,
        **{key: value for key, value in settings.items() if not key.startswith(other)},
    }


def recorded(settings: Preset | UnetPhase) -> dict:
    """The fields of a dataclass without those left at a default of None: a folder from before them can be continued."""
    values = {
        field.name: getattr(settings, field.name)
        for field in fields(settings)
        if not (field.default is None and getattr(settings, field.name) is None)
    }
    if "phases" in values:
        values["phases"] = [recorded(phase) for phase in values["phases"]]
    if "canvases" in values:
        values["canvases"] = asdict(values["canvases"])
    return values


def grow_models(run: Run, models: dict[str, nn.Module]) -> None:
    """Fills UNet and text encoder from the model folder that this one grows from.

    Raises:
        UsageError: that model's format does not fit.
    """
    folder = run.grow_from
    config = json.loads((folder / "unet" / "config.json").read_text())
    weights = load_file(folder / "unet" / "diffusion_pytorch_model.safetensors")
    try:
        fresh = grow(models["unet"], weights, len(config["block_out_channels"]))
    except ValueError as error:
        raise UsageError(f"{folder} does not fit preset {run.preset_name}: {error}") from None
    take_over(models["text_encoder"], folder / "text_encoder" / "model.safetensors")
    total = len(models["unet"].state_dict())
    announce("unet", f"{total - len(fresh)} of {total} tensors taken from {folder}")


@torch.no_grad()
def sharpen_attention(
    models: dict[str, nn.Module], share: float, noisy: Tensor, timesteps: Tensor, texts: Tensor
) -> None:
    """Sharpens the UNet's self-attention layers, from the first to the last, each on what it then is given.

    Args:
        models: "unet" and "text_encoder".
        share: see `sharpen`.
        noisy: latents [B, 4, h, w] of the agent phase.
        timesteps: theirs, [B].
        texts: token numbers of their captions, [B, 77].
    """
    text = models["text_encoder"](texts)[0]
    for layer in self_attention_layers(models["unet"]):
        given: list[Tensor] = []

        def note(_layer, args, kwargs, given=given) -> None:
            given.append(args[0] if args else kwargs["hidden_states"])

        handle = layer.register_forward_pre_hook(note, with_kwargs=True)
        models["unet"](noisy, timesteps, text)
        handle.remove()
        sharpen(layer, given[0], share)


def self_attention_layers(unet: nn.Module) -> list[nn.Module]:
    """The UNet's self-attention layers, in the order in which they are called: down blocks, then up blocks."""
    return [layer for name, layer in unet.named_modules() if name.endswith("attn1") and not layer.is_cross_attention]


def take_over(model: nn.Module, path: Path) -> None:
    """Fills a whole model from a safetensors file.

    Raises:
        UsageError: the file is of a model of another format.
    """
    # The text encoder's names begin with "text_model." in files and, in newer transformers, not in the model.
    found = {key.removeprefix("text_model."): value for key, value in load_file(path).items()}
    own = model.state_dict()
    if {key.removeprefix("text_model."): value.shape for key, value in own.items()} != {
        key: value.shape for key, value in found.items()
    }:
        raise UsageError(f"{path} is of a model of another format than the preset's")
    model.load_state_dict({key: found[key.removeprefix("text_model.")] for key in own})


def use_key_subset(unet: nn.Module, subset: SubsetAttnProcessor) -> None:
    """Gives the full-resolution self-attention layers that processor."""
    tops = ("down_blocks.0.", f"up_blocks.{len(unet.up_blocks) - 1}.")
    for name, module in unet.named_modules():
        if name.startswith(tops) and name.endswith(".attn1"):
            module.set_processor(subset)


def seed_initial_weights(run: Run, stage: str) -> None:
    """Seeds the global generator, which the models' constructors draw their first weights from."""
    torch.manual_seed(run.generator(stage, "initial weights").initial_seed())


def finish(folder: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Writes a stage's weights.safetensors, which says that it is finished, then drops its checkpoint."""
    with replacing(folder / "weights.safetensors") as part:
        save_file({key: value.cpu().contiguous() for key, value in tensors.items()}, part, metadata=metadata)
    (folder / "checkpoint.safetensors").unlink(missing_ok=True)


# --------------------------------------------------------------------------------------- stages: export and samples


def load_autoencoder(run: Run):
    """The finished autoencoder, in float32 on the CPU, with the scaling factor that gives its latents deviation 1."""
    path = require(run, run.out / "autoencoder" / "weights.safetensors", "autoencoder")
    model = build_autoencoder(run.preset, scaling_factor=float(read_metadata(path)["scaling_factor"]))
    model.load_state_dict(load_file(path))
    return model.requires_grad_(False).eval()


def name_as_stable_diffusion(path: Path) -> None:
    """Gives the text encoder's weights the names that Stable Diffusion's have, "text_model." first.

    transformers 5 saves them without it and reads both; transformers 4 would find none and start from random weights.
    """
    tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def export_stage(run: Run) -> None:
    """Writes the finished parts as a StableDiffusionPipeline folder, model/, in float16 safetensors."""
    weights = require(run, run.out / "unet" / "weights.safetensors", "unet")
    tensors = load_file(weights)
    tokenizer = build_tokenizer(run, trained_names(run), run.out / "unet" / "tokenizer")
    unet, text_encoder = build_unet(run.preset), build_text_encoder(run.preset, tokenizer)
    unet.load_state_dict(part_of(tensors, "unet"))
    text_encoder.load_state_dict(part_of(tensors, "text_encoder"))
    pipeline = build_pipeline(load_autoencoder(run), text_encoder, tokenizer, unet).to(torch.float16)

    folder, part = run.out / "model", run.out / "model.part"
    shutil.rmtree(part, ignore_errors=True)
    pipeline.save_pretrained(part, safe_serialization=True)
    for name in ("vocab.json", "merges.txt"):  # newer transformers leave these two to tokenizer.json alone
        shutil.copyfile(run.out / "unet" / "tokenizer" / name, part / "tokenizer" / name)
    name_as_stable_diffusion(part / "text_encoder" / "model.safetensors")
    for path in part.rglob("*.safetensors"):  # safetensors lets only their owner read them
        shutil.copymode(part / "model_index.json", path)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    announce("export", f"{folder}, {size / 1e6:.1f} MB")


def samples_stage(run: Run) -> None:
    """Draws samples.png from model/: --count of the names of the last phase."""
    from diffusers import StableDiffusionPipeline

    folder = require(run, run.out / "model" / "model_index.json", "export").parent
    pipeline = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipeline.to(run.device).to(torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    names = evenly(shown_names(run), run.count)
    sheet = contact_sheet(run, pipeline, names, columns=min(8, len(names)), progress=True)
    with replacing(run.out / "samples.png") as part:
        sheet.save(part, format="png")
    announce("samples", f"{len(names)} pictures in {run.out / 'samples.png'}")


@torch.no_grad()
def contact_sheet(run: Run, pipeline, names: Sequence[str], columns: int, progress: bool = False) -> Image.Image:
    """One labelled sample per name, each from a seed of its own; columns across."""
    images = []
    for start in tqdm(range(0, len(names), 8), desc="samples", unit="batch", disable=not progress):
        batch = names[start : start + 8]
        images += pipeline(
            [f"a high quality photograph of a {name}." for name in batch],
            num_inference_steps=run.preset.sample_steps,
            guidance_scale=run.preset.guidance,
            generator=[run.generator("sample", name) for name in batch],
        ).images
    width, height = images[0].size
    label = 14
    sheet = Image.new("RGB", (columns * width, -(-len(images) // columns) * (height + label)), "white")
    pen = ImageDraw.Draw(sheet)
    for number, (name, image) in enumerate(zip(names, images, strict=True)):
        left, top = number % columns * width, number // columns * (height + label)
        pen.text((left + 3, top + 1), name, fill="black")
        sheet.paste(image, (left, top + label))
    return sheet


def as_floats(pixels: Tensor) -> Tensor:
    """uint8 RGB to float32 in -1 … 1."""
    return pixels.float() / 127.5 - 1


def as_grid(images: Tensor, columns: int) -> Image.Image:
    """Pictures [B, 3, H, W] in -1 … 1, B a multiple of `columns`, as one picture."""
    pixels = ((images.cpu() + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
    rows = [torch.cat(list(row), dim=-1) for row in pixels.split(columns)]
    return Image.fromarray(torch.cat(rows, dim=-2).permute(1, 2, 0).numpy())


def evenly(items: Sequence, count: int) -> list:
    """At most `count` of the items, spread over the whole sequence."""
    count = min(count, len(items))
    return [items[number * len(items) // count] for number in range(count)]


# ----------------------------------------------------------------------------------------------------- command line


def announce(stage: str, text: str) -> None:
    """Says how a stage ended."""
    print(f"{stage}: {text}", flush=True)


def require(run: Run, path: Path, stage: str) -> Path:
    """`path`, which an earlier stage writes last.

    Raises:
        UsageError: that stage has not been finished.
    """
    if not path.exists():
        raise UsageError(
            f"{path} is not there: run the stage {stage} with --preset {run.preset_name} --out {run.out} first"
        )
    return path


def writable_folder(path: Path) -> Path:
    """`path`, made if need be.

    Raises:
        UsageError: it cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"--out {path} cannot be written to ({error.strerror})") from None
    return path


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    summary, _, details = __doc__.partition("\n")
    parser = argparse.ArgumentParser(description=summary, epilog=details, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "stage", nargs="?", default="all", choices=("all", *STAGES), help="default: all, one after the other"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of everything that is written")
    parser.add_argument(
        "--preset", default="first", choices=sorted(PRESETS), help="model and schedule (default: first)"
    )
    parser.add_argument("--smoke", action="store_const", dest="preset", const="smoke", help="short for --preset smoke")
    parser.add_argument(
        "--icons",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help=".tgz packages or icons.json files, instead of npm",
    )
    parser.add_argument(
        "--grow-from", type=Path, metavar="FOLDER", help="the model folder that presets cpu and smoke-grown grow from"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument(
        "--precision", choices=("bf16", "fp32"), help="of the training's autocast (default: the preset's)"
    )
    parser.add_argument("--compile", action="store_true", help="torch.compile the UNet for training")
    parser.add_argument(
        "--checkpoint-seconds", type=float, metavar="S", help="least time between checkpoints (default: the preset's)"
    )
    parser.add_argument("--count", type=int, default=24, help="pictures of the contact sheet (default: 24)")
    return parser.parse_args(arguments)


def make_run(options: argparse.Namespace) -> Run:
    """A checked Run.

    Raises:
        UsageError: a value that does not work here.
    """
    if options.count < 1:
        raise UsageError(f"--count is {options.count}, but a contact sheet has at least 1 picture")
    for path in options.icons:
        if not path.is_file():
            raise UsageError(f"--icons {path} is not a file")
    try:
        wanted = "cuda" if torch.cuda.is_available() else "cpu"
        device = torch.device(wanted if options.device == "auto" else options.device)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError):
        raise UsageError(f"--device {options.device} is not available here: use cpu, or leave it out") from None
    preset = PRESETS[options.preset]
    grow_from = options.grow_from
    if grow_from and not preset.grows:
        raise UsageError(f"--grow-from is given, but preset {options.preset} starts from random weights")
    if preset.grows and (grow_from is None or not (grow_from / "model_index.json").is_file()):
        found = f" ({grow_from} is none)" if grow_from else ""
        raise UsageError(f"preset {options.preset} grows from a model: give its folder with --grow-from{found}")
    return Run(
        out=writable_folder(options.out),
        preset_name=options.preset,
        preset=preset,
        seed=options.seed,
        precision=options.precision or preset.precision,
        device=device,
        compile=options.compile,
        icons=tuple(options.icons),
        grow_from=grow_from,
        count=options.count,
        checkpoint_seconds=preset.checkpoint_seconds
        if options.checkpoint_seconds is None
        else options.checkpoint_seconds,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the stages asked for; returns the exit status: 0, 2 for a mistake of the user's, 130 when interrupted."""
    options = parse_arguments(arguments)
    work = dict(zip(STAGES, (data_stage, autoencoder_stage, unet_stage, export_stage, samples_stage), strict=True))
    try:
        run = make_run(options)
        for stage in STAGES if options.stage == "all" else (options.stage,):
            work[stage](run)
    except UsageError as error:
        print(f"train_demo_model: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


def quiet_libraries() -> None:
    """Keeps notes on a valid but unusual pipeline (tiny autoencoder, no safety checker) out of the progress bars."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


if __name__ == "__main__":
    quiet_libraries()
    sys.exit(main())
