"""Times scenarios against each other: interleaved rounds after a warm-up, the UNet call in each phase, peak memory."""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from agentsd import AgentConfig, Phase
from agentsd.images.measure import PeakMemory

from .protocol import CONTROLS, PROMPT, BenchError, Scenario
from .scenarios import use_scenario

_WARM_UP_STEPS = 4  # the fewest that take PLMS through both phases
_IN_PIECES = "breaks the compiler's graph: compiled in pieces and timed after the others, hence no speed-up"


@dataclass(frozen=True)
class Workload:
    """What is timed.

    Attributes:
        size: height and width in pixels; None takes the model's own.
        batch_size: pictures per call.
        steps, guidance: of the sampling.
        rounds: how many times each scenario is timed.
        compile: torch.compile the UNet, each scenario a copy of its own, as one graph for the very shapes at hand. A
            scenario that breaks the graph is compiled in pieces, after the others: TorchDynamo keeps what it learns by
            the source code of a forward, which all copies share, and would run the others in pieces too.
    """

    size: int | None = None
    batch_size: int = 1
    steps: int = 50
    guidance: float = 7.5
    rounds: int = 3
    compile: bool = False


@dataclass
class Timing:
    """What was measured of one scenario under one workload.

    Attributes:
        scenario: its name.
        workload: size filled in.
        seconds: of each round, for the whole pipeline call (all pictures of the batch), without the time that putting a
            patch on and taking it off takes, which a user does once and not for each picture.
        unet_seconds: phase ("agent", "merge") -> seconds of each UNet call while the timestep was in it; with
            DeepCache, whose calls are whole or nearly free, the mean of each round's. Phases are those of the default
            early fraction for methods that have none, so that columns can be compared.
        peak_gb: greatest memory during a call: of the allocator on CUDA, resident on Linux; None elsewhere.
        peak_gb_per_image: what a call took beyond the loaded, patched model, per picture. The paper's GB/img must be
            this: its smallest, 1.21, is less than the weights alone take.
        failed: why there are no figures, or "".
        operators: phase -> PyTorch operators of one UNet call that do something (no views, no allocations): about the
            number of kernels a GPU is sent, which at small sizes cost more than their arithmetic. Empty if compiled.
        note: why it was timed apart from the others, so that speed-ups would compare different moments, or "".
    """

    scenario: str
    workload: Workload
    seconds: list[float] = field(default_factory=list)
    unet_seconds: dict[str, list[float]] = field(default_factory=dict)
    peak_gb: float | None = None
    peak_gb_per_image: float | None = None
    failed: str = ""
    operators: dict[str, int] = field(default_factory=dict)
    note: str = ""

    @property
    def seconds_per_image(self) -> float | None:
        """Median over the rounds, divided by the batch size."""
        return statistics.median(self.seconds) / self.workload.batch_size if self.seconds else None

    @property
    def quartiles(self) -> tuple[float, float] | None:
        """First and third quartile of the seconds per picture."""
        if len(self.seconds) < 2:
            return None
        low, _, high = statistics.quantiles(self.seconds, n=4, method="inclusive")
        return low / self.workload.batch_size, high / self.workload.batch_size

    def unet_median(self, phase: Phase) -> float | None:
        """Median seconds of a UNet call in a phase."""
        times = self.unet_seconds.get(phase.value)
        return statistics.median(times) if times else None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Timing:
        """What to_dict gave."""
        return cls(**{**data, "workload": Workload(**data["workload"])})


def measure(
    pipe: Any,
    scenarios: Sequence[Scenario],
    workload: Workload,
    on_call: Callable[[str, int], None] | None = None,
) -> list[Timing]:
    """Time every scenario, each once in every round, the rounds' order turned by one each time.

    So a machine whose speed drifts favours none. Out of memory fails one scenario, not the run.

    Args:
        pipe: an unpatched text-to-image pipeline; as before afterwards.
        on_call: called with (scenario, round) before each call; round 0 is the warm-up.
    """
    workload = replace(workload, size=workload.size or pipe.unet.config.sample_size * pipe.vae_scale_factor)
    timings = {scenario: Timing(scenario.name, workload) for scenario in scenarios}
    if workload.compile:
        torch._dynamo.reset()  # what it learnt at another size would make this one's shapes symbolic
    broken = _measure_rounds([_Run(pipe, scenario, workload) for scenario in scenarios], timings, on_call)
    for scenario in broken:
        torch._dynamo.reset()
        timings[scenario].note = _IN_PIECES
        _measure_rounds([_Run(pipe, scenario, workload, in_pieces=True)], timings, on_call)
    return list(timings.values())


def _measure_rounds(
    runs: Sequence[_Run], timings: dict[Scenario, Timing], on_call: Callable[[str, int], None] | None
) -> list[Scenario]:
    """Fill in the timings; returns the scenarios that cannot be compiled as one graph, which have none yet."""
    broken: list[Scenario] = []
    workload = runs[0].workload
    warm_up = replace(workload, steps=min(workload.steps, _WARM_UP_STEPS))
    for number in range(workload.rounds + 1):
        turn = number % len(runs)
        for run in [*runs[turn:], *runs[:turn]]:
            timing = timings[run.scenario]
            if timing.failed or run.scenario in broken:
                continue
            if on_call:
                on_call(run.scenario.name, number)
            try:
                if number == 0:
                    run.prepare()
                    run.warm_up(timing, warm_up)
                else:
                    run.record(timing)
            except BenchError:
                raise
            except Exception as error:  # torch.compile raises its own kinds, memory runs out in several ways
                if isinstance(error, torch._dynamo.exc.Unsupported) and not run.in_pieces:
                    broken.append(run.scenario)
                else:
                    timing.failed = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
                run.forget()
    return broken


class _Run:
    """One scenario made ready: for eager runs patched at each call, for compiled ones a patched copy of its own."""

    def __init__(self, pipe: Any, scenario: Scenario, workload: Workload, in_pieces: bool = False):
        self.pipe = pipe
        self.scenario = scenario
        self.workload = workload
        self.in_pieces = in_pieces
        self.keep = contextlib.ExitStack()

    def prepare(self) -> None:
        if not self.workload.compile:
            return
        if self.scenario.method in CONTROLS or self.scenario.cache_interval > 1:
            raise RuntimeError("not compiled: it changes the UNet between its calls")
        if self.scenario.method == "limit":
            raise RuntimeError("not compiled: a compiler leaves out the projections that it computes and does not use")
        # One UNet each: patches that come and go would have it compiled anew in every round.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 64)
        components = {**self.pipe.components, "unet": copy.deepcopy(self.pipe.unet)}
        self.pipe = type(self.pipe)(**components, **_constructor_options(self.pipe))
        self.pipe.set_progress_bar_config(disable=True)
        self.keep.enter_context(use_scenario(self.pipe, self.scenario))
        self.pipe.unet.compile(fullgraph=not self.in_pieces, dynamic=False)

    def warm_up(self, timing: Timing, workload: Workload) -> None:
        for lap in self.call(workload, count_operators=not workload.compile).laps:
            if lap.operators is not None:
                timing.operators[self.phase(lap).value] = lap.operators

    def call(self, workload: Workload, count_operators: bool = False) -> _Call:
        """Run the pipeline; clock and peak memory are of its call alone, with the patch put on before."""
        device = self.pipe.unet.device
        patched = contextlib.nullcontext() if workload.compile else use_scenario(self.pipe, self.scenario)
        with patched, _stopwatch(self.pipe, count_operators) as laps:
            # A user patches once for many pictures, so what that takes is no part of a picture's time.
            memory = PeakMemory(device)
            start = _now(device)
            self.pipe(
                [PROMPT.format("zebra")] * workload.batch_size,
                num_inference_steps=workload.steps,
                guidance_scale=workload.guidance,
                height=workload.size,
                width=workload.size,
                generator=[torch.Generator("cpu").manual_seed(i) for i in range(workload.batch_size)],
            )
            seconds = _elapsed(start, _now(device))
            peak, growth = memory.peak()
        return _Call(laps, seconds, peak, growth)

    def record(self, timing: Timing) -> None:
        call = self.call(self.workload)
        timing.seconds.append(call.seconds)
        if call.peak is not None:
            per_image = call.growth / 1e9 / self.workload.batch_size
            timing.peak_gb = max(timing.peak_gb or 0, call.peak / 1e9)
            timing.peak_gb_per_image = max(timing.peak_gb_per_image or 0, per_image)
        seconds: dict[str, list[float]] = {}
        for lap in call.laps:
            seconds.setdefault(self.phase(lap).value, []).append(lap.seconds())
        for phase, times in seconds.items():
            # The median over DeepCache's calls would be the time of one that skips most of the UNet.
            kept = [statistics.fmean(times)] if self.scenario.cache_interval > 1 else times
            timing.unet_seconds.setdefault(phase, []).extend(kept)

    def phase(self, lap: _Lap) -> Phase:
        config = self.scenario.config
        # ToMeSD's config has no early phase; its calls are sorted as agentsd's by default would be.
        early = config.early if config is not None and config.early else AgentConfig.early
        horizon = self.pipe.scheduler.config.num_train_timesteps
        return AgentConfig(early=early).phase_at(float(lap.timestep), horizon)

    def forget(self) -> None:
        self.keep.close()
        self.pipe = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _constructor_options(pipe: Any) -> dict[str, Any]:
    """What a pipeline's constructor takes beside its networks."""
    options = {key: value for key, value in pipe.config.items() if not key.startswith("_")}
    return {key: value for key, value in options.items() if key not in pipe.components and key != "add_watermarker"}


@dataclass(frozen=True)
class _Lap:
    """One UNet call: its timestep, how long it took (to be asked once all is done), and its operators if counted."""

    timestep: Any
    seconds: Callable[[], float]
    operators: int | None


@dataclass(frozen=True)
class _Call:
    """One pipeline call: its UNet calls, its seconds, and in bytes the peak of memory (None where it cannot be told)
    and how far that is above the beginning."""

    laps: list[_Lap]
    seconds: float
    peak: int | None
    growth: int


class _CountedOperators(TorchDispatchMode):
    """Counts the operators that are dispatched, but for those that only look at memory or allocate it."""

    def __init__(self) -> None:
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, operator: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = operator.name()
        self.number += not (operator.is_view or "empty" in name or "_unsafe_view" in name)
        return operator(*args, **(kwargs or {}))


class _TimedUNet:
    """Stands in for a pipeline's UNet during one call: times each of its calls, and is the UNet in all else.

    No hook, as those run inside the graph of a compiled UNet.
    """

    def __init__(self, unet: Any, laps: list[_Lap], count_operators: bool):
        self.__dict__.update(_unet=unet, _laps=laps, _count_operators=count_operators)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._unet, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._unet, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        counted = _CountedOperators() if self._count_operators else None
        start = _mark(self._unet.device)
        with counted or contextlib.nullcontext():
            out = self._unet(*args, **kwargs)
        end = _mark(self._unet.device)
        # Reading the time now would make a GPU wait.
        self._laps.append(_Lap(timestep, lambda: _elapsed(start, end), counted and counted.number))
        return out


@contextlib.contextmanager
def _stopwatch(pipe: Any, count_operators: bool = False) -> Iterator[list[_Lap]]:
    unet = pipe.unet
    laps: list[_Lap] = []
    # Past the pipeline's own setter, which looks for a saveable class.
    vars(pipe)["unet"] = _TimedUNet(unet, laps, count_operators)
    try:
        yield laps
    finally:
        vars(pipe)["unet"] = unet


def _mark(device: torch.device) -> Any:
    """This moment on the device's own clock: an event in its queue on CUDA, so that timing makes nothing wait."""
    if device.type == "cuda":
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event
    if device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter()


def _now(device: torch.device) -> Any:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return _mark(device)


def _elapsed(start: Any, end: Any) -> float:
    if isinstance(start, float):
        return end - start
    end.synchronize()
    return start.elapsed_time(end) / 1000
