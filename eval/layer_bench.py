"""Time and profile one self-attention layer by grid size and setting: `python eval/layer_bench.py --help`."""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 2 wrong input."""
    from eval.common.command import run_command

    command = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(command)

    def work() -> int:
        from eval.calls import layers  # heavy imports, so that --help and wrong arguments answer at once

        layers.run(options, " ".join(["python eval/layer_bench.py", *command]))
        return 0

    return run_command("layer_bench", work)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="layer_bench.py",
        description="Times one self-attention layer, by default one of SD 1.5's at full resolution, under each setting "
        "of the patch against PyTorch's fused attention and against no mixing of tokens at all.",
    )
    add = parser.add_argument
    add("--sides", default="64,96,128", help="of the token grid, pixels / 8 in SD 1.5 (default: %(default)s)")
    add("--channels", type=int, default=320, help="default: %(default)s")
    add("--heads", type=int, default=8, help="default: %(default)s")
    add("--batch", type=int, default=2, help="default: %(default)s, one image with guidance")
    add("--ratio", type=float, default=0.4, help="default: %(default)s")
    add("--rounds", type=int, default=3, help="interleaved, after a warm-up (default: %(default)s)")
    add("--profile", action="store_true", help="also print which of PyTorch's operators take the time")
    add("--device", help="cuda, mps or cpu; default: the best there is")
    add("--dtype", help="float32, float16 or bfloat16; default: float16 on cuda, float32 elsewhere")
    add("--out", metavar="FILE.md", help="also write the table there")
    return parser


if __name__ == "__main__":
    from launch import launch

    launch(__file__)
