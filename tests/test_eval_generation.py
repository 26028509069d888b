"""eval/fid/generation.py: folders end up the same however often a run was stopped, with any number of processes."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from child import ENVIRONMENT
from conftest import make_pipeline
from PIL import Image

from eval.common.models import ModelSpec, load_model
from eval.common.protocol import BenchError, Plan, make_scenarios
from eval.fid import generation
from eval.fid.generation import (
    Job,
    check_space,
    generate_in_processes,
    generate_share,
    is_whole,
    missing_images,
    open_folders,
)

ROOT = Path(__file__).parents[1]
KILLS = int(os.environ.get("AGENTSD_TEST_KILLS", "1"))
"""How many times the long test kills a run; each takes as long as loading the model."""

PLAN = Plan(((0, "zebra"), (1, "owl"), (2, "lemon")), copies=2, steps=4, batch_size=2, size=64, guidance=5.0)
SCENARIOS = tuple(make_scenarios(["tomesd", "agentsd"], (0.4,)))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small model in a folder, as other processes load it."""
    folder = tmp_path_factory.mktemp("model")
    make_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def pipe(model):
    return load_model(ModelSpec(str(model), device="cpu"))


@pytest.fixture(scope="module")
def undisturbed(pipe, model, tmp_path_factory):
    """What one process generates in one run."""
    job = make_job(model, tmp_path_factory.mktemp("undisturbed"))
    open_folders(pipe, job)
    assert generate_share(pipe, job) == len(SCENARIOS) * 6
    return contents(job.root)


def make_job(model, root, plan=PLAN) -> Job:
    return Job(ModelSpec(str(model), device="cpu"), plan, SCENARIOS, root)


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def test_the_folders_hold_images_and_manifests(undisturbed, pipe, model, tmp_path):
    assert len(undisturbed) == len(SCENARIOS) * 7
    manifest = json.loads(undisturbed["agentsd-r0.4/manifest.json"])
    assert manifest["model"] == str(model) and manifest["patch"]["ratio"] == 0.4 and manifest["steps"] == 4
    assert manifest["versions"]["torch"] == torch.__version__ and manifest["dtype"] == "float32"
    names = {Path(name).name for name in undisturbed}
    assert names == {"manifest.json", *(sample.file for sample in PLAN.samples)}
    for name in (PLAN.samples[0].file, PLAN.samples[5].file):
        assert len({undisturbed[f"{scenario.name}/{name}"] for scenario in SCENARIOS}) == 3


def test_nothing_finished_is_generated_again_and_damage_is_repaired(undisturbed, pipe, model, tmp_path, monkeypatch):
    job = make_job(model, tmp_path)
    for name, data in undisturbed.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    calls = []
    generate_batch = generation.generate_batch
    monkeypatch.setattr(generation, "generate_batch", lambda *a: calls.append(a[1].name) or generate_batch(*a))
    open_folders(pipe, job)
    assert generate_share(pipe, job) == 0 and calls == [] and missing_images(job) == 0

    first, second, third, whole = (job.paths(SCENARIOS[0])[i] for i in (0, 2, 4, 1))
    first.write_bytes(first.read_bytes()[:-30])  # its end is missing
    second.write_bytes(b"")
    data = bytearray(third.read_bytes())
    data[len(data) // 2] ^= 1  # one bit is wrong
    third.write_bytes(data)
    (first.parent / ".left.png.tmp").write_bytes(b"half an image")
    before = whole.stat().st_mtime_ns
    assert missing_images(job) == 3
    open_folders(pipe, job)
    assert generate_share(pipe, job) == 3 and calls == ["sd"] * 3
    assert contents(tmp_path) == undisturbed and whole.stat().st_mtime_ns == before


def test_truncated_anywhere_is_not_whole(tmp_path):
    path = tmp_path / "a.png"
    generation.save_image(Image.effect_noise((16, 16), 50).convert("RGB"), path, {"prompt": "a"})
    data = path.read_bytes()
    assert is_whole(path)
    for length in range(len(data)):
        path.write_bytes(data[:length])
        assert not is_whole(path), length
    assert not is_whole(tmp_path / "none.png") and not is_whole(tmp_path)


def test_the_share_of_each_process_adds_up(undisturbed, pipe, model, tmp_path):
    job = make_job(model, tmp_path)
    open_folders(pipe, job)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert generate_share(pipe, job, rank=1, processes=2) == 6  # the second of two, first
        assert torch.get_num_threads() == 2  # times are taken afterwards, with the threads that the report names
    finally:
        torch.set_num_threads(threads)
    assert generate_share(pipe, job, rank=0, processes=2) == 12
    assert contents(tmp_path) == undisturbed


def test_a_failed_process_says_why_and_is_reported(model, tmp_path, capsys, monkeypatch):
    with pytest.raises(SystemExit) as stopped:
        generation._work(make_job(model, tmp_path / "not made"), 0, 1, os.getppid())
    assert stopped.value.code == 2 and "generating: " in capsys.readouterr().err
    monkeypatch.setattr(generation, "_work", sys.exit)
    with pytest.raises(BenchError, match=r"1 of 1 generating processes failed \(exit code"):
        generate_in_processes("no job", 1)


def test_other_settings_are_refused(undisturbed, pipe, model, tmp_path):
    job = make_job(model, tmp_path)
    open_folders(pipe, job)
    changes = {"steps": 5, "seed": 1, "guidance": 4.0, "batch_size": 1, "threads": 2, "copies": 1}
    for key, value in changes.items():
        plan = dataclasses.replace(PLAN, **{key: value})
        with pytest.raises(BenchError, match=f"was generated with another {key} .*give .*another --out"):
            open_folders(pipe, make_job(model, tmp_path, plan))
    other = make_pipeline(block_out_channels=(32, 32))
    other.set_progress_bar_config(disable=True)
    with pytest.raises(BenchError, match="another weights"):
        open_folders(other, job)
    manifest = tmp_path / "sd" / "manifest.json"
    data = json.loads(manifest.read_text())
    data["versions"]["torch"] = "1.0"
    manifest.write_text(json.dumps(data))
    with pytest.raises(BenchError, match=r'another versions.torch \("1.0", now'):
        open_folders(pipe, job)
    manifest.write_text("{")
    with pytest.raises(BenchError, match="is damaged"):
        open_folders(pipe, job)
    manifest.unlink()
    shutil.copy(ROOT / "tests" / "conftest.py", tmp_path / "sd" / "stranger.png")
    with pytest.raises(BenchError, match="has images .* but no manifest.json"):
        open_folders(pipe, job)


def test_disks_that_cannot_be_written_to(pipe, model, tmp_path, monkeypatch):
    job = make_job(model, tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(BenchError, match="cannot be written to"):
        check_space(tmp_path / "file", 1, 1)
    if os.path.isdir("/proc/self"):
        with pytest.raises(BenchError, match="/proc/pictures cannot be written to"):
            check_space(Path("/proc/pictures"), 1, 1)
    with pytest.raises(BenchError, match="make room"):
        check_space(tmp_path, 10**9, 512**2)
    check_space(tmp_path, 10, 512**2)
    open_folders(pipe, job)

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(generation, "save_image", full)
    with pytest.raises(BenchError, match="is full: make room and give the same command again"):
        generate_share(pipe, job)


RUN = """
from pathlib import Path
from test_eval_generation import *
from eval.common.models import load_model
if __name__ == "__main__":
    job = make_job(Path({model!r}), Path({out!r}))
    pipe = load_model(job.spec)
    open_folders(pipe, job)
    generate_share(pipe, job)
"""


def test_killed_at_random_moments_the_folder_ends_up_the_same(undisturbed, pipe, model, tmp_path):
    out = tmp_path / "out"
    script = tmp_path / "run.py"
    script.write_text(RUN.format(model=str(model), out=str(out)))
    moments = random.Random(0)

    def start():
        command = [sys.executable, str(script)]
        return subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=ENVIRONMENT)

    for kill in range(KILLS):
        # Half the kills come at some moment after drawing began, so that they fall into batches and not into imports.
        process = start()
        wanted = len(undisturbed) * (kill + 1) // (KILLS + 2)
        while process.poll() is None and len(list(out.rglob("*.png"))) < wanted:
            time.sleep(0.002)
        time.sleep(moments.random() * 0.1)
        process.send_signal(signal.SIGKILL)
        process.wait()
        seen = contents(out) if out.exists() else {}
        for name, data in seen.items():
            assert name.endswith(".tmp") or data == undisturbed[name], name
    job = make_job(model, out)
    open_folders(pipe, job)
    generate_in_processes(job, 2)  # the rest by two processes: who generates an image makes no difference
    assert contents(out) == undisturbed
