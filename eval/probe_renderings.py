"""Render the demo model's icons on new grounds, as images for eval/denoising_loss.py.

python apps/train_demo_model.py data --preset cpu --grow-from agentsd/demo_model --out runs/icons
python eval/probe_renderings.py runs/icons/data runs/renderings --count 32
python eval/denoising_loss.py --model demo --images runs/renderings --captions runs/renderings/captions.json
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
        from eval.probes.renderings import write_renderings  # heavy imports, so that --help answers at once

        write_renderings(options.data, options.out, options.count)
        return 0

    return run_command("probe_renderings", work)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="probe_renderings.py",
        description="Renders the demo model's icons on grounds that it was not trained on, as images for "
        "eval/denoising_loss.py. The objects are those of the training; ground colours and margins are new.",
    )
    parser.add_argument("data", type=Path, help="folder `data` of apps/train_demo_model.py")
    parser.add_argument("out", type=Path, help="folder of the images")
    parser.add_argument("--count", type=int, default=32, help="number of images (default: %(default)s)")
    return parser


if __name__ == "__main__":
    from launch import launch

    launch(__file__)
