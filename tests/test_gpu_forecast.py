"""eval/forecast: what is traced on the meta device, the roofline's properties, and the command with tiny networks."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F
from conftest import make_unet
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from agentsd.config import Phase
from eval.common.operations import count_operations
from eval.forecast import gpus, work
from eval.forecast.gpus import FAST_HOST, GPUS, SLOW_HOST
from eval.forecast.hooks import hook_seconds
from eval.forecast.networks import Shape
from eval.forecast.public_figures import RATIOS, TIMES
from eval.forecast.roofline import EAGER, GRAPH, call_seconds
from eval.forecast.tracing import CallTrace, Operation, trace
from eval.forecast.validation import Errors, Prediction

TINY = Shape("sd15", 128)


@pytest.fixture(scope="module")
def network():
    return work._tiny(TINY)


def traced(call, module=None):
    return trace(call, module or nn.Identity())


def empty(*shape, dtype=torch.float16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def test_a_traced_call_has_the_operators_that_a_run_one_has():
    unet, called = make_unet(), []
    inputs = dict(timestep=torch.tensor(10), encoder_hidden_states=torch.zeros(2, 7, 32), return_dict=False)
    sample = torch.zeros(2, 4, 16, 16)
    handle = register_module_forward_pre_hook(lambda *_: called.append(1))
    with torch.no_grad():
        ran = count_operations(lambda: unet(sample, **inputs))
    handle.remove()
    unet.to("meta")
    inputs = {name: one.to("meta") if isinstance(one, torch.Tensor) else one for name, one in inputs.items()}
    sample = sample.to("meta")
    found = traced(lambda: unet(sample, **inputs), unet)
    assert (found.operators, found.modules, found.waits) == (ran, len(called), 0)


def test_attention_is_one_operator_with_its_sizes():
    query, key = empty(2, 4, 64, 16), empty(2, 4, 32, 16)
    found = traced(lambda: F.scaled_dot_product_attention(query, key, key))
    (one,) = found.operations
    assert (one.kind, one.sizes) == ("attention", (2, 4, 64, 32, 16))
    assert one.bytes_in == 2 * (query.numel() + 2 * key.numel()) and one.bytes_out == 2 * query.numel()


def test_products_and_convolutions_have_the_sizes_of_their_product():
    linear, conv = nn.Linear(8, 5, device="meta"), nn.Conv2d(3, 7, 3, padding=1, device="meta")
    found = traced(lambda: (linear(empty(2, 6, 8, dtype=torch.float32)), conv(empty(2, 3, 4, 4, dtype=torch.float32))))
    products = [one for one in found.operations if one.sizes]
    assert [(one.kind, one.sizes) for one in products] == [
        ("matmul", (1, 12, 5, 8)), ("convolution", (1, 32, 7, 27)),
    ]  # fmt: skip
    assert all(one.float32 for one in products)


def test_views_cost_the_host_alone_and_expanded_tensors_are_read_once():
    x = empty(4, 8)
    found = traced(lambda: x.view(8, 4).t()[:2])
    assert found.operators == 0 and found.views == 3
    (one,) = traced(lambda: empty(1, 8).expand(100, 8) + 1).operations
    assert one.bytes_in == 16 and one.bytes_out == 1600


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: bool((x > 0).any()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: torch.zeros(3).to(x.device),
        lambda x: x.copy_(torch.zeros(3)),
        lambda x: torch.tensor([1, 2], device=x.device),
    ],
)
def test_every_way_of_waiting_for_the_device_is_counted(wait):
    assert traced(lambda: wait(empty(3, dtype=torch.float32))).waits == 1


def test_an_upload_that_blocks_nothing_is_an_operator_and_no_wait():
    x = empty(3, dtype=torch.float32)
    for upload in (lambda: torch.zeros(3).to("meta", non_blocking=True), lambda: x.copy_(torch.zeros(3), True)):
        found = traced(upload)
        assert (found.operators, found.waits) == (1, 0)


def test_what_lies_on_the_host_is_not_the_devices():
    assert traced(lambda: torch.arange(5).float().mean().item()).operations == []


def test_a_network_is_traced_patched_and_cached(network):
    unpatched = network.unpatched()
    agents = network.with_agentsd({})
    cached = network.with_agentsd({"cache_interval": 3})
    assert set(agents) == {(Phase.AGENT, True), (Phase.MERGE, True)}
    assert set(cached) == {(phase, whole) for phase in Phase for whole in (True, False)}
    assert unpatched.operators < agents[Phase.MERGE, True].operators < agents[Phase.AGENT, True].operators
    assert all(cached[phase, False].operators < unpatched.operators for phase in Phase)
    assert network.unpatched() == unpatched  # the patch is gone
    assert network.with_tomesd(0.5).operators > unpatched.operators and network.unpatched() == unpatched
    whole, reused = network.with_deepcache()
    assert reused.operators < whole.operators and network.unpatched() == unpatched


def test_more_work_never_takes_less_time():
    gpu = GPUS["A100"]

    def seconds(*operations, **arguments):
        return call_seconds(CallTrace(list(operations)), gpu, FAST_HOST, **arguments).gpu

    for kind, small, large in (
        ("matmul", (1, 256, 256, 256), (1, 8192, 256, 256)),
        ("convolution", (1, 4096, 320, 2880), (1, 4096, 640, 2880)),
        ("attention", (2, 8, 1024, 1024, 40), (2, 8, 4096, 4096, 40)),
        ("sort", (2, 1024, 4), (2, 65536, 8)),
        ("elementwise", (), ()),
    ):
        one, other = Operation("x", kind, 1000, 1000, small), Operation("x", kind, 10**8, 10**8, large)
        for mode in (EAGER, GRAPH):
            assert seconds(one, mode=mode) < seconds(other, mode=mode) < seconds(other, other, mode=mode)


def test_the_host_is_hidden_behind_the_gpu_or_not():
    small = CallTrace([Operation("x", "elementwise", 8, 8)] * 100, modules=10)
    gpu = GPUS["A100"]
    fast, slow = (call_seconds(small, gpu, host) for host in (FAST_HOST, SLOW_HOST))
    graph = call_seconds(small, gpu, FAST_HOST, GRAPH)
    assert fast.total > fast.gpu and graph.total < fast.total < slow.total
    large = CallTrace([Operation("x", "elementwise", 10**10, 10**10)])
    hidden = [call_seconds(large, gpu, host, hooks=1e-3).total for host in (FAST_HOST, SLOW_HOST)]
    assert hidden[0] == hidden[1] == call_seconds(large, gpu, FAST_HOST).total
    # What the host does after it has waited for the device, the device waits for.
    waits = CallTrace([*large.operations, Operation("x", "wait", 8, 0)])
    assert call_seconds(waits, gpu, FAST_HOST, hooks=1e-3).total > hidden[0] + 0.6e-3


def test_the_time_in_the_hooks_is_measured_by_kind_of_call():
    taken = hook_seconds("sd15", {"cache_interval": 3}, steps=12)
    assert set(taken) >= {(Phase.MERGE, True), (Phase.MERGE, False)} and all(0 < one < 1 for one in taken.values())


def test_public_figures_name_their_source_and_a_known_gpu():
    for one in (*TIMES, *RATIOS):
        assert one.gpu in GPUS and one.source.startswith("https://") and one.measured > 0
        assert one.is_ratio == (one in RATIOS)
    assert {gpu for gpu, of in GPUS.items() if of.calibrated} == {one.gpu for one in TIMES if not one.later}
    assert set(gpus.FORECAST) <= set(GPUS)


def test_errors_are_of_the_prediction():
    figure = RATIOS[0]
    found = [Prediction(figure, figure.measured * (1 + error)) for error in (-0.1, 0.02, 0.05)]
    errors = Errors.of(found)
    assert (errors.least, errors.median_size, errors.largest) == pytest.approx((-0.1, 0.05, 0.05))


def test_the_command_writes_page_and_data(tmp_path):
    shapes = (Shape("sd15", 512), Shape("sdxl", 1024))
    figures = [one for one in (*TIMES, *RATIOS) if one.shape in shapes][:6] + [RATIOS[-1]]
    figures = [dataclasses.replace(one, shape=shapes[0]) for one in figures]
    work.run("python eval/gpu_forecast.py", tmp_path, dry_run=True, shapes=shapes[:1], figures=figures)
    page = (tmp_path / "gpu-forecast.md").read_text(encoding="utf-8")
    data = json.loads((tmp_path / "gpu-forecast.json").read_text(encoding="utf-8"))
    assert page.startswith("# A dry run") and "Forecast, not measured" in page and "uncalibrated" in page
    assert len(data["speed_ups"]) == 12 and len(data["validation"]) == len(figures)
    assert all(one["agents"] > 0 for one in data["speed_ups"])
