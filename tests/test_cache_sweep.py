"""cache_sweep.py: its rows run on a tiny model, whole calls are counted by the layers that ran, distances are right."""

from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from conftest import make_pipeline

from eval import cache_sweep
from eval.calls import step_caching


def test_distances_by_hand():
    originals = np.full((2, 16, 16, 3), 0.5, dtype=np.float32)
    images = originals.copy()
    images[1] += 0.1
    found = step_caching.distances(images, originals)
    assert found["psnrs"] == [100.0, 20.0] and found["psnr"] == pytest.approx(60)
    assert found["psnr_error"] == pytest.approx(40)
    if step_caching.HAS_FLIP:
        assert step_caching.distances(originals, originals)["flip"] == 0 < found["flip"] < 1
    assert found["ssim"] < step_caching.distances(originals, originals)["ssim"] == pytest.approx(1)


@pytest.fixture
def small(monkeypatch):
    """The built-in model's place is taken by a tiny one at 64 pixels."""

    def load(model):
        pipe = make_pipeline(layers_per_block=2)
        whole = type(pipe).__call__
        pipe.__class__ = type("Small", (type(pipe),), {"__call__": lambda *a, **k: whole(*a, **k, height=64, width=64)})
        return pipe

    monkeypatch.setattr(step_caching.agentsd, "load_pipeline", load)


def test_rows_and_resuming(small, tmp_path, capsys, monkeypatch):
    command = ["--out", str(tmp_path), "--steps", "20", "--intervals", "3", "--images", "2", "--extras"]
    cache_sweep.main([*command, "--schedulers", "dpm++2m"])
    rows = {
        (row["method"], row.get("order"), row.get("depth")): row
        for row in json.loads((tmp_path / "rows.json").read_text())["rows"]
    }
    whole = {key: row["whole"] for key, row in rows.items()}
    assert whole["agents", None, None] == 20 and whole["deepcache", None, None] == 7
    assert whole["cache", 0, None] == 8  # the last call is whole
    assert whole["fewer steps", None, None] == 9  # 8 whole and 12 cached calls take as long
    with (tmp_path / "rows.csv").open() as file:
        assert len(list(csv.DictReader(file))) == len(rows) == 9
    assert "FLIP" in capsys.readouterr().out

    monkeypatch.setattr(step_caching, "run_row", lambda *_: pytest.fail("a row that is there is generated again"))
    cache_sweep.main([*command, "--schedulers", "dpm++2m"])
    assert "FLIP" in capsys.readouterr().out


ONE_ROW = "--steps 4 --intervals 2 --images 1 --schedulers ddim --out".split()


def test_a_folder_of_another_model_is_refused(small, tmp_path, capsys, monkeypatch):
    """It once printed the first model's figures as those of the second."""
    assert cache_sweep.main([*ONE_ROW, str(tmp_path)]) == 0
    before = (tmp_path / "rows.json").read_text()
    capsys.readouterr()
    assert cache_sweep.main([*ONE_ROW, str(tmp_path), "--model", "another"]) == 2
    printed = capsys.readouterr()
    assert "has rows of the model demo, and this is another: give another --out" in printed.err
    assert "FLIP" not in printed.out
    monkeypatch.setattr(step_caching, "weights_fingerprint", lambda pipe: "fine-tuned")
    assert cache_sweep.main([*ONE_ROW, str(tmp_path)]) == 2
    assert "demo with other weights" in capsys.readouterr().err
    data = json.loads(before)
    for row in data["rows"]:
        del row["model"]
    (tmp_path / "rows.json").write_text(json.dumps(data))
    assert cache_sweep.main([*ONE_ROW, str(tmp_path)]) == 2
    assert "the model which they do not say" in capsys.readouterr().err


def test_old_rows_keep_their_date_and_versions(small, tmp_path, capsys, monkeypatch):
    """The folder was once stamped as a whole with the day and versions of the last run."""
    assert cache_sweep.main([*ONE_ROW, str(tmp_path)]) == 0
    first = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert all({"model", "weights", "date", "machine", "versions"} <= row.keys() for row in first)
    assert all("torch " in row["versions"] for row in first)
    later = {"date": "2031-01-01", "machine": "a faster one", "versions": "torch 3.0"}
    monkeypatch.setattr(step_caching, "setting", lambda: later)
    assert cache_sweep.main([*ONE_ROW, str(tmp_path), "--intervals", "2", "3"]) == 0
    rows = json.loads((tmp_path / "rows.json").read_text())["rows"]
    assert rows[: len(first)] == first and len(rows) > len(first)
    assert all({key: row[key] for key in later} == later for row in rows[len(first) :])
    page = (tmp_path / "rows.md").read_text()
    assert f"- {len(first)} rows, 1 images each: demo, {first[0]['date']}" in page and "demo, 2031-01-01" in page
    assert "made in 2 settings: " in capsys.readouterr().out
    with (tmp_path / "rows.csv").open() as file:
        assert [line["date"] for line in csv.DictReader(file)] == [row["date"] for row in rows]


@pytest.mark.parametrize(
    "wrong, said",
    [
        ("--schedulers nonsense", "--schedulers nonsense: must be of ddim, plms"),
        ("--steps 1", "'1': must be an integer, at least 2"),
        ("--intervals two", "'two': must be an integer, at least 2"),
        ("--images 0", "'0': must be an integer, at least 1"),
    ],
)
def test_wrong_input_is_refused(wrong, said, tmp_path, capsys):
    try:
        code = cache_sweep.main(["--out", str(tmp_path / "out"), *wrong.split()])
    except SystemExit as ended:  # argparse
        code = ended.code
    assert code == 2 and said in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
