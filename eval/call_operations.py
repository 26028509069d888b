"""Count the operators of each kind of UNet call on the meta device: `python eval/call_operations.py --help`.

python eval/call_operations.py
"""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 1 stopped, 2 wrong input."""
    from eval.common.command import run_command

    command = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(command)

    def work() -> int:
        from eval.calls import operators  # heavy imports, so that --help and wrong arguments answer at once

        print("\n".join(operators.operator_table(options.shapes)))
        return 0

    return run_command("call_operations", work)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="call_operations.py",
        description="Counts the operators of each kind of UNet call: eager mode, one image with guidance, float16, on "
        "the meta device, which computes nothing. An operator of a GPU launches one kernel or a few.",
    )
    parser.add_argument(
        "--shapes", nargs="+", default=["sd15:512", "sdxl:1024"], metavar="ARCHITECTURE:SIZE",
        help="sd15, sd21 or sdxl and pixels a side (default: sd15:512 sdxl:1024)",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    from launch import launch

    launch(__file__)
