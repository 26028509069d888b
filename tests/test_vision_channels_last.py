"""Memory formats: every model takes channels_last, though it has biases of another rank, and computes the same."""

from __future__ import annotations

import copy

import pytest
import torch
from test_vision_attention import GRID, make, tokens
from test_vision_dense import SMALL
from test_vision_dense import small as small_backbone
from torch import nn
from vision_small import NAMES, images, small

from agentsd.vision import FeaturePyramid, SeparateAgentAttention
from agentsd.vision.cswin import AgentBranch


@torch.no_grad()
@pytest.mark.parametrize("name", NAMES)
def test_models_in_channels_last_compute_the_same(name):
    model = small(name)
    before = {n: (v.shape, v.clone()) for n, v in model.state_dict().items()}
    expected = model(images())
    model.to(memory_format=torch.channels_last)
    convolutions = [m.weight for m in model.modules() if isinstance(m, nn.Conv2d)]
    assert all(weight.is_contiguous(memory_format=torch.channels_last) for weight in convolutions)
    assert all(v.shape == before[n][0] and torch.equal(v, before[n][1]) for n, v in model.state_dict().items())
    for image in (images(), images().to(memory_format=torch.channels_last)):
        torch.testing.assert_close(model(image), expected)
    model.to(memory_format=torch.contiguous_format)
    torch.testing.assert_close(model(images()), expected)


@pytest.mark.parametrize("name", SMALL)
def test_pyramids_of_features_in_channels_last_have_the_same_gradients(name):
    """A detector's backbone, with gradients: they have the parameters' rank, and move with them."""
    model = FeaturePyramid(small_backbone(name), out_channels=8).eval()  # no stochastic depth
    moved = copy.deepcopy(model)
    image = torch.randn(1, 3, 64, 96)
    for each in (model, moved):
        sum(level.square().mean() for level in each(image).values()).backward()
    moved.to(memory_format=torch.channels_last)
    sum(level.square().mean() for level in moved(image.to(memory_format=torch.channels_last)).values()).backward()
    sum(level.square().mean() for level in model(image).values()).backward()
    for (label, one), other in zip(model.named_parameters(), moved.parameters()):
        torch.testing.assert_close(one.grad, other.grad, rtol=1e-3, atol=1e-5, msg=label)


def move_back_and_forth(module):
    return module.to(torch.float64, memory_format=torch.channels_last).to(torch.float32)


def move_to_meta_and_back(module):
    weights = copy.deepcopy(module.state_dict())
    module.to("meta", memory_format=torch.channels_last).to_empty(device="cpu").load_state_dict(weights)
    return module


def move_to_shared_memory(module):
    return module.share_memory()


def move_with_swapped_tensors(module):
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        return module.to(memory_format=torch.channels_last).double().float()
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


@torch.no_grad()
@pytest.mark.parametrize(
    "move",
    [move_back_and_forth, move_to_meta_and_back, move_to_shared_memory, move_with_swapped_tensors],
    ids=lambda f: f.__name__,
)
def test_other_moves_of_the_biases_still_work(move):
    module = make(class_token=True)
    expected, shapes = module(tokens(extra=1), GRID), {n: p.shape for n, p in module.named_parameters()}
    parameters = dict(module.named_parameters())
    module = move(module)
    torch.testing.assert_close(module(tokens(extra=1), GRID), expected)
    assert {n: p.shape for n, p in module.named_parameters()} == shapes
    assert all(type(p) is nn.Parameter and p.requires_grad for p in module.parameters())
    if move is move_to_shared_memory:
        assert all(p.is_shared() and p is parameters[n] for n, p in module.named_parameters())


@torch.no_grad()
@pytest.mark.parametrize("grid", [GRID, (7, 7), (9, 4)])
@pytest.mark.parametrize("agent_grid", [None, 3])
def test_fused_kernels_get_contiguous_biases_in_channels_last(grid, agent_grid):
    for kind in (SeparateAgentAttention, AgentBranch):
        module = make(kind, agent_grid=agent_grid).to(memory_format=torch.channels_last)
        assert all(biases.is_contiguous() for biases in module.biases(grid, torch.float32))
