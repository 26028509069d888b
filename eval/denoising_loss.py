"""By how much a method raises a model's own denoising loss: `python eval/denoising_loss.py --help`."""

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
        from eval.denoising.run import run  # heavy imports, so that --help and wrong arguments answer at once

        return run(options, " ".join(["python eval/denoising_loss.py", *command]))

    return run_command("denoising_loss", work)


def _parser() -> argparse.ArgumentParser:
    from eval.denoising.settings import ABLATIONS, METHODS

    parser = argparse.ArgumentParser(
        prog="denoising_loss.py",
        description="Measures the loss E‖ε̂ − ε‖² of a model at each timestep on images that it was not trained on, "
        "unpatched and by several methods, with the same images and the same noise. A stopped run resumes when the "
        "same command is given again; `accelerate launch` shares the work among GPUs.",
        epilog="Without arguments: the shipped probe, a small network that needs its attention, in a few minutes on 2 "
        "CPU cores. The controls, mean value and no attention, are always measured beside.",
    )
    parser.add_argument(
        "--model", default="probe",
        help="probe, probe-64, demo, a folder or a Hugging Face id of SD 1.x, 2.x, XL (default: %(default)s)",
    )  # fmt: skip
    parser.add_argument("--revision", help="of a Hugging Face id")
    parser.add_argument(
        "--images", type=Path, metavar="DIR", help="unseen images, one folder per class (not for the probe)"
    )
    parser.add_argument(
        "--captions", type=Path, metavar="FILE", help="JSON object or CSV of captions by file name, for other folders"
    )
    parser.add_argument(
        "--methods", default="sd,tomesd,agentsd", help=f"several of {', '.join(METHODS)} (default: %(default)s)"
    )
    parser.add_argument("--ratios", default="0.4,0", help="fractions of the tokens merged away (default: %(default)s)")
    parser.add_argument(
        "--ablate",
        default="",
        help=f"several of {', '.join(ABLATIONS)}, or crosses as alphaxscale; made at the last of --ratios",
    )
    parser.add_argument(
        "--timesteps", default="60,170,280,390,500,610,720,830,940", help="noise levels (default: %(default)s)"
    )
    parser.add_argument("--steps", type=int, default=50, help="of the sampler that the mean over a run is weighted by")
    parser.add_argument("--samples", type=int, default=128, help="number of images (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=16, help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="of timing; 0: none (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of noise and patterns (default: %(default)s)")
    parser.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    parser.add_argument("--dtype", help="float32, float16 or bfloat16; default: float16 on cuda, float32 elsewhere")
    parser.add_argument("--out", metavar="DIR", default="out/denoising_loss", help="default: %(default)s")
    return parser


if __name__ == "__main__":
    from launch import launch

    launch(__file__)
