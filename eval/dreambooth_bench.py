"""DreamBooth with agents in training and sampling, the paper's figure 8: `python eval/dreambooth_bench.py --help`."""

from __future__ import annotations

import argparse
import sys
from typing import Any

PRESETS: dict[str, dict[str, Any]] = {
    "quick": {
        "model": "demo", "instance_prompt": "a sks bird", "class_prompt": "a bird", "images": 16, "prior_images": 8,
        "steps": 25, "guidance": 5.0, "train_steps": 300, "learning_rate": 1e-4, "prior_preservation": True,
        "num_class_images": 8, "class_inference_steps": 20, "class_guidance": 2.0, "timed_steps": 16,
        "features": "efficientnet-lite0",
    },
    "paper": {
        "model": "stable-diffusion-v1-5/stable-diffusion-v1-5", "instance_prompt": "a photo of sks dog",
        "class_prompt": "a photo of a dog",
        "prompt": [
            "{}", "{} on the beach", "{} in the snow", "{} wearing a red hat", "{} on a wooden floor", "{} in a garden",
        ],
        "images": 8, "prior_images": 16, "steps": 100, "guidance": 7.5, "train_steps": 800, "learning_rate": 1e-6,
        "prior_preservation": True, "num_class_images": 100, "class_inference_steps": 50, "class_guidance": 7.5,
        "timed_steps": 30, "use_8bit_adam": True, "mixed_precision": "fp16", "features": "efficientnet-lite0",
    },
}  # fmt: skip
"""What --preset sets; single arguments override. "paper" is appendix B.4; it needs --subject."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 1 stopped, 2 wrong input."""
    from eval.common.command import run_command

    command = sys.argv[1:] if arguments is None else arguments
    options = _options(command)

    def work() -> int:
        from eval.dreambooth.run import run  # heavy imports, so that --help and wrong arguments answer at once

        return run(options, " ".join(["python eval/dreambooth_bench.py", *command]))

    return run_command("dreambooth_bench", work)


def _options(command: list[str]) -> argparse.Namespace:
    parser = _parser()
    preset = parser.parse_args(command).preset
    parser.set_defaults(**{key: value for key, value in PRESETS[preset].items() if key != "prompt"})
    options = parser.parse_args(command)
    options.prompt = options.prompt or PRESETS[preset].get("prompt")  # a default would stay beside what is appended
    if preset == "paper" and options.subject is None:
        parser.error("--preset paper needs --subject: a folder with four to six photographs of one dog")
    options.out = options.out or f"out/dreambooth_bench-{preset}"
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dreambooth_bench.py",
        description="Trains a subject with and without agent attention and samples it in the four ways of the paper's "
        "figure 8: time and memory of training and sampling, similarity to the subject, a grid of images. A stopped "
        "run resumes when the same command is given again.",
        epilog="Without arguments: --preset quick, the demo model and the shipped subject on 2 CPU cores.",
    )
    parser.add_argument(
        "--preset", choices=sorted(PRESETS), default="quick", help="paper: appendix B.4 (default: %(default)s)"
    )
    parser.add_argument("--out", metavar="DIR", help="default: out/dreambooth_bench-PRESET")

    subject = parser.add_argument_group("the subject")
    subject.add_argument("--model", help="demo, a folder, a .safetensors checkpoint, or a Hugging Face id")
    subject.add_argument("--subject", metavar="DIR", help="its images; default: the shipped ones")
    subject.add_argument("--instance-prompt", metavar="TEXT", help="what they show, with the identifier sks")
    subject.add_argument("--class-prompt", metavar="TEXT", help="what the class is called")
    subject.add_argument(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="what is sampled, also several times; {} is the instance prompt",
    )

    training = parser.add_argument_group("training, as in apps/dreambooth.py")
    training.add_argument("--train-steps", type=int, metavar="N")
    training.add_argument("--learning-rate", type=float, metavar="R")
    training.add_argument("--train-batch-size", type=int, default=1, metavar="N")
    training.add_argument("--resolution", type=int, default=512, metavar="PX")
    training.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"), default="no")
    training.add_argument("--use-8bit-adam", action=argparse.BooleanOptionalAction, default=False)
    training.add_argument("--gradient-checkpointing", action=argparse.BooleanOptionalAction, default=False)
    training.add_argument("--train-text-encoder", action=argparse.BooleanOptionalAction, default=False)
    training.add_argument("--lora-rank", type=int, metavar="R")
    training.add_argument("--prior-preservation", action=argparse.BooleanOptionalAction)
    training.add_argument("--num-class-images", type=int, metavar="N")
    training.add_argument("--class-inference-steps", type=int, metavar="N")
    training.add_argument("--class-guidance", type=float, metavar="G", help="guidance of the class images")
    training.add_argument("--timed-steps", type=int, metavar="N", help="rounds of the interleaved timing")

    sampling = parser.add_argument_group("sampling")
    sampling.add_argument("--images", type=int, metavar="N", help="seeds of each prompt")
    sampling.add_argument("--prior-images", type=int, metavar="N", help="seeds of the class prompt; 0 for none")
    sampling.add_argument("--steps", type=int)
    sampling.add_argument("--guidance", type=float)
    sampling.add_argument("--scheduler", default="ddim", help="default: %(default)s")
    sampling.add_argument("--size", type=int, metavar="PX", help="default: the model's own")
    sampling.add_argument("--ratio", type=float, default=0.4, help="default: %(default)s")
    sampling.add_argument("--alpha", type=float, default=0.075, help="default: %(default)s")
    sampling.add_argument("--early", type=float, default=0.4, help="of the row with agents in sampling alone")
    sampling.add_argument("--seed", type=int, default=0)
    sampling.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    sampling.add_argument("--dtype", help="of the sampling; default: float16 on cuda, float32 elsewhere")

    scores = parser.add_argument_group("scores")
    scores.add_argument("--features", help="inception or efficientnet-lite0 (offline)")
    scores.add_argument("--dino", metavar="DIR", help="a saved DINO model: adds the DINO score")
    scores.add_argument("--clip", metavar="DIR", help="a saved CLIP model: adds CLIP-I and CLIP-T")
    return parser


if __name__ == "__main__":
    from launch import launch

    launch(__file__)
