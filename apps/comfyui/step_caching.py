"""StepCaching: which model calls of one sampling run are cached, and what each of them reuses.

ComfyUI says which run, step and conditionings a call has, so that nothing is guessed. One decision holds for all
conditionings of a step, as guidance amplifies what differs between them.
"""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from agentsd.config import AgentConfig, Phase
from agentsd.step_cache import StepCache, plan_whole_calls

from .skipping import chain

# Samplers of ComfyUI that call the model once for each sigma: the whole run is known when it begins.
_ONCE_A_STEP = frozenset(
    "sample_" + name
    for name in (
        "euler euler_cfg_pp euler_ancestral euler_ancestral_cfg_pp lms ddpm lcm ipndm ipndm_v deis dpmpp_2m "
        "dpmpp_2m_cfg_pp dpmpp_2m_sde dpmpp_2m_sde_gpu dpmpp_2m_sde_heun dpmpp_2m_sde_heun_gpu dpmpp_3m_sde "
        "dpmpp_3m_sde_gpu res_multistep res_multistep_cfg_pp res_multistep_ancestral res_multistep_ancestral_cfg_pp "
        "gradient_estimation gradient_estimation_cfg_pp unipc unipc_bh2 er_sde sa_solver"
    ).split()
)
# With it, also as "ddim", extrapolated features measured nearer to the unpatched latents than reused ones.
_STEADY = "sample_euler"
# It chooses its steps by how well two estimates agree, which a reused feature falsifies and agents disturb.
ADAPTIVE = "dpm_adaptive"

_BACK = 0.1
"""A run by hand that goes back by more than this part of it begins anew, as restarts do."""


@dataclass
class Batch:
    """All conditionings of one step, which are decided together.

    Attributes:
        stream: the how manieth in its step; perturbed-attention guidance adds a second one.
        features: (conditioning, n-th call with it) -> the feature that it reuses; None where the batch is whole.
        kept: the same of a whole batch, what was computed.
        begun: (phase, signature) that it began with.
        calls: model calls so far.
        broken: a call found no feature of its own and was whole.
    """

    stream: int
    features: dict[Hashable, Tensor] | None = None
    kept: dict[Hashable, Tensor] = field(default_factory=dict)
    begun: tuple[Phase, Any] | None = None
    calls: int = 0
    broken: bool = False
    _seen: Counter[Hashable] = field(default_factory=Counter)

    def keys(self, uuids: list[Any], batch: int) -> list[Hashable]:
        """Names of a call's features, one for each conditioning in it, or one for all where they do not part evenly."""
        names = list(uuids) if uuids and batch % len(uuids) == 0 else [tuple(uuids)]
        keys: list[Hashable] = []
        for name in names:
            keys.append((name, self._seen[name]))
            self._seen[name] += 1
        return keys

    def feature(self, keys: list[Hashable], batch: int) -> Tensor | None:
        """[B, C, H, W] that a call reuses; None where it is whole."""
        if self.features is None:
            return None
        parts = [self.features.get(key) for key in keys]
        if any(part is None or part.shape[0] * len(keys) != batch for part in parts):
            self.broken = True
            return None
        return torch.cat([part for part in parts if part is not None]) if len(parts) > 1 else parts[0]


class StepCaching:
    """Step caching of one run; a new run is a new one.

    Args:
        config: the settings.
        sampler: ComfyUI's sampler object.
        sigmas: noise levels of the run; the last one is where it ends.
        sampling: the model's `model_sampling`.
        percents: (start, end) of the run between which calls are cached.
    """

    def __init__(
        self, config: AgentConfig, sampler: Any, sigmas: list[float], sampling: Any, percents: tuple[float, float]
    ):
        self._config = config
        name = sampler_name(sampler)
        start, end = (float(sampling.percent_to_sigma(percent)) for percent in percents)
        self._inside = lambda sigma: end <= sigma <= start
        self._percents = _Percents(sampling)
        boundary = float(sampling.percent_to_sigma(config.early)) if config.early > 0 else math.inf
        self._phase = lambda sigma: Phase.AGENT if sigma >= boundary else Phase.MERGE
        steps = sigmas[:-1]
        self._sigmas: list[float] | None = None
        if calls_once_a_step(sampler) and all(later < one for one, later in zip(sigmas, sigmas[1:])):
            self._sigmas = steps
            phases = tuple((self._phase(sigma), self._inside(sigma)) for sigma in steps)
            plan = plan_whole_calls(phases, config.cache_interval, len(steps))
            plan = tuple(whole or not self._inside(sigma) for whole, sigma in zip(plan, steps))
            self._cache = StepCache(config.cache_interval, self._order(name == _STEADY), plan)
        else:
            self._cache = self._by_hand()
        self._position: float | None = None
        self._sigma = math.inf
        self._stream = 0
        self._layouts: dict[int, Any] = {}

    def begin_step(self, sigma: float) -> None:
        """Begin an evaluation of the sampler at a noise level."""
        before, self._sigma, self._stream = self._position, sigma, 0
        if self._sigmas is not None:
            index = 0 if before is None else int(before) + 1
            if index < len(self._sigmas) and math.isclose(sigma, self._sigmas[index], rel_tol=1e-4):
                self._position = index
                return
            # The sampler does not go over the sigmas one by one (noise added in between): what is known ends here.
            self._sigmas, before, self._cache = None, None, self._by_hand()
        position = self._percents(sigma)
        if before is not None and position < before - _BACK:
            before, self._cache = None, self._by_hand()
        # Each evaluation has a place of its own: solvers of second order go back a little, or stay.
        self._position = position if before is None else max(position, before + 1e-6)

    def begin_batch(self, conds: list[Any], x: Tensor, options: dict[str, Any], whole: bool) -> Batch:
        """Decide about all conditionings of a step.

        Args:
            conds: ComfyUI's lists of conditionings.
            x: [B, C, H, W] the noisy latent.
            options: ComfyUI's transformer_options.
            whole: they cannot be cached.
        """
        stream, self._stream = self._stream, self._stream + 1
        batch = Batch(stream)
        if self._position is None:
            return batch
        window = getattr(options.get("context_window"), "index_list", None)
        active = [cond for group in conds for cond in group or () if is_active(cond, self._sigma)]
        signature = (
            tuple(cond.get("uuid") for cond in active),
            tuple(id(one) for cond in active for one in active_controls(cond, self._sigma)),
            tuple(frame for cond in active for frame in _keyframes(cond.get("hooks"), self._sigma, options)),
            (x.shape, x.dtype, x.device),
            None if window is None else tuple(window),
        )
        whole = whole or not self._inside(self._sigma)
        batch.begun = phase, signature = self._phase(self._sigma), signature
        flat = self._cache.begin(self._position, stream, phase, signature, whole)
        if flat is not None:
            sizes = [math.prod(shape) for _, shape in self._layouts[stream]]
            parts = zip(self._layouts[stream], flat.split(sizes))
            batch.features = {key: part.view(shape) for (key, shape), part in parts}
        return batch

    def end_batch(self, batch: Batch, completed: bool) -> None:
        """Keep what a whole batch computed."""
        stream = batch.stream
        if batch.features is not None:
            if batch.broken or not completed:
                self._cache.drop(stream)
            else:
                self._cache.end(stream, None)
            return
        kinds = {(feature.dtype, feature.device) for feature in batch.kept.values()}
        if not completed or len(kinds) != 1 or self._position is None or batch.begun is None:
            self._cache.drop(stream)
            return
        layout = tuple((key, tuple(feature.shape)) for key, feature in batch.kept.items())
        if self._layouts.get(stream) != layout:
            # A line through features of different shapes leads nowhere (Deep Shrink that switches off).
            self._layouts[stream] = layout
            self._cache.drop(stream)
            self._cache.begin(self._position, stream, *batch.begun, whole=True)
        self._cache.end(stream, _flat(batch))

    def free(self) -> None:
        """Free all features."""
        self._cache = self._by_hand()
        self._layouts.clear()

    def num_kept(self) -> int:
        """How many features are kept."""
        return self._cache.num_kept()

    def _order(self, steady: bool) -> int:
        order = self._config.cache_order
        return int(steady) if isinstance(order, str) else order

    def _by_hand(self) -> StepCache:
        return StepCache(self._config.cache_interval, self._order(False))


class _Percents:
    """The part of a run that lies before a noise level, 0 … 1, as ComfyUI's percents count; computed when needed."""

    def __init__(self, sampling: Any):
        self._sampling = sampling
        self._logs: list[float] | None = None

    def __call__(self, sigma: float) -> float:
        if self._logs is None:
            parts = [0.001, *(i / 100 for i in range(1, 100)), 0.999]
            self._logs = [math.log(max(float(self._sampling.percent_to_sigma(part)), 1e-9)) for part in parts]
        log = math.log(max(sigma, 1e-9))
        place = sum(one > log for one in self._logs)
        if place in (0, len(self._logs)):
            return place / (len(self._logs) - 1) if place == 0 else 1.0
        above, below = self._logs[place - 1], self._logs[place]
        return (place - 1 + (above - log) / (above - below)) / (len(self._logs) - 1)


def sampler_name(sampler: Any) -> str:
    """The name of the function of a ComfyUI sampler; "" where it has none."""
    return getattr(getattr(sampler, "sampler_function", None), "__name__", "")


def calls_once_a_step(sampler: Any) -> bool:
    """Whether a ComfyUI sampler is known to call the model once for each sigma."""
    return sampler_name(sampler) in _ONCE_A_STEP


def is_active(cond: dict[str, Any], sigma: float) -> bool:
    """Whether a conditioning is used at a noise level, by ComfyUI's rule."""
    start, end = cond.get("timestep_start"), cond.get("timestep_end")
    return (start is None or sigma <= start) and (end is None or sigma >= end)


def active_controls(cond: dict[str, Any], sigma: float) -> list[Any]:
    """The ControlNets and T2I-Adapters of a conditioning that are used at a noise level."""
    found = []
    for one in chain(cond.get("control")):
        times = getattr(one, "timestep_range", None)
        if times is None or times[1] <= sigma <= times[0]:
            found.append(one)
    return found


def _keyframes(hooks: Any, sigma: float, options: dict[str, Any]) -> list[tuple]:
    """Which keyframe of each hook (a LoRA's strength over the run) holds at a noise level.

    ComfyUI moves on to it after this; a copy of the hook's keyframes says already which one it will be.
    """
    found = []
    for hook in getattr(hooks, "hooks", ()):
        group: Any = copy.copy(getattr(hook, "hook_keyframe", None))
        if hasattr(group, "prepare_current_keyframe") and "sample_sigmas" in options:
            group.prepare_current_keyframe(sigma, options)
        found.append((id(hook), getattr(group, "_current_index", None)))
    return found


def _flat(batch: Batch) -> Tensor:
    parts = [feature.flatten() for feature in batch.kept.values()]
    return torch.cat(parts) if len(parts) > 1 else parts[0]
