"""Fine-tune Stable Diffusion on a few images of one subject (DreamBooth), with agent attention in every step or not.

Usage:

    python apps/dreambooth.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --agents both \\
        --instance-data-dir dog --instance-prompt "a photo of sks dog" --output-dir runs/dog
    agentsd generate "a photo of sks dog on the beach" --model runs/dog -o beach.png

Options are named as in diffusers' DreamBooth script; underscores are accepted too. A run that was stopped goes on
with the same command and --resume-from-checkpoint latest, and ends with the same weights as one that was not.
On several GPUs: accelerate launch apps/dreambooth.py …
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from dreambooth.output import how_to_go_on  # the package beside this file, which Python prefers to the file itself
from dreambooth.settings import (
    AGENTS,
    LR_SCHEDULERS,
    PRECISIONS,
    DreamBoothSettings,
    UsageError,
    default_config,
)

from agentsd.cli import add_settings, unrecognized
from agentsd.config import FIELD_NAMES


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """Print one sentence, as for all other wrong input."""
        self.exit(2, f"dreambooth: error: {message}; --help lists the options\n")


def _count(text: str) -> Any:
    """A number or none, of an option that is checked where all settings are."""
    return None if text.lower() == "none" else int(text) if text.isdigit() else text


def make_parser() -> argparse.ArgumentParser:
    """The parser; options that are not given are left out of its result."""
    summary, _, details = __doc__.partition("\n")
    parser = _Parser(
        description=summary,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        argument_default=argparse.SUPPRESS,
        allow_abbrev=False,
    )
    defaults = {field.name: field.default for field in dataclasses.fields(DreamBoothSettings)}

    def add(group: Any, option: str, help: str, **arguments: Any) -> None:
        name = option.lstrip("-").replace("-", "_")
        default = defaults.get(name)
        if default not in (None, False, dataclasses.MISSING):
            help += f" (default: {default})"
        group.add_argument(option, help=help, **arguments)

    data = parser.add_argument_group("the subject")
    add(data, "--model", "demo (built in), a folder, a .safetensors checkpoint, or a Hugging Face id", metavar="MODEL")
    add(data, "--instance-data-dir", "folder with the images of the subject", type=Path, required=True, metavar="DIR")
    add(data, "--instance-prompt", "what they show: 'a photo of sks dog'", required=True, metavar="TEXT")
    add(data, "--output-dir", "folder for the model", type=Path, required=True, metavar="DIR")
    add(data, "--resolution", "side of the images in pixels", type=int, metavar="N")

    prior = parser.add_argument_group("prior preservation")
    add(prior, "--with-prior-preservation", "train on images of the class too", action="store_true")
    add(prior, "--class-data-dir", "their folder; missing ones are generated", type=Path, metavar="DIR")
    add(prior, "--class-prompt", "what they show: 'a photo of a dog'", metavar="TEXT")
    add(prior, "--num-class-images", "how many", type=int, metavar="N")
    add(prior, "--prior-loss-weight", "weight of their loss", type=float, metavar="W")
    add(prior, "--class-inference-steps", "denoising steps of a generated one", type=int, metavar="N")

    agents = parser.add_argument_group("agent attention")
    add(agents, "--agents", "in training and sampling, in sampling only, or not", choices=AGENTS)
    add_settings(agents, "agent_", FIELD_NAMES, {"early": "1 where agents train, else 0.4"})

    training = parser.add_argument_group("training")
    add(training, "--train-text-encoder", "train the text encoder too", action="store_true")
    add(training, "--train-batch-size", "images per forward pass and process", type=int, metavar="N")
    add(training, "--gradient-accumulation-steps", "forward passes per optimizer step", type=int, metavar="N")
    add(training, "--gradient-checkpointing", "less memory, more time", action="store_true")
    add(training, "--max-train-steps", "optimizer steps", type=int, metavar="N")
    add(training, "--learning-rate", "LoRA needs about 100 times the default", type=float, metavar="R")
    add(training, "--lr-scheduler", "of the learning rate", choices=LR_SCHEDULERS)
    add(training, "--lr-warmup-steps", "steps of its linear rise", type=int, metavar="N")
    add(training, "--lr-num-cycles", "of cosine_with_restarts", type=int, metavar="N")
    add(training, "--lr-power", "of polynomial", type=float, metavar="P")
    add(training, "--lr-step-rules", "of piecewise_constant: 1:500,0.1", metavar="RULES")
    add(training, "--use-8bit-adam", "bitsandbytes' AdamW8bit (CUDA only)", action="store_true")
    for name in ("beta1", "beta2", "weight-decay", "epsilon"):
        add(training, f"--adam-{name}", "of AdamW", type=float, metavar="X")
    add(training, "--max-grad-norm", "gradients are clipped to this norm", type=float, metavar="X")
    add(training, "--mixed-precision", "default: as accelerate launch says, else no", choices=PRECISIONS)
    add(training, "--lora-rank", "train LoRA matrices in place of the weights", type=int, metavar="R")
    add(training, "--seed", "of every random number", type=int, metavar="N")
    add(training, "--device", "default: the GPU if there is one", choices=("cpu", "cuda", "mps"))

    keeping = parser.add_argument_group("checkpoints and validation")
    add(keeping, "--checkpointing-steps", "a checkpoint after every N steps", type=int, metavar="N")
    add(keeping, "--checkpoints-total-limit", "keep only the newest N, or none for no limit", type=_count, metavar="N")
    add(keeping, "--resume-from-checkpoint", "latest, or step-N", metavar="NAME")
    add(keeping, "--validation-prompt", "generate images with it while training", metavar="TEXT")
    add(keeping, "--num-validation-images", "how many", type=int, metavar="N")
    add(keeping, "--validation-steps", "after every N steps, and at the end", type=int, metavar="N")
    add(keeping, "--validation-inference-steps", "their denoising steps", type=int, metavar="N")
    add(keeping, "--guidance-scale", "of validation and class images", type=float, metavar="G")
    return parser


def read_settings(arguments: Sequence[str]) -> DreamBoothSettings:
    """The settings that a command line gives. Raises UsageError; exits with status 2 for an unknown option."""
    parser = make_parser()
    known, unknown = parser.parse_known_args([_with_hyphens(argument) for argument in arguments])
    if unknown:
        parser.error(unrecognized(parser, unknown))
    options = vars(known)
    fields = {name.removeprefix("agent_"): options.pop(name) for name in list(options) if name.startswith("agent_")}
    if fields:
        try:
            options["config"] = default_config(options.get("agents", "none"), **fields)
        except (TypeError, ValueError) as error:
            raise UsageError(str(error)) from None
    return DreamBoothSettings(**options)


def _with_hyphens(argument: str) -> str:
    """--train_batch_size=1 as --train-batch-size=1; what does not begin like an option stays."""
    name, equals, value = argument.partition("=")
    return name.replace("_", "-") + equals + value if name.startswith("--") and " " not in name else argument


def main(arguments: Sequence[str] | None = None) -> int:
    """Train; returns the exit status: 0, 1 out of memory, 2 for wrong input, 130 when interrupted."""
    settings = None
    try:
        settings = read_settings(sys.argv[1:] if arguments is None else arguments)
        from dreambooth.run import run  # heavy imports, so that --help and wrong options answer at once

        run(settings)
    except UsageError as error:
        print(f"dreambooth: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        remedy = "" if settings is None else f"; {how_to_go_on(Path(settings.output_dir))}"
        print(f"\nstopped{remedy}", file=sys.stderr)
        return 130
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        print(
            "dreambooth: error: out of memory; --gradient-checkpointing, --lora-rank, --mixed-precision, "
            "--use-8bit-adam and a smaller --resolution or --train-batch-size need less",
            file=sys.stderr,
        )
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
