"""What only a CUDA device can show: half precision, determinism of the sums, and how often the host waits."""

from __future__ import annotations

import warnings

import pytest
import torch
from conftest import call_unet, make_pipeline, make_unet

import agentsd
from agentsd.grid_split import split_grid
from agentsd.layer_plan import draw_offsets
from agentsd.merging import match_tokens, merge_tokens
from agentsd.patch import get_patch

pytestmark = pytest.mark.gpu


def test_draws_are_the_ones_of_the_cpu(gpu):
    assert torch.equal(draw_offsets(1, 981, 3, 1000, 16, gpu).cpu(), draw_offsets(1, 981, 3, 1000, 16))


def test_merging_is_deterministic(gpu):
    """Sums by atomic additions would differ in their last bits from run to run."""
    x = torch.randn(2, 64 * 64, 320, device=gpu)
    matching = match_tokens(x, split_grid(64, 64, (4, 4), device=gpu))
    first = merge_tokens(x, matching, matching.num_src)
    for _ in range(10):
        assert torch.equal(merge_tokens(x, matching, matching.num_src), first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_means_are_accumulated_in_float32(gpu, dtype):
    x = torch.full((1, 64, 2), 60000.0, dtype=dtype, device=gpu)
    matching = match_tokens(x, split_grid(8, 8, (8, 8), device=gpu))
    torch.testing.assert_close(merge_tokens(x, matching, 63), x[:, :1])


@pytest.mark.parametrize("timestep", [900, 100])
def test_equals_the_cpu_and_repeats(gpu, timestep):
    unet = agentsd.apply_patch(make_unet())
    expected = call_unet(unet, timestep=timestep)
    unet.to(gpu)
    first = call_unet(unet, timestep=torch.tensor(timestep, device=gpu))
    torch.testing.assert_close(first.cpu(), expected, atol=2e-3, rtol=2e-3)
    assert torch.equal(call_unet(unet, timestep=torch.tensor(timestep, device=gpu)), first)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_finite(gpu, dtype):
    unet = agentsd.apply_patch(make_unet("sd2").to(gpu, dtype))
    for timestep in (900, 100):
        assert torch.isfinite(call_unet(unet, timestep=timestep)).all()


def test_one_synchronisation_per_unet_call(gpu):
    unet = agentsd.apply_patch(make_unet("sd15-deep").to(gpu), max_downsample=4)
    sample, text = torch.randn(2, 4, 16, 16, device=gpu), torch.randn(2, 7, 32, device=gpu)
    timestep = torch.tensor(900, device=gpu)
    with torch.no_grad():
        unet(sample, timestep, text)
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                unet(sample, timestep, text)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert sum("synchroniz" in str(warning.message) for warning in caught) <= 1


def test_compiled_with_inductor(gpu):
    unet = agentsd.apply_patch(make_unet().to(gpu))
    expected = [call_unet(unet, timestep=timestep) for timestep in (900, 100)]
    unet.compile(fullgraph=True)
    for timestep, eager in zip((900, 100), expected):
        compiled = call_unet(unet, timestep=torch.tensor(timestep, device=gpu))
        torch.testing.assert_close(compiled, eager, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("offloads", [False, True])
def test_tune_times_the_device_and_changes_nothing(gpu, offloads):
    pipe = make_pipeline()
    if offloads:
        pipe.enable_model_cpu_offload()
    else:
        pipe.to(gpu)
    state = torch.cuda.get_rng_state()
    tuning = agentsd.tune(pipe, 128, 128, steps=12, rounds=2)
    assert torch.equal(torch.cuda.get_rng_state(), state) and get_patch(pipe) is None
    assert "CUDA" in tuning.machine["driver"] and tuning.machine["device"] == torch.cuda.get_device_name()
    assert all(seconds > 0 for one in tuning.candidates for seconds in one.rounds)


def test_model_offload(gpu):
    from accelerate import cpu_offload_with_hook

    unet = agentsd.apply_patch(make_unet())
    expected = call_unet(unet)
    cpu_offload_with_hook(unet, gpu)
    torch.testing.assert_close(call_unet(unet).cpu(), expected, atol=2e-3, rtol=2e-3)
    assert set(get_patch(unet).last_call.outcomes.values()) == {"active"}
