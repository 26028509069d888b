"""eval/common/fingerprint.py: the code's hash changes with what can change an image, and with nothing else."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

import agentsd
from eval.common import fingerprint
from eval.common.fingerprint import code_fingerprint, effective_code, imported_files

PACKAGE = Path(agentsd.__file__).parent


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """A copy of the package and of scenarios.py that a test may change."""
    shutil.copytree(PACKAGE, tmp_path / "agentsd", ignore=shutil.ignore_patterns("*.safetensors", "__pycache__"))
    shutil.copy(fingerprint._SCENARIOS, tmp_path)
    monkeypatch.setattr(fingerprint, "_METHODS", tmp_path / "agentsd" / "images" / "methods.py")
    monkeypatch.setattr(fingerprint, "_SCENARIOS", tmp_path / "scenarios.py")
    return tmp_path / "agentsd"


def append(path: Path, code: str) -> None:
    path.write_text(f"{path.read_text()}\n{code}\n")


def test_every_file_that_makes_an_image_counts_and_no_other():
    names = {str(path.relative_to(PACKAGE)) for path in imported_files(PACKAGE / "images" / "methods.py")}
    assert {"attention.py", "config.py", "merging.py", "patch.py", "images/methods.py"} <= names
    assert any(name.startswith("unet") for name in names)
    assert not names & {"cli.py", "report.py", "visualize.py", "images/png.py", "images/compare.py", "__init__.py"}


def test_what_changes_an_image_changes_the_hash(copy):
    before = code_fingerprint("agentsd"), code_fingerprint("tomesd")
    assert None not in before and code_fingerprint("sd") is None and code_fingerprint("agentsd") == before[0]
    append(copy / "attention.py", "ALPHA = 2")
    after = code_fingerprint("agentsd"), code_fingerprint("tomesd")
    assert after[0] != before[0] and after[1] == before[1]  # ToMeSD does not run our attention
    append(copy / "images" / "methods.py", "RATIO = 0.5")
    assert code_fingerprint("tomesd") != before[1] and code_fingerprint("agentsd") != after[0]


def test_what_changes_no_image_does_not(copy):
    before = {method: code_fingerprint(method) for method in ("agentsd", "tomesd", "mean-value", "sd-naive")}
    for path in copy.rglob("*.py"):
        append(path, "# A comment.")
    append(copy / "cli.py", "import ast")
    append(copy / "images" / "png.py", "LEVEL = 9")
    assert {method: code_fingerprint(method) for method in before} == before


def test_moving_a_file_changes_nothing_and_breaks_nothing(copy):
    before = code_fingerprint("agentsd")
    (copy / "attention.py").rename(copy / "unet" / "agent_attention.py")
    for path in copy.rglob("*.py"):
        path.write_text(path.read_text().replace("from ..attention import", "from .agent_attention import"))
    assert code_fingerprint("agentsd") == before


def test_effective_code():
    first = (
        'def f(x: int) -> int:\n    """Doc."""\n    if x < 0:\n        raise ValueError(f"x={x}")\n    return 2 * x\n'
    )
    other = "# Why.\ndef f(x):\n    'Other.'\n    if x < 0:\n        raise ValueError('no')\n    return (2 * x)\n"
    assert effective_code(first) == effective_code(other)
    assert effective_code(first) != effective_code(first.replace("2", "3"))
    assert effective_code(first) != effective_code(first.replace("ValueError", "TypeError"))
