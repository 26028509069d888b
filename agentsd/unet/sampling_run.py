"""Which run, position and stream a UNet call has: known from the timestep that it is given.

A diffusers pipeline iterates over its scheduler's timesteps, so that the timestep of each call is a view of that
tensor: the same storage is the same run, the offset in it the position, and the storage's other values are the whole
schedule. They are read to the host once in a run, so that no later call waits for the device. In a loop by hand whose
timesteps say less, positions are the falling timesteps and a run begins where they rise.
"""

from __future__ import annotations

import dataclasses
import sys
from itertools import islice
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from ..step_cache import StepCache
from .threads import callers

# Latents noised anew are as far apart as independent noise, to within a few percent; a step of an ancestral sampler of
# 12 steps has about 0.65 of that.
_INDEPENDENT = 0.85

# Where a step itself is as wide as this part of independent noise (the last one, to no noise), nothing can be told.
_UNTOLD = 0.7

_MOST_FRAMES = 100
_REMEMBERED = 8


@dataclasses.dataclass(frozen=True)
class Loop:
    """The timesteps that a loop goes over.

    Attributes:
        storage: of the tensor; held, so that its address is not used again.
        first, stride: offset of the first timestep in it, and from one to the next.
        timesteps: their values.
    """

    storage: torch.UntypedStorage
    first: int
    stride: int
    timesteps: tuple[float, ...]

    def shares(self, value: Any) -> bool:
        """Whether a value is a tensor of timesteps of this loop."""
        if type(value) is not Tensor or value.layout is not torch.strided:
            return False
        try:
            return value.untyped_storage()._cdata == self.storage._cdata
        except (RuntimeError, NotImplementedError):  # wrapped by a transform of torch.func
            return False

    def position(self, timestep: Tensor) -> int | None:
        """Where in the loop a timestep stands; None where it is none of the loop's."""
        if timestep.untyped_storage()._cdata != self.storage._cdata:
            return None
        steps, rest = divmod(int(timestep.storage_offset()) - self.first, self.stride)
        return steps if rest == 0 and 0 <= steps < len(self.timesteps) else None


class Run:
    """One sampling run; made anew when another one begins.

    Attributes:
        loop: what is known of its timesteps; None in a loop by hand.
        position: of the last call: an index into the loop, or without one the timestep, negated.
        calls: how many calls there were at this position, the last one included.
        cache: its step cache, None without step caching.
        latents: (timestep, latent) of the last call of each stream, while latents are compared.
        whole: nothing of the run is cached.
        takes_turns: the run was cut short by another one, and comes back.
        whole_shape: shape of the latent in the last whole call.
    """

    def __init__(self, loop: Loop | None, position: float):
        self.loop = loop
        self.position = self._first = position
        self.calls = 1
        self.cache: StepCache | None = None
        self.latents: dict[int, tuple[float, Tensor]] = {}
        self.whole = False
        self.takes_turns = False
        self.whole_shape: torch.Size | None = None

    @property
    def stream(self) -> int:
        """Which of the streams the last call belongs to: the k-th call at a position to stream k."""
        return self.calls - 1

    def goes_on_at(self, position: float) -> bool:
        """Note a call at a position, if it can be the next one of this run."""
        if position < self.position:
            return False
        self.calls = self.calls + 1 if position == self.position else 1
        self.position = position
        return True

    def at_begin(self) -> bool:
        """Whether the last call is at the run's first position."""
        return self.position == self._first

    def at_end(self) -> bool:
        """Whether the last call is known to be the run's last."""
        return self.loop is not None and self.position == len(self.loop.timesteps) - 1


class RunTracker:
    """Tells runs apart. One per patch.

    Attributes:
        run: the run of the last call; None before the first, and where a call belonged to none.
    """

    def __init__(self) -> None:
        self.run: Run | None = None
        self._no_loop: Loop | None = None  # a storage whose values are no schedule, read once
        # Where loops were left for another one, by the storage's address; the last few. A loop holds its storage.
        self._left_at: dict[int, tuple[Loop, float]] = {}

    def new_run(self) -> None:
        """The next call begins a run."""
        self.run = None

    def follow(self, timestep: Tensor | float) -> tuple[float, ...]:
        """Find the run of a call, `self.run` from then on; returns its timesteps, one or one for each sample."""
        if isinstance(timestep, Tensor):
            if timestep.numel() > 1 and any(timestep.stride()):
                values = tuple(float(value) for value in timestep.flatten().tolist())
                if len(set(values)) > 1:
                    self.run = None  # no run: a timestep of its own for each sample
                    return values
                return (self._follow_by_hand(values[0]),)
            if timestep.untyped_storage().nbytes() > timestep.element_size():
                return (self._follow_loop(timestep),)
        return (self._follow_by_hand(float(timestep)),)

    def in_progress(self, frame: FrameType) -> bool:
        """Whether a frame goes over the timesteps of a run that has not ended."""
        run = self.run
        if run is None or run.loop is None or run.at_end():
            return False
        return any(run.loop.shares(value) for value in list(frame.f_locals.values()))

    def _follow_loop(self, timestep: Tensor) -> float:
        run = self.run
        if run is not None and run.loop is not None:
            position = run.loop.position(timestep)
            if position is not None and run.goes_on_at(position):
                return run.loop.timesteps[position]
        loop = self._no_loop
        if loop is None or (position := loop.position(timestep)) is None:
            loop = find_loop(timestep)
            position = loop.position(timestep)
            assert position is not None  # it is one of the loop's own
            if _falls(loop.timesteps):
                self._begin(Run(loop, position))
                return loop.timesteps[position]
            self._no_loop = loop
        return self._follow_by_hand(loop.timesteps[position])

    def _follow_by_hand(self, timestep: float) -> float:
        run = self.run
        if run is None or run.loop is not None or not run.goes_on_at(-timestep):
            self._begin(Run(None, -timestep))
        return timestep

    def _begin(self, run: Run) -> None:
        before, self.run = self.run, run
        address = None
        if run.loop is not None:
            address = run.loop.storage._cdata
            run.takes_turns = address in self._left_at and self._left_at[address][1] < run.position
        if before is None or before.loop is None or before.at_end() or before.loop.storage._cdata == address:
            return
        left = before.loop.storage._cdata
        self._left_at.pop(left, None)
        self._left_at[left] = (before.loop, before.position)
        if len(self._left_at) > _REMEMBERED:
            self._left_at.pop(next(iter(self._left_at)))

    def __reduce__(self) -> tuple:
        return RunTracker, ()  # a copy has runs of its own


def find_loop(timestep: Tensor) -> Loop:
    """Find what a timestep is one of, and read it to the host.

    A pipeline may go over a part of its scheduler's timesteps (img2img begins late, SDXL's `denoising_end` ends early),
    which only the tensor in its loop knows: the innermost caller's local variable that shares the storage. Where there
    is none, all values of the storage are the schedule.
    """
    storage = timestep.untyped_storage()
    whole = Loop(storage, 0, 1, ())
    for frame in islice(callers(sys._getframe(1)), _MOST_FRAMES):
        for value in list(frame.f_locals.values()):
            if whole.shares(value) and value.ndim == 1 and value.numel() > 1 and value.stride(0) > 0:
                loop = Loop(storage, value.storage_offset(), value.stride(0), _read(value))
                if loop.position(timestep) is not None:
                    return loop
    values = torch.empty(0, dtype=timestep.dtype, device=timestep.device).set_(storage)
    return dataclasses.replace(whole, timesteps=_read(values))


def _read(timesteps: Tensor) -> tuple[float, ...]:
    return tuple(float(value) for value in timesteps.tolist())


def _falls(timesteps: tuple[float, ...]) -> bool:
    """Whether timesteps fall, as a sampling run's do; solvers of second order go up a little in between."""
    rises = sum(max(0.0, later - one) for one, later in zip(timesteps, timesteps[1:]))
    return timesteps[0] > timesteps[-1] and rises < 0.5 * (timesteps[0] - timesteps[-1])


def continues(before: Tensor, after: Tensor, levels: tuple[tuple[float, float], tuple[float, float]]) -> bool | None:
    """Whether a latent is another one some steps later. Reads from the device.

    In x = a x0 + b ε, a step of one run is about |b' − a' b / a| wide, as ε changes little; latents of one image
    that were noised anew are √(b'² + (a' b / a)²) apart, and those of two images more.

    Args:
        before, after: [B, C, …] two latents of one shape.
        levels: (a, b) of each.

    Returns:
        None where the step is so wide that it cannot be told.
    """
    (signal, noise), (later_signal, later_noise) = levels
    ratio = later_signal / max(signal, 1e-6)
    independent = (later_noise**2 + (ratio * noise) ** 2) ** 0.5
    if abs(later_noise - ratio * noise) > _UNTOLD * independent:
        return None
    apart = (after.float() - ratio * before.float()).flatten(1).square().mean(1).sqrt().amax()
    return bool(apart < _INDEPENDENT * independent)
