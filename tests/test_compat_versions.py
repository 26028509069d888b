"""Compatibility matrix, versions: what is installed is what pyproject declares, and the table says what was run."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import compat_table
import pytest
from compat_matrix import compat

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3])


@pytest.mark.parametrize("library", ["torch", "diffusers", "transformers", "accelerate"])
@compat("Versions", "Oldest and newest declared versions of torch, diffusers, transformers and accelerate")
def test_installed_versions_are_declared(library):
    floor = re.search(rf'"{library}>=([\d.]+)"', PYPROJECT.read_text())[1]
    assert numbers(version(library)) >= numbers(floor)


ROW = dict(group="G", name="thing", status="works", note="", test="tests/test_x.py::test_thing[a]", passed=True)


def test_the_table_has_every_row_once_and_keeps_the_rest_of_the_readme():
    block = compat_table.table({"new": [ROW, {**ROW, "group": "H", "status": "warns"}], "old": [ROW]})
    assert "| thing | works | [`test_thing[a]`](tests/test_x.py) |  |" in block and "| H | status |" in block
    readme = f"# Title\n{compat_table.BEGIN}\nold\n{compat_table.END}\nend\n"
    updated = compat_table.with_table(readme, block)
    assert updated == f"# Title\n{compat_table.BEGIN}\n{block}\n{compat_table.END}\nend\n"
    assert compat_table.with_table(updated, block) == updated
    with pytest.raises(SystemExit, match="no lines"):
        compat_table.with_table("# Title", block)


def test_a_row_that_failed_or_was_not_run_makes_no_table():
    assert compat_table.problems({"new": [ROW], "old": [ROW]}) == []
    assert compat_table.problems({"new": [{**ROW, "passed": False}]}) == ["thing: failed with new"]
    assert compat_table.problems({"new": [ROW], "old": []}) == ["thing: not run with old"]
