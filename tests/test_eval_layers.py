"""eval/calls/layers.py on small grids: what each variant computes, and the tables; never how long it took."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import agentsd
from agentsd.unet.processor import AgentAttnProcessor
from eval.calls import layers
from eval.calls.layers import Layer, Shape, as_markdown, growth, measure, profile, variants
from eval.layer_bench import main

SHAPE = Shape(channels=32, heads=4, batch=2)


def make_layer(side):
    return Layer(side, SHAPE, torch.device("cpu"), torch.float32)


def test_each_variant_runs_as_what_it_is_called(monkeypatch):
    """By the numbers of queries and keys that reach PyTorch's fused attention from a layer of 16 × 16 tokens."""
    calls = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, *args, **kwargs):
        calls.append((query.shape[2], key.shape[2]))
        return fused(query, key, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    left = 256 - int(256 * 0.4)
    expected = {
        "sdpa": [(256, 256)],
        "limit": [],
        "agent": [(16, left), (left, 16)],
        "agent, max_agents=256": [(16, left), (left, 16)],
        "merge": [(left, left)],
        "downsample": [(256, 64)],
        "downsample, merge_stride=4": [(256, 16)],
        "downsample, max_keys=1024": [(256, 64)],
    }
    layer = make_layer(16)
    for row in variants(0.4):
        calls.clear()
        with torch.inference_mode():
            first, second = layer.run(row, lambda call: (call(), call()))
        assert torch.equal(first, second) and first.shape == (2, 256, 32)
        if row.name in expected:
            assert calls == 2 * expected[row.name], row.name


def test_the_layer_computes_what_it_computes_in_its_block():
    layer, seen = make_layer(8), []

    def give_tokens(block, args, kwargs):
        return (layer.tokens,), kwargs

    agent, _, _, merge = variants(0.5)[2:6]
    for row in (agent, merge):
        with torch.inference_mode():
            alone = layer.run(row, lambda call: call())
            with agentsd.patched(layer.unet, **dict(row.settings)):
                first = layer.block.register_forward_pre_hook(give_tokens, prepend=True, with_kwargs=True)
                last = layer.block.attn1.register_forward_hook(lambda *args: seen.append(args[-1]))
                sample, text = layer.sample.expand(2, -1, -1, -1), layer.text.expand(2, -1, -1)
                layer.unet(sample, layers._TIMESTEPS[row.phase], text)
                first.remove()
                last.remove()
        assert torch.allclose(alone, seen[-1], atol=1e-6), row.name


def test_each_variant_is_timed_once_a_round_in_rotated_order(monkeypatch):
    layer, order = make_layer(9), []
    run = layer.run
    monkeypatch.setattr(layer, "run", lambda row, work: order.append(row.name) or run(row, work))
    names = [row.name for row in variants(0.5)[:3]]
    with torch.inference_mode():
        found = measure(layer, variants(0.5)[:3], 2)
    assert list(found) == names and all(own.median > 0 for own in found.values())
    assert order == [*names, *names[1:], names[0]]
    assert not any(isinstance(p, AgentAttnProcessor) for p in layer.unet.attn_processors.values())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in layer.unet.modules())


def test_growth_is_the_exponent():
    assert growth([8, 16], [1.0, 16.0]) == pytest.approx(2)  # four times the tokens
    assert growth([64, 128, 256], [3.0, 0.0, 48.0]) == pytest.approx(1)


def test_the_table():
    found = [
        {name: SimpleNamespace(median=seconds) for name, seconds in {"sdpa": 0.4, "limit": 0.1, "agent": 0.2}.items()},
        {name: SimpleNamespace(median=seconds) for name, seconds in {"sdpa": 6.4, "limit": 0.4, "agent": 0.8}.items()},
    ]
    text = as_markdown([64, 128], found, "title", ["line"])
    assert text.startswith("# title\n\nline\n\n| layer | 64×64: ms |")
    assert "| agent | 200.0 | 2.00 | 2.00 | 800.0 | 8.00 | 2.00 | N^1.00 |" in text
    assert "grows" not in as_markdown([64], found[:1], "title", [])
    alone = as_markdown([64, 128], found, "title", ["line"], rounds=1)  # of a single round no speed-up
    assert "× sdpa" not in alone and "over the limit" not in alone and "| agent | 200.0 | 800.0 | N^1.00 |" in alone


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--sides", "a"], "--sides 'a'"),
        (["--sides", "2,64"], "4 … 1024"),
        (["--channels", "40"], "--channels 40"),
        (["--heads", "0"], "--heads 0"),
        (["--rounds", "0"], "--rounds 0"),
        (["--ratio", "2"], "ratio=2.0"),
        (["--device", "tpu"], "device='tpu'"),
        (["--dtype", "int8"], "dtype='int8'"),
        (["--out", "nowhere/at/all.md"], "does not exist"),
    ],
)
def test_bad_input(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_the_command(tmp_path, capsys):
    out = tmp_path / "table.md"
    arguments = "--sides 8,16 --channels 32 --heads 4 --rounds 1 --device cpu --profile".split()
    assert main([*arguments, "--out", str(out)]) == 0
    assert out.read_text() in capsys.readouterr().out
    assert "python eval/layer_bench.py --sides 8,16" in out.read_text() and "torch" in out.read_text()
    assert "## Operators at 8×8" in out.read_text() and "## Operators at 16×16" in out.read_text()


def test_the_profile_counts_the_layer_alone(monkeypatch):
    monkeypatch.setattr(layers, "_OPERATORS", 1000)
    rows = {row.name: row for row in variants(0.4)}
    for name, sorts, attentions in (("sdpa", 0, 1), ("limit", 0, 0), ("merge", 2, 1)):
        with torch.inference_mode():
            lines = profile(make_layer(16), [rows[name]]).splitlines()
        calls = {line.split()[0]: int(line.split()[-1]) for line in lines if line.strip().startswith("aten::")}
        assert calls["aten::linear"] == 4  # the layer's projections, not its block's
        assert calls.get("aten::sort", 0) == sorts, name
        assert calls.get("aten::scaled_dot_product_attention", 0) == attentions, name
