"""Compatibility matrix, versions: what is installed is what pyproject declares, and the table says what was run."""

from __future__ import annotations

import json
import re
from importlib.metadata import version

import compat_table
import pytest
from compat_matrix import compat


def numbers(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text.split("+")[0])[:3])


@pytest.mark.parametrize("library", list(compat_table.floors()))
@compat("Versions", "Oldest and newest declared versions of torch, diffusers, transformers and accelerate")
def test_installed_versions_are_declared(library):
    assert numbers(version(library)) >= numbers(compat_table.floors()[library])


ROW = dict(group="G", name="thing", status="works", note="", test="tests/test_x.py::test_thing[a]", passed=True)


def test_kept_results_are_read_as_written():
    runs = {"new": [ROW, {**ROW, "name": "Größe 19 × 13"}], "old": [ROW]}
    assert json.loads(compat_table.dump(runs)) == runs


def test_the_table_has_every_row_once_and_keeps_the_rest_of_the_readme():
    block = compat_table.table({"new": [ROW, {**ROW, "group": "H", "status": "warns"}], "old": [ROW]})
    assert "| thing | works | [`test_thing[a]`](test_x.py) |  |" in block and "| H | status |" in block
    readme = f"# Title\n{compat_table.BEGIN}\nold\n{compat_table.END}\nend\n"
    updated = compat_table.with_table(readme, block)
    assert updated == f"# Title\n{compat_table.BEGIN}\n{block}\n{compat_table.END}\nend\n"
    assert compat_table.with_table(updated, block) == updated
    with pytest.raises(SystemExit, match="no lines"):
        compat_table.with_table("# Title", block)


def test_a_row_that_failed_or_was_not_run_makes_no_table(monkeypatch):
    monkeypatch.setattr(compat_table, "floors", lambda: {"torch": "2.8"})
    new, old = "torch 2.15.0, diffusers 0.42.1", "torch 2.8.0, diffusers 0.35.0"
    assert compat_table.problems({new: [ROW], old: [ROW]}) == []
    assert compat_table.problems({new: [ROW]}) == ["the oldest declared version torch 2.8: not run"]
    assert compat_table.problems({old: [{**ROW, "passed": False}]}) == [f"thing: failed with {old}"]
    assert compat_table.problems({new: [ROW], old: []}) == [f"thing: not run with {old}"]


def test_failed_rows_alone_are_run_again(monkeypatch):
    ran = []
    failed, namesake = {**ROW, "group": "H", "passed": False}, {**ROW, "name": "other"}
    monkeypatch.setattr(compat_table, "run_tests", lambda tests: ran.extend(tests) or [{**failed, "passed": True}])
    assert compat_table.run_failed([ROW, failed, namesake]) == [ROW, {**failed, "passed": True}, namesake]
    assert len(ran) == 1 and ran[0].endswith("tests/test_x.py::test_thing[a]")
