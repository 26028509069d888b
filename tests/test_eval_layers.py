"""eval/layers.py on small grids: what runs as what, and the table; never how long it took."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from agentsd.unet.processor import AgentAttnProcessor
from eval import layers
from eval.layer_bench import main
from eval.layers import Measured, Shape, as_markdown, growth, measure, profile, profile_as_markdown, variants

SHAPE = Shape(channels=32, heads=4, batch=2)


def test_each_variant_runs_as_what_it_is_called(monkeypatch):
    """By the numbers of queries and keys that reach PyTorch's fused attention from a layer of 16 × 16 tokens."""
    calls = []
    fused = torch.nn.functional.scaled_dot_product_attention

    def spy(query, key, *args, **kwargs):
        if key.shape[2] != layers._TEXT_TOKENS:
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
    for row in variants(0.4):
        calls.clear()
        measure(16, [row], SHAPE, 1, torch.device("cpu"), torch.float32)
        if row.name in expected:
            assert calls == 2 * expected[row.name], row.name  # the warm-up and one round


def test_nothing_is_left_of_the_patch(monkeypatch):
    made = []
    unet_class = layers.UNet2DConditionModel
    monkeypatch.setattr(layers, "UNet2DConditionModel", lambda **config: made.append(unet_class(**config)) or made[-1])
    found = measure(9, variants(0.5), SHAPE, 2, torch.device("cpu"), torch.float32)
    assert list(found) == [row.name for row in variants(0.5)] and all(own.seconds > 0 for own in found.values())
    assert not any(isinstance(p, AgentAttnProcessor) for p in made[0].attn_processors.values())
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in made[0].modules())


def test_growth_is_the_exponent():
    assert growth([8, 16], [1.0, 16.0]) == pytest.approx(2)  # four times the tokens
    assert growth([64, 128, 256], [3.0, 0.0, 48.0]) == pytest.approx(1)


def test_the_table():
    found = [
        {"sdpa": Measured(0.4, 10.0), "limit": Measured(0.1, 5.0), "agent": Measured(0.2, None)},
        {"sdpa": Measured(6.4, 40.0), "limit": Measured(0.4, 20.0), "agent": Measured(0.8, None)},
    ]
    text = as_markdown([64, 128], found, "title", ["line"])
    assert text.startswith("# title\n\nline\n\n| layer | 64×64: ms |")
    assert "| agent | 200.0 | 2.00 | 2.00 |  | 800.0 | 8.00 | 2.00 |  | N^1.00 |" in text
    assert "grows" not in as_markdown([64], found[:1], "title", [])


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
    assert "8×8: milliseconds" in out.read_text() and "16×16: milliseconds" in out.read_text()


def test_the_profile_counts_the_layer_alone():
    rows = [row for row in variants(0.4) if row.name in ("sdpa", "limit", "merge")]
    found = profile(16, rows, SHAPE, 3, torch.device("cpu"), torch.float32)
    calls = {name: {key: one.calls for key, one in operators.items()} for name, operators in found.items()}
    assert all(own["aten::linear"] == 4 for own in calls.values())  # the layer's projections, not its block's
    assert {name: own.get("aten::sort", 0) for name, own in calls.items()} == {"sdpa": 0, "limit": 0, "merge": 2}
    assert {name: own.get("aten::scaled_dot_product_attention") for name, own in calls.items()} == {
        "sdpa": 1, "limit": None, "merge": 1,
    }  # fmt: skip
    assert all(one.seconds >= 0 for operators in found.values() for one in operators.values())
    text = profile_as_markdown(16, found, most=3)
    assert text.startswith("16×16: ") and len(text.splitlines()) == 2 + 2 + 3 + 1
    lines = [line.split(" | ") for line in text.splitlines()[4:]]
    for column, operators in enumerate(found.values(), start=1):  # nothing is lost between the rows
        counted = sum(int(line[column].split("(")[1].split(")")[0]) for line in lines if line[column].strip(" |"))
        assert counted == sum(one.calls for one in operators.values())
