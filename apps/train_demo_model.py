"""Train a small text-to-image model in Stable Diffusion's format from two emoji icon sets, on a CPU or a GPU.

Usage:

    pip install -e ".[train]"
    python apps/train_demo_model.py --out runs/first             # all five stages
    python apps/train_demo_model.py --preset cpu --grow-from runs/first/model --out runs/cpu
    python apps/train_demo_model.py --smoke --out runs/smoke     # the same in a minute: tiny model, four built-in icons

    python apps/train_demo_model.py data        --out runs/first [--icons fluent.tgz noto.tgz]
    python apps/train_demo_model.py autoencoder --out runs/first [--device cuda]
    python apps/train_demo_model.py unet        --out runs/first [--device cuda] [--compile]
    python apps/train_demo_model.py export      --out runs/first
    python apps/train_demo_model.py samples     --out runs/first [--count 24]

| stage | reads | writes |
|---|---|---|
| data | npm packages @iconify-json/fluent-emoji and @iconify-json/noto, or --icons | data/*/*.png, data/index.json |
| autoencoder | data | autoencoder/weights.safetensors, autoencoder/grids |
| unet (and its text encoder) | data, autoencoder | unet/weights.safetensors, unet/grids |
| export | autoencoder, unet | model/: loads with StableDiffusionPipeline.from_pretrained |
| samples | model | samples.png, a contact sheet |

| preset | images | latents | made for |
|---|---|---|---|
| first | 121 icons centred on white, 256 px | 32 × 32 | 2 CPU cores, 1 hour |
| cpu | the same, on three light grounds each, 512 px | 64 × 64, grown from first | 2 CPU cores, 2½ hours |
| smoke, smoke-grown | four built-in icons, 64 px | 8 × 8, toys in the formats of first and cpu | tests |

In the model of cpu the full-resolution self-attention is the only self-attention there is. In the last
phase its queries and keys are set to find the tokens that look alike, and fixed but for their scale: trained further,
they spread over all tokens. eval/results/demo-training.md has the measurements.

A stage that is finished is skipped; one that was stopped, even by kill -9, goes on from its last checkpoint when the
same command is given again. Every random number is a function of (seed, stage, step), so on the same CPU an
interrupted run ends with the weights of an undisturbed one. Each stage refuses a folder made with other settings.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from demo_training.autoencoder import autoencoder_stage
from demo_training.export import export_stage
from demo_training.icons import data_stage
from demo_training.presets import PRESETS
from demo_training.run import Run, UsageError, writable_folder
from demo_training.samples import samples_stage
from demo_training.unet import unet_stage

STAGES = ("data", "autoencoder", "unet", "export", "samples")


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
    parser.add_argument("--count", type=int, default=24, help="images of the contact sheet (default: 24)")
    return parser.parse_args(arguments)


def make_run(options: argparse.Namespace) -> Run:
    """A checked Run.

    Raises:
        UsageError: a value that does not work here.
    """
    if options.count < 1:
        raise UsageError(f"--count is {options.count}, but a contact sheet has at least 1 image")
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
    """Run the stages asked for; returns the exit status: 0, 2 for a mistake of the user's, 130 when interrupted."""
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
    """Keep warnings about a valid but unusual pipeline (no safety checker) out of the progress bars."""
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


if __name__ == "__main__":
    quiet_libraries()
    sys.exit(main())
