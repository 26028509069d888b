"""eval/fid/report.py and plots.py: rows, sentences, tables and charts from made-up measurements of known outcome."""

from __future__ import annotations

import csv
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eval.common.environment import environment
from eval.common.protocol import METHODS, UNSCORED, BenchError, make_scenarios
from eval.common.tables import figure, number
from eval.fid import report
from eval.fid.generation import save_image
from eval.fid.latency import Timing, Workload

SCENARIOS = make_scenarios(METHODS, (0.2, 0.4))
FILES = [f"{i:04d}-a_thing-0.png" for i in range(8)]
RESULTS = Path(__file__).resolve().parents[1] / "eval" / "results"
SCORED = {
    "features": "efficientnet-lite0", "label": "FD (EfficientNet-Lite0)", "feature_size": 1280, "reference": "things",
    "reference_count": 8, "resamples": 20, "resampled": "images",
}  # fmt: skip


@pytest.fixture(scope="module")
def machine():
    return environment(torch.device("cpu"), torch.float32)


def make_timings(sizes=(64,), batch=2) -> list[Timing]:
    timings = []
    for size in sizes:
        for i, scenario in enumerate(SCENARIOS):
            timing = Timing(scenario.name, Workload(size, batch))
            if scenario.method == "no-attention":
                timing.failed = "out of memory"
            else:
                timing.seconds = [(13 - i) * f * size / 64 for f in (1.0, 1.1, 0.97)]
                timing.unet_seconds = {"agent": [timing.seconds[0] / 10], "merge": [timing.seconds[0] / 20]}
                timing.whole_seconds = [0.1] * 6
                timing.cached_seconds = [0.02] * 12 if scenario.method == "deepcache" else []
                timing.peak_gb, timing.peak_gb_per_image = 3.0, 0.5
            timings.append(timing)
    return timings


def make_scores(control: float = 30.0) -> dict[str, dict]:
    rows = {}
    for scenario in SCENARIOS:
        if scenario.method in UNSCORED:
            continue
        rows[scenario.name] = {"images": 8, "fd": 50.0, "kid": 0.01, "kid_deviation": 0.002}
        if scenario.method != "sd":
            gap = control if scenario.method in ("mean-value", "no-attention") else 5.0
            gap = 0.5 if scenario.method == "tomesd" else gap
            interval = [gap - 2, gap + 2]
            rows[scenario.name] |= {"fd_difference": gap, "fd_difference_ci": interval, "psnr": 100.0, "ssim": 1.0}
    return rows


def make_results(machine, timings=None, scores=None, size=64, batch=2, **scored):
    run = {
        "title": "fid_bench: made up", "command": "python eval/fid_bench.py", "protocol": "8 images", "size": size,
        "batch_size": batch, "scenarios": [scenario.name for scenario in SCENARIOS], "files": FILES,
        "environment": machine,
    }  # fmt: skip
    timings = make_timings() if timings is None else timings
    scores = make_scores() if scores is None else scores
    rows = report.make_rows(run, SCENARIOS, timings, scores)
    return {"run": run, "scored": {**SCORED, **scored} if scores else {}, "rows": rows}


def written(folder, results, charts=False):
    rows = report.write_report(folder, results, charts)["rows"]
    return {row["scenario"]: row for row in rows}, (folder / "results.md").read_text()


def test_everything_asked_for_is_in_the_rows_and_files(tmp_path, machine):
    for scenario in SCENARIOS[:3]:
        (tmp_path / "images" / scenario.name).mkdir(parents=True)
        for file in FILES:
            save_image(Image.effect_noise((64, 64), 50).convert("RGB"), tmp_path / "images" / scenario.name / file)
    by_name, text = written(tmp_path, make_results(machine), charts=True)
    assert list(by_name) == [scenario.name for scenario in SCENARIOS]
    assert all(row["fid"] is None for row in by_name.values())  # these are no Inception features
    agentsd = by_name["agentsd-r0.4"]
    settings = ("ratio", "early", "alpha", "broadcast_exponent", "cache_interval")
    assert [agentsd[key] for key in settings] == [0.4, 0.4, 0.075, -0.15, 1]
    assert "alpha" not in by_name["tomesd-r0.4"] and by_name["sd"]["ratio"] is None
    assert agentsd["seconds_per_image"] == 4 and agentsd["seconds"] == pytest.approx([8.0, 8.8, 7.76])
    assert agentsd["speedup_vs_sd"] == pytest.approx(13 / 8)
    assert agentsd["unet_agent_ms"] == pytest.approx(800) and agentsd["unet_merge_speedup"] == pytest.approx(13 / 8)
    assert by_name["no-attention-r0.4"]["note"] == "out of memory" and by_name["no-attention-r0.4"]["fd"] == 50
    assert by_name["sd-naive"]["fd"] is None and by_name["sd-naive"]["seconds_per_image"] == 6
    cached = by_name["deepcache-3"]
    assert (cached["calls"], cached["unet_whole_ms"], cached["unet_cached_ms"]) == ("2 + 4", 100, 20)
    assert agentsd["calls"] is None and agentsd["unet_whole_ms"] == 100

    saved = json.loads((tmp_path / "results.json").read_text(), parse_constant=lambda word: pytest.fail(word))
    assert saved["rows"][2]["psnr"] == 100 and saved["run"]["environment"]["versions"]["diffusers"]
    with open(tmp_path / "results.csv", newline="") as file:
        lines = list(csv.DictReader(file))
    assert lines[2]["fd_difference_ci_low"] == "-1.5" and "torch" in lines[0]["environment"]
    assert len(lines) == len(SCENARIOS) and lines[0]["kid_deviation"] == "0.002" and lines[0]["seconds"].count(" ") == 2
    assert "FD (EfficientNet-Lite0)" in text and "FID" not in text and "commit" in text and "(grid.webp)" in text
    for name in ("quality.png", "speedup.png", "grid.webp"):
        with Image.open(tmp_path / name) as image:
            assert min(image.size) > 80
            if name != "grid.webp":
                assert_footer_is_clear(image)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.suffix in (".json", ".csv", ".md")}
    report.write_report(tmp_path, charts=False)  # from disk alone, the same
    assert before == {name: (tmp_path / name).read_bytes() for name in before}


def assert_footer_is_clear(image: Image.Image) -> None:
    """The environment is written in grey below everything else: it once overlapped the axis of a low chart."""
    pixels = np.asarray(image.convert("RGB")).astype(int)
    black = np.flatnonzero((pixels.max(2) < 60).any(1)).max()
    grey = (pixels.max(2) < 160) & (pixels.min(2) > 80) & (np.ptp(pixels, axis=2) < 10)
    footer = np.flatnonzero(grey.sum(1) > 40)
    assert len(footer) and (footer > black).sum() > 10, (black, footer)


def test_quality_and_speed_are_two_tables_of_at_most_ten_columns(tmp_path, machine):
    scores = make_scores()
    for row in scores.values():
        row |= {"clip_score": 30.0, "feature_distance": 0.1}
    scores["agentsd-r0.4"] |= {"fd_difference_tomesd": -3.0, "fd_difference_tomesd_ci": [-4.0, -2.0]}
    timings = make_timings() + [replace(t, workload=replace(t.workload, compile=True)) for t in make_timings()]
    _, text = written(tmp_path, make_results(machine, timings, scores))
    headers = [line for line in text.splitlines() if line.startswith("| scenario |")]
    assert len(headers) == 2 and all(header.count("|") - 1 <= 10 for header in headers)
    assert headers[0].startswith(
        "| scenario | images | FD − sd [95 %] | FD − tomesd [95 %] | FD (EfficientNet-Lite0) |"
    )
    assert "| agentsd-r0.4 | 8 | +5.00 [+3.00, +7.00] | -3.00 [-4.00, -2.00] | 50.00 |" in text
    assert "| agentsd-r0.4, compiled | 64 | 2 | 4.000 |" in text and "| 2 + 4 |" in text
    assert "## Quality" in text and "## Speed" in text
    for column in report.COLUMNS:
        assert not column.tables or column.heading


def test_one_size_and_one_scenario_have_charts_too(tmp_path, machine):
    results = make_results(machine, make_timings()[:3], {})
    report.write_report(tmp_path, results)
    assert (tmp_path / "speedup.png").is_file() and not (tmp_path / "quality.png").exists()
    (tmp_path / "speedup.png").unlink()
    scores = {name: row for name, row in make_scores().items() if name in ("sd", "agentsd-r0.4")}
    report.write_report(tmp_path, make_results(machine, [], scores))
    assert (tmp_path / "quality.png").is_file() and not (tmp_path / "speedup.png").exists()
    assert "## Speed" not in (tmp_path / "results.md").read_text()


def test_several_sizes_have_rows_of_their_own(tmp_path, machine):
    results = report.write_report(tmp_path, make_results(machine, make_timings((64, 128)), {}), charts=False)
    rows = results["rows"]
    assert len(rows) == 2 * len(SCENARIOS) and [row["size"] for row in rows[:3]] == [64, 64, 64]
    for row in rows:
        if not row["note"]:
            assert row["speedup_vs_sd"] == pytest.approx(
                rows[0]["seconds_per_image"] * row["size"] / 64 / row["seconds_per_image"]
            )
    assert "FD" not in (tmp_path / "results.md").read_text()


def test_unstable_timings_say_so(tmp_path, machine):
    timings = make_timings()
    timings[4].seconds = [10.0, 12.0, 10.0]
    by_name, _ = written(tmp_path, make_results(machine, timings))
    assert by_name[timings[4].scenario]["note"] == "unstable: rounds differ by 20%"
    assert by_name[timings[3].scenario]["note"] == ""


@pytest.mark.parametrize("alone", ["sd", "agentsd-r0.4", None])
def test_a_single_round_gives_no_speed_up_in_rows_tables_and_charts(tmp_path, machine, alone):
    timings = make_timings()
    for timing in timings:
        if alone in (None, timing.scenario):
            timing.seconds = timing.seconds[:1]
    (tmp_path / "speedup.png").write_bytes(b"of an earlier run")
    by_name, text = written(tmp_path, make_results(machine, timings, {}), charts=True)
    row = by_name["agentsd-r0.4"]
    assert all(row[key] is None for key in ("speedup_vs_sd", "unet_agent_speedup", "unet_merge_speedup"))
    assert row["seconds_per_image"] == 4 and row["unet_agent_ms"] == pytest.approx(800)
    others = {name: row["speedup_vs_sd"] for name, row in by_name.items() if name != "agentsd-r0.4" and row["seconds"]}
    assert all((value is None) == (alone != "agentsd-r0.4") for value in others.values()), others
    assert by_name[alone or "sd"]["note"] == "one round: no speed-up"
    assert ("× sd" in text) == ("(speedup.png)" in text) == (alone == "agentsd-r0.4")
    assert (tmp_path / "speedup.png").exists() == (alone == "agentsd-r0.4")


@pytest.mark.parametrize("size, batch", [(128, 2), (64, 1)])
def test_scores_and_times_of_different_images_are_different_rows(machine, size, batch):
    rows = make_results(machine, size=size, batch=batch)["rows"]  # timed at 64 px, batch 2
    for scenario in SCENARIOS:
        own = [row for row in rows if row["scenario"] == scenario.name]
        times = next(row for row in own if (row["size"], row["batch_size"]) == (64, 2))
        assert "fd" not in times and "images" not in times
        scored = [row for row in own if row is not times]
        if scenario.method in UNSCORED:
            assert scored == []
            continue
        [row] = scored
        assert (row["size"], row["batch_size"]) == (size, batch) and row["fd"] == 50 and "seconds_per_image" not in row


def test_scores_stand_with_the_times_of_what_was_generated(machine):
    timings = make_timings((64, 128))
    timings += [replace(timing, workload=replace(timing.workload, compile=True)) for timing in timings]
    results = make_results(machine, timings)
    for scenario in SCENARIOS:
        own = [row for row in results["rows"] if row["scenario"] == scenario.name]
        assert len(own) == 4 and own[0]["size"] == 64 and own[0]["compiled"] is None
        assert own[0].get("fd") == (None if scenario.method in UNSCORED else 50)
        assert not any("fd" in row for row in own[1:])  # of another size, or of a compiled UNet
    assert len([s for s in report.verdict(results["rows"], SCORED) if "against sd" in s]) == 7


def test_the_two_accelerators_are_compared_with_each_other(tmp_path, machine):
    _, text = written(tmp_path, make_results(machine))
    assert "− tomesd" not in text and "against tomesd" not in text
    scores = make_scores()
    for ratio, gap in (("0.2", 0.5), ("0.4", -3.0)):
        scores[f"agentsd-r{ratio}"] |= {"fd_difference_tomesd": gap, "fd_difference_tomesd_ci": [gap - 1, gap + 1]}
    by_name, text = written(tmp_path, make_results(machine, None, scores))
    assert by_name["agentsd-r0.4"]["fd_difference_tomesd"] == -3 and by_name["agentsd-r0.4"]["fd_difference"] == 5
    assert by_name["tomesd-r0.4"]["fd_difference_tomesd"] is None
    label = "FD (EfficientNet-Lite0)"
    assert json.loads((tmp_path / "results.json").read_text())["verdict"][2:6] == [
        f"agentsd-r0.2: {label} +5.00 [+3.00, +7.00] against sd: worse.",
        f"agentsd-r0.2: {label} +0.50 [-0.50, +1.50] against tomesd-r0.2: no difference that 8 images can show.",
        f"agentsd-r0.4: {label} +5.00 [+3.00, +7.00] against sd: worse.",
        f"agentsd-r0.4: {label} -3.00 [-4.00, -2.00] against tomesd-r0.4: better.",
    ]


@pytest.mark.parametrize("resampled, said", [("images", "over images, 20"), ("names", "over names, each with all its")])
def test_the_report_says_what_was_resampled(tmp_path, machine, resampled, said):
    _, text = written(tmp_path, make_results(machine, resampled=resampled))
    assert f"95 % interval by bootstrap {said}" in text


def test_the_verdict_says_what_the_intervals_say(machine):
    said = report.verdict(make_results(machine)["rows"], SCORED)
    assert "no difference that 8 images can show" in next(s for s in said if s.startswith("tomesd-r0.4"))
    for method in ("agentsd-r0.4", "deepcache-3", "tgate"):
        assert "+5.00 [+3.00, +7.00] against sd: worse" in next(s for s in said if s.startswith(method))
    assert "the cost of removing this attention" in next(s for s in said if s.startswith("Control"))
    assert "fewer than the 1280 features" in said[-1]


@pytest.mark.parametrize("control", [1.0, 5.0])
def test_the_verdict_admits_that_a_model_cannot_judge(machine, control):
    said = report.verdict(make_results(machine, None, make_scores(control))["rows"], SCORED)
    assert all("cannot tell attention methods apart" in s for s in said if s.startswith("Control"))


@pytest.mark.parametrize("form, zero", [("{:+.2f}", "+0.00"), ("{:.2f}", "0.00"), ("{:.0f}", "0")])
def test_what_rounds_to_zero_has_no_minus_sign(form, zero):
    for value in (-0.0, -0.001, 0.001):
        assert number(value, form) == zero
    assert figure(-0.004, (-0.001, 0.004), form) == f"{zero} [{zero}, {zero}]"
    assert number(-1.5, "{:+.2f}") == "-1.50" and number("", "{}") == "" and number(-3, "{}") == "-3"


def test_nothing_to_report_on(tmp_path):
    with pytest.raises(BenchError, match="has no results.json"):
        report.write_report(tmp_path)
    (tmp_path / "results.json").write_text("{")
    with pytest.raises(BenchError, match="results.json cannot be read"):
        report.write_report(tmp_path)


OF_FID_BENCH = [
    path.parent.name
    for path in RESULTS.glob("*/results.json")
    if {"rows", "run"} <= json.loads(path.read_text()).keys()
]


@pytest.mark.parametrize("folder", sorted(OF_FID_BENCH))
def test_committed_results_are_what_their_data_say(tmp_path, folder):
    shutil.copytree(RESULTS / folder, tmp_path / folder)
    report.write_report(tmp_path / folder, charts=False)
    for name in ("results.json", "results.csv", "results.md"):
        assert (tmp_path / folder / name).read_text() == (RESULTS / folder / name).read_text(), name


def test_every_result_folder_is_linked_and_every_link_leads_somewhere():
    root = RESULTS.parents[1]
    own = [*root.glob("eval/*.md"), *root.glob("eval/results/*.md")]
    linked = set()
    for page in [*own, *root.glob("*.md"), *root.glob("a*/**/*.md")]:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            path = (page.parent / target).resolve()
            linked.add(path.parent.name)
            assert page not in own or "://" in target or path.exists(), f"{page.name}: {target}"
    assert {path.name for path in RESULTS.iterdir() if path.is_dir()} - {"readme"} <= linked
