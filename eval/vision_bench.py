"""Cost, speed and accuracy of the agent transformers beside the paper's table: `python eval/vision_bench.py --help`."""

from __future__ import annotations

import argparse
import shlex
import sys

PRESETS = {
    "quick": {"stages": "counts,throughput,growth", "batch_size": 1, "rounds": 7, "pairs": "small", "sizes": "224,448",
              "growth": "224,448,672,1024"},
    "full": {"stages": "counts,throughput,growth", "batch_size": 32, "rounds": 20, "pairs": "all",
             "sizes": "224,384,512,768", "growth": "224,448,672,896,1024"},
}  # fmt: skip
"""What --preset sets; single arguments override."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 1 stopped or failed on the way, 2 wrong input."""
    from eval.common.command import run_command

    command = sys.argv[1:] if arguments is None else arguments
    options = _options(command)

    def work() -> int:
        from eval.vision import run  # heavy imports, so that --help and wrong arguments answer at once

        return run.run(options, shlex.join(["python", "eval/vision_bench.py", *command]))

    return run_command("vision_bench", work)


def _options(command: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="vision_bench.py",
        description="Parameters and FLOPs of the 18 models, their speed against timm's models, and the growth of time "
        "with resolution; none of it needs data. With --imagenet also top-1 and top-5 accuracy of a published "
        "checkpoint by the authors' protocol: run it under `accelerate launch` for several GPUs; stopped, the same "
        "command goes on where it was.",
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="quick", help="quick: a few minutes on 2 CPU cores (default: %(default)s)")
    add("--stages", help="of counts, throughput, growth, with commas; empty for none")
    add("--pairs", choices=("small", "all"), help="which models the throughput stage compares")
    add("--sizes", help="image sides in pixels of the throughput stage, multiples of 32, with commas")
    add("--growth", help="image sides in pixels of the growth stage, multiples of 16, with commas")
    add("--batch-size", type=int, help="images in a call")
    add("--rounds", type=int, help="interleaved, after a warm-up")
    add("--device", help="cuda, mps or cpu; default: the best there is")
    add("--dtype", choices=("float32", "float16", "bfloat16"), default="float32", help="default: %(default)s")
    add("--clock", choices=("wall", "cpu"), default="wall", help="cpu: the process's own CPU time, for a busy machine; "
        "with OMP_NUM_THREADS=1 (default: %(default)s)")  # fmt: skip
    add("--imagenet", metavar="DIR", help="the validation images, in one folder for each of the 1,000 classes")
    add("--checkpoint", metavar="FILE", help="with --imagenet: the authors' file or one of save_safetensors")
    add("--model", help="with --imagenet: timm's name of the checkpoint's model")
    add("--imagenet-batch", type=int, default=64, help="images in a call of that stage (default: %(default)s)")
    add("--workers", type=int, default=2, help="processes that read images, per GPU (default: %(default)s)")
    add("--out", metavar="DIR", required=True, help="where results.md, results.json and finished work go")
    options = parser.parse_args(command)
    for key, value in PRESETS[options.preset].items():
        if getattr(options, key) is None:
            setattr(options, key, value)
    return options


if __name__ == "__main__":
    from launch import launch

    launch(__file__)
