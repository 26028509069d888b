"""attention.py: against naive loops, as generalised linear attention, and at the edge of float16."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import reference
import torch
from hypothesis import given, settings

from agentsd import agent_attention
from agentsd.attention import softmax_attention


def random_inputs(tokens=9, agents=4, head_dim=8, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    make = lambda n: torch.randn(2, 3, n, head_dim, generator=generator, dtype=dtype)  # noqa: E731
    return make(tokens), make(agents), make(tokens), make(tokens)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 12),
    st.integers(1, 6),
    st.sampled_from([4, 7, 16]),
    st.floats(0, 1),
    st.floats(-1, 0),
    st.integers(0, 999),
)
def test_equals_naive_loops(tokens, agents, head_dim, alpha, exponent, seed):
    query, agent, key, value = random_inputs(tokens, agents, head_dim, seed)
    out = agent_attention(query, agent, key, value, alpha, exponent)
    for b in range(2):
        for h in range(3):
            gathered = reference.attend(agent[b, h], key[b, h], value[b, h], head_dim**-0.5)
            expected = torch.stack(reference.attend(query[b, h], agent[b, h], gathered, head_dim**exponent))
            torch.testing.assert_close(out[b, h], expected + alpha * value[b, h])


def test_is_generalised_linear_attention():
    """O = φq(Q) (φk(K)ᵀ V) + αV with φq(Q) = softmax(s Q Aᵀ) and φk(K) = softmax(A Kᵀ / √d)ᵀ."""
    query, agents, key, value = random_inputs()
    d = query.shape[-1]
    phi_q = torch.softmax(d**-0.15 * query @ agents.mT, dim=-1)
    phi_k = torch.softmax(agents @ key.mT / d**0.5, dim=-1).mT
    torch.testing.assert_close(agent_attention(query, agents, key, value), phi_q @ (phi_k.mT @ value) + 0.075 * value)


def test_agents_are_a_set():
    query, agents, key, value = random_inputs()
    permuted = agents[:, :, torch.tensor([2, 0, 3, 1])]
    torch.testing.assert_close(agent_attention(query, agents, key, value), agent_attention(query, permuted, key, value))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_upcast_stays_finite_where_logits_overflow_float16(dtype):
    query, agents, key, value = (40 * x for x in random_inputs(dtype=torch.float32))
    assert (agents @ key.mT * query.shape[-1] ** -0.5).abs().max() < 65504 < (40 * agents @ (40 * key).mT).abs().max()
    large = [(40 * x).to(dtype) for x in (query, agents, key)]
    out = agent_attention(*large, value.to(dtype), upcast=True)
    assert out.dtype == dtype and torch.isfinite(out).all()
    exact = agent_attention(*(x.double() for x in large), value.to(dtype).double())
    torch.testing.assert_close(out.double(), exact, rtol=0.02, atol=0.5)
    plain = softmax_attention(large[0], large[2], value.to(dtype), upcast=True)
    assert plain.dtype == dtype and torch.isfinite(plain).all()


def test_upcast_holds_under_autocast():
    query, key, value = torch.randn(3, 1, 2, 16, 8, generator=torch.Generator().manual_seed(0)).unbind()
    expected = softmax_attention(query, key, value)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(softmax_attention(query, key, value, upcast=True), expected)
        assert not torch.equal(softmax_attention(query, key, value).float(), expected)


def test_alpha_needs_one_value_per_query():
    query, agents, key, value = random_inputs()
    with pytest.raises(ValueError, match="alpha=0"):
        agent_attention(query[:, :, :5], agents, key, value)
    assert agent_attention(query[:, :, :5], agents, key, value, alpha=0).shape == (2, 3, 5, 8)


def test_biases_are_added_to_the_logits_of_each_softmax():
    query, agents, key, value = random_inputs()
    generator = torch.Generator().manual_seed(1)
    first = torch.randn(1, 3, 4, 9, generator=generator, dtype=torch.float64)
    second = torch.randn(1, 3, 9, 4, generator=generator, dtype=torch.float64)
    d = query.shape[-1]
    for b1, b2 in ((first, second), (first, None), (None, second)):
        aggregated = (agents @ key.mT * d**-0.5 + (0 if b1 is None else b1)).softmax(-1) @ value
        expected = (query @ agents.mT * d**-0.5 + (0 if b2 is None else b2)).softmax(-1) @ aggregated
        out = agent_attention(query, agents, key, value, 0, -0.5, aggregation_bias=b1, broadcast_bias=b2)
        torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("upcast", [False, True])
def test_without_biases_the_fused_calls_get_no_mask(monkeypatch, upcast):
    """A mask of zeros may choose another kernel: Stable Diffusion's results must not change by a bit."""
    calls = []
    fused = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        "torch.nn.functional.scaled_dot_product_attention",
        lambda *args, **kwargs: calls.append(set(kwargs)) or fused(*args, **kwargs),
    )
    inputs = random_inputs(dtype=torch.float32)
    agent_attention(*inputs, upcast=upcast)
    assert calls == [{"scale"}, {"scale"}]
    agent_attention(*inputs, upcast=upcast, broadcast_bias=torch.zeros(1, 3, 9, 4))
    assert calls[2:] == [{"scale"}, {"scale", "attn_mask"}]


def test_float32_biases_serve_bfloat16_inputs():
    inputs = random_inputs(dtype=torch.bfloat16)
    bias = torch.randn(1, 3, 4, 9, generator=torch.Generator().manual_seed(1))
    for upcast in (False, True):
        out = agent_attention(*inputs, upcast=upcast, aggregation_bias=bias)
        assert out.dtype == torch.bfloat16
        exact = agent_attention(*(x.double() for x in inputs), aggregation_bias=bias)
        torch.testing.assert_close(out.double(), exact, rtol=0.05, atol=0.05)
