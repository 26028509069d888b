"""Speed and quality of Stable Diffusion, ToMeSD and AgentSD in one table: `python eval/fid_bench.py --help`."""

from __future__ import annotations

import argparse
import sys

_TABLE_10 = "sd,sd-naive,tomesd,agentsd,mean-value,no-attention"
PRESETS = {
    "quick": {
        "model": "demo", "methods": _TABLE_10, "ratios": "0.4", "classes": 24, "images_per_class": 1,
        "scheduler": "dpm++2m", "steps": 12, "guidance": 5.0, "features": "efficientnet-lite0", "rounds": 3,
    },
    "paper": {
        "model": "stable-diffusion-v1-5/stable-diffusion-v1-5", "methods": _TABLE_10, "ratios": "0.1,0.2,0.3,0.4,0.5",
        "classes": 1000, "images_per_class": 2, "steps": 50, "guidance": 7.5, "size": 512, "features": "inception",
        "rounds": 10,
    },
}  # fmt: skip
"""What --preset sets; single arguments override."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 1 stopped or failed on the way, 2 wrong input."""
    from eval.common.command import run_command

    command = sys.argv[1:] if arguments is None else arguments
    options = _options(command)

    def work() -> int:
        from eval.fid import bench  # heavy imports, so that --help and wrong arguments answer at once

        return bench.run(options, " ".join(["python eval/fid_bench.py", *command]))

    return run_command("fid_bench", work)


def _options(command: list[str]) -> argparse.Namespace:
    parser = _parser()
    first = parser.parse_args(command)
    preset = PRESETS[first.preset] if first.preset else PRESETS["quick"]
    parser.set_defaults(**preset)
    options = parser.parse_args(command)
    options.preset = first.preset or "quick"
    return options


def _told(preset: dict) -> str:
    return " ".join(f"--{key.replace('_', '-')} {value}" for key, value in preset.items())


def _parser() -> argparse.ArgumentParser:
    from eval.common.protocol import ABLATIONS, METHODS

    parser = argparse.ArgumentParser(
        prog="fid_bench.py",
        description="Generates images of the same prompts by several methods, scores and times them. A stopped "
        "run resumes when the same command is given again.",
        epilog="Without arguments: --preset quick, a few minutes on 2 CPU cores with the built-in demo model. "
        + " ".join(f"{name}: {_told(preset)}." for name, preset in PRESETS.items())
        + " Methods: "
        + "; ".join(f"{name}: {method.what}" for name, method in METHODS.items())
        + ". Timed only: "
        + ", ".join(name for name, method in METHODS.items() if not method.scored)
        + ".",
    )
    what = parser.add_argument_group("what to do")
    what.add_argument(
        "--preset", choices=sorted(PRESETS), help="paper: all of Table 10; quick: the demo model (default)"
    )
    what.add_argument("--speed-only", action="store_true", help="time only: needs no reference and no trained weights")
    what.add_argument("--quality-only", action="store_true", help="generate and score only, do not time")
    what.add_argument(
        "--dry-run", action="store_true",
        help="print scenarios, images, disk, missing inputs and an estimate of the time, change nothing, and stop",
    )  # fmt: skip
    what.add_argument(
        "--score", nargs=2, metavar=("A", "B"), help="score two folders or .npz files, print the row, and stop"
    )
    what.add_argument(
        "--save-reference", nargs=2, metavar=("FOLDER", "FILE.npz"), help="save statistics of images, and stop"
    )
    what.add_argument("--overwrite", action="store_true", help="--save-reference may replace a file")
    what.add_argument("--report-only", metavar="DIR", help="rebuild the report of a finished run from disk, and stop")

    grid = parser.add_argument_group("scenarios")
    grid.add_argument("--methods", help=f"several of {', '.join(METHODS)}, with commas")
    grid.add_argument(
        "--method-module", metavar="FILE.py", action="append", default=[],
        help="a file that registers methods of your own, as eval/examples/strided_keys.py does; all are compared "
        "unless --methods names some of them",
    )  # fmt: skip
    grid.add_argument("--ratios", help="fractions of the tokens merged away, as in 0.2,0.4")
    grid.add_argument("--early", type=float, default=0.4, help="fraction of agent steps (default: %(default)s)")
    grid.add_argument(
        "--ablate", default="",
        help=f"several of {', '.join(ABLATIONS)}, with commas; alpha, scale and early are the paper's Tables 11-13, "
        "alpha-early crosses two of them, early-ratio merges less in the agent phase, cache, cache-alone (no agents) "
        "and presets add step caching, the others save more at larger sizes",
    )  # fmt: skip
    grid.add_argument(
        "--cache-intervals", metavar="N,N",
        help="agentsd also with step caching, deepcache and fewer-steps at these (default: the last two at 3)",
    )  # fmt: skip

    model = parser.add_argument_group("model")
    model.add_argument("--model", help="demo, a folder, a .safetensors checkpoint, or a Hugging Face id")
    model.add_argument("--revision", help="of a Hugging Face id")
    model.add_argument("--random-weights", metavar="NAME", help="sd15, sd21 or sdxl with random weights (--speed-only)")
    model.add_argument("--scheduler", default="plms", help="default: %(default)s")
    model.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    model.add_argument("--dtype", help="float32, float16 or bfloat16; default: float16 on cuda, float32 elsewhere")

    image = parser.add_argument_group("images")
    image.add_argument("--classes", type=int, help="how many classes, spread evenly over the list")
    image.add_argument("--images-per-class", type=int)
    image.add_argument("--steps", type=int)
    image.add_argument("--guidance", type=float)
    image.add_argument("--size", type=int, help="height and width in pixels; default: the model's own")
    image.add_argument("--batch-size", type=int, default=1, help="default: %(default)s")
    image.add_argument("--seed", type=int, default=0, help="another one gives other images (default: %(default)s)")
    image.add_argument(
        "--processes", type=int, help="on a CPU: how many generate; default: one per core if memory allows"
    )
    image.add_argument("--threads", type=int, default=1, help="of each of them (default: %(default)s)")

    score = parser.add_argument_group("scores")
    score.add_argument("--features", help="inception (FID) or efficientnet-lite0 (offline; FD, never called FID)")
    score.add_argument("--inception-weights", metavar="FILE", help="pytorch-fid's weights, where it cannot fetch them")
    score.add_argument(
        "--reference", metavar="PATH", help="folder of images, on white where transparent, or .npz; demo has its own"
    )
    score.add_argument(
        "--reference-per-class", type=int, metavar="N", help="the first N of each class: 5 as ToMe, or 50"
    )
    score.add_argument("--resamples", type=int, default=200, help="of the bootstrap (default: %(default)s)")
    score.add_argument("--clip", metavar="DIR", help="a saved CLIP model: adds the CLIP score")

    speed = parser.add_argument_group("times")
    speed.add_argument("--sizes", help="sizes to time, as in 512,768,1024; default: --size")
    speed.add_argument("--batch-sizes", help="batch sizes to time, as in 1,8; default: --batch-size")
    speed.add_argument("--rounds", type=int, help="interleaved rounds after the warm-up")
    speed.add_argument("--compile", action="store_true", help="also time the compiled UNet")
    parser.add_argument("--out", metavar="DIR", help="default: out/fid_bench-PRESET; results and images")
    return parser


if __name__ == "__main__":
    from launch import launch

    launch(__file__)
