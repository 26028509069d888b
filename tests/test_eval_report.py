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
from eval.generation import save_image
from eval.latency import Timing, Workload
from eval.protocol import METHODS, BenchError, make_scenarios

SCENARIOS = make_scenarios(METHODS, (0.2, 0.4))
FILES = [f"{i:04d}-a_thing-0.png" for i in range(8)]
SCORED = {"features": "efficientnet-lite0", "label": "FD (EfficientNet-Lite0)", "feature_size": 1280}


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
            save_image(Image.effect_noise((64, 64), 50).convert("RGB"), tmp_path / "images" / scenario.name / file)
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


def rows_of_run(folder, **changes):
    """The report again, with these entries in run.json; rows by scenario."""
    run = json.loads((folder / "run.json").read_text())
    report.write_run(folder, run | changes)
    by_name = {}
    for row in report.write_report(folder):
        by_name.setdefault(row["scenario"], []).append(row)
    return by_name


@pytest.mark.parametrize("changes", [{"size": 128, "batch_size": 2}, {"size": 64, "batch_size": 1}])
def test_scores_and_times_of_different_pictures_are_different_rows(tmp_path, changes):
    make_results(tmp_path)  # timed at 64 px, batch 2
    for name, rows in rows_of_run(tmp_path, **changes).items():
        times = next(row for row in rows if (row["size"], row["batch_size"]) == (64, 2))
        assert times["fd"] is None and times["images"] is None
        if name in ("sd-naive", "limit"):
            assert rows == [times]
            continue
        [scores] = [row for row in rows if row is not times]
        assert {key: scores[key] for key in changes} == changes and scores["fd"] == 50 and scores["method"]
        assert scores["seconds_per_image"] is None and scores["note"] is None
    assert not (tmp_path / "quality.png").exists()  # it would set one's distance against the other's seconds
    assert len([s for s in report.verdict(sum(rows_of_run(tmp_path).values(), []), SCORED) if "against sd" in s]) == 4


def test_scores_stand_with_the_times_of_what_was_drawn(tmp_path):
    make_results(tmp_path, sizes=(64, 128))
    latency = json.loads((tmp_path / "latency.json").read_text())
    for item in latency["timings"][:]:
        latency["timings"].append(item | {"workload": item["workload"] | {"compile": True}})
    report.write_part(tmp_path, report.LATENCY, latency)
    for name, rows in rows_of_run(tmp_path, batch_size=2).items():
        assert len(rows) == 4 and rows[0]["size"] == 64 and rows[0]["compiled"] is None
        assert rows[0]["fd"] == (None if name in ("sd-naive", "limit") else 50)
        assert [row["fd"] for row in rows[1:]] == [None] * 3  # of another size, or of a UNet that did not draw
    assert len([s for s in report.verdict(sum(rows_of_run(tmp_path).values(), []), SCORED) if "against sd" in s]) == 4


def test_a_run_that_did_not_note_its_batch_is_reported_as_ever(tmp_path):
    make_results(tmp_path, sizes=(128,))  # and the pictures were of 64 px
    for name, rows in rows_of_run(tmp_path).items():
        assert [row["fd"] for row in rows] == [None if name in ("sd-naive", "limit") else 50]
        assert rows[0]["size"] == 128
    make_results(tmp_path, sizes=(64, 128))
    assert [(row["size"], row["fd"]) for row in rows_of_run(tmp_path)["sd"]] == [(None, 50), (64, None), (128, None)]


def test_the_protocol_says_where_the_times_are_of_something_else():
    def said(*workloads):
        return report.timed_apart([Workload(size, batch) for size, batch in workloads], 512, 1)

    assert said() == said((None, 1)) == said((512, 1), (None, 1)) == ""
    assert said((256, 1)) == " Timed at 256 px, batch 1."
    assert said((512, 1), (512, 8)) == " Timed at 512 px, batch 1, 8."
    assert said((None, 1), (1024, 1)) == " Timed at 512, 1024 px, batch 1."


def test_the_two_accelerators_are_compared_with_each_other(tmp_path):
    make_results(tmp_path)
    text = (report.write_report(tmp_path), (tmp_path / "results.md").read_text())[1]
    assert "− tomesd" not in text and "against tomesd" not in text and "to tomesd" not in text
    scores = json.loads((tmp_path / "scores.json").read_text())
    for ratio, gap in (("0.2", 0.5), ("0.4", -3.0)):
        scores["rows"][f"agentsd-r{ratio}"] |= {
            "fd_difference_tomesd": gap, "fd_difference_tomesd_ci": [gap - 1, gap + 1],
        }  # fmt: skip
    report.write_part(tmp_path, report.SCORES, scores)
    rows = {row["scenario"]: row for row in report.write_report(tmp_path)}
    assert rows["agentsd-r0.4"]["fd_difference_tomesd"] == -3 and rows["agentsd-r0.4"]["fd_difference"] == 5
    assert rows["tomesd-r0.4"]["fd_difference_tomesd"] is None
    result = json.loads((tmp_path / "results.json").read_text())
    label = "FD (EfficientNet-Lite0)"
    assert result["verdict"][2:6] == [
        f"agentsd-r0.2: {label} +5.00 [+3.00, +7.00] against sd, lower is better: worse.",
        f"agentsd-r0.2: {label} +0.50 [-0.50, +1.50] against tomesd-r0.2, lower is better: "
        "no difference that 8 pictures can show.",
        f"agentsd-r0.4: {label} +5.00 [+3.00, +7.00] against sd, lower is better: worse.",
        f"agentsd-r0.4: {label} -3.00 [-4.00, -2.00] against tomesd-r0.4, lower is better: better.",
    ]
    with open(tmp_path / "results.csv", newline="") as file:
        [line] = [line for line in csv.DictReader(file) if line["scenario"] == "agentsd-r0.4"]
    assert (line["fd_difference_tomesd"], line["fd_difference_tomesd_ci_high"]) == ("-3.0", "-2.0")
    text = (tmp_path / "results.md").read_text()
    assert "| FD − sd | 95 % | FD − tomesd | 95 % | KID |" in text and "| -3.00 | -4.00 … -2.00 |" in text
    assert "those to tomesd are to the same ratio without DeepCache." in text


def test_the_report_says_what_was_resampled(tmp_path):
    make_results(tmp_path)
    report.write_report(tmp_path)
    assert "bootstrap over pictures, 20 resamples" in (tmp_path / "results.md").read_text()  # also of an older run
    scores = json.loads((tmp_path / "scores.json").read_text())
    for resampled, said, left_out in [
        ("pictures", "bootstrap over pictures, 20", "with the same pictures left out of both."),
        ("names", "bootstrap over names, each with all its seeds, 20", "with the same names left out of both."),
    ]:
        report.write_part(tmp_path, report.SCORES, scores | {"resampled": resampled})
        report.write_report(tmp_path)
        text = (tmp_path / "results.md").read_text()
        assert said in text and left_out in text


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
