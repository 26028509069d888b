"""The app in a browser: `python apps/demo.py`. Arguments only; the work is in `playground`."""

from __future__ import annotations

import argparse
import signal
import sys


def main(arguments: list[str] | None = None) -> int:
    """Run the app until Ctrl+C; returns the exit code: 0 ended, 2 wrong input."""
    options = _parser().parse_args(arguments)
    # So that it ends like Ctrl+C, and tidies up; from here on, as the import below makes the private folder.
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        return _run(options)
    except KeyboardInterrupt:  # before the page was there, or a second one while it was being closed
        return 0
    finally:
        signal.signal(signal.SIGTERM, before)


def _run(options: argparse.Namespace) -> int:
    print("agentsd: loading, a few seconds …", file=sys.stderr)
    try:
        # Heavy imports happen here, so that --help and wrong arguments answer at once.
        from playground.server import start
        from playground.settings import Limits

        from agentsd.images.pipelines import choose_device, choose_dtype
    except ModuleNotFoundError as error:
        print(f'agentsd: {error.name} is missing: pip install -e ".[app]"', file=sys.stderr)
        return 2
    try:
        choose_dtype(options.dtype, choose_device(options.device))
        start(
            options.model or ["demo"],
            host=options.host,
            port=options.port,
            share=options.share,
            device=options.device,
            dtype=options.dtype,
            limits=Limits(largest=options.max_size, steps=options.max_steps),
        )
    except (ValueError, OSError) as error:
        print(f"agentsd: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="demo.py", description="See in a browser what agent attention does: Stable Diffusion, ToMeSD and AgentSD."
    )
    parser.add_argument(
        "--model", action="append", metavar="demo|ID|FOLDER|FILE",
        help="a model to offer (FILE: a .safetensors checkpoint), also several times; only these are ever loaded "
        "(default: demo, the built-in one)",
    )  # fmt: skip
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s, this machine)")
    parser.add_argument("--port", type=_port, help="default: the first free one from 7860")
    parser.add_argument("--share", action="store_true", help="make a public address, through Gradio's servers")
    parser.add_argument("--device", help="cuda, mps or cpu; default: the best there is")
    parser.add_argument("--dtype", help="float32, float16 or bfloat16; default: float16 on cuda, float32 elsewhere")
    parser.add_argument(
        "--max-size",
        type=_multiple_of_8,
        default=1024,
        metavar="PX",
        help="largest height and width of a request (default: %(default)s)",
    )
    parser.add_argument(
        "--max-steps",
        type=_positive,
        default=150,
        metavar="N",
        help="most denoising steps of a request (default: %(default)s)",
    )
    return parser


def _port(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 65535:
        raise argparse.ArgumentTypeError(f"{value}: must be an integer in 1 … 65535")
    return value


def _positive(text: str) -> int:
    value = int(text)
    if not 1 <= value <= 999:
        raise argparse.ArgumentTypeError(f"{value}: must be an integer in 1 … 999")
    return value


def _multiple_of_8(text: str) -> int:
    value = int(text)
    if not 64 <= value <= 8192 or value % 8:
        raise argparse.ArgumentTypeError(f"{value}: must be a multiple of 8 in 64 … 8192")
    return value


if __name__ == "__main__":
    sys.exit(main())
