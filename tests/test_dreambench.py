"""eval/dreambooth_bench.py: from the arguments to the report on a tiny model, and its parts."""

from __future__ import annotations

import argparse
import csv
import dataclasses
import importlib
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_pipeline, make_tokenizer
from dreambooth.data import find_images
from PIL import Image
from scipy import stats

from agentsd import AgentConfig
from agentsd.images.generate import generate
from agentsd.images.pipelines import load_pipeline
from agentsd.images.png import read_settings
from agentsd.images.request import Request
from eval import dreambooth_bench
from eval.common.processes import run_python
from eval.common.protocol import BenchError
from eval.dreambooth import run as bench_run
from eval.dreambooth import scoring, trainings
from eval.dreambooth.networks import cosines, load_judges, sharpness
from eval.dreambooth.plan import SUBJECT, plan_from
from eval.dreambooth.report import make_costs, make_verdict
from eval.dreambooth.statistics import paired_difference, paired_ratio
from eval.dreambooth.step_times import measure_steps, training_settings

ROOT = Path(__file__).parents[1]

# The script and the package beside it have the same name, and an import gives the package.
_spec = importlib.util.spec_from_file_location("dreambooth_script", ROOT / "apps" / "dreambooth.py")
script = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(script)

ROWS = ["dreambooth", "sampling", "untrained", "both", "before"]
PRIOR = ["prior-before", "prior-dreambooth", "prior-both", "prior-lost"]


class InProcess:
    """Stands in for run_python: the same work in this process, where torch is loaded already."""

    def __init__(self):
        self.runs = []

    def __call__(self, arguments, what):
        self.runs.append(what)
        main = importlib.import_module(arguments[1]).main if arguments[0] == "-m" else script.main
        assert main(arguments[2 if arguments[0] == "-m" else 1 :]) == 0


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, arguments, what was run) of a finished run on a tiny model."""
    folder = tmp_path_factory.mktemp("bench")
    make_pipeline().save_pretrained(folder / "model")
    make_images(folder / "subject", 2)
    arguments = [
        "--model", str(folder / "model"), "--subject", str(folder / "subject"), "--out", str(folder / "out"),
        "--images", "2", "--prior-images", "2", "--steps", "2", "--train-steps", "2", "--resolution", "64",
        "--size", "64", "--num-class-images", "1", "--class-inference-steps", "1", "--timed-steps", "2",
        "--learning-rate", "1e-3", "--device", "cpu", "--prompt", "{}", "--prompt", "{} at sea", "--ratio", "0.3",
    ]  # fmt: skip
    inside = InProcess()
    with pytest.MonkeyPatch.context() as patch:
        for module in (bench_run, trainings):
            patch.setattr(module, "run_python", inside)
        assert dreambooth_bench.main(arguments) == 0
    return folder, arguments, inside.runs


def make_images(folder, count):
    folder.mkdir()
    draws = np.random.default_rng(0)
    for i in range(count):
        Image.fromarray(draws.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return sorted(folder.iterdir())


# --- the whole run ----------------------------------------------------------------------------------------------------


def test_every_row_is_trained_and_sampled_as_it_says(finished):
    folder, _, runs = finished
    assert sum("training" in what and "timing" not in what for what in runs) == 3
    assert sum("memory" in what for what in runs) == 5
    models, images = folder / "out" / "models", folder / "out" / "images"
    every = AgentConfig(ratio=0.3, early=1.0)
    trained = json.loads((models / "both" / "agentsd.json").read_text())
    assert AgentConfig(**trained["config"]) == every
    for row, model, config in (
        ("dreambooth", models / "none", None),
        ("sampling", models / "none", AgentConfig(ratio=0.3, early=0.4)),
        ("untrained", models / "none", every),
        ("both", models / "both", every),
        ("before", folder / "model", None),
        ("prior-both", models / "both", every),
        ("prior-lost", models / "no-prior", None),
    ):
        files = sorted((images / row).iterdir())
        assert [file.name for file in files][:2] == ["00-0000.png", "00-0001.png"]
        assert len(files) == (2 if row.startswith("prior") else 4)
        found = read_settings(files[1])
        assert found["patch"] == (None if config is None else dataclasses.asdict(config) | {"agent_stride": 4})
        pipe = load_pipeline(model, device="cpu", scheduler="ddim")
        pipe.set_progress_bar_config(disable=True)
        prompt = "a bird" if row.startswith("prior") else "a sks bird"
        request = Request(prompt, steps=2, guidance=5.0, seed=1, height=64, width=64)
        again = generate(pipe, request, "sd" if config is None else "agentsd", config).image
        assert np.array_equal(np.asarray(Image.open(files[1])), np.asarray(again)), row


def test_the_report_has_every_figure(finished):
    out = finished[0] / "out"
    results = json.loads((out / "results.json").read_text())
    rows = {row["row"]: row for row in results["rows"]}
    assert list(rows) == ROWS and [row["row"] for row in results["prior"]] == PRIOR
    base, both = rows["dreambooth"], rows["both"]
    times = [read_settings(path)["seconds"] for path in sorted((out / "images" / "both").iterdir())]
    assert both["seconds"] == pytest.approx(np.median(times))
    assert both["speedup_ci"][0] <= both["speedup"] <= both["speedup_ci"][1] and "speedup" not in base
    steps = json.loads((out / "step_times.json").read_text())
    assert both["step_seconds"] == pytest.approx(np.median(steps["both"])) and len(steps["none"]) == 2
    assert both["train_gb"] > 0.1 and both["sample_gb"] > 0.1 and "train_gb" not in rows["before"]
    difference = both["features"] - base["features"]
    assert both["features_difference"] == pytest.approx(difference) and "features_untrained_ci" in both
    assert rows["sampling"]["psnr"] > 0 and "psnr" not in both
    assert results["prior"][0]["features_kept"] == pytest.approx(1) and "features_kept_lost_ci" in results["prior"][2]
    assert len(results["verdict"]) == 10
    text = (out / "results.md").read_text()
    for part in ("python eval/dreambooth_bench.py --model", "## Cost", "## Quality", "## Prior", "![grid](grid.webp)"):
        assert part in text
    with open(out / "results.csv") as file:
        assert [row["row"] for row in csv.DictReader(file)] == ROWS + PRIOR
    grid = Image.open(out / "grid.webp")
    assert grid.width > 1000 and grid.height > 1200


def test_without_interleaved_steps_the_seconds_are_those_of_the_trainings(finished):
    out = finished[0] / "out"
    plan = plan_from(json.loads((out / "plan.json").read_text())["plan"])
    records = trainings.read_records(plan, out)
    rows = {row["row"]: row for row in make_costs(plan, out, records, None, {"both": 2_000_000_000, "before": None})}
    assert rows["both"]["step_seconds"] == np.median(records["both"]["seconds_per_step"])
    assert rows["both"]["step_ratio"] == pytest.approx(rows["both"]["step_seconds"] / rows["untrained"]["step_seconds"])
    assert "step_ratio_ci" not in rows["both"] and "step_seconds" not in rows["before"]
    assert rows["both"]["sample_gb"] == 2 and rows["before"]["sample_gb"] is None


def test_trainings_that_were_stopped_go_on_and_finished_ones_are_left(finished, tmp_path, monkeypatch):
    plan = plan_from(json.loads((finished[0] / "out" / "plan.json").read_text())["plan"])
    for name, ended in (("none", True), ("both", False)):
        (tmp_path / "models" / name).mkdir(parents=True)
        (tmp_path / "models" / name / "training.json").write_text(json.dumps({"finished": ended}))
    given = []
    monkeypatch.setattr(trainings, "run_python", lambda arguments, what: given.append(arguments))
    with pytest.raises(BenchError, match="the training with agents in every step is not finished"):
        trainings.train_all(plan, tmp_path)
    assert len(given) == 2
    assert given[0][-2:] == ["--resume-from-checkpoint", "latest"] and "both" in given[0]
    assert "--resume-from-checkpoint" not in given[1] and "--with-prior-preservation" not in given[1]
    (tmp_path / "models" / "both" / "training.json").write_text("{")
    with pytest.raises(BenchError, match="training.json cannot be read"):
        trainings.train_all(plan, tmp_path)


def test_a_stopped_run_resumes_and_another_one_is_refused(finished, monkeypatch, capsys):
    folder, arguments, _ = finished
    file = folder / "out" / "images" / "both" / "01-0001.png"
    before, kept = np.asarray(Image.open(file)), (folder / "out" / "images" / "sampling" / "00-0000.png").read_bytes()
    file.write_bytes(file.read_bytes()[:100])
    (folder / "out" / "memory" / "both.json").unlink()
    inside = InProcess()
    for module in (bench_run, trainings):
        monkeypatch.setattr(module, "run_python", inside)
    assert dreambooth_bench.main(arguments) == 0
    assert inside.runs == ["the memory measurement of both"]
    assert np.array_equal(np.asarray(Image.open(file)), before)
    assert (folder / "out" / "images" / "sampling" / "00-0000.png").read_bytes() == kept
    assert dreambooth_bench.main([*arguments, "--guidance", "3"]) == 2
    assert "was made with guidance 5.0, not 3.0: give the same settings or another --out" in capsys.readouterr().err


# --- input ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--images", "1"], "--images 1: must be at least 2"),
        (["--prior-images", "1"], "--prior-images 1: has no interval; give at least 2, or 0"),
        (["--timed-steps", "1"], "--timed-steps 1: must be at least 2"),
        (["--ratio", "2"], "ratio=2"),
        (["--scheduler", "fast"], "--scheduler 'fast': must be one of plms"),
        (["--features", "resnet"], "--features 'resnet': must be one of"),
        (["--clip", "nowhere"], "--clip nowhere: there is no such folder"),
        (["--subject", "nowhere"], "there is no such folder; give the folder that has the images"),
        (["--prompt", " "], "--prompt ' ': is empty"),
        (["--dtype", "int8"], "dtype='int8'"),
    ],
)
def test_wrong_input_is_one_sentence_before_anything_is_written(tmp_path, capsys, arguments, message):
    assert dreambooth_bench.main([*arguments, "--out", str(tmp_path / "out")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("dreambooth_bench: ") and message in said and said.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_presets(tmp_path):
    quick = bench_run.make_plan(dreambooth_bench._options([]))
    assert quick.model == "demo" and quick.subject == str(SUBJECT) and quick.prompts == ("a sks bird",)
    assert plan_from(json.loads(json.dumps(quick.as_json()))) == quick
    paper = bench_run.make_plan(dreambooth_bench._options(["--preset", "paper", "--subject", str(tmp_path)]))
    assert (paper.train_steps, paper.learning_rate, paper.use_8bit_adam, paper.steps) == (800, 1e-6, True, 100)
    assert paper.scheduler == "ddim" and paper.ratio == 0.4 and paper.alpha == 0.075
    assert paper.prompts[1] == "a photo of sks dog on the beach" and len(paper.prompts) == 6
    own = dreambooth_bench._options(["--preset", "paper", "--subject", "x", "--prompt", "{} asleep"])
    assert bench_run.make_plan(own).prompts == ("a photo of sks dog asleep",)
    with pytest.raises(SystemExit):
        dreambooth_bench._options(["--preset", "paper"])


def test_the_training_command_means_what_the_timed_trainers_are_given(tmp_path):
    plan = bench_run.make_plan(
        dreambooth_bench._options(["--lora-rank", "4", "--gradient-checkpointing", "--ratio", "0.3"])
    )
    for name in plan.trainings:
        options = plan.training_options(name, tmp_path)
        read = script.read_settings(trainings.command_line(options))
        assert read == training_settings(options)
        assert (read.agent_config == AgentConfig(early=1, ratio=0.3)) == (name == "both")
        assert read.agents == ("both" if name == "both" else "none")
        assert read.with_prior_preservation == (name != "no-prior")
    assert read.lora_rank == 4 and read.gradient_checkpointing and read.max_train_steps == plan.train_steps


def test_the_shipped_subject_is_small_and_has_its_licence():
    files = sorted(SUBJECT.glob("*.webp"))
    assert 4 <= len(files) <= 6 and sum(file.stat().st_size for file in files) < 150_000
    assert all(max(Image.open(file).size) <= 256 for file in files)
    note = (SUBJECT / "README.md").read_text()
    assert "MIT License" in note and "Microsoft Corporation" in note and "render_subject.py" in note


# --- parts ------------------------------------------------------------------------------------------------------------


def test_trainers_take_turns_and_warm_ups_do_not_count():
    order = []

    class Trainer:
        def __init__(self, name):
            self.name = name

        def step(self):
            order.append(self.name)

    seconds = measure_steps({"none": Trainer("none"), "both": Trainer("both")}, 3)
    assert {name: len(found) for name, found in seconds.items()} == {"none": 3, "both": 3}
    assert len(order) == 10 and order[-6:] == ["none", "both", "both", "none", "none", "both"]


def test_paired_intervals():
    draws = np.random.default_rng(1)
    hardness = draws.normal(0, 10, 200)
    base, values = hardness + draws.normal(0, 1, 200), hardness + 0.5 + draws.normal(0, 1, 200)
    found = paired_difference(values, base)
    error = np.std(values - base, ddof=1) / np.sqrt(200)
    assert found.value == pytest.approx(np.mean(values - base))
    assert found.high - found.low == pytest.approx(2 * 1.96 * error, rel=0.1)  # what the seeds share has cancelled out
    # Copies of the same places are no new evidence: with their groups the interval is as wide as of one copy.
    labels = list(range(200))
    copied = paired_difference(np.tile(values, 3), np.tile(base, 3), labels * 3)
    assert copied.high - copied.low == pytest.approx(found.high - found.low, rel=0.05)
    alone = paired_difference(np.tile(values, 3), np.tile(base, 3))
    assert alone.high - alone.low < 0.7 * (found.high - found.low)
    ratio = paired_ratio([2.0, 4.0, 8.0], [1.0, 2.0, 4.0])
    assert (ratio.value, ratio.low, ratio.high) == pytest.approx((2, 2, 2))
    with pytest.raises(ValueError, match="2 values and 1 to compare"):
        paired_difference([1, 2], [1])


@pytest.mark.parametrize("seeds", [2, 3, 8, 30])
@pytest.mark.parametrize("prompts", [1, 3])
def test_intervals_cover_what_they_say_at_few_seeds(seeds, prompts):
    """Of 2,000 benchmarks with a known difference, about 95 % have it in their interval; a bootstrap had it in 50 %."""
    draws = np.random.default_rng(seeds)
    covered = ratios = 0
    groups = [seed for seed in range(seeds) for _ in range(prompts)]
    for _ in range(2000):
        shared = np.repeat(draws.normal(0, 2, seeds), prompts)  # what the prompts of a seed have in common
        base = draws.normal(0, 5, seeds * prompts)
        values = base + 0.3 + shared + draws.normal(0, 1, seeds * prompts)
        found = paired_difference(values, base, groups)
        covered += found.low <= 0.3 <= found.high
        if prompts == 1:
            found = paired_ratio(2 * np.exp(values - 0.3), np.exp(base))
            ratios += found.low <= 2 <= found.high
    assert 0.93 < covered / 2000 < 0.97
    assert prompts > 1 or 0.93 < ratios / 2000 < 0.97


def test_one_seed_has_no_interval_also_with_many_prompts():
    for values, groups in (([1.0], None), ([1.0, 2.0, 3.0], [7, 7, 7])):
        with pytest.raises(ValueError, match="an interval needs at least 2"):
            paired_difference(values, [0.0] * len(values), groups)
    with pytest.raises(ValueError, match="1 seeds or rounds: an interval needs at least 2"):
        paired_ratio([2.0], [1.0])


def test_intervals_of_groups_of_one_size_are_those_of_their_means():
    draws = np.random.default_rng(0)
    values, base = draws.normal(size=(2, 12))
    found = paired_difference(values, base, [seed for seed in range(4) for _ in range(3)])
    means = (values - base).reshape(4, 3).mean(1)
    theirs = stats.t.interval(0.95, 3, means.mean(), stats.sem(means))
    assert (found.low, found.high) == pytest.approx(theirs)


def test_the_subjects_images_are_those_that_are_trained_on(tmp_path, capsys):
    """Whatever their format; what else lies there is no image of the subject, and alone it is refused."""
    folder = tmp_path / "subject"
    make_images(folder, 2)
    Image.open(folder / "0.png").save(folder / "2.gif")
    Image.open(folder / "0.png").save(folder / "3.tiff")
    (folder / "notes.txt").write_text("")
    (folder / "more").mkdir()
    plan = bench_run.make_plan(dreambooth_bench._options(["--subject", str(folder)]))
    assert [file.name for file in scoring.subject_files(plan)] == ["0.png", "1.png", "2.gif", "3.tiff"]
    assert scoring.subject_files(plan) == find_images(folder, "instance_data_dir").images
    (folder / "gone.png").symlink_to("nowhere")
    assert dreambooth_bench.main(["--subject", str(folder), "--out", str(tmp_path / "out")]) == 2
    assert "gone.png is a link to nowhere, which is not there" in capsys.readouterr().err
    assert dreambooth_bench.main(["--subject", str(folder / "more"), "--out", str(tmp_path / "out")]) == 2
    assert "is no folder with images; give one with four to six" in capsys.readouterr().err


def test_verdict_says_which_way_an_interval_points():
    def row(name, **scores):
        keys = ("features_difference", "sharpness_difference", "features_untrained", "sharpness_untrained")
        found = {"row": name, "title": name, "features": 0.8, "train_gb": 1.0}
        found |= {key: 0.0 for key in keys} | {f"{key}_ci": [-1.0, 1.0] for key in keys} | scores
        return found | {"speedup": 1.5, "speedup_ci": [1.4, 1.6], "step_ratio": 0.9}

    worse = {"features_difference": -0.1, "features_difference_ci": [-0.2, -0.05]}
    rows = [row("dreambooth"), row("sampling"), row("untrained", **worse), row("both"), row("before")]
    said = make_verdict(rows, [], "cosine")
    assert "1.50× [1.40, 1.60]" in said[0] and "0.90×" in said[1] and "1.00×" in said[2]
    assert "-0.100 [-0.200, -0.050] against DreamBooth without agents: less like the subject" in said[3]
    assert "no difference that so many images can show" in said[4]


def test_sharpness_falls_with_blur_and_cosines_are_those_of_numpy(tmp_path):
    from PIL import ImageFilter

    (file,) = make_images(tmp_path / "a", 1)
    blurred = tmp_path / "blurred.png"
    Image.open(file).filter(ImageFilter.GaussianBlur(2)).save(blurred)
    assert sharpness(blurred) < 0.5 * sharpness(file)
    a, b = np.random.default_rng(0).normal(size=(2, 3)), np.random.default_rng(1).normal(size=(4, 3))
    expected = [[x @ y / np.linalg.norm(x) / np.linalg.norm(y) for y in b] for x in a]
    assert np.allclose(cosines(a, b), expected)


def test_dino_and_clip_from_folders(tmp_path):
    from transformers import (
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPProcessor,
        ViTConfig,
        ViTImageProcessor,
        ViTModel,
    )

    small = dict(hidden_size=32, intermediate_size=37, num_hidden_layers=1, num_attention_heads=4)
    torch.manual_seed(0)
    ViTModel(ViTConfig(**small, image_size=32, patch_size=8)).save_pretrained(tmp_path / "dino")
    ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(tmp_path / "dino")
    ends = dict(bos_token_id=1288, eos_token_id=1289, pad_token_id=1289)
    vision, text = dict(small, image_size=32, patch_size=8), dict(small, vocab_size=1290, **ends)
    CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=16)).save_pretrained(tmp_path / "clip")
    processor = CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    CLIPProcessor(image_processor=processor, tokenizer=make_tokenizer()).save_pretrained(tmp_path / "clip")
    files = make_images(tmp_path / "a", 3)

    options = argparse.Namespace(features="efficientnet-lite0", dino=tmp_path / "dino", clip=tmp_path / "clip")
    judges = load_judges(options, "cpu")
    assert list(judges.networks) == ["features", "dino", "clip_i"]
    assert [network.of_files(files).shape for network in judges.networks.values()] == [(3, 1280), (3, 32), (3, 16)]
    vectors = judges.networks["clip_i"].of_files(files)
    inputs = judges.clip.processor(text=["a cat"] * 3, images=[Image.open(f) for f in files], return_tensors="pt")
    with torch.no_grad():
        out = judges.clip.model(**inputs)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    assert np.allclose(unit, out.image_embeds.numpy(), atol=1e-5)
    expected = (out.image_embeds * out.text_embeds).sum(1).clamp(min=0)
    assert np.allclose(judges.clip.similarities(files, ["a cat"] * 3), expected.numpy(), atol=1e-5)
    for name in ("dino", "clip"):
        with pytest.raises(BenchError, match=f"--{name} .*: is no"):
            load_judges(argparse.Namespace(**vars(options) | {name: tmp_path / "a"}), "cpu")


def test_a_part_in_a_process_of_its_own(tmp_path, capfd):
    (tmp_path / "fine.py").write_text("import sys, agentsd; print(sys.argv[1], agentsd.__file__)")
    run_python([str(tmp_path / "fine.py"), "hello"], "a test")
    assert f"hello {ROOT / 'agentsd'}" in capfd.readouterr().out
    (tmp_path / "bad.py").write_text("raise SystemExit(3)")
    with pytest.raises(BenchError, match=r"a test failed \(exit code 3\)"):
        run_python([str(tmp_path / "bad.py")], "a test")
    (tmp_path / "stopped.py").write_text("raise SystemExit(130)")
    with pytest.raises(KeyboardInterrupt):
        run_python([str(tmp_path / "stopped.py")], "a test")
