"""Which run, position and stream a UNet call has: known from the timestep that it is given.

A diffusers pipeline iterates over its scheduler's timesteps, so that the timestep of each call is a view of that
tensor: the same storage is the same run, the offset in it the position, and the storage's other values are the whole
schedule. They are read to the host once in a run, so that no later call waits for the device. In a loop by hand whose
timesteps say less, positions are the falling timesteps and a run begins where they rise.
"""

from __future__ import annotations

import dataclasses
import sys
from collections import deque
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from ..step_cache import StepCache

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

    def goes_over(self, timesteps: Tensor) -> bool:
        """Whether these are timesteps of this loop or some of it."""
        return timesteps.untyped_storage()._cdata == self.storage._cdata

    def position(self, timestep: Tensor) -> int | None:
        """Where in the loop a timestep stands; None where it is none of the loop's."""
        if not self.goes_over(timestep):
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

    def has_loop_of(self, other: Run) -> bool:
        """Whether both go over one tensor of timesteps."""
        if self.loop is None or other.loop is None:
            return False
        return self.loop.storage._cdata == other.loop.storage._cdata

    def timestep(self) -> float:
        """Of the last call."""
        return -self.position if self.loop is None else self.loop.timesteps[int(self.position)]

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
        self._displaced: deque[Run] = deque(maxlen=_REMEMBERED)

    def new_run(self) -> None:
        """The next call begins a run."""
        self.run = None

    def follow(self, timestep: Tensor | float) -> tuple[tuple[float, ...], bool]:
        """Find the run of a call, `self.run` from then on.

        Returns:
            The timesteps of the call, one or one for each sample; and whether a run begins with it.
        """
        if isinstance(timestep, Tensor):
            if timestep.numel() > 1 and any(timestep.stride()):
                values = tuple(float(value) for value in timestep.flatten().tolist())
                if len(set(values)) > 1:
                    self.run = None  # no run: a timestep of its own for each sample
                    return values, True
                return self._follow_by_hand(values[0])
            if timestep.untyped_storage().nbytes() > timestep.element_size():
                return self._follow_loop(timestep)
        return self._follow_by_hand(float(timestep))

    def in_progress(self, frame: FrameType) -> bool:
        """Whether a frame goes over the timesteps of a run that has not ended."""
        run = self.run
        if run is None or run.loop is None or run.at_end():
            return False
        return any(_shares(value, run.loop.storage) for value in list(frame.f_locals.values()))

    def _follow_loop(self, timestep: Tensor) -> tuple[tuple[float, ...], bool]:
        run = self.run
        if run is not None and run.loop is not None:
            position = run.loop.position(timestep)
            if position is not None and run.goes_on_at(position):
                return (run.timestep(),), False
        other = self._no_loop
        if other is not None and (index := other.position(timestep)) is not None:
            return self._follow_by_hand(other.timesteps[index])
        loop = find_loop(timestep)
        position = loop.position(timestep)
        assert position is not None  # it is one of the loop's own
        if not _falls(loop.timesteps):
            self._no_loop = loop
            return self._follow_by_hand(loop.timesteps[position])
        self._begin(Run(loop, position))
        return (loop.timesteps[position],), True

    def _follow_by_hand(self, timestep: float) -> tuple[tuple[float, ...], bool]:
        run = self.run
        if run is not None and run.loop is None and run.goes_on_at(-timestep):
            return (timestep,), False
        self._begin(Run(None, -timestep))
        return (timestep,), True

    def _begin(self, run: Run) -> None:
        before, self.run = self.run, run
        if run.loop is not None:
            cut = [one for one in self._displaced if one.has_loop_of(run)]
            run.takes_turns = any(one.position < run.position for one in cut)
        if before is not None and before.loop is not None and not before.at_end() and not before.has_loop_of(run):
            stopped = Run(before.loop, before.position)
            self._displaced = deque([one for one in self._displaced if not one.has_loop_of(stopped)], _REMEMBERED)
            self._displaced.append(stopped)

    def __getstate__(self) -> dict[str, Any]:
        return {}  # a copy has runs of its own

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__()  # type: ignore[misc]


def find_loop(timestep: Tensor) -> Loop:
    """Find what a timestep is one of, and read it to the host.

    A pipeline may go over a part of its scheduler's timesteps (img2img begins late, SDXL's `denoising_end` ends early),
    which only the tensor in its loop knows: the innermost caller's local variable that shares the storage. Where there
    is none, all values of the storage are the schedule.
    """
    storage = timestep.untyped_storage()
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_MOST_FRAMES):
        if frame is None:
            break
        for value in list(frame.f_locals.values()):
            if _shares(value, storage) and value.ndim == 1 and value.numel() > 1 and value.stride(0) > 0:
                loop = Loop(storage, value.storage_offset(), value.stride(0), ())
                last = loop.first + (value.numel() - 1) * loop.stride
                offset = timestep.storage_offset()
                if loop.first <= offset <= last and (offset - loop.first) % loop.stride == 0:
                    return dataclasses.replace(loop, timesteps=_read(value))
        frame = frame.f_back
    whole = torch.empty(0, dtype=timestep.dtype, device=timestep.device).set_(storage)
    return Loop(storage, 0, 1, _read(whole))


def _shares(value: Any, storage: torch.UntypedStorage) -> bool:
    if type(value) is not Tensor or value.layout is not torch.strided:
        return False
    try:
        return value.untyped_storage()._cdata == storage._cdata
    except (RuntimeError, NotImplementedError):  # wrapped by a transform of torch.func
        return False


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
