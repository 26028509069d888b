"""vision/attention.py: the module against naive arithmetic; compile, export and autocast."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import torch
import vision_reference as reference

from agentsd.attention import agent_attention
from agentsd.vision import AgentAttention, SeparateAgentAttention
from agentsd.vision.attention import AgentCore
from agentsd.vision.cswin import StripeBranch

GRID = (6, 5)


def make(kind=AgentAttention, grid=GRID, seed=0, **settings):
    torch.manual_seed(seed)
    module = kind(16, 2, 4, grid, **settings)
    for parameter in module.parameters():  # biases large enough to matter
        torch.nn.init.normal_(parameter, std=0.5)
    return module.eval()


def tokens(grid=GRID, extra=0, batch=2, dim=16):
    return torch.randn(batch, grid[0] * grid[1] + extra, dim, generator=torch.Generator().manual_seed(1))


def naive(module, x, grid, pooled=None):
    w = {f"a.{name}": value for name, value in module.state_dict().items()}
    if "a.kv.weight" in w:
        key, value = reference.linear(w, "a.kv", x).chunk(2, -1)
        query = reference.linear(w, "a.q", x)
    else:
        query, key, value = reference.linear(w, "a.qkv", x).chunk(3, -1)
    return reference.linear(w, "a.proj", reference.agent(w, "a", query, key, value, grid, 2, pooled=pooled))


@torch.no_grad()
@pytest.mark.parametrize("kind", [AgentAttention, SeparateAgentAttention])
@pytest.mark.parametrize("grid", [GRID, (9, 4)])
@pytest.mark.parametrize("agent_grid", [None, 3])
@pytest.mark.parametrize("class_token", [False, True])
def test_equals_the_equations(kind, grid, agent_grid, class_token):
    module = make(kind, agent_grid=agent_grid, class_token=class_token)
    x = tokens(grid, int(class_token))
    torch.testing.assert_close(module(x, grid), naive(module, x, grid, agent_grid), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(module.train()(x, grid), naive(module, x, grid, agent_grid), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_weights_are_those_of_the_output():
    module = make(class_token=True)
    x = tokens(extra=1)
    query, key, value = module.project(x)
    aggregation, broadcast = module.weights(query, key, GRID)
    torch.testing.assert_close(aggregation.sum(-1), torch.ones(2, 2, 4))
    out = (broadcast @ (aggregation @ module.split(value))).transpose(1, 2).flatten(2)
    torch.testing.assert_close(module.attend(query, key, value, GRID), out)


@torch.no_grad()
def test_attention_is_the_function_of_the_package():
    module = make(agent_grid=3)
    query, key, value = module.project(tokens())
    split = [module.split(part) for part in (query, module.pool_agents(query, GRID), key, value)]
    first, second = module.biases(GRID, torch.float32)
    out = agent_attention(
        *split, alpha=0, broadcast_exponent=-0.5, aggregation_bias=first, broadcast_bias=second
    ).transpose(1, 2)
    torch.testing.assert_close(module.attend(query, key, value, GRID), out.flatten(2))


@torch.no_grad()
def test_ablations_leave_out_bias_and_convolution():
    module = make(enabled=False, use_conv=False)
    assert set(dict(module.named_parameters())) == {"qkv.weight", "qkv.bias", "proj.weight", "proj.bias"}
    query, key, value = module.project(x := tokens())
    agents = module.split(module.pool_agents(query, GRID))
    query, key, value = module.split(query), module.split(key), module.split(value)
    scale = 8**-0.5
    out = (query @ agents.mT * scale).softmax(-1) @ ((agents @ key.mT * scale).softmax(-1) @ value)
    torch.testing.assert_close(module(x, GRID), module.proj(out.transpose(1, 2).flatten(2)))


def test_gradients_reach_every_parameter():
    module = make(class_token=True, agent_grid=3).train()
    module(tokens(extra=1), GRID).square().mean().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in module.parameters())


# ---- how it is run ----


def test_autocast_and_half_precision_stay_close():
    module, x = make().requires_grad_(False), tokens()
    exact = module(x, GRID)
    with torch.autocast("cpu", torch.bfloat16):
        assert module(x, GRID).dtype == torch.bfloat16
        torch.testing.assert_close(module(x, GRID).float(), exact, rtol=0.1, atol=0.1 * exact.abs().max().item())
    torch.testing.assert_close(module(x, GRID), exact)  # the bfloat16 biases are not used again
    half = copy.deepcopy(module).to(torch.bfloat16)(x.to(torch.bfloat16), GRID)
    torch.testing.assert_close(half.float(), exact, rtol=0.1, atol=0.1 * exact.abs().max().item())


@torch.no_grad()
def test_compiles_whole_and_exports():
    module, x = make(class_token=True), tokens(extra=1)
    expected = module(x, GRID)
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x, GRID), expected)
    module.an_bias.add_(1.0)
    torch.testing.assert_close(compiled(x, GRID), module(x, GRID))
    exported = torch.export.export(module, (x, GRID)).module()
    torch.testing.assert_close(exported(x, GRID), module(x, GRID))


@torch.no_grad()
def test_tensors_reach_the_fused_kernels_with_channels_last_in_memory(monkeypatch):
    """Otherwise PyTorch falls back to its slow math kernel without a word."""
    strides = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def record(query, key, value, **settings):
        strides.extend(t.stride(-1) for t in (query, key, value, settings.get("attn_mask", query)))
        return fused(query, key, value, **settings)

    monkeypatch.setattr("torch.nn.functional.scaled_dot_product_attention", record)
    make()(tokens(), GRID)
    make(SeparateAgentAttention, agent_grid=3, class_token=True)(tokens(extra=1), GRID)
    for vertical in (True, False):
        StripeBranch(16, 2, 2, vertical)(tokens(), tokens(), tokens(), GRID)
    assert len(strides) == 2 * 8 + 3 * 4 and set(strides) == {1}


def test_wrong_numbers_are_explained():
    with pytest.raises(ValueError, match="num_agents=10.*square number"):
        AgentAttention(16, 2, 10, GRID)
    with pytest.raises(ValueError, match="num_agents=0"):
        AgentAttention(16, 2, 0, GRID)
    with pytest.raises(ValueError, match="agent_grid=-1"):
        AgentCore(16, 2, 4, GRID, agent_grid=-1)
    with pytest.raises(ValueError, match="num_heads=3.*divide the 16"):
        AgentAttention(16, 3, 4, GRID)


def test_needs_timm_and_says_so_and_loads_no_diffusers():
    code = (
        "import sys; sys.modules['diffusers'] = None; sys.modules['timm'] = None\n"
        "try: import agentsd.vision\n"
        'except ImportError as error: assert ".[vision]" in str(error) and "clone" in str(error), error\n'
        "else: raise SystemExit('no error')\n"
        "del sys.modules['timm']\n"
        "import agentsd.vision\n"
        "ours = {n for n in sys.modules if n.startswith('agentsd') and not n.startswith('agentsd.vision')}\n"
        "assert ours == {'agentsd', 'agentsd.messages'}, ours  # the latter for the message\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
