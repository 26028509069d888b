"""pareto.py: a dry run with a tiny model, fair schedules, the line to beat by hand."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from conftest import make_pipeline

from agentsd.config import PRESETS
from eval import pareto
from eval.common.fair_schedules import FAIR_SCHEDULES, Run, set_fair_schedule, steps_of_equal_time
from eval.common.image_distance import HAS_FLIP
from eval.common.models import ModelSpec, load_model
from eval.common.protocol import BenchError
from eval.equal_time import call_times, generation, line, work
from eval.equal_time.rows import FEWER_STEPS, Row, rows_of

RUN = Run("ddim", 12)


@pytest.fixture
def tiny(monkeypatch):
    """The built-in model's place is taken by a tiny one."""
    loaded = []

    def load(spec):
        loaded.append(spec)
        return make_pipeline(layers_per_block=2)

    monkeypatch.setattr(work, "load_model", load)
    return loaded


def command_of(folder):
    command = f"--out {folder} --images 4 --size 64 --runs ddim:12 --fewer 6 11 --intervals 2 3 --device cpu"
    return [*command.split(), "--leave-out", 'preset "fast"', 'preset "fastest"', 'preset "large"', "DeepCache 2"]


def test_a_dry_run_with_a_tiny_model_and_resuming(tiny, tmp_path, capsys, monkeypatch):
    assert pareto.main(command_of(tmp_path)) == 0
    data = json.loads((tmp_path / "results.json").read_text())
    check = {entry["row"]: entry for entry in data["check"]}
    assert [entry["images"] for entry in data["check"] + data["choice"]] == [3] * len(check) + [1] * len(check)
    assert (
        check["6 steps"]["whole"] == check["6 steps"]["machines"]["A100"]["time"] == 6
        and check["6 steps"]["cached"] == 0
    )
    assert check['preset "paper"']["whole"] == check["ToMeSD"]["whole"] == 12
    assert (check["DeepCache 3"]["whole"], check["DeepCache 3"]["cached"]) == (4, 8)
    cache = check["cache 2"]
    share = call_times.load()["A100"]["cache alone"]
    assert cache["whole"] + cache["cached"] == 12 and cache["cached"] > 3
    expected = cache["whole"] * share["whole, merge"] + cache["cached"] * share["cached, merge"]
    assert cache["machines"]["A100"]["time"] == pytest.approx(expected)
    assert set(cache["machines"]) == {call_times.CPU, *call_times.GPUS_SHOWN}
    assert data["presets"] == PRESETS and (tmp_path / "results.md").read_text().count("| cache 2 | 3 |") == 1

    monkeypatch.setattr(generation, "generate", lambda *_: pytest.fail("an image that is there is generated again"))
    with (tmp_path / generation.RESULTS).open("a") as file:
        file.write('{"run": "ddim, 12')  # a run was stopped here
    assert pareto.main(command_of(tmp_path)) == 0 and "cache 2" in capsys.readouterr().out
    assert pareto.main([*command_of(tmp_path), "--report-only", "--page", str(tmp_path / "page")]) == 0
    assert (tmp_path / "page" / "results.json").exists() and len(tiny) == 2


def test_prompts_from_a_file(tiny, tmp_path, capsys):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a zebra\n\n a castle \n")
    small = ["--prompts", str(prompts), "--fewer", "6", "--intervals", "3"]
    assert pareto.main([*command_of(tmp_path / "out"), *small]) == 2
    assert "has 2 prompts, --images asks for 4" in capsys.readouterr().err
    assert pareto.main([*command_of(tmp_path / "out"), *small, "--images", "2", "--leave-out", "ToMeSD"]) == 0
    rows = [json.loads(text) for text in (tmp_path / "out" / generation.RESULTS).read_text().splitlines()]
    assert {one["image"] for one in rows} == {0, 1} and "ToMeSD" not in {one["row"] for one in rows}


@pytest.mark.parametrize("name", FAIR_SCHEDULES)
def test_a_fair_schedule_begins_at_one_noise_level(name):
    pipe = make_pipeline()
    set_fair_schedule(pipe, name)
    first = set()
    for steps in (6, 9, 25):
        pipe.scheduler.set_timesteps(steps)
        sigmas = getattr(pipe.scheduler, "sigmas", None)
        first.add((int(pipe.scheduler.timesteps[0]), None if sigmas is None else round(float(sigmas[0]), 4)))
    assert len(first) == 1 and first.pop()[0] == 999


def test_fewer_steps_take_the_time_of_whole_and_cached_calls():
    assert steps_of_equal_time(25, 9) == 11 and steps_of_equal_time(20, 8) == 9 and steps_of_equal_time(10, 10) == 10


def test_fewer_steps_of_the_benchmark_do_not_begin_at_another_noise_level():
    pipe = load_model(ModelSpec(scheduler="ddim", device="cpu", fair=True))
    first = []
    for steps in (25, 11):
        pipe.scheduler.set_timesteps(steps)
        first.append(int(pipe.scheduler.timesteps[0]))
    assert first == [999, 999]


def test_a_schedule_that_is_not_fair_is_refused():
    with pytest.raises(BenchError, match="'heun' has no schedule here that begins alike"):
        set_fair_schedule(make_pipeline(), "heun")
    with pytest.raises(BenchError, match="'henu' is unknown: use ddim"):
        set_fair_schedule(make_pipeline(), "henu")


@pytest.mark.parametrize(
    "wrong, said",
    [
        ("--runs heun:20", "--runs 'heun:20': must be NAME:STEPS with 4 … 200 steps, NAME of ddim"),
        ("--runs ddim", "--runs 'ddim': must be NAME:STEPS"),
        ("--images 0", "'0': must be an integer, at least 1"),
        ("--size 100", "--size 100: must be a multiple of 8"),
        ("--leave-out tomesd", "--leave-out 'tomesd': is no row here; the rows are 6 steps, 8 steps"),
        ("--report-only", "no image has all rows yet"),
    ],
)
def test_wrong_input_is_refused(wrong, said, tmp_path, capsys):
    try:
        code = pareto.main(["--out", str(tmp_path / "out"), *wrong.split()])
    except SystemExit as ended:  # argparse
        code = ended.code
    assert code == 2 and said in capsys.readouterr().err


def test_the_line_at_a_time():
    points = [(6, 30.0), (12, 40.0), (24, 60.0)]
    assert line.at_time(points, 12) == 40 and line.at_time(points, 6 * math.sqrt(2)) == pytest.approx(35)
    assert line.at_time(points, 5) is None and line.at_time(points, 25) is None


def test_rows_are_compared_with_fewer_steps_image_by_image():
    fewer = [Row(f"{steps} steps", steps, FEWER_STEPS) for steps in (4, 8)]
    ours = Row("cache 3", 12, "agentsd", {"ratio": 0, "early": 0, "cache_interval": 3})

    def result(row, image, psnr, calls):
        one = {
            "run": RUN.name,
            "key": row.key,
            "image": image,
            "psnr": psnr,
            "flip": 1 / psnr,
            "seconds": sum(calls.values()),
        }
        return {**one, "calls": calls}

    results = [result(row, image, row.steps + image, {"whole, merge": row.steps}) for row in fewer for image in (0, 1)]
    results += [result(ours, image, 10 + 3 * image, {"whole, merge": 3, "cached, merge": 9}) for image in (0, 1, 2)]
    theirs = Row("DeepCache 3", 12, "deepcache", {}, 3)
    results.append(result(theirs, 0, 8, {"whole, merge": 4}))
    times = {"GPU": {"deepcache": {"whole, merge": 1.0}, "cache alone": {"whole, merge": 1.0, "cached, merge": 5 / 9}}}
    found = {entry["row"]: entry for entry in line.compare(RUN, [*fewer, ours, theirs], results, times, measured=True)}
    cache = found["cache 3"]
    assert cache["images"] == 3 and cache["machines"]["GPU"]["time"] == 8
    beside = cache["machines"]["GPU"]["psnr"]
    two = {"images": 2, "interval": None}  # the third image lacks the line
    assert beside == {**two, "other": 8.5, "nearer": 3, "worst": 2, "images_nearer": 2}
    assert cache["machines"]["GPU"]["flip"]["images_nearer"] == 2  # the lower one is the nearer one
    assert cache["distances"]["psnr"] == {"median": 13, "mean": 13, "worst": 10} and "ssim" not in cache["distances"]
    assert cache["machines"]["measured"] == {"time": 12}  # the line does not reach
    deepcache = {"row": "DeepCache 3", "images": 1, "other": 8, "nearer": 2, "interval": None, "worst": 2}
    assert cache["deepcache"] == {**deepcache, "images_nearer": 1}


def test_the_rows_of_a_chart_are_of_the_same_images():
    rows = [Row(f"{steps} steps", steps, FEWER_STEPS) for steps in (4, 6, 8)]
    has = {4: (0, 1, 2, 3), 6: (0, 2), 8: (3,)}  # image 1 lacks one row, the last row most images
    results = [{"run": RUN.name, "key": row.key, "image": image} for row in rows for image in has[row.steps]]
    found = [(one["key"], one["image"]) for one in line.on_common_images(RUN, rows, results)]
    assert found == [(row.key, image) for row in rows[:2] for image in (0, 2)]
    assert line.on_common_images(RUN, rows, []) == []


@pytest.mark.parametrize("count", [5, 6, 9, 24])
def test_the_interval_of_a_median_holds_it_often_enough(count):
    values = [float(value) for value in np.random.default_rng(count).permutation(count)]
    found = line.median_interval(values)
    if count == 5:
        assert found is None
        return
    # The number of values below the median is binomial: the interval misses it where that number is beyond a rank.
    below = np.array([math.comb(count, k) / 2**count for k in range(count + 1)])
    low, high = (int(end) for end in found)  # ranks from 0
    assert high == count - 1 - low and 2 * below[: low + 1].sum() <= 0.05 < 2 * below[: low + 2].sum()


def test_a_folder_of_other_images_is_refused(tmp_path):
    """Another number of images gives an image another name; its figures were once taken for those of the new one."""
    sampling = generation.Sampling("demo", 5.0, 64)
    image = generation.images_of(["a zebra"])[0]
    stored = {"run": RUN.name, "key": "", "image": 0, "of": sampling.of(image)}
    (tmp_path / generation.RESULTS).write_text(json.dumps(stored))
    generation.generate_all(None, {}, [image], sampling, tmp_path)
    for other in (generation.images_of(["a castle"])[0], image):
        sampling = sampling if other is not image else generation.Sampling("demo", 7.5, 64)
        with pytest.raises(BenchError, match="image 0 is of .* give another --out"):
            generation.generate_all(None, {}, [other], sampling, tmp_path)


def test_rows_have_each_preset_once_and_nothing_twice():
    rows = rows_of(RUN, (6, 12), (2, 3), leave_out=("ToMeSD",))
    assert len({row.key for row in rows}) == len({row.name for row in rows}) == len(rows)
    for name, fields in PRESETS.items():
        assert [
            row for row in rows if row.fields == fields and row.kind == "agentsd" and row.name == f'preset "{name}"'
        ]
    assert [row.name for row in rows if row.kind == FEWER_STEPS] == ["6 steps"]


def test_call_times_are_known_for_every_row():
    for machine in call_times.load().values():
        for row in rows_of(RUN, (6,), (2, 3)):
            calls = {"whole, merge": 2} if row.kind == "tomesd" else {"whole, merge": 1, "cached, merge": 1}
            assert 0 < call_times.time_of(row, calls, machine) < 2.1
    assert call_times.family_of(Row("", 12, "agentsd", PRESETS["fastest"])) == "large"
    assert call_times.family_of(Row("", 12, "agentsd", {"cache_interval": 2})) == "agents"


def test_distance_by_hand():
    full = np.full((16, 16, 3), 0.5, dtype=np.float32)
    equal = generation.distances(full, full, None)
    assert (equal["psnr"], equal["ssim"], equal["features"]) == (100, 1, None) and not equal["flip"]
    other = generation.distances(full + 0.1, full, generation._features())
    assert other["psnr"] == pytest.approx(20, abs=1e-3) and other["ssim"] < 1 and other["features"] > 0
    assert not HAS_FLIP or 0 < other["flip"] < 1


def test_every_fourth_image_is_there_to_choose():
    images = generation.images_of(["a"] * 8)
    assert [image.index for image in images if image.chooses] == [3, 7] and len({image.seed for image in images}) == 8


def test_presets_are_those_that_the_page_was_measured_with():
    data = json.loads((call_times.STORED.parent / "results.json").read_text(encoding="utf-8"))
    assert data["presets"] == PRESETS
    measured = {entry["row"]: entry["fields"] for entry in data["check"] if entry["row"].startswith("preset")}
    for name, fields in measured.items():
        assert fields == PRESETS[name.split('"')[1]], name
    assert {'preset "cache"', 'preset "fast"'} <= set(measured)
