"""run_command: turn errors of a command into one sentence and an exit code; at_least: a count. Nothing heavy."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from collections.abc import Callable


def at_least(least: int) -> Callable[[str], int]:
    """A type for argparse: an integer that is not below a bound."""

    def convert(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            value = least - 1
        if value < least:
            raise argparse.ArgumentTypeError(f"{text!r}: must be an integer, at least {least}")
        return value

    return convert


def run_command(name: str, work: Callable[[], int]) -> int:
    """Run a command that can be resumed.

    Args:
        name: name of the command, printed before each sentence.
        work: returns the exit code; does its heavy imports itself, so that --help answers at once.

    Returns:
        That exit code; 1 stopped or failed, 2 wrong input.
    """
    for category in (FutureWarning, DeprecationWarning):  # between libraries, not for the user
        warnings.filterwarnings("ignore", category=category)
    from .protocol import BenchError

    try:
        return work()
    except BenchError as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: stopped; give the same command again to resume", file=sys.stderr)
        return 1
    except BrokenPipeError:  # of `fid_bench.py … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except OSError as error:
        print(f"{name}: {error}; correct that and give the same command again to resume", file=sys.stderr)
        return 2
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        print(f"{name}: out of memory: try a smaller --size or --batch-size, or --dtype float16", file=sys.stderr)
        return 1
