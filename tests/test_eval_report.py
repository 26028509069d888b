"""eval/report.py: rows, sentences and files from made-up measurements whose outcome is known."""

from __future__ import annotations

import csv
import json
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[1]))

from eval import report
from eval.generation import save_picture
from eval.latency import Timing, Workload
from eval.protocol import METHODS, BenchError, make_scenarios

SCENARIOS = make_scenarios(METHODS, (0.2, 0.4))
FILES = [f"{i:04d}-a_thing-0.png" for i in range(8)]


def make_results(folder: Path, sizes=(64,), scores: bool = True, control: float = 30.0) -> None:
    run = {
        "title": "fid_bench: made up", "command": "python eval/fid_bench.py", "protocol": "8 pictures", "size": 64,
        "scenarios": [report.scenario_row(scenario) for scenario in SCENARIOS], "files": FILES,
        "environment": report.environment(torch.device("cpu"), torch.float32),
    }  # fmt: skip
    report.write_run(folder, run)
    timings = []
    for size in sizes:
        for i, scenario in enumerate(SCENARIOS):
            seconds = [(10 - i) * f * size / 64 for f in (1.0, 1.1, 0.9)]
            phases = {"agent": [seconds[0] / 10], "merge": [seconds[0] / 20]}
            failed = "out of memory" if scenario.method == "no-attention" else ""
            timing = Timing(
                scenario.name, Workload(size, 2), [] if failed else seconds, {} if failed else phases, 3.0, 0.5
            )
            timing.failed = failed
            timings.append(timing)
    report.write_part(folder, report.LATENCY, {"timings": [timing.to_dict() for timing in timings]})
    if scores:
        rows = {}
        for scenario in SCENARIOS:
            if scenario.method in ("sd-naive", "limit"):
                continue
            rows[scenario.name] = {"images": 8, "fd": 50.0, "fd_ci": [45.0, 55.0], "kid": 0.01, "kid_deviation": 0.002}
            if scenario.method != "sd":
                gap = control if scenario.method in ("mean-value", "no-attention") else 5.0
                gap = 0.5 if scenario.method == "tomesd" else gap
                rows[scenario.name] |= {
                    "fd_difference": gap,
                    "fd_difference_ci": [gap - 2, gap + 2],
                    "psnr": math.inf,
                    "ssim": 1.0,
                }
        found = {
            "features": "efficientnet-lite0", "label": "FD (EfficientNet-Lite0)", "feature_size": 1280,
            "reference": "things", "reference_count": 8, "resamples": 20, "rows": rows,
        }  # fmt: skip
        report.write_part(folder, report.SCORES, found)


def test_everything_asked_for_is_in_the_rows_and_files(tmp_path):
    make_results(tmp_path)
    for scenario in SCENARIOS:
        (tmp_path / "images" / scenario.name).mkdir(parents=True)
        for file in FILES:
            save_picture(Image.effect_noise((64, 64), 50).convert("RGB"), tmp_path / "images" / scenario.name / file)
    rows = report.write_report(tmp_path)
    by_name = {row["scenario"]: row for row in rows}
    assert list(by_name) == [scenario.name for scenario in SCENARIOS]
    wanted = (
        "method ratio early alpha broadcast_exponent images fid fd fid_ci kid seconds_per_image speedup_vs_sd "
        "speedup_vs_naive peak_gb psnr ssim"
    )
    for row in rows:
        assert set(wanted.split()) <= set(row)
        assert row["fid"] is None and row["fid_ci"] is None  # these are no Inception features
    agentsd = by_name["agentsd-r0.4"]
    assert (agentsd["ratio"], agentsd["early"], agentsd["alpha"], agentsd["broadcast_exponent"]) == (
        0.4,
        0.4,
        0.075,
        -0.15,
    )
    assert by_name["tomesd-r0.4"]["alpha"] is None and by_name["sd"]["ratio"] == 0
    assert agentsd["seconds_per_image"] == 2.5 and agentsd["seconds_quartiles"] == pytest.approx((2.375, 2.625))
    assert agentsd["speedup_vs_sd"] == 2.0 and agentsd["speedup_vs_naive"] == pytest.approx(1.8)
    assert agentsd["unet_agent_ms"] == 500 and agentsd["unet_merge_speedup"] == 2.0
    assert by_name["no-attention-r0.4"]["note"] == "out of memory" and by_name["no-attention-r0.4"]["fd"] == 50
    assert by_name["sd-naive"]["fd"] is None and by_name["sd-naive"]["seconds_per_image"] == 4.5

    saved = json.loads((tmp_path / "results.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert saved["rows"][2]["psnr"] == "inf" and saved["run"]["environment"]["versions"]["diffusers"]
    with open(tmp_path / "results.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert lines[0]["fd_ci_low"] == "45.0" and "torch" in lines[0]["environment"] and len(lines) == len(SCENARIOS)
    text = (tmp_path / "results.md").read_text()
    assert "FD (EfficientNet-Lite0)" in text and "FID" not in text and "commit" in text and "(grid.png)" in text
    for name in ("quality.png", "memory.png", "grid.png"):
        with Image.open(tmp_path / name) as image:
            assert min(image.size) > 80
    assert_footer_is_clear(tmp_path / "memory.png")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix in (".json", ".csv", ".md")}
    report.write_report(tmp_path)  # from disk alone, the same
    assert before == {name: (tmp_path / name).read_bytes() for name in before}


def assert_footer_is_clear(plot: Path) -> None:
    """The environment is written in grey below everything else: it once lay on a low plot's axis."""
    with Image.open(plot) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    black = np.flatnonzero((pixels.max(2) < 60).any(1)).max()
    footer = np.flatnonzero(((pixels.max(2) < 160) & (pixels.min(2) > 80)).sum(1) > 40)
    assert len(footer) and (footer > black).sum() > 10, (black, footer)


def test_a_low_plot_is_not_written_over(tmp_path):
    make_results(tmp_path, scores=False)
    run = json.loads((tmp_path / "run.json").read_text())
    latency = json.loads((tmp_path / "latency.json").read_text())
    report.write_run(tmp_path, run | {"scenarios": run["scenarios"][:2]})
    report.write_part(tmp_path, report.LATENCY, {"timings": latency["timings"][:2]})
    report.write_report(tmp_path)
    assert_footer_is_clear(tmp_path / "memory.png")


def test_several_sizes_have_rows_of_their_own_and_a_plot(tmp_path):
    make_results(tmp_path, sizes=(64, 128), scores=False)
    rows = report.write_report(tmp_path)
    assert len(rows) == 2 * len(SCENARIOS) and [row["size"] for row in rows[:3]] == [64, 64, 64]
    for row in rows:
        if not row["note"]:
            assert row["speedup_vs_sd"] == pytest.approx(
                rows[0]["seconds_per_image"] * row["size"] / 64 / row["seconds_per_image"]
            )
    assert (tmp_path / "speedup.png").is_file() and not (tmp_path / "quality.png").exists()
    assert "FD" not in report.table(rows) and "s / image" in report.table(rows)


def test_what_was_timed_apart_has_no_speed_up(tmp_path):
    make_results(tmp_path, scores=False)
    latency = json.loads((tmp_path / "latency.json").read_text())
    latency["timings"][3]["note"] = "timed after the others"
    report.write_part(tmp_path, report.LATENCY, latency)
    by_name = {row["scenario"]: row for row in report.write_report(tmp_path)}
    row = by_name[latency["timings"][3]["scenario"]]
    assert row["note"] == "timed after the others" and row["seconds_per_image"] > 0
    assert row["speedup_vs_sd"] is None and row["unet_agent_speedup"] is None and row["speedup_vs_naive"] is None


def sentences(folder, **options):
    make_results(folder, **options)
    report.write_report(folder)
    return json.loads((folder / "results.json").read_text())["verdict"]


def test_the_verdict_says_what_the_intervals_say(tmp_path):
    said = sentences(tmp_path)
    assert "no difference that 8 pictures can show" in next(s for s in said if s.startswith("tomesd-r0.4"))
    assert "+5.00 [+3.00, +7.00] against sd, lower is better: worse" in next(
        s for s in said if s.startswith("agentsd-r0.4")
    )
    assert "what losing that attention costs" in next(s for s in said if s.startswith("Control"))
    assert "fewer than the 1280 features" in said[-1]


@pytest.mark.parametrize("control", [1.0, 5.0])
def test_the_verdict_admits_that_a_model_cannot_judge(tmp_path, control):
    said = sentences(tmp_path, control=control)
    assert all("cannot tell attention methods apart" in s for s in said if s.startswith("Control"))


def test_nothing_to_report_on(tmp_path):
    with pytest.raises(BenchError, match="has no run.json"):
        report.write_report(tmp_path)
    make_results(tmp_path)
    (tmp_path / "latency.json").write_text("{")
    with pytest.raises(BenchError, match="latency.json cannot be read"):
        report.write_report(tmp_path)
