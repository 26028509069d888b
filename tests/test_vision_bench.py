"""eval/vision: counts, paired timing, the ImageNet protocol with stops and several processes, and the command line."""

from __future__ import annotations

import argparse
import functools
import json
from types import SimpleNamespace

import pytest
import timm
import torch
from PIL import Image

from eval import vision_bench
from eval.common.protocol import BenchError
from eval.vision import counts, imagenet, speed
from eval.vision.models import build
from eval.vision.paper import AGENT, BASELINE_TOP1, PAIRS
from eval.vision.report import as_markdown


def test_every_model_has_its_row_and_every_baseline_its_accuracy():
    from agentsd.vision import VARIANTS

    assert set(AGENT) == set(VARIANTS)
    for pair in PAIRS["all"]:
        assert pair.agent in AGENT and pair.baseline in BASELINE_TOP1
        assert BASELINE_TOP1[pair.baseline] <= AGENT[pair.agent].top1


def test_counts_of_the_baselines_are_the_papers():
    parameters, gmacs = counts.count("deit_tiny_patch16_224", 224)
    assert parameters == 5_717_416 and gmacs == pytest.approx(1.25, abs=0.01)
    parameters, gmacs = counts.count("pvt_v1_tiny", 224)  # 13.2 M and 1.9 G in the PVT paper
    assert parameters == pytest.approx(13.2e6, rel=0.01) and gmacs == pytest.approx(1.9, abs=0.05)


def test_counts_have_a_row_per_model(monkeypatch):
    name = "agent_pvt_tiny"
    monkeypatch.setattr(counts, "AGENT", {name: AGENT[name]})
    (row,) = counts.rows()
    assert row["parameters"] == 11_570_352 and row["size"] == 224
    text = as_markdown("t", ["l"], {"counts": [row]})
    assert "| agent_pvt_tiny | 224 | 11,570,352 | 11.6 | 1.99 | 2 | 78.4 |" in text


def test_pairs_are_timed_in_turn(monkeypatch):
    order = []

    def fake(name, size, device, dtype):
        return lambda image: order.append(name)

    monkeypatch.setattr(speed, "build", fake)
    laps = iter([4.0, 1.0, 6.0, 2.0, 10.0, 5.0])
    monkeypatch.setattr(speed, "_seconds", lambda call, timing: (call(), next(laps))[1])
    row = speed._timed_pair("a", "b", 32, speed.Timing(2, 3, torch.device("cpu"), torch.float32))
    assert order == ["a", "b"] * 4  # a warm-up and three rounds
    assert row["speedup"] == 3 and row["baseline_ms"] == 3000 and row["agent_ms"] == 1000 and row["unstable"]


def test_a_single_round_gives_no_speed_up(monkeypatch):
    monkeypatch.setattr(speed, "build", lambda *_: lambda image: None)
    laps = iter([4.0, 1.0])
    monkeypatch.setattr(speed, "_seconds", lambda *_: next(laps))
    names = "deit_tiny_patch16_224", "agent_deit_tiny_patch16_224"
    row = speed._timed_pair(*names, 32, speed.Timing(1, 1, torch.device("cpu"), torch.float32))
    assert row["speedup"] is row["speedup_quartiles"] is None and row["baseline_ms"] == 4000
    rows = [{**row, "tokens": 4, "baseline_gmacs": 1.0, "agent_gmacs": 1.0, "why": "size"}]
    text = as_markdown("t", [], {"growth": rows, "throughput": rows})
    assert text.count("| one round |  |") == 2 and "×" not in text


@pytest.mark.parametrize("clock", ["wall", "cpu"])
def test_growth_of_real_models(clock):
    rows = speed.growth([32, 64], speed.Timing(1, 1, torch.device("cpu"), torch.float32, clock))
    assert [row["tokens"] for row in rows] == [4, 16] and all(row["agent_ms"] > 0 for row in rows)
    rows = [
        {"tokens": n, "agent_ms": 3 * n**1.5, "baseline_ms": n, "agent_gmacs": n, "baseline_gmacs": n} for n in (4, 64)
    ]
    assert speed.exponent(rows, "agent_ms") == pytest.approx(1.5)


def test_models_are_built_for_their_size():
    assert build("pvt_v1_small", 64, "cpu")(torch.randn(1, 3, 64, 64)).shape == (1, 1000)
    with pytest.raises(BenchError, match="48 pixels: must be a multiple of 32 for pvt_v1_small"):
        build("pvt_v1_small", 48)


# ---- ImageNet ----


class Red(torch.nn.Module):
    """Classes ranked by how near their number, times 25, is to the red of the image."""

    calls = 0

    def forward(self, images):
        self.calls += 1
        red = images[:, 0].mean((1, 2)) * 255
        return -(red[:, None] - 25 * torch.arange(8)).abs()


@pytest.fixture()
def folder(tmp_path):
    """8 classes of 3 images: one in its class's red, the others in those of classes further away."""
    for label in range(8):
        place = tmp_path / "images" / "val" / f"n{label}"
        place.mkdir(parents=True)
        for i, red in enumerate((25 * label, 25 * ((label + 2) % 8), 25 * ((label + 4) % 8))):
            Image.new("RGB", (5, 5), (red, 0, 0)).save(place / f"{label}-{i}.png")
    return tmp_path / "images"


def process(index, total):
    return SimpleNamespace(
        process_index=index, num_processes=total, is_main_process=index == 0, device=torch.device("cpu"),
        wait_for_everyone=lambda: None,
    )  # fmt: skip


def to_tensor(image):
    return torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8).view(5, 5, 3).permute(2, 0, 1) / 255


def expected(data):
    top1 = top5 = 0
    for image, label in data:
        ranked = Red()(image[None])[0].argsort(descending=True, stable=True).tolist()
        top1, top5 = top1 + (ranked[0] == label), top5 + (label in ranked[:5])
    return 100 * top1 / len(data), 100 * top5 / len(data)


def test_accuracy_is_exact_and_a_stopped_run_goes_on(folder, tmp_path):
    data = imagenet.open_folder(folder, 8, to_tensor)
    settings, model = {"model": "red", "chunk": 5}, Red()
    scores = imagenet.evaluate(model, data, settings, tmp_path, process(0, 1))
    assert (scores["top1"], scores["top5"]) == pytest.approx(expected(data)) and scores["images"] == 24
    assert model.calls == 5
    lines = tmp_path / "imagenet" / "done-0.jsonl"
    text = lines.read_text()
    lines.write_text(text[:-20])  # stopped while the last line was written
    again = Red()
    assert imagenet.evaluate(again, data, settings, tmp_path, process(0, 1)) == scores
    assert again.calls == 1
    with pytest.raises(BenchError, match="other settings"):
        imagenet.evaluate(model, data, {**settings, "chunk": 4}, tmp_path, process(0, 1))


def test_processes_share_the_work_and_one_reports(folder, tmp_path):
    data = imagenet.open_folder(folder, 8, to_tensor)
    settings, models = {"chunk": 5}, [Red(), Red()]
    (tmp_path / "imagenet").mkdir()
    (tmp_path / "imagenet" / "settings.json").write_text(json.dumps(settings))
    assert imagenet.evaluate(models[1], data, settings, tmp_path, process(1, 2)) is None
    scores = imagenet.evaluate(models[0], data, settings, tmp_path, process(0, 1))
    assert models[1].calls == 2 and models[0].calls == 3
    assert (scores["top1"], scores["top5"]) == pytest.approx(expected(data))


def test_command_evaluates_a_checkpoint(folder, tmp_path, monkeypatch, capsys):
    name = "agent_deit_tiny_patch16_224"
    small = functools.partial(timm.create_model, depth=1, num_classes=8)
    torch.save({"model": small(name).state_dict()}, tmp_path / "f.pth")
    monkeypatch.setattr(imagenet.timm, "create_model", small)
    arguments = ["--imagenet", str(folder), "--checkpoint", str(tmp_path / "f.pth"), "--model", name, "--device", "cpu"]
    arguments += ["--workers", "0", "--imagenet-batch", "10", "--out", str(tmp_path / "out")]
    assert vision_bench.main(arguments) == 0
    found = json.loads((tmp_path / "out" / "results.json").read_text())
    assert found["imagenet"]["images"] == 24 and 0 <= found["imagenet"]["top1"] <= found["imagenet"]["top5"] <= 100
    assert set(found) == {"command", "machine", "imagenet"}
    assert f"| {name} | 24 |" in (tmp_path / "out" / "results.md").read_text()
    torch.save({"model": small(name).state_dict()}, tmp_path / "f.pth")  # other weights
    assert vision_bench.main(arguments) == 2 and "other settings" in capsys.readouterr().err
    torch.save({"model": small(name, num_classes=9).state_dict()}, tmp_path / "f.pth")
    assert vision_bench.main(arguments) == 2 and "another number of classes" in capsys.readouterr().err


def test_folders_must_be_the_classes(folder, tmp_path):
    with pytest.raises(BenchError, match="8 folders and the model 1000 classes"):
        imagenet.open_folder(folder, 1000, to_tensor)
    with pytest.raises(BenchError, match="one folder of images for each class"):
        imagenet.open_folder(tmp_path / "none", 1000, to_tensor)


# ---- the command ----


def test_command_writes_its_report(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(counts, "AGENT", {"agent_pvt_tiny": AGENT["agent_pvt_tiny"]})
    assert (
        vision_bench.main(["--stages", "counts,growth", "--growth", "32", "--rounds", "1", "--out", str(tmp_path)]) == 0
    )
    text = (tmp_path / "results.md").read_text()
    assert "agent_pvt_tiny" in text and "## Growth" in text and "--growth 32" in text and "timm" in text
    assert set(json.loads((tmp_path / "results.json").read_text())) == {"command", "machine", "counts", "growth"}


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--stages", "speed"], "--stages speed"),
        (["--sizes", "100"], "multiples of 32"),
        (["--rounds", "0"], "--rounds 0"),
        (["--model", "agent_pvt_tiny"], "--imagenet DIR"),
        (["--imagenet", "x"], "--checkpoint FILE"),
        (["--imagenet", "x", "--checkpoint", "y", "--model", "resnet18"], "--model resnet18"),
        (["--imagenet", "x", "--checkpoint", "none.pth", "--model", "agent_deit_tiny_patch16_224"], "none.pth"),
        (["--device", "quantum"], "--device quantum"),
    ],
)
def test_wrong_arguments_are_one_sentence(tmp_path, capsys, arguments, said):
    assert vision_bench.main([*arguments, "--out", str(tmp_path)]) == 2
    assert said in capsys.readouterr().err


def test_presets_leave_given_arguments_alone():
    options = vision_bench._options(["--preset", "full", "--rounds", "2", "--out", "x"])
    assert isinstance(options, argparse.Namespace) and options.rounds == 2 and options.batch_size == 32
