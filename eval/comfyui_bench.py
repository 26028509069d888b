"""Time model calls or whole runs in ComfyUI with and without the node: `python eval/comfyui_bench.py FOLDER`.

`.ci/comfyui FOLDER` prepares the folder. The model has SD 1.5's or SDXL's real size and random weights.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 1 stopped or failed, 2 wrong input."""
    from eval.common.command import run_command

    options = _parser().parse_args(sys.argv[1:] if arguments is None else arguments)

    def work() -> int:
        from eval.calls import comfyui, comfyui_runs

        if options.runs or options.model == "demo":
            return comfyui_runs.run(options)
        return comfyui.run(options)

    return run_command("comfyui_bench", work)


def _parser() -> argparse.ArgumentParser:
    from eval.calls.comfyui_runs import VARIANTS

    parser = argparse.ArgumentParser(
        prog="comfyui_bench.py", description="Times model calls in ComfyUI with and without the node."
    )
    add = parser.add_argument
    add("folder", type=Path, help="what .ci/comfyui prepared")
    add("--model", choices=("sd15", "sdxl", "demo"), default="sd15", help="default: %(default)s; demo is for runs")
    add("--sizes", default="512,1024", help="in pixels (default: %(default)s)")
    add("--batch", type=int, default=1, help="2 is one image with guidance (default: %(default)s)")
    add("--rounds", type=int, default=2, help="interleaved, after a warm-up (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), default="cpu", help="default: %(default)s")
    add("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16", help="default: %(default)s")
    add("--threads", type=int, default=2, help="CPU threads (default: %(default)s)")
    runs = parser.add_argument_group("whole runs: step caching, ToMe, EasyCache, LazyCache, fewer steps, interleaved")
    add = runs.add_argument
    add("--runs", action="store_true", help="whole runs in place of calls")
    add("--size", type=int, default=512, help="in pixels (default: %(default)s)")
    add("--variants", nargs="+", choices=VARIANTS, metavar="NAME", help=f"some of {', '.join(VARIANTS)}; default: all")
    add("--steps", type=int, default=25, help="default: %(default)s")
    add("--fewer", type=int, nargs="*", default=(), metavar="N", help="unpatched runs of so many steps beside")
    add("--sampler", default="euler", help="default: %(default)s")
    add("--scheduler", default="karras", help="default: %(default)s")
    add("--guidance", type=float, default=4.0, help="default: %(default)s")
    add("--images", type=int, default=2, help="default: %(default)s")
    return parser


if __name__ == "__main__":
    from launch import launch

    launch(__file__)
