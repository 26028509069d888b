"""Time what the patch's hooks take of the host's time in a UNet call: `python eval/host_time.py --help`.

python eval/host_time.py
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 1 stopped, 2 wrong input."""
    from eval.common.command import at_least, run_command

    command = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(
        prog="host_time.py",
        description="Times the hooks alone, in runs over a scheduler's timesteps; nothing of the UNet is computed. "
        "On a GPU this time is serial with the device.",
    )
    add = parser.add_argument
    add("--steps", type=at_least(2), default=25, help="of a run (default: %(default)s)")
    add(
        "--rounds", type=at_least(1), default=5, help="runs that are timed, after one of warm-up (default: %(default)s)"
    )
    add("--interval", type=at_least(1), default=3, help="cache_interval (default: %(default)s)")
    add("--out", type=Path, metavar="FILE", help="also write the table there")
    options = parser.parse_args(command)

    def work() -> int:
        from eval.calls import hooks  # heavy imports, so that --help and wrong arguments answer at once

        hooks.run(options, " ".join(["python eval/host_time.py", *command]))
        return 0

    return run_command("host_time", work)


if __name__ == "__main__":
    from launch import launch

    launch(__file__)
