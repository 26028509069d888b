"""Progress on stderr: the pipeline's bar on a terminal, one line per run elsewhere, and the time left in all."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from typing import Any, TextIO

from .compare import SECONDS_ENOUGH, USUAL_ROUNDS
from .methods import METHODS

_NARROW = 80  # columns below which tqdm would cut its rate off
_SHORT_BAR = "{desc}: {n_fmt}/{total_fmt} {rate_fmt}"


class Progress:
    """Shows the runs of a pipeline as they begin and end.

    Args:
        pipe: the pipeline, whose progress bar is set before each run.
        steps: of each run but the warm-ups.
        stream: where to write; None takes stderr.
    """

    def __init__(self, pipe: Any, steps: int, stream: TextIO | None = None):
        self.pipe = pipe
        self.steps = steps
        self.stream = stream or sys.stderr
        self.on_terminal = self.stream.isatty()

    def single(self, label: str) -> None:
        """One run begins."""
        self._set_bar(label, label)
        self._line(f"{label}: {self.steps} steps …")

    def _set_bar(self, label: str, short: str) -> None:
        if not self.on_terminal:
            self.pipe.set_progress_bar_config(disable=True)
        elif self._columns() < _NARROW:
            self.pipe.set_progress_bar_config(desc=short, leave=False, bar_format=_SHORT_BAR)
        else:
            self.pipe.set_progress_bar_config(desc=label, leave=False)

    def _line(self, text: str) -> None:
        """A line that a bar on a terminal makes needless."""
        if not self.on_terminal:
            self.say(text)

    def say(self, text: str) -> None:
        """Write a line at once."""
        print(text, file=self.stream, flush=True)

    def _columns(self) -> int:
        try:
            return os.get_terminal_size(self.stream.fileno()).columns
        except (OSError, ValueError, AttributeError):
            return 80


class ComparisonProgress(Progress):
    """What `compare_methods` calls on_round with: before each run it tells the last one's time and what is left.

    Args:
        methods: the methods compared.
        rounds: as asked for; None as compare_methods does.
        The others: as Progress takes them.
    """

    def __init__(self, pipe: Any, steps: int, methods: Sequence[str], rounds: int | None, stream: TextIO | None = None):
        super().__init__(pipe, steps, stream)
        self.methods = list(methods)
        self.rounds = rounds
        self.seconds: list[tuple[int, float]] = []  # (round, seconds) of the finished runs
        self.began = self.run_began = time.perf_counter()
        self.run: tuple[str, int] | None = None

    def __call__(self, method: str, number: int) -> None:
        """A run begins."""
        if self.run is None and not self.seconds:
            rounds = "1 round" if self.total_rounds() == 1 else f"{self.total_rounds()} rounds"
            self.say(f"{len(self.methods)} methods, {rounds} of {self.steps} steps, after a warm-up")
        self._end_run()
        name, left = METHODS[method], self.seconds_left()
        short = f"{name} {number}/{self.total_rounds()}" if number else f"{name} warm-up"
        self._set_bar(short if left is None else f"{short} ({duration(left)} left in all)", short)
        self.run, self.run_began = (method, number), time.perf_counter()

    def finish(self) -> None:
        """The last run has ended."""
        self._end_run()
        self.say(f"{duration(time.perf_counter() - self.began)} in all")

    def total_rounds(self) -> int:
        """How many rounds there will be, as far as the finished runs tell."""
        if self.rounds is not None:
            return self.rounds
        first = [seconds for number, seconds in self.seconds if number == 1]
        if len(first) < len(self.methods):
            return USUAL_ROUNDS
        expected = next((n for n in range(1, USUAL_ROUNDS) if n * sum(first) > SECONDS_ENOUGH), USUAL_ROUNDS)
        begun = max(number for number, _ in [*self.seconds, (self.run[1] if self.run else 0, 0.0)])
        return max(expected, begun)  # later rounds may have been faster than the first

    def seconds_left(self) -> float | None:
        """Time until all runs have ended, by the mean of the timed ones; None before the first has."""
        timed = [seconds for number, seconds in self.seconds if number > 0]
        if not timed:
            return None
        runs_left = self.total_rounds() * len(self.methods) - len(timed)
        return sum(timed) / len(timed) * max(0, runs_left)

    def _end_run(self) -> None:
        if self.run is None:
            return
        (method, number), self.run = self.run, None
        seconds = time.perf_counter() - self.run_began
        self.seconds.append((number, seconds))
        left = self.seconds_left()
        if number == 0:
            self._line(f"{METHODS[method]}, warm-up: {seconds:.2f} s")
            return
        then = f"; {duration(left)} left in all" if left else ""
        self._line(f"{METHODS[method]}, round {number} of {self.total_rounds()}: {seconds:.2f} s{then}")
        if self.on_terminal and then and sum(of > 0 for of, _ in self.seconds) == 1:
            self.say(f"{duration(left or 0)} left in all")


def duration(seconds: float) -> str:
    """Seconds in the largest unit that makes them a number of one to three digits: "45 s", "12 min", "2.5 h"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 90 * 60 else f"{seconds / 3600:.1f} h"
