"""eval/fid/latency.py on tiny real pipelines: order of rounds, phases, memory, compiled copies; never the time."""

from __future__ import annotations

import contextlib
import sys
from dataclasses import replace

import pytest
import torch
from conftest import make_pipeline

from agentsd import Phase
from agentsd.patch import get_patch
from eval.common.protocol import METHODS, Scenario, make_scenarios
from eval.fid.latency import Workload, measure

SMALL = Workload(steps=5, rounds=2, guidance=5.0)


def test_rounds_are_interleaved_and_the_pipeline_is_left_as_it_was():
    pipe = make_pipeline()
    unet, processors = pipe.unet, pipe.unet.attn_processors
    scenarios = make_scenarios(METHODS, (0.4,))
    calls = []
    timings = measure(pipe, scenarios, SMALL, lambda name, number: calls.append((number, name)))
    names = [scenario.name for scenario in scenarios]
    assert [number for number, _ in calls] == [n for n in range(3) for _ in names]
    for number in range(3):
        assert sorted(name for n, name in calls if n == number) == sorted(names)
    assert calls[0][1] == names[0] and calls[len(names)][1] == names[1]  # the next round begins with the next one
    for timing in timings:
        assert not timing.failed and len(timing.seconds) == 2 and timing.workload.size == 128
        # Of 6 calls DeepCache with interval 3 computes two as a whole; T-GATE skips layers of all depths, no call.
        cached = 8 if timing.scenario == "deepcache-3" else 0
        calls = 6 if timing.scenario == "fewer-steps-3" else 12  # PLMS makes 3 in 2 steps
        assert (len(timing.whole_seconds), len(timing.cached_seconds)) == (calls - cached, cached), timing.scenario
        if timing.scenario == "fewer-steps-3":
            continue
        # PLMS calls the UNet 6 times for 5 steps, at 801, 601, 601, 401, 201, 1: three are noisier than 600.
        calls = 2 if cached else 6  # the mean of each round
        assert {phase: len(times) for phase, times in timing.unet_seconds.items()} == {"agent": calls, "merge": calls}
        inside = sum(timing.whole_seconds + timing.cached_seconds)
        assert 0 < inside < sum(timing.seconds)
        assert min(timing.seconds) <= timing.seconds_per_image <= max(timing.seconds)
        if sys.platform == "linux" and timing.peak_gb is not None:
            assert 0 <= timing.peak_gb_per_image < timing.peak_gb < 100
    assert pipe.unet is unet and get_patch(pipe) is None
    assert pipe.unet.attn_processors == processors


def test_whole_and_cached_calls_of_our_own_step_caching():
    scenario = make_scenarios(["agentsd"], (0.4,), intervals=(3,))[-1]
    [timing] = measure(make_pipeline(), [scenario], Workload(steps=20, rounds=1, size=64))
    assert len(timing.whole_seconds) + len(timing.cached_seconds) == 21
    assert 7 <= len(timing.whole_seconds) <= 10  # one in three, and where the phase changes
    assert {phase: len(times) for phase, times in timing.unet_seconds.items()} == {"agent": 1, "merge": 1}


def test_a_batch_is_counted_per_image_and_phases_follow_early():
    scenario = make_scenarios(["agentsd"], (0.4,), early=1.0)[1]
    [timing] = measure(make_pipeline(), [scenario], Workload(steps=2, rounds=1, batch_size=3, size=64))
    assert timing.seconds_per_image == pytest.approx(timing.seconds[0] / 3)
    assert timing.unet_median(Phase.AGENT) > 0 and timing.unet_median(Phase.MERGE) is None


@pytest.mark.parametrize("early", [0.0, 0.04, 0.4, 0.96, 1.0])
def test_the_warm_up_computes_one_call_of_each_phase(early, monkeypatch):
    """It once was a run of four steps, in which early=0.2 has no agent phase and early=0.8 no other."""
    from eval.fid import latency

    calls = []
    run = latency._Run.call

    def spy(self, *args, **kwargs):
        found = run(self, *args, **kwargs)
        calls.append([self.phase(lap.timestep) for lap in found.laps])
        return found

    monkeypatch.setattr(latency._Run, "call", spy)
    scenario = make_scenarios(["agentsd"], (0.4,), early=early)[1]
    [timing] = measure(make_pipeline(), [scenario], Workload(steps=25, rounds=1, size=64))
    warmed, timed = calls
    assert not early or set(timed) <= set(warmed)  # without agents all calls are alike
    assert len(timed) == 26 and len(warmed) == len(set(warmed))
    assert set(timing.unet_seconds) == {phase.value for phase in timed}


def test_the_warm_up_of_a_caching_method_has_whole_and_cached_calls(monkeypatch):
    from eval.fid import latency

    calls = []
    run = latency._Run.call
    monkeypatch.setattr(latency._Run, "call", lambda *args, **kwargs: calls.append(run(*args, **kwargs)) or calls[-1])
    scenarios = make_scenarios(["agentsd", "deepcache", "tgate"], (0.4,), intervals=(3,))[2:]
    measure(make_pipeline(), scenarios, Workload(steps=2, rounds=1, size=64))
    kinds = [[lap.whole for lap in call.laps] for call in calls[:3]]
    assert kinds == [[True, False] * 2, [True, False, False, True], [True] * 4]


def test_one_scenario_may_fail_without_the_others(monkeypatch):
    from eval.fid import latency

    good, bad = make_scenarios(["agentsd"], (0.4,))
    use_scenario = latency.use_scenario

    def use(pipe, scenario):
        if scenario is bad:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        return use_scenario(pipe, scenario)

    monkeypatch.setattr(latency, "use_scenario", use)
    first, second = measure(make_pipeline(), [good, bad], SMALL)
    assert len(first.seconds) == 2 and second.seconds == [] and second.seconds_per_image is None
    assert second.failed == "CUDA out of memory. Tried to allocate 2 GiB"


def test_compiled_scenarios_and_sizes_do_not_touch_each_other(monkeypatch):
    """ToMeSD breaks the graph; TorchDynamo then once compiled every UNet in pieces, also in timed rounds."""
    pipe = make_pipeline(
        block_out_channels=(32,), down_block_types=("CrossAttnDownBlock2D",), up_block_types=("UpBlock2D",),
        mid_block_type=None,
    )  # fmt: skip
    graphs: dict[tuple, list[bool]] = {}
    now = []

    def backend(graph, inputs):
        symbolic = any(isinstance(x, torch.SymInt) for x in inputs)
        graphs.setdefault(tuple(now), []).append(symbolic)
        return graph.forward

    def compile_without_inductor(unet, **kwargs):  # tracing is what may fail; inductor takes minutes
        compiled.append(unet)
        return torch.nn.Module.compile(unet, backend=backend, **kwargs)

    compiled, limit = [], torch._dynamo.config.recompile_limit
    monkeypatch.setattr(type(pipe.unet), "compile", compile_without_inductor)
    scenarios = make_scenarios(["tomesd", "agentsd", "no-attention", "limit"], (0.4,))
    for size in (64, 128):
        compiled.clear()
        workload = Workload(steps=4, rounds=1, size=size, compile=True)
        graphs.clear()
        timings = measure(pipe, scenarios, workload, lambda *call: now.__setitem__(slice(None), call))
        sd, tomesd, agentsd, *controls = timings
        pieces = {name: len(found) for (name, number), found in graphs.items() if number == 0}
        assert pieces["sd"] == 1 and pieces["agentsd-r0.4"] == 2  # one graph per phase
        assert not any(map(any, graphs.values()))  # no symbolic sizes
        assert all(number == 0 for _, number in graphs)  # nothing is compiled while the clock runs
        assert len(sd.seconds) == len(agentsd.seconds) == 1 and not sd.failed and not agentsd.failed
        assert tomesd.failed == "not compiled: it breaks the compiler's graph" and not tomesd.seconds
        assert all("not compiled: " in timing.failed for timing in controls)
        assert len({id(unet) for unet in compiled}) == 3 and pipe.unet not in compiled  # copies of their own
        assert agentsd.unet_median(Phase.AGENT) > 0 and agentsd.whole_seconds == [] and get_patch(pipe) is None
    assert torch._dynamo.config.recompile_limit == limit


def test_a_call_with_deepcache_is_timed_by_its_mean(monkeypatch):
    from eval.fid import latency

    cached = Scenario("deepcache", interval=2)
    fake = [latency._Lap(801, lambda: 9.0, whole=True), *[latency._Lap(801, lambda: 1.0, whole=False)] * 3]
    monkeypatch.setattr(latency._Run, "call", lambda *_, **__: latency._Call(fake, 12.0, None, 0))
    [timing] = measure(make_pipeline(), [cached], SMALL)
    assert timing.unet_seconds == {"agent": [3.0, 3.0]} and timing.unet_median(Phase.AGENT) == 3.0
    assert timing.seconds == [12.0, 12.0] and timing.peak_gb is None
    assert timing.whole_seconds == [9.0] * 2 and timing.cached_seconds == [1.0] * 6


def test_putting_a_patch_on_and_taking_it_off_is_not_timed(monkeypatch):
    from eval.fid import latency

    class Clock:
        """Stands still but for who sleeps, so that seconds are exact whatever the machine."""

        now = 0.0

        def perf_counter(self):
            return self.now

        def sleep(self, seconds):
            self.now += seconds

    class Memory:
        def __init__(self, device):
            events.append("watch memory")

        def peak(self):
            events.append("read memory")
            return 3_000_000_000, 1_000_000_000

    @contextlib.contextmanager
    def use(pipe, scenario):
        clock.sleep(1000)
        events.append("patch")
        yield pipe
        events.append("unpatch")
        clock.sleep(1000)

    clock, events = Clock(), []
    monkeypatch.setattr(latency, "time", clock)
    monkeypatch.setattr(latency, "use_scenario", use)
    monkeypatch.setattr(latency, "PeakMemory", Memory)
    pipe = make_pipeline()
    pipe.unet.register_forward_pre_hook(lambda *_: clock.sleep(1))
    pipe.vae.decoder.register_forward_pre_hook(lambda *_: clock.sleep(5))
    [timing] = measure(pipe, [Scenario("sd")], replace(SMALL, rounds=2))
    calls = 6  # of the UNet, which PLMS calls once more than it has steps
    assert timing.seconds == [calls + 5.0] * 2 and sum(map(len, timing.unet_seconds.values())) == 2 * calls
    assert (timing.peak_gb, timing.peak_gb_per_image) == (3.0, 1.0)
    assert events == ["patch", "watch memory", "read memory", "unpatch"] * 3


@pytest.mark.gpu
def test_on_a_gpu(gpu):
    pipe = make_pipeline().to(gpu)
    for timing in measure(pipe, make_scenarios(METHODS, (0.4,)), SMALL):
        assert not timing.failed and timing.peak_gb > 0
        assert 0 < sum(map(sum, timing.unet_seconds.values())) < sum(timing.seconds)
