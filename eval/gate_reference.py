"""Make eval/demo_reference.npz from the demo model's training images: `python eval/gate_reference.py --help`.

    python apps/train_demo_model.py data --preset cpu --grow-from runs/first/model --out runs/cpu
    python eval/gate_reference.py runs/cpu --grow-from runs/first/model

For a model of another preset:

    python eval/gate_reference.py runs/first --preset first --out reference.npz
    python eval/demo_gate.py --model runs/first/model --reference reference.npz
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 1 stopped, 2 wrong input."""
    from eval.common.command import run_command

    options = _parser().parse_args(sys.argv[1:] if arguments is None else arguments)

    def work() -> int:
        from eval.gate import reference  # heavy imports, so that --help and wrong arguments answer at once

        reference.run(options)
        return 0

    return run_command("gate_reference", work)


def _parser() -> argparse.ArgumentParser:
    from eval.common.protocol import DEMO_REFERENCE

    parser = argparse.ArgumentParser(
        prog="gate_reference.py",
        description="Composes the demo model's training images again and saves their names and EfficientNet-Lite0 "
        "features, which the gate compares with.",
    )
    add = parser.add_argument
    add("run", type=Path, help="the --out of train_demo_model.py, whose data stage is done")
    add("--preset", default="cpu", help="it was trained with (default: %(default)s)")
    add("--grow-from", type=Path, help="the model it was grown from, as it was given to that script")
    add("--per-name", type=int, default=3, help="canvases of each name (default: %(default)s)")
    add("--images", type=Path, metavar="DIR", help="also write the composed images there")
    add("--out", type=Path, metavar="FILE.npz", default=DEMO_REFERENCE, help="default: %(default)s")
    add("--overwrite", action="store_true", help="replace that file where it is there")
    return parser


if __name__ == "__main__":
    from launch import launch

    launch(__file__)
