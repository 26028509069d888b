"""tune: times the unpatched model and every preset on this machine, and says which settings pay here."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from ..config import DEFAULT_NUM_TRAIN_TIMESTEPS, PRESETS, AgentConfig, Phase, make_config
from ..patch import find_unet, patched
from ..unet.layers import own_latent_size
from .compare import refuse_compiled
from .methods import refuse_patched
from .request import Request
from .rounds import rotated
from .tuning import UNPATCHED, Candidate, Tuning, machine
from .unet_calls import RandomInputs, first_of_each_phase, plan_of_run, set_timesteps, timed_calls

USUAL_ROUNDS, SECONDS_ENOUGH = 5, 60.0
"""Rounds where none are asked for: so many, or fewer (but three) once so many seconds have passed."""
_LEAST_ROUNDS = 3
_QUICK = 0.3  # seconds of a call below which a round takes the median of several
_CALLS_IF_QUICK = 5
_MOST_CALLS = 60  # of one phase in one round, until whole and cached ones were enough

BESIDE_PRESETS: dict[str, dict[str, Any]] = {"agents from a grid": {"agents": "grid"}}
"""Settings that are timed as the presets are, by name."""

Kind = tuple[Phase, bool]
"""Of a call: its phase, and whether it is whole."""


@dataclass(frozen=True)
class _Method:
    """What is timed by itself: the unpatched model or a preset."""

    name: str
    config: AgentConfig | None


def tune(
    pipe: Any,
    height: int | None = None,
    width: int | None = None,
    *,
    steps: int = 25,
    batch_size: int = 1,
    rounds: int | None = None,
    on_round: Callable[[str, int], None] | None = None,
) -> Tuning:
    """Time the UNet calls of a run, unpatched and with each preset, on this machine; changes nothing.

    Every kind of call (each phase, whole and cached) is timed on random inputs, in interleaved rounds after a warm-up,
    synchronised with the device. The time of a run is their medians times how many of each kind the run has. Text
    encoder and autoencoder, which no setting changes, are not in it.

    Args:
        pipe: an unpatched pipeline with a UNet2DConditionModel; unpatched again afterwards.
        height, width: image size in pixels, multiples of 8; None takes the model's own.
        steps: denoising steps of the run, with the pipeline's scheduler.
        batch_size: images at once.
        rounds: how often each is timed; None five times, or three once a minute has passed.
        on_round: called with (name, round) before each is timed; round 0 is the warm-up.

    Returns:
        A Tuning: print it, read its `recommended` settings, or keep `to_dict()`.

    Raises:
        TypeError, ValueError: a wrong argument; a pipeline that is already patched, whose UNet is compiled, or whose
            UNet needs inputs that cannot be made up.

    Example:
        >>> tuning = agentsd.tune(pipe, height=512, width=512)
        >>> agentsd.apply_patch(pipe, **tuning.recommended)  # where it is not None: nothing pays
    """
    request = Request("-", steps=steps, height=height, width=width)
    _check(pipe, batch_size, rounds)
    own = [8 * side for side in own_latent_size(find_unet(pipe))]
    request = dataclasses.replace(request, height=request.height or own[0], width=request.width or own[1])
    methods = [_Method(UNPATCHED, None)]
    tried = {**{name: {"preset": name} for name in PRESETS}, **BESIDE_PRESETS}
    methods += [_Method(name, make_config(**settings)) for name, settings in tried.items()]
    device = torch.device(getattr(pipe, "_execution_device", None) or pipe.unet.device)  # where offloading takes it
    with _scheduler_of_its_own(pipe, device) as scheduler:
        work = _Work(pipe, scheduler, request, batch_size, device)
        plans = {method.name: plan_of_run(scheduler, method.config, steps) for method in methods}
        seconds: dict[str, list[dict[Kind, float]]] = {method.name: [] for method in methods}
        failed: dict[str, str] = {}
        began = time.perf_counter()
        for number in itertools.count():
            for method in rotated(methods, number):
                if method.name in failed:
                    continue
                if on_round:
                    on_round(method.name, number)
                try:
                    taken = work.round_of(method)
                except (ValueError, torch.cuda.OutOfMemoryError) as error:
                    if method.config is None:
                        raise
                    failed[method.name] = str(error).splitlines()[0]
                    continue
                if number:  # before them the warm-up
                    seconds[method.name].append(taken)
            if number >= (rounds or USUAL_ROUNDS):
                break
            if rounds is None and number >= _LEAST_ROUNDS and time.perf_counter() - began > SECONDS_ENOUGH:
                break
    unpatched = seconds.pop(UNPATCHED)
    call = statistics.median(seconds for times in unpatched for seconds in times.values())
    calls = plans[UNPATCHED].total()
    base = Candidate(UNPATCHED, None, _runs(unpatched, plans[UNPATCHED]), {"whole": call}, {"whole": calls})
    candidates = [
        _candidate(name, tried[name], times, plans[name]) for name, times in seconds.items() if name not in failed
    ]
    candidates += _one_phase_alone(seconds, unpatched, plans)
    return Tuning(
        machine=machine(pipe, device), height=work.height, width=work.width, steps=steps,
        scheduler=type(scheduler).__name__, batch_size=batch_size, unpatched=base, candidates=tuple(candidates),
        failed=failed,
    )  # fmt: skip


class _Work:
    """Times one method in one round."""

    def __init__(self, pipe: Any, scheduler: Any, request: Request, batch_size: int, device: torch.device):
        assert request.height is not None and request.width is not None
        self.pipe, self.scheduler, self.steps = pipe, scheduler, request.steps
        self.height, self.width = request.height, request.width
        self.device = device
        scale = getattr(pipe, "vae_scale_factor", 8)
        size = self.height // scale, self.width // scale
        self.inputs = RandomInputs.of(pipe.unet, *size, batch_size, self.device)
        self.length = scheduler.config.get("num_train_timesteps") or DEFAULT_NUM_TRAIN_TIMESTEPS

    def round_of(self, method: _Method) -> dict[Kind, float]:
        """Median seconds of each kind of call."""
        found: dict[Kind, float] = {}
        config = method.config
        with patched(self.pipe, config) if config is not None else contextlib.nullcontext():
            timesteps = set_timesteps(self.scheduler, self.steps, self.device)
            starts = first_of_each_phase(config, timesteps.tolist(), self.length)
            for phase in starts:
                # A run for each phase, as img2img begins in the midst of one.
                timesteps = set_timesteps(self.scheduler, self.steps, self.device)
                kinds = (True, False) if config is not None and config.cache_interval > 1 else (True,)
                for whole, seconds in self._of_phase(timesteps, starts, phase, kinds).items():
                    found[phase, whole] = seconds
        return found

    def _of_phase(
        self, timesteps: Any, starts: dict[Phase, int], phase: Phase, kinds: tuple[bool, ...]
    ) -> dict[bool, float]:
        """Median seconds of whole and of cached calls in a phase, for those kinds that it has."""
        begin = starts[phase]
        end = min([start for start in starts.values() if start > begin], default=len(timesteps))
        seconds: dict[bool, list[float]] = {whole: [] for whole in kinds}
        calls = timed_calls(self.pipe.unet, self.scheduler, timesteps, self.inputs, begin)
        for call in itertools.islice(calls, min(end - begin, _MOST_CALLS)):
            seconds.setdefault(call.whole, []).append(call.seconds)
            enough = _CALLS_IF_QUICK if call.seconds < _QUICK else 1
            if all(len(seconds[whole]) >= enough for whole in kinds):
                break
        return {whole: statistics.median(times) for whole, times in seconds.items() if times}


@contextlib.contextmanager
def _scheduler_of_its_own(pipe: Any, device: torch.device) -> Iterator[Any]:
    """A copy of the pipeline's scheduler in its place, and the global random state as it was afterwards."""
    scheduler = pipe.scheduler
    devices = [device] if device.type == "cuda" else []
    # Past the pipeline's own setter, which records the class of its parts for save_pretrained.
    vars(pipe)["scheduler"] = copy.deepcopy(scheduler)
    try:
        with torch.random.fork_rng(devices=devices):
            yield pipe.scheduler
    finally:
        vars(pipe)["scheduler"] = scheduler
        if hasattr(pipe, "maybe_free_model_hooks"):  # an offloaded UNet goes back to the CPU, as after an image
            pipe.maybe_free_model_hooks()


def _runs(rounds: list[dict[Kind, float]], plan: Counter[Kind]) -> tuple[float, ...]:
    """Seconds of a run's UNet calls by each round's times."""
    return tuple(sum(count * _time_of(kind, times) for kind, count in plan.items()) for times in rounds)


def _time_of(kind: Kind, times: dict[Kind, float]) -> float:
    """The time of a kind of call; where a round had none of it, that of the whole calls of its phase, or of any."""
    phase, whole = kind
    return times.get(kind) or times.get((phase, True)) or max(times.values())


def _candidate(name: str, settings: dict[str, Any], rounds: list[dict[Kind, float]], plan: Counter[Kind]) -> Candidate:
    kinds = sorted({kind for times in rounds for kind in times}, key=lambda kind: (kind[0].value, not kind[1]))
    calls = {_name(kind): statistics.median([times[kind] for times in rounds if kind in times]) for kind in kinds}
    return Candidate(name, settings, _runs(rounds, plan), calls, _by_name(plan))


def _one_phase_alone(
    seconds: dict[str, list[dict[Kind, float]]], unpatched: list[dict[Kind, float]], plans: dict[str, Counter[Kind]]
) -> list[Candidate]:
    """The paper's method in one phase only, by arithmetic: a phase that does not pay is left to the model."""
    if not (paper := seconds.get("paper")):
        return []
    agent, merge, plain = (Phase.AGENT, True), (Phase.MERGE, True), (Phase.MERGE, True)
    plan = plans["paper"]
    late_full = [{agent: ours[agent], merge: theirs[plain]} for ours, theirs in zip(paper, unpatched) if agent in ours]
    early_off = [{merge: ours[merge]} for ours in paper if merge in ours]
    found = []
    if late_full and plan[agent]:
        found.append(_candidate("agents, then unpatched", {"late": "full"}, late_full, plan))
    if early_off:
        found.append(_candidate("token merging alone", {"early": 0.0}, early_off, Counter({merge: plan.total()})))
    return found


def _name(kind: Kind) -> str:
    return f"{'whole' if kind[1] else 'cached'}, {kind[0].value}"


def _by_name(plan: Counter[Kind]) -> dict[str, int]:
    return {
        _name(kind): count for kind, count in sorted(plan.items(), key=lambda item: (item[0][0].value, -item[0][1]))
    }


def _check(pipe: Any, batch_size: int, rounds: int | None) -> None:
    """Raise before time is spent."""
    for name, value, high in (("batch_size", batch_size, 64), ("rounds", rounds, 100)):
        if name == "rounds" and value is None:
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}={value!r}: must be an integer in 1 … {high}")
        if not 1 <= value <= high:
            raise ValueError(f"{name}={value}: must be an integer in 1 … {high}")
    unet = find_unet(pipe)
    if not isinstance(unet, UNet2DConditionModel) or getattr(pipe, "scheduler", None) is None:
        raise TypeError(
            f"cannot tune a {type(pipe).__name__}: give a pipeline with a scheduler and a UNet2DConditionModel; time "
            "others with agentsd.compare"
        )
    refuse_patched(pipe)
    refuse_compiled(pipe)
