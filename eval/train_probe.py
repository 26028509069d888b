"""Train the probe: a small network that truly needs its self-attention, for eval/denoising_loss.py.

Usage:

    python eval/train_probe.py --out runs/probe             # train, export to runs/probe/model, judge by the gate
    python eval/train_probe.py --preset cpu-64 --start-from eval/probe --out runs/probe-64    # of 64 × 64 pixels
    python eval/train_probe.py matching --out runs/probe-64 # how sharp its attention could be at best
    python eval/train_probe.py --smoke --out runs/smoke     # the same in seconds, with a toy

The images are smooth random patterns that repeat within the image (with a period, mirrored, turned, or scattered).
Tile and period are new in each image, so attention to the other copies is the best denoiser. The gate says what the
loss is with the mean value in attention's place and with no attention. A stopped training goes on from its last
checkpoint when the same command is given again; every random number is a function of (seed, step).
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

STAGES = ("train", "gate", "matching")


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line."""
    summary, _, details = __doc__.partition("\n")
    parser = argparse.ArgumentParser(description=summary, epilog=details, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "stage", nargs="?", default="all", choices=("all", *STAGES), help="all (default) is train and gate"
    )
    parser.add_argument("--out", type=Path, required=True, help="folder of everything that is written")
    parser.add_argument(
        "--preset", choices=("cpu", "cpu-64", "smoke"), default="cpu", help="cpu (default): 24 × 24; cpu-64: 64 × 64"
    )
    parser.add_argument("--smoke", action="store_const", dest="preset", const="smoke", help="--preset smoke, a toy")
    parser.add_argument(
        "--start-from", type=Path, metavar="FOLDER", help="a probe whose weights the training starts from"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu", help="cpu (default), cuda or cuda:N")
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of the training's autocast")
    parser.add_argument("--checkpoint-seconds", type=float, default=60, metavar="S", help="least time between them")
    parser.add_argument("--samples", type=int, default=96, help="unseen images of the gate (default: 96)")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the stages asked for; returns the exit status: 0, 2 for a mistake of the user's, 130 when interrupted."""
    options = parse_arguments(arguments)
    import torch  # heavy imports, so that --help answers at once
    from demo_training.run import Run, UsageError, writable_folder

    from eval.common.protocol import BenchError
    from eval.probes.training import PRESETS, train_stage

    try:
        try:
            torch.empty(1, device=options.device)
        except (RuntimeError, AssertionError):
            raise UsageError(f"--device {options.device} is not available here: use cpu, or leave it out") from None
        run = Run(
            out=writable_folder(options.out),
            preset_name=options.preset,
            preset=PRESETS[options.preset],  # type: ignore[arg-type]
            seed=options.seed,
            precision=options.precision,
            device=torch.device(options.device),
            compile=False,
            icons=(),
            grow_from=options.start_from,
            count=0,
            checkpoint_seconds=options.checkpoint_seconds,
        )
        if options.stage in ("all", "train"):
            train_stage(run)
        if options.stage in ("all", "gate"):
            from eval.probes.gate import gate_stage

            gate_stage(run.out, options.samples)
        if options.stage == "matching":
            from eval.probes.matching import matching_stage

            matching_stage(run.out)
    except (UsageError, BenchError) as error:
        print(f"train_probe: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    from launch import launch

    launch(__file__)
