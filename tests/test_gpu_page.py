"""eval/GPU.md: every command of the page, dry-run on a CPU, so that a lent hour is not spent on a misspelt option."""

from __future__ import annotations

import importlib
import re
import shlex

import pytest
from child import ROOT

from eval.calls import tuning

PAGE = (ROOT / "eval" / "GPU.md").read_text("utf-8")
BLOCKS = re.findall(r"```bash\n(.*?)```", PAGE, flags=re.DOTALL)
COMMANDS = [line.strip() for block in BLOCKS for line in block.splitlines() if line.strip()]


def run(command: str, *more: str) -> int:
    """A command of eval/ in this process."""
    python, script, *arguments = shlex.split(command)
    assert python == "python" and script.startswith("eval/")
    module = importlib.import_module("eval." + script.removeprefix("eval/").removesuffix(".py"))
    return module.main([*arguments, *more])


def test_the_page_has_what_an_hour_is_for():
    text = " ".join(COMMANDS)
    for part in (
        "pytest -m gpu",
        "tune_bench",
        "--batch-sizes 1,4",
        "sdxl",
        "512,768,1024",
        "--compile",
        "reduce-overhead",
    ):
        assert part in text
    minutes = [int(number) for number in re.findall(r"(\d+) minutes", PAGE)]
    assert len(minutes) == 6 and sum(minutes) <= 60


@pytest.mark.parametrize("command", [c for c in COMMANDS if "fid_bench" not in c and "pytest" not in c])
def test_commands_say_what_they_would_time(command, capsys):
    assert run(command, "--dry-run") == 0
    out = capsys.readouterr().out
    assert re.search(r"sd15|sdxl", out) and " px" in out


@pytest.mark.parametrize("command", [c for c in COMMANDS if "fid_bench" in c])
def test_whole_images_are_planned_on_the_demo_model(command, capsys, tmp_path):
    """Its dry run times a few steps: with the demo model and small images in place of the real ones."""
    command = re.sub(r"--random-weights \w+ --dtype \w+ --sizes [\d,]+", "--sizes 64", command)
    command = re.sub(r"--out \S+", f"--size 64 --out {tmp_path}", command)
    assert run(command, "--dry-run") == 0
    out = capsys.readouterr().out
    assert "missing: nothing" in out and "agentsd-r0.4-cache3" in out


def test_the_gpu_tests_are_found(pytestconfig):
    assert "pytest -m gpu" in COMMANDS
    marked = "pytestmark = pytest.mark.gpu"
    assert marked in (ROOT / "tests" / "test_gpu.py").read_text("utf-8")


def test_tuning_with_random_weights_writes_tables_as_it_goes(monkeypatch, tmp_path, capsys):
    from conftest import make_pipeline

    monkeypatch.setattr(tuning, "random_pipeline", lambda *_: make_pipeline())
    run("python eval/tune_bench.py --sizes 64,128 --steps 3 --rounds 1", "--out", str(tmp_path))
    assert sorted(file.name for file in tmp_path.iterdir()) == [
        "tune-sd15-128-1.json", "tune-sd15-64-1.json", "tune-sd15.md",
    ]  # fmt: skip
    assert (tmp_path / "tune-sd15.md").read_text("utf-8").count("\n| ") == 2


@pytest.mark.parametrize(
    "command",
    ["python eval/tune_bench.py --sizes large", "python eval/call_bench.py --mode reduce-overhead"],
)
def test_wrong_input_is_refused(command, capsys):
    with pytest.raises(SystemExit):
        run(command)
    assert "error: --" in capsys.readouterr().err
