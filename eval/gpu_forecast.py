"""Forecast the speed of UNet calls on GPUs, from their operators: `python eval/gpu_forecast.py --help`."""

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
        from eval.forecast import work  # heavy imports, so that --help and wrong arguments answer at once

        out = None if options.print else options.out
        work.run(" ".join(["python eval/gpu_forecast.py", *command]), out, options.hook_ms, options.dry_run)
        return 0

    return run_command("gpu_forecast", work)


def _options(command: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="gpu_forecast.py",
        description="Walks the UNets of SD 1.5 and SDXL on the meta device, predicts the time of their calls on four "
        "GPUs by a roofline model, and compares it with public figures. A few minutes on 2 CPU cores; needs no GPU.",
    )
    add = parser.add_argument
    add("--out", type=Path, default=Path("eval/results"), metavar="DIR",
        help="where to write gpu-forecast.md and .json (default: %(default)s)")  # fmt: skip
    add("--print", action="store_true", help="print the page and write nothing")
    add("--hook-ms", type=float, metavar="MS",
        help="the host's time in the patch's hooks around a call; default: measured on this machine")  # fmt: skip
    add("--dry-run", action="store_true", help="tiny networks, a minute: every step, and figures of no meaning")
    options = parser.parse_args(command)
    if options.hook_ms is not None and not 0 <= options.hook_ms <= 1000:
        parser.error("--hook-ms: must lie in 0 … 1000")
    if options.dry_run and not options.print and options.out == parser.get_default("out"):
        options.print = True  # never over the real page
    return options


if __name__ == "__main__":
    from launch import launch

    launch(__file__)
