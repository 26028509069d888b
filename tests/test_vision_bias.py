"""vision/bias.py: the biases of a forward pass are those of the parameters as they are, however these changed."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from diffusers.training_utils import EMAModel
from test_vision_attention import GRID, make, naive, tokens
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.utils import parameters_to_vector, parametrize, vector_to_parameters

from agentsd.vision import bias

# ---- writes, by how they are done: a factor, as softmax does not see a constant that is added to all ----


@torch.no_grad()
def write_in_place(module):
    module.an_bias.mul_(3.0)


def write_by_load(module):
    module.load_state_dict({name: 3 * value for name, value in module.state_dict().items()})


def write_by_assigning_load(module):
    module.load_state_dict({name: 3 * value for name, value in module.state_dict().items()}, assign=True)


def write_by_replacing(module):
    module.an_bias = nn.Parameter(3 * module.an_bias.detach())


def write_by_foreach(module):
    with torch.no_grad():
        torch._foreach_lerp_(list(module.parameters()), [torch.ones_like(p) for p in module.parameters()], 0.5)


def write_in_inference_mode(module):
    with torch.inference_mode():
        module.an_bias.mul_(3.0)


def write_through_data(module):
    module.an_bias.data.mul_(3.0)


def write_by_setting_data(module):
    module.na_bias.data = 3 * module.na_bias.data


def write_by_vector(module):
    vector_to_parameters(3 * parameters_to_vector(module.parameters()), module.parameters())


def write_through_numpy(module):
    module.ah_bias.detach().numpy()[:] *= 3


def write_through_storage(module):
    other = 3 * module.aw_bias.detach()
    module.aw_bias.untyped_storage().copy_(other.untyped_storage())


def write_one_number(module):
    module.wa_bias.data.flatten()[-1] += 5


def write_by_average_of_weights(module):
    """diffusers' EMAModel.copy_to, which writes through .data."""
    average = EMAModel(module.parameters())
    average.shadow_params = [3 * value for value in average.shadow_params]
    average.copy_to(module.parameters())


def write_by_fused_optimizer(module):
    """Steps in eval mode, with a look at the output between them; the fused step leaves the versions alone."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05, fused=True)
    for _ in range(5):
        optimizer.zero_grad()
        module(tokens(), GRID).square().mean().backward()
        optimizer.step()
        with torch.no_grad():
            module(tokens(), GRID)


def write_by_dtype_through_data(module):
    for parameter in module.parameters():
        parameter.data = 3 * parameter.data.to(torch.float64)
    module.to(torch.float32)


def write_by_device(module):
    weights = {name: 3 * value for name, value in module.state_dict().items()}
    module.to("meta").to_empty(device="cpu").load_state_dict(weights)


WRITES = [value for name, value in sorted(globals().items()) if name.startswith("write_")]


@pytest.mark.parametrize("write", WRITES, ids=lambda f: f.__name__)
@pytest.mark.parametrize("frozen", [False, True])
def test_output_follows_a(write, frozen):
    module = make()
    if frozen and write is not write_by_fused_optimizer:
        module.requires_grad_(False)
    with torch.no_grad():
        module(tokens(), GRID)
        write(module) if write is not write_by_fused_optimizer else torch.enable_grad()(write)(module)
        torch.testing.assert_close(module(tokens(), GRID), naive(module, tokens(), GRID), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_unchanged_parameters_are_resized_once():
    module = make()
    first = module.current_biases(GRID, torch.float32)
    again = module.current_biases(GRID, torch.float32)
    assert all(new is old for new, old in zip(again, first))
    for kept, fresh in zip(first, module.biases(GRID, torch.float32)):
        assert torch.equal(kept, fresh) and kept is not fresh
    assert not torch.equal(module.biases(GRID, torch.float32)[0].zero_(), first[0]), "what is handed out is not kept"


# ---- parameters that something else stands for ----


@torch.no_grad()
@pytest.mark.parametrize("wrapped", [False, True])
def test_functional_call_reads_the_tensors_it_is_given(wrapped):
    module, other = make(), make(seed=1)
    mine = module(tokens(), GRID)
    given = dict(other.named_parameters()) if wrapped else other.state_dict()
    found = torch.func.functional_call(module, given, (tokens(), GRID))
    torch.testing.assert_close(found, other(tokens(), GRID))
    torch.testing.assert_close(module(tokens(), GRID), mine)


@torch.no_grad()
def test_vmap_over_models_and_grad_of_inputs_leave_nothing_behind():
    module, other = make(), make(seed=1)
    mine = module(tokens(), GRID)
    stacked = {n: torch.stack([a, b]) for (n, a), b in zip(module.state_dict().items(), other.state_dict().values())}
    call = lambda weights, x: torch.func.functional_call(module, weights, (x, GRID))  # noqa: E731
    found = torch.vmap(call, in_dims=(0, None))(stacked, tokens())
    torch.testing.assert_close(found, torch.stack([mine, other(tokens(), GRID)]))
    each = torch.vmap(lambda x: module(x[None], GRID)[0])(tokens())
    torch.testing.assert_close(each, mine)
    module.requires_grad_(False)
    with torch.enable_grad():
        gradient = torch.func.grad(lambda x: module(x, GRID).sum())(tokens())
    assert gradient.isfinite().all()
    torch.testing.assert_close(module(tokens(), GRID), mine)


@torch.no_grad()
@pytest.mark.parametrize("first", ["fake", "real"])
def test_a_run_with_fake_tensors_leaves_none_behind(first):
    module = make()
    expected = naive(module, tokens(), GRID)
    if first == "real":
        module(tokens(), GRID)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert module(mode.from_tensor(tokens()), GRID).shape == (2, 30, 16)
    torch.testing.assert_close(module(tokens(), GRID), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_parametrization_is_computed_each_time():
    module = make()
    module(tokens(), GRID)
    factor = nn.Module()
    factor.scale = 2.0
    factor.forward = lambda value: factor.scale * value
    parametrize.register_parametrization(module, "an_bias", factor)
    for factor.scale in (2.0, 3.0):
        weights = copy.deepcopy(make())
        weights.load_state_dict(make().state_dict())
        weights.an_bias.mul_(factor.scale)
        torch.testing.assert_close(module(tokens(), GRID), weights(tokens(), GRID))


@torch.no_grad()
@pytest.mark.parametrize("copied", [copy.deepcopy, copy.copy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_are_independent(copied):
    module = make()
    module(tokens(), GRID)
    twin = copied(module)
    assert twin._kept is None
    twin.an_bias = nn.Parameter(3 * twin.an_bias)
    for each in (twin, module):
        torch.testing.assert_close(each(tokens(), GRID), naive(each, tokens(), GRID), rtol=1e-4, atol=1e-4)


# ---- what is kept, and where not ----


def test_biases_are_not_kept_where_gradients_flow_or_in_training():
    module = make()
    first = module.current_biases(GRID, torch.float32)[0]
    assert first.requires_grad and module._kept is None
    with torch.no_grad():
        module(tokens(), GRID)
        assert module._kept is not None
        module.train()
        module(tokens(), GRID)
        assert module._kept is None


@torch.no_grad()
def test_large_biases_are_not_kept(monkeypatch):
    module = make()  # 2 heads, 4 agents, 30 tokens
    monkeypatch.setattr(bias, "MOST_KEPT", 2 * 4 * 30)
    module(tokens(), GRID)
    assert module._kept is not None
    module.train().eval()
    monkeypatch.setattr(bias, "MOST_KEPT", 2 * 4 * 30 - 1)
    torch.testing.assert_close(module(tokens(), GRID), naive(module, tokens(), GRID), rtol=1e-4, atol=1e-4)
    assert module._kept is None


def test_biases_made_in_inference_mode_serve_a_backward_pass():
    module = make().requires_grad_(False)
    with torch.inference_mode():
        module(tokens(), GRID)
    x = tokens().requires_grad_()
    module(x, GRID).sum().backward()
    assert x.grad.any()


def test_a_model_built_in_inference_mode_runs_in_both():
    with torch.inference_mode():
        module = make().requires_grad_(False)
        expected = naive(module, tokens(), GRID)
        torch.testing.assert_close(module(tokens(), GRID), expected, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(module(tokens(), GRID), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_another_grid_or_dtype_gets_its_own_biases():
    module = make()
    for grid in (GRID, (4, 4), GRID):
        torch.testing.assert_close(module(tokens(grid), grid), naive(module, tokens(grid), grid), rtol=1e-4, atol=1e-4)
    assert module.current_biases(GRID, torch.bfloat16)[0].dtype == torch.bfloat16
    assert module.current_biases(GRID, torch.float32)[0].dtype == torch.float32


@torch.no_grad()
@pytest.mark.parametrize("private", ["_len_torch_dispatch_stack", "_are_functorch_transforms_active"])
def test_a_pytorch_that_cannot_say_keeps_nothing(private, monkeypatch):
    monkeypatch.delattr(torch._C, private)
    module = make()
    module(tokens(), GRID)
    assert module._kept is None
