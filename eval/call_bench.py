"""Time the kinds of UNet calls, unpatched, whole and cached, interleaved: `python eval/call_bench.py --help`.

python eval/call_bench.py --random-weights sd15 --size 512 --rounds 3
python eval/call_bench.py --random-weights sdxl --size 1024 --rounds 1 --skip large
python eval/call_bench.py --random-weights sd15 --size 512 --rounds 3 --compile --skip large
python eval/call_bench.py --random-weights sd15 --size 512 --rounds 3 --controlnet --skip large
"""

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
        from eval.calls import unet_calls  # heavy imports, so that --help and wrong arguments answer at once

        unet_calls.run(options, " ".join(["python eval/call_bench.py", *command]))
        return 0

    return run_command("call_bench", work)


def _options(command: list[str]) -> argparse.Namespace:
    from eval.calls.methods import METHODS
    from eval.common.command import at_least

    parser = argparse.ArgumentParser(
        prog="call_bench.py",
        description="Times the kinds of UNet calls, unpatched, whole and cached; says what runs of them come to.",
    )
    add = parser.add_argument
    add("--random-weights", default="sd15", choices=("sd15", "sd21", "sdxl"), help="default: %(default)s")
    add("--size", type=at_least(64), default=512, help="pixels a side (default: %(default)s)")
    add("--rounds", type=at_least(1), default=3, help="interleaved, after a warm-up (default: %(default)s)")
    add("--runs", nargs="+", metavar="NAME:STEPS", default=["ddim:25", "ddim:50", "plms:50"],
        help="schedulers with their steps (default: ddim:25 ddim:50 plms:50)")  # fmt: skip
    add("--skip", nargs="*", default=[], choices=list(METHODS), help="methods that are not timed")
    add("--compile", action="store_true", help="torch.compile every method, the unpatched UNet too")
    add("--mode", choices=("default", "reduce-overhead", "max-autotune"),
        help="of torch.compile, with --compile; reduce-overhead takes CUDA graphs")  # fmt: skip
    add("--controlnet", action="store_true", help="with a ControlNet before every call of the UNet")
    add("--dtype", default="bfloat16", help="default: %(default)s")
    add("--device", help="cuda, mps or cpu; default: the best there is")
    add("--threads", type=at_least(1), help="CPU threads; default: as PyTorch chooses")
    add("--out", type=Path, metavar="DIR", help="also write the tables and all times there")
    add("--dry-run", action="store_true", help="say what would be timed, and stop")
    options = parser.parse_args(command)
    if options.controlnet and options.compile:
        parser.error("--controlnet and --compile: a compiled ControlNet is never skipped; give one of the two")
    if options.controlnet and options.random_weights == "sdxl":
        parser.error("--controlnet: with --random-weights sd15 or sd21 alone")
    if options.mode and not options.compile:
        parser.error("--mode: belongs to --compile")
    return options


if __name__ == "__main__":
    from launch import launch

    launch(__file__)
