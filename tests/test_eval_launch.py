"""The commands of eval/, run as files from any folder: each finds its modules, and says --help without torch."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
from child import ROOT

COMMANDS = sorted(file.name for file in (ROOT / "eval").glob("*.py") if file.stem not in ("__init__", "launch"))


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_run_as_a_file_finds_its_modules_and_its_help_loads_nothing_heavy(name, tmp_path):
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    environment["PYTHONPATH"] = str(tmp_path / "agentsd")  # the package alone, as `pip install -e .` gives it
    (tmp_path / "agentsd").mkdir()
    (tmp_path / "agentsd" / "agentsd").symlink_to(ROOT / "agentsd")
    command = [sys.executable, "-X", "importtime", str(ROOT / "eval" / name), "--help"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "usage:" in done.stdout
    loaded = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in loaded and not loaded & {"torch", "diffusers", "transformers", "matplotlib"}
