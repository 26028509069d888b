"""Distance to the unpatched image over time, with fewer steps as the line to beat: `python eval/pareto.py --help`.

python eval/pareto.py --page eval/results/pareto             # the demo model, 512 px: an hour and more on 2 CPU cores
python eval/pareto.py --model ID --prompts FILE --images 24  # real weights, on a GPU: the first thing to run
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
        from eval.equal_time import work  # heavy imports, so that --help and wrong arguments answer at once

        work.run(options, " ".join(["python eval/pareto.py", *command]))
        return 0

    return run_command("pareto", work)


def _parser() -> argparse.ArgumentParser:
    from eval.common.command import at_least

    parser = argparse.ArgumentParser(
        prog="pareto.py",
        description="Generates the same images with fewer steps, by step caching, the presets, DeepCache and ToMeSD, "
        "and measures how near they are to those of the full run, beside fewer steps that take the same time. A "
        "stopped run resumes when the same command is given again.",
    )
    add = parser.add_argument
    add("--out", type=Path, metavar="DIR", default=Path("out/pareto"), help="results; default: %(default)s")
    add("--page", type=Path, metavar="DIR", help="page, chart and data; default: --out")
    add("--model", default="demo", help="demo, a folder, a checkpoint or a Hugging Face id (default: %(default)s)")
    add("--prompts", metavar="FILE", help="a prompt a line; default: names that the demo model knows")
    add("--images", type=at_least(1), default=8, help="how many prompts; every fourth is to choose settings by "
        "(default: %(default)s)")  # fmt: skip
    add("--only", choices=("all", "choice", "check"), default="all", help="which of the images (default: %(default)s)")
    add("--runs", nargs="+", metavar="NAME:STEPS", default=["ddim:25", "euler-karras:25", "dpm++2m-karras:20"],
        help="schedulers with their steps; default: ddim:25 euler-karras:25 dpm++2m-karras:20")  # fmt: skip
    add("--fewer", nargs="+", type=at_least(1), default=[6, 8, 10, 12, 15, 18, 22], help="steps of the line to beat")
    add("--intervals", nargs="+", type=at_least(2), default=[2, 3, 5], help="of caching alone and of DeepCache")
    add("--leave-out", nargs="+", metavar="ROW", default=[], help='names of rows, as in "ToMeSD" \'preset "large"\'')
    add("--guidance", type=float, default=5.0, help="default: %(default)s")
    add("--size", type=at_least(64), help="pixels a side; default: the model's own")
    add("--device", help="cuda, mps or cpu; default: the best there is")
    add("--dtype", help="float32, float16 or bfloat16; default: float16 on cuda, float32 elsewhere")
    add("--threads", type=at_least(1), help="of PyTorch on a CPU")
    add("--share", nargs=2, type=at_least(1), metavar=("K", "N"), default=(1, 1), help="the K-th of N processes")
    add("--measured", action="store_true", help="also each row's own seconds, as on a GPU: nothing else may run")
    add("--report-only", action="store_true", help="write the page from what is there")
    add("--call-times", action="store_true", help="store what calls take, measured and forecast, and stop")
    return parser


if __name__ == "__main__":
    from launch import launch

    launch(__file__)
