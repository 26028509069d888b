"""Time the presets on this machine without a download, as `agentsd tune` does: `python eval/tune_bench.py --help`."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 1 stopped, 2 wrong input."""
    from eval.common.command import run_command

    command = sys.argv[1:] if arguments is None else arguments
    options = _options(command)

    def work() -> int:
        from eval.calls import tuning  # heavy imports, so that --help and wrong arguments answer at once

        tuning.run(options, " ".join(["python eval/tune_bench.py", *command]))
        return 0

    return run_command("tune_bench", work)


def _options(command: list[str]) -> argparse.Namespace:
    from eval.common.command import at_least

    parser = argparse.ArgumentParser(
        prog="tune_bench.py",
        description="Times the UNet calls of the unpatched model, of every preset and of each phase on this machine, "
        "with random weights, which are as fast as trained ones, and says which settings pay.",
    )
    add = parser.add_argument
    add("--random-weights", default="sd15", choices=("sd15", "sd21", "sdxl"), help="default: %(default)s")
    add("--sizes", default="512", help="pixels a side, several with commas (default: %(default)s)")
    add("--batch-sizes", default="1", help="images at once, several with commas (default: %(default)s)")
    add("--steps", type=at_least(1), default=25, help="of the run (default: %(default)s)")
    add("--rounds", type=at_least(1), help="default: 5, or fewer, but 3, once a minute has passed")
    add("--dtype", help="float32, float16 or bfloat16; default: float16 on cuda, float32 elsewhere")
    add("--device", help="cuda, mps or cpu; default: the best there is")
    add("--out", type=Path, metavar="DIR", help="also write tables and data there")
    add("--dry-run", action="store_true", help="say what would be timed, and stop")
    options = parser.parse_args(command)
    for name in ("sizes", "batch_sizes"):
        try:
            setattr(options, name, [at_least(1)(part) for part in getattr(options, name).split(",")])
        except argparse.ArgumentTypeError as error:
            parser.error(f"--{name.replace('_', '-')} {error}")
    return options


if __name__ == "__main__":
    from launch import launch

    launch(__file__)
