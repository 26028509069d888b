"""Step caching: which calls of a sampling run may reuse a feature of an earlier one, and what the feature is then.

Neighbouring steps change most of a UNet's features little. A *whole* call runs everything and keeps one feature: the
hidden states that enter the recomputed end of the last up block. A *cached* call recomputes that end on a kept
feature. What is decided here knows no host: diffusers (`agentsd/unet`) and ComfyUI say which run, position and stream a
call has, and skip parts of their networks.

    plan = plan_whole_calls(phases, interval=3, steps=25)   # True where a call of the run is whole
    cache = StepCache(interval=3, order=1, plan=plan)       # all state of one run; a new run is a new one
    feature = cache.begin(position, stream, phase, signature)   # [B, C, H, W], None where the call is whole
    cache.end(stream, kept)                                 # what the whole call computed

Source: Ma et al., "DeepCache: Accelerating Diffusion Models for Free" (arXiv 2312.00858), section 3, for the reuse;
Liu et al., "From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers" (arXiv 2503.06923), section
3.2, for the extrapolation.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Hashable
from functools import lru_cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

# A run of fewer steps is whole: LCM, Turbo and Lightning take 8 steps or fewer.
FEWEST_STEPS = 10

# In a run whose end is not known, steps further apart than this part of it are whole.
_WIDEST_STEP = 0.1

# The longest part of the run over which a feature is reused: 12 and 20 steps with a large interval
# would fall to 30 dB of the unpatched image. 50 steps at interval 5 span 0.08 of the run, 30 steps 0.13. In a
# planned run too: 25 DDIM steps at interval 5 have 37.3 dB with 7 whole calls, and unbounded 32.8 with 6 (one image).
_LONGEST_REUSE = 0.14

# How much of the line through two features an extrapolation follows.
_SLOPE = 0.5

# More streams than these keep nothing, as each keeps a feature or two.
MOST_STREAMS = 16


@dataclasses.dataclass
class CallCounts:
    """UNet calls of one run."""

    whole: int = 0
    cached: int = 0


@lru_cache(maxsize=256)
def plan_whole_calls(phases: tuple[Hashable, ...], interval: int, steps: int) -> tuple[bool, ...]:
    """Plan a run whose calls are known: the first and last one and those where the phase changes are whole.

    Between them whole calls lie evenly, so that at most `interval` calls in a row share one.

    Args:
        phases: what each call of the run does, in order.
        interval: AgentConfig.cache_interval.
        steps: the run's number of steps; solvers of second order call twice in one.

    Returns:
        For each call whether it is whole.
    """
    count = len(phases)
    if interval == 1 or steps < FEWEST_STEPS:
        return (True,) * count
    widest = min(interval, 1 + int(_LONGEST_REUSE * count))
    changes = [i for i in range(1, count) if phases[i] != phases[i - 1]]
    anchors = sorted({0, *changes, count - 1})
    whole = set(anchors)
    for first, last in pairwise(anchors):
        gaps = -(-(last - first) // widest)
        whole.update(first + round(i * (last - first) / gaps) for i in range(1, gaps))
    return tuple(i in whole for i in range(count))


@dataclasses.dataclass
class _Track:
    """What is known of one stream of a run.

    Attributes:
        signature, phase, position: of its last call.
        features: (position, feature) of its last whole calls, the newest first.
        cached_in_a_row: cached calls since the last whole one.
        step: width of the last step that had one.
    """

    signature: Any
    phase: Hashable
    position: float
    features: list[tuple[float, Tensor]] = dataclasses.field(default_factory=list)
    cached_in_a_row: int = 0
    step: float = 0.0


class StepCache:
    """All state of one run with step caching; a new run is a new StepCache.

    A *position* is a place in the run: the index of a call with a plan, and without one the part of the run that lies
    before it, 0 … 1. Positions rise or stay. The k-th call at a position belongs to *stream* k: guidance in two calls,
    what other guiders add, views, windows.

    Args:
        interval: at most so many calls in a row share one whole call.
        order: 0 reuses the newest feature, 1 goes a part of the way on the line through the last two.
        plan: which positions are whole (`plan_whole_calls`); None where the end of the run is not known.

    Attributes:
        counts: whole and cached calls so far.
        full: there were more streams than are kept.
    """

    def __init__(self, interval: int, order: int, plan: tuple[bool, ...] | None = None):
        self.interval = interval
        self.order = order
        self.plan = plan
        self.counts = CallCounts()
        self.full = False
        self._tracks: dict[int, _Track] = {}
        self._position: float | None = None
        self._previous: float | None = None  # the position before it
        self._calls = 0  # at this position so far
        self._calls_before = 0  # at the position before it
        self._uneven = False  # the position before this one had more or fewer calls than the one before that

    def begin(
        self, position: float, stream: int, phase: Hashable, signature: Any, whole: bool = False
    ) -> Tensor | None:
        """Decide whether a call is cached.

        Args:
            position, stream, phase: of the call.
            signature: whatever else a feature depends on (conditioning, batch, size, dtype, device), compared by ==.
            whole: the host cannot skip anything in this call.

        Returns:
            The feature that the call reuses, a new tensor, as hosts may write into it; None where the call is whole.
        """
        self._move_to(position)
        self._calls = max(self._calls, stream + 1)
        track = self._tracks.get(stream)
        if track is not None and track.signature != signature:
            track = None  # also for a line: one through features of two kinds leads nowhere
        cached = track is not None and not whole and self._may_reuse(track, position, phase)
        if stream >= MOST_STREAMS:
            self.full = True
        else:
            before = track or _Track(signature, phase, position)
            self._tracks[stream] = track = dataclasses.replace(
                before,
                signature=signature,
                phase=phase,
                position=position,
                cached_in_a_row=before.cached_in_a_row + 1 if cached else 0,
                step=_step_to(before, position),
            )
        if not cached or track is None:
            self.counts.whole += 1
            return None
        self.counts.cached += 1
        return _forecast(track.features, position)

    def expects_cached(self, position: float, phase: Hashable) -> bool:
        """Whether the only call of the next position would be cached, if nothing else changes."""
        track = self._tracks.get(0)
        return (
            track is not None
            and self._position is not None
            and self._position < position
            and self._calls == 1
            and self._calls_before in (0, 1)
            and self._may_reuse(track, position, phase, previous=self._position)
        )

    def keep_none(self, position: float, stream: int) -> None:
        """Count a whole call that keeps nothing, as with gradients; what was kept is freed."""
        self._move_to(position)
        self._calls = max(self._calls, stream + 1)
        self._tracks.clear()
        self.counts.whole += 1

    def end(self, stream: int, kept: Tensor | None) -> None:
        """End a call: keep the feature of a whole one, and free all after the last call of a planned run.

        Args:
            stream: of the call.
            kept: [B, C, H, W] of a whole call; None of a cached one.
        """
        track = self._tracks.get(stream)
        if track is not None and kept is not None:
            older = [entry for entry in track.features if entry[0] != track.position]
            track.features = [(track.position, kept), *older][: self.order + 1]
        if self.plan is not None and self._position is not None and self._position >= len(self.plan) - 1:
            if self._calls >= self._calls_before:
                self._tracks.clear()

    def drop(self, stream: int) -> None:
        """Free what a stream keeps: its call failed."""
        self._tracks.pop(stream, None)

    def num_kept(self) -> int:
        """How many features are kept."""
        return sum(len(track.features) for track in self._tracks.values())

    def _move_to(self, position: float) -> None:
        if self._position is None or position > self._position:
            self._uneven = self._calls_before not in (0, self._calls)
            self._calls_before, self._calls, self._previous = self._calls, 0, self._position
            self._position = position

    def _may_reuse(self, track: _Track, position: float, phase: Hashable, previous: float | None = None) -> bool:
        """Whether a call that goes on with a stream may be cached."""
        # A stream that was not called at the position before has lost its place among the others.
        previous = self._previous if previous is None else previous
        if not track.features or track.phase != phase or self._uneven or track.position != previous:
            return False
        if self.plan is not None:
            first, last = int(track.position) + 1, int(position)
            return last < len(self.plan) and not any(self.plan[first : last + 1])
        return (
            track.cached_in_a_row < self.interval - 1
            and _step_to(track, position) <= _WIDEST_STEP + 1e-6
            and position - track.features[0][0] <= _LONGEST_REUSE + 1e-6
        )


def _step_to(track: _Track, position: float) -> float:
    """Width of the step that leads to a call; the second call at a position has the latents of another such step."""
    return position - track.position or track.step


def _forecast(features: list[tuple[float, Tensor]], position: float) -> Tensor:
    """The feature at a position, from the last whole calls: the newest one, or one on the line through the last two.

    It goes half of the line's way from the newest. On the demo model (25 DDIM steps, 10 images) the whole way is 1.2 dB
    nearer to the unpatched image than the newest feature alone, but further away for 4 images; half of it is 1.8 dB
    nearer, and further away for 1. In planned runs (one image, interval 3, nothing merged) half of it is 0.4 dB nearer
    than the whole way with DDIM, and 1.5 dB with Euler.
    """
    newest_position, newest = features[0]
    if len(features) == 1:
        return newest.clone()
    older_position, older = features[1]
    ahead = (position - newest_position) / (newest_position - older_position)
    return torch.lerp(older, newest, 1 + _SLOPE * ahead)
