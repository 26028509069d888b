"""Whether a model can judge attention methods at all: `python eval/demo_gate.py --help`."""

from __future__ import annotations

import argparse
import sys


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 1 stopped, or failed the gate with --strict, 2 wrong input."""
    from eval.common.command import run_command

    command = sys.argv[1:] if arguments is None else arguments
    options = _parser().parse_args(command)

    def work() -> int:
        from eval.gate import run  # heavy imports, so that --help and wrong arguments answer at once

        return run.run(options, " ".join(["python eval/demo_gate.py", *command]))

    return run_command("demo_gate", work)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="demo_gate.py",
        description="Measures, before attention methods are compared on a model, whether it can tell them apart: "
        "whether its full-resolution self-attention picks out few keys in the agent phase, whether taking that "
        "attention away makes the images clearly worse, and whether they show what was asked for. A stopped "
        "run resumes when the same command is given again.",
        epilog="Writes gate.json and gate.md. The exit code is 0 whether the gate is passed or not, but for --strict.",
    )
    parser.add_argument("--model", default="demo", help="demo, or a folder (default: %(default)s)")
    parser.add_argument("--strict", action="store_true", help="exit code 1 where the gate is failed")
    parser.add_argument("--out", metavar="DIR", default="out/demo_gate", help="default: %(default)s")

    image = parser.add_argument_group("images")
    image.add_argument(
        "--classes", type=int, default=60, help="how many names, spread evenly over the list (default: %(default)s)"
    )
    image.add_argument("--names", help="these names in place of --classes, with commas between")
    image.add_argument("--images-per-class", type=int, default=1, help="default: %(default)s")
    image.add_argument("--steps", type=int, default=12, help="default: %(default)s")
    image.add_argument("--guidance", type=float, default=5.0, help="default: %(default)s")
    image.add_argument("--size", type=int, help="height and width in pixels; default: the model's own")
    image.add_argument("--seed", type=int, default=0, help="another one gives other images (default: %(default)s)")
    image.add_argument("--scheduler", default="dpm++2m", help="default: %(default)s")
    image.add_argument("--batch-size", type=int, default=1, help="default: %(default)s")
    image.add_argument(
        "--processes", type=int, help="on a CPU: how many generate; default: one per core if memory allows"
    )
    image.add_argument("--threads", type=int, default=1, help="of each of them (default: %(default)s)")
    image.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    image.add_argument("--dtype", help="float32, float16 or bfloat16; default: float16 on cuda, float32 elsewhere")

    what = parser.add_argument_group("what is measured")
    what.add_argument("--ratio", type=float, default=0.4, help="of ToMeSD and AgentSD (default: %(default)s)")
    what.add_argument("--early", type=float, default=0.4, help="fraction of agent steps (default: %(default)s)")
    what.add_argument(
        "--prompts", type=int, default=8,
        help="effective keys are measured in so many images, of names spread evenly (default: %(default)s)",
    )  # fmt: skip
    what.add_argument(
        "--reference", metavar="FILE.npz",
        help="names and features of the training images, one or several per name, as "
        "eval/gate_reference.py writes; default for demo: its own",
    )  # fmt: skip
    return parser


if __name__ == "__main__":
    from launch import launch

    launch(__file__)
