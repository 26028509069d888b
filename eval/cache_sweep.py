"""Step caching's settings against the unpatched images, at equal whole calls: `python eval/cache_sweep.py --help`.

python eval/cache_sweep.py --out eval/results/step-caching  # the whole table, an hour on 2 CPU cores
python eval/cache_sweep.py --schedulers ddim --steps 25 --intervals 3 # one block of it
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 1 stopped, 2 wrong input."""
    from eval.common.command import run_command

    command = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(command)

    def work() -> int:
        from eval.calls import step_caching  # heavy imports, so that --help and wrong arguments answer at once

        step_caching.run(options, " ".join(["python eval/cache_sweep.py", *command]))
        return 0

    return run_command("cache_sweep", work)


def _parser() -> argparse.ArgumentParser:
    from eval.common.command import at_least

    parser = argparse.ArgumentParser(
        prog="cache_sweep.py",
        description="Generates the same images by each setting of step caching, by DeepCache and by fewer steps, and "
        "measures their distance to the unpatched ones. A stopped run resumes when the same command is given again.",
    )
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR", default=Path("out/step-caching"), help="default: %(default)s")
    add("--model", default="demo", help="demo, a folder or a Hugging Face id (default: %(default)s)")
    add("--schedulers", nargs="+", default=["ddim", "dpm++2m", "plms"], help="default: ddim dpm++2m plms")
    add("--steps", nargs="+", type=at_least(2), default=[12, 20, 25, 50], help="default: 12 20 25 50")
    add("--intervals", nargs="+", type=at_least(2), default=[2, 3, 5], help="default: 2 3 5")
    add("--images", type=at_least(1), default=4, help="images a row (default: %(default)s)")
    add("--extras", action="store_true", help="also depth 2, and more whole calls early")
    return parser


if __name__ == "__main__":
    from launch import launch

    launch(__file__)
