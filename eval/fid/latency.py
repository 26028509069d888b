"""Time scenarios against each other: interleaved rounds after a warm-up, the UNet call in each phase, peak memory."""

from __future__ import annotations

import contextlib
import copy
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from agentsd import AgentConfig, Phase
from agentsd.images.measure import PeakMemory
from agentsd.images.rounds import rotated
from agentsd.images.warm_up import one_step_per_phase
from eval.common.methods import METHODS
from eval.common.models import native_size
from eval.common.protocol import PROMPT, BenchError, Scenario
from eval.common.scenarios import use_scenario

from .images import first_line


@dataclass(frozen=True)
class Workload:
    """What is timed.

    Attributes:
        size: height and width in pixels; None takes the model's own.
        batch_size: images per call.
        steps, guidance: of the sampling.
        rounds: how many times each scenario is timed.
        compile: torch.compile the UNet, one copy per scenario, as one graph for these shapes; a scenario that breaks
            the graph, as ToMeSD does, fails.
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
        seconds: of each round, for the whole pipeline call (all images of the batch). Applying and removing the patch
            is not included: a user does it once and not for each image.
        unet_seconds: phase ("agent", "merge") -> seconds of each UNet call while the timestep was in it; with caching
            the mean of each round. Methods without phases get those of the default early fraction, for comparison.
        whole_seconds, cached_seconds: of each UNet call that computed the whole network, or reused a cached feature;
            empty if compiled, where the two are not told apart.
        peak_gb: greatest memory during a call: of the allocator on CUDA, resident on Linux; None elsewhere.
        peak_gb_per_image: memory of a call beyond the loaded, patched model, per image, as the paper's GB/img must be.
        failed: why there are no figures, or "".
    """

    scenario: str
    workload: Workload
    seconds: list[float] = field(default_factory=list)
    unet_seconds: dict[str, list[float]] = field(default_factory=dict)
    whole_seconds: list[float] = field(default_factory=list)
    cached_seconds: list[float] = field(default_factory=list)
    peak_gb: float | None = None
    peak_gb_per_image: float | None = None
    failed: str = ""

    @property
    def seconds_per_image(self) -> float | None:
        """Median over the rounds, divided by the batch size."""
        return statistics.median(self.seconds) / self.workload.batch_size if self.seconds else None

    def unet_median(self, phase: Phase) -> float | None:
        """Median seconds of a UNet call in a phase."""
        times = self.unet_seconds.get(phase.value)
        return statistics.median(times) if times else None


def measure(
    pipe: Any,
    scenarios: Sequence[Scenario],
    workload: Workload,
    on_call: Callable[[str, int], None] | None = None,
) -> list[Timing]:
    """Time every scenario, each once in every round, the rounds' order turned by one each time.

    A machine whose speed drifts therefore favours none. Out of memory fails one scenario, not the run.

    Args:
        pipe: an unpatched text-to-image pipeline; as before afterwards.
        on_call: called with (scenario, round) before each call; round 0 is the warm-up.
    """
    workload = replace(workload, size=workload.size or native_size(pipe))
    timings = [Timing(scenario.name, workload) for scenario in scenarios]
    runs = list(zip([_Run(pipe, scenario, workload) for scenario in scenarios], timings))
    # All copies of the UNet share the code by which TorchDynamo counts recompilations.
    limit = max(torch._dynamo.config.recompile_limit, 64)
    with torch._dynamo.config.patch(recompile_limit=limit) if workload.compile else contextlib.nullcontext():
        if workload.compile:
            torch._dynamo.reset()  # what it learnt at another size would make this one's shapes symbolic
        for number in range(workload.rounds + 1):
            for run, timing in rotated(runs, number):
                if timing.failed:
                    continue
                if on_call:
                    on_call(timing.scenario, number)
                try:
                    if number == 0:
                        run.prepare()
                        run.warm_up()
                    else:
                        run.record(timing)
                except BenchError:
                    raise
                except Exception as error:  # torch.compile raises its own kinds, memory runs out in several ways
                    broken = isinstance(error, torch._dynamo.exc.Unsupported)
                    timing.failed = "not compiled: it breaks the compiler's graph" if broken else first_line(error)
                    run.forget()
    return timings


class _Run:
    """One scenario: eager, the pipeline is patched at each call; compiled, it has a patched copy of its own."""

    def __init__(self, pipe: Any, scenario: Scenario, workload: Workload):
        self.pipe = pipe
        self.scenario = scenario
        self.workload = workload
        self.keep = contextlib.ExitStack()

    def prepare(self) -> None:
        if not self.workload.compile:
            return
        if why := METHODS[self.scenario.method].not_compiled:
            raise RuntimeError(f"not compiled: {why}")
        # One UNet each: patches that come and go would have it compiled again in every round.
        components = {**self.pipe.components, "unet": copy.deepcopy(self.pipe.unet)}
        self.pipe = type(self.pipe)(**components, **_constructor_options(self.pipe))
        self.pipe.set_progress_bar_config(disable=True)
        self.keep.enter_context(use_scenario(self.pipe, self.scenario))
        self.pipe.unet.compile(fullgraph=True, dynamic=False)

    def warm_up(self) -> None:
        """Run one UNet call of each phase, two with caching: the first calls are slower than the rest."""
        config = self.scenario.config
        if METHODS[self.scenario.method].cached_calls:
            config = AgentConfig(cache_interval=2)
        with one_step_per_phase(self.pipe, config) as steps:
            self.call(steps)

    def call(self, steps: int) -> _Call:
        """Run the pipeline; time and peak memory are of its call alone, after the patch was applied."""
        device, workload = self.pipe.unet.device, self.workload
        patched = contextlib.nullcontext(self.pipe) if workload.compile else use_scenario(self.pipe, self.scenario)
        with patched as call, _stopwatch(self.pipe, workload.compile) as laps:
            memory = PeakMemory(device)
            start = _now(device)
            call(
                [PROMPT.format("zebra")] * workload.batch_size,
                num_inference_steps=steps,
                guidance_scale=workload.guidance,
                height=workload.size,
                width=workload.size,
                generator=[torch.Generator("cpu").manual_seed(i) for i in range(workload.batch_size)],
            )
            seconds = _elapsed(start, _now(device))
            peak, growth = memory.peak()
        return _Call(laps, seconds, peak, growth)

    def record(self, timing: Timing) -> None:
        call = self.call(self.workload.steps)
        timing.seconds.append(call.seconds)
        if call.peak is not None:
            per_image = call.growth / 1e9 / self.workload.batch_size
            timing.peak_gb = max(timing.peak_gb or 0, call.peak / 1e9)
            timing.peak_gb_per_image = max(timing.peak_gb_per_image or 0, per_image)
        seconds: dict[str, list[float]] = {}
        for lap in call.laps:
            seconds.setdefault(self.phase(lap.timestep).value, []).append(lap.seconds())
            if lap.whole is not None:
                (timing.whole_seconds if lap.whole else timing.cached_seconds).append(lap.seconds())
        for phase, times in seconds.items():
            # The median over calls of a caching method would be the time of one that skips most of the UNet.
            kept = [statistics.fmean(times)] if self.scenario.cache_interval > 1 else times
            timing.unet_seconds.setdefault(phase, []).extend(kept)

    def phase(self, timestep: Any) -> Phase:
        config = self.scenario.config
        # ToMeSD's config has no early phase; its calls are sorted by agentsd's default.
        early = config.early if config is not None and config.early else AgentConfig.early
        horizon = self.pipe.scheduler.config.num_train_timesteps
        return AgentConfig(early=early).phase_at(float(timestep), horizon)

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
    """One UNet call: its timestep, its time (to be read when all is done), and whether it computed the whole network
    (None where that is unknown)."""

    timestep: Any
    seconds: Callable[[], float]
    whole: bool | None = None


@dataclass(frozen=True)
class _Call:
    """One pipeline call: its UNet calls, seconds, peak memory in bytes (None: unknown), its growth since the start."""

    laps: list[_Lap]
    seconds: float
    peak: int | None
    growth: int


class _TimedUNet:
    """Replaces a pipeline's UNet and times its calls; a hook would become part of a compiled UNet's graph."""

    def __init__(self, unet: Any, laps: list[_Lap], deep: list[bool] | None):
        self.__dict__.update(_unet=unet, _laps=laps, _deep=deep)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._unet, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self._unet, name, value)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        timestep = kwargs["timestep"] if "timestep" in kwargs else args[1]
        if self._deep is not None:
            self._deep.clear()
        start = _mark(self._unet.device)
        out = self._unet(*args, **kwargs)
        end = _mark(self._unet.device)
        whole = None if self._deep is None else bool(self._deep)
        self._laps.append(_Lap(timestep, lambda: _elapsed(start, end), whole))  # read later: now a GPU would wait
        return out


@contextlib.contextmanager
def _stopwatch(pipe: Any, compiled: bool) -> Iterator[list[_Lap]]:
    unet = pipe.unet
    laps: list[_Lap] = []
    deep: list[bool] | None = None
    with contextlib.ExitStack() as stack:
        if not compiled and unet.mid_block is not None:
            deep = []  # every caching method skips the deepest layers in a cached call
            hook = unet.mid_block.resnets[0].register_forward_pre_hook(lambda *_, deep=deep: deep.append(True))
            stack.callback(hook.remove)
        vars(pipe)["unet"] = _TimedUNet(unet, laps, deep)  # past the setter, which expects a class to save
        stack.callback(vars(pipe).__setitem__, "unet", unet)
        yield laps


def _mark(device: torch.device) -> Any:
    """The present time on the device's own clock: on CUDA an event in its queue, so that nothing has to wait."""
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
