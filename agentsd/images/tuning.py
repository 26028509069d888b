"""Tuning: what `tune` measured, which settings it recommends, and both as text."""

from __future__ import annotations

import dataclasses
import json
import platform
import statistics
import sys
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from .rounds import STABLE, is_stable

UNPATCHED = "unpatched"
PAYS = 1.03
"""Settings pay where a run's UNet calls take less than the unpatched ones by this factor."""
LEAVE = "leave it unpatched"


@dataclass(frozen=True)
class Candidate:
    """One way to run the model.

    Attributes:
        name: the preset's, or what it does.
        settings: keyword arguments of apply_patch; None for the unpatched model.
        rounds: seconds of a run's UNet calls, by each round's times.
        calls: median seconds of a call by kind: "whole, agent", "cached, merge" …; unpatched, "whole" alone.
        plan: how many calls of each kind the run has.
    """

    name: str
    settings: dict[str, Any] | None
    rounds: tuple[float, ...]
    calls: dict[str, float] = field(default_factory=dict)
    plan: dict[str, int] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        """Of a run's UNet calls, the median over the rounds."""
        return statistics.median(self.rounds)

    @property
    def stable(self) -> bool:
        """Whether it was timed more than once, and its rounds differ by at most 15 %."""
        return is_stable(self.rounds)

    @property
    def caches(self) -> bool:
        """Whether some of its calls are cached."""
        return any(kind.startswith("cached") for kind in self.plan)

    @property
    def code(self) -> str:
        """The line of code that patches a pipeline so."""
        if self.settings is None:
            return LEAVE
        arguments = ", ".join(["pipe", *[f"{name}={json.dumps(value)}" for name, value in self.settings.items()]])
        return f"agentsd.apply_patch({arguments})"


@dataclass(frozen=True, repr=False)
class Tuning:
    """What `tune` measured; `print` shows a table.

    Attributes:
        machine: device, driver and versions.
        height, width: image size in pixels.
        steps, scheduler, batch_size: of the run whose time is computed.
        unpatched: the model as it is.
        candidates: every preset, and the paper's method in one phase only.
        failed: presets that could not be timed, with the reason.
    """

    machine: dict[str, str]
    height: int
    width: int
    steps: int
    scheduler: str
    batch_size: int
    unpatched: Candidate
    candidates: tuple[Candidate, ...]
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def stable(self) -> bool:
        """Whether every timing is."""
        return self.unpatched.stable and all(one.stable for one in self.candidates)

    def speed_up(self, candidate: Candidate) -> float:
        """Seconds of the unpatched run over those of a candidate."""
        return self.unpatched.seconds / candidate.seconds

    def pays(self, candidate: Candidate) -> bool:
        """Whether a candidate is faster by 3 %, and in every round faster than the unpatched model in any."""
        return self.speed_up(candidate) >= PAYS and max(candidate.rounds) < min(self.unpatched.rounds)

    @cached_property
    def best(self) -> Candidate:
        """The fastest that pays; the unpatched model where nothing does."""
        return self._best(self.candidates)

    @cached_property
    def best_without_caching(self) -> Candidate:
        """The fastest that pays and caches nothing, which stays nearer to the unpatched image."""
        return self._best(tuple(one for one in self.candidates if not one.caches))

    def _best(self, candidates: tuple[Candidate, ...]) -> Candidate:
        return min((one for one in candidates if self.pays(one)), key=lambda one: one.seconds, default=self.unpatched)

    @property
    def recommended(self) -> dict[str, Any] | None:
        """Keyword arguments of apply_patch for the fastest settings that pay; None where nothing pays."""
        return self.best.settings

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain data, ready for JSON."""

        def row(one: Candidate) -> dict[str, Any]:
            found = dataclasses.asdict(one) | {"rounds": list(one.rounds), "seconds": one.seconds, "stable": one.stable}
            return found | {"speed_up": self.speed_up(one), "pays": self.pays(one)}

        return {
            "machine": self.machine,
            "height": self.height,
            "width": self.width,
            "steps": self.steps,
            "scheduler": self.scheduler,
            "batch_size": self.batch_size,
            "unpatched": row(self.unpatched),
            "candidates": [row(one) for one in self.candidates],
            "failed": self.failed,
            "recommended": self.recommended,
            "code": self.best.code,
            "recommended_without_caching": self.best_without_caching.settings,
        }

    def __str__(self) -> str:
        machine = self.machine
        images = "1 image" if self.batch_size == 1 else f"{self.batch_size} images"
        lines = [
            f"{machine['model']}, {self.height}×{self.width} px (height × width), {images}, {machine['dtype']}, on "
            f"{machine['device']}",
            f"UNet calls of {self.steps} steps of {self.scheduler}:",
            "",
            *_aligned([_HEADER, *[self._row(one) for one in (self.unpatched, *self.candidates)]]),
        ]
        lines += [f"{name}: not timed, {reason}" for name, reason in self.failed.items()]
        return "\n".join([*lines, "", self._how_timed(), "", *self._recommendation()])

    __repr__ = __str__  # shown where a notebook or a prompt shows a value

    def share(self) -> str:
        """A row for a Markdown table of machines: device, versions, size and figures; nothing that names a user."""
        machine = self.machine
        versions = ", ".join(machine[key] for key in ("driver", "torch", "diffusers", "agentsd") if machine.get(key))
        size = f"{self.width}×{self.height}" + (f" × {self.batch_size}" if self.batch_size > 1 else "")
        figures = [f"{one.name} {self._said(one)}" for one in self.candidates]
        run = f"{self.unpatched.seconds:.3g} s, {self.steps} steps of {self.scheduler}"
        cells = [machine["device"], versions, machine["model"], machine["dtype"], size, run, "; ".join(figures)]
        return "| " + " | ".join(cell.replace("|", "/") for cell in cells) + " |"

    def _said(self, candidate: Candidate) -> str:
        steady = candidate.stable and self.unpatched.stable
        return f"{self.speed_up(candidate):.2f}×" if steady else "unstable"

    def _row(self, one: Candidate) -> tuple[str, ...]:
        def call(kind: str) -> str:
            seconds = one.calls.get(kind, one.calls.get("whole"))
            return "" if seconds is None else _call_text(seconds)

        cached = [one.calls[kind] for kind in ("cached, agent", "cached, merge") if kind in one.calls]
        total = sum(one.plan.values())
        whole = sum(count for kind, count in one.plan.items() if kind.startswith("whole"))
        seconds = f"{one.seconds:.2f} s" if one.stable else f"about {one.seconds:.2g} s"
        said = "" if one is self.unpatched else self._said(one)
        return (
            one.name, seconds, said, call("whole, agent"), call("whole, merge"),
            _call_text(max(cached)) if cached else "", f"{whole} of {total}",
        )  # fmt: skip

    def _how_timed(self) -> str:
        rounds = len(self.unpatched.rounds)
        if rounds == 1:
            return "One round after a warm-up: give more to have speed-ups."
        text = f"Medians of {rounds} interleaved rounds after a warm-up"
        if self.stable:
            return f"{text}."
        return (
            f"{text}. Unstable: rounds of one row differ by more than {STABLE - 1:.0%}; try again on an idle machine."
        )

    def _recommendation(self) -> list[str]:
        def said(one: Candidate) -> str:
            if one is self.unpatched:
                return f"{LEAVE}: no settings are faster by {PAYS - 1:.0%} or more"
            steady = one.stable and self.unpatched.stable
            return f"{one.code}  # {self._said(one) if steady else 'faster in every round, by unstable timings'}"

        lines = [f"Fastest here:           {said(self.best)}"]
        if self.best.caches or self.best is self.unpatched:
            lines.append(f"Without step caching:   {said(self.best_without_caching)}")
        if self.best is self.unpatched:
            return lines[:1]
        return [*lines, "These are seconds alone; `agentsd generate --compare` shows how near the image stays."]


_HEADER = ("", "run", "speed-up", "agent call", "later call", "cached call", "whole calls")


def _call_text(seconds: float) -> str:
    return f"{1000 * seconds:.1f} ms" if seconds < 1 else f"{seconds:.2f} s"


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return [
        "  ".join([row[0].ljust(widths[0]), *[cell.rjust(width) for cell, width in zip(row[1:], widths[1:])]]).rstrip()
        for row in rows
    ]


def machine(pipe: Any, device: torch.device) -> dict[str, str]:
    """The device, its driver and the versions that a time depends on."""
    found = {"device": _device_name(device), "model": type(pipe).__name__, "dtype": _dtype_name(pipe.unet.dtype)}
    if device.type == "cuda":
        found["driver"] = f"driver {_driver()}, CUDA {torch.version.cuda}"
    for package in ("torch", "diffusers", "agentsd"):
        found[package] = f"{package} {version(package)}"
    return found | {"python": platform.python_version(), "platform": platform.system()}


def _dtype_name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    name = platform.processor() or platform.machine()
    if sys.platform == "linux" and device.type == "cpu":
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
        threads = torch.get_num_threads()
        return f"{name}, {threads} thread{'s' * (threads > 1)}"
    return f"{device.type} on {name}"


def _driver() -> str:
    """The version of NVIDIA's driver, as the driver itself says it on Linux."""
    file = Path("/sys/module/nvidia/version")
    try:
        return file.read_text(encoding="utf-8").strip()
    except OSError:
        return "unknown"
