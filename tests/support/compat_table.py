"""Runs the compatibility matrix and writes COMPATIBILITY.md's table from the outcome:

    python tests/support/compat_table.py             # run, keep the result in compat_results.json, rewrite the table
    python tests/support/compat_table.py --failed    # run again only the rows that failed with these versions
    python tests/support/compat_table.py --no-run    # rewrite the table from the kept results

Every row is a test marked `compat` (see compat_matrix.py). There is a table only if every row passed in every kept run,
of which there is one for each set of library versions: run the command in an environment with the oldest versions that
pyproject declares, and then in one with the newest. --fresh forgets the runs with other versions.
"""

from __future__ import annotations

import argparse
import json
import platform
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
PAGE = TESTS / "COMPATIBILITY.md"
PYPROJECT = TESTS.parent / "pyproject.toml"
RESULTS = TESTS / "compat_results.json"
BEGIN, END = "<!-- compatibility:begin -->", "<!-- compatibility:end -->"
LIBRARIES = ("torch", "diffusers", "transformers", "accelerate", "peft")


def floors() -> dict[str, str]:
    """The oldest versions that pyproject declares, of the libraries it declares."""
    declared = {name: re.search(rf'^ +"{name}>=([\d.]+)', PYPROJECT.read_text(), re.M) for name in LIBRARIES}
    return {name: match[1] for name, match in declared.items() if match}


class Recorder:
    """pytest plugin: the outcome of every row's tests."""

    def __init__(self) -> None:
        self.rows: dict[tuple[str, str], dict] = {}

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_makereport(self, item, call):
        report = yield
        marker = item.get_closest_marker("compat")
        if marker and (call.when == "call" or not report.passed):
            row = self.rows.setdefault(
                (marker.kwargs["group"], marker.kwargs["name"]), {**marker.kwargs, "test": item.nodeid, "passed": True}
            )
            row["passed"] &= report.passed
            if row["test"] != item.nodeid:  # several parameters prove one row together
                row["test"] = item.nodeid.partition("[")[0]
        return report


def installed() -> str:
    """The versions at work."""
    versions = ", ".join(f"{name} {version(name).split('+')[0]}" for name in LIBRARIES)
    return f"Python {platform.python_version()}, {versions}"


def run_matrix() -> list[dict]:
    """Run every test file of the matrix; returns the rows in the order of the files."""
    names = [f"compat_{name}" for name in ("pipelines", "schedulers", "adapters", "execution")]
    names += ["right_or_told", "step_cache", "step_cache_controlnet", "one_run", "compat_versions"]
    return run_tests([str(TESTS / f"test_{name}.py") for name in names])


def run_tests(tests: list[str]) -> list[dict]:
    """Run the rows among tests that are named as pytest takes them; returns the rows."""
    recorder = Recorder()
    pytest.main(["-q", "-n0", "-m", "compat", *tests], plugins=[recorder])
    return list(recorder.rows.values())


def run_failed(rows: list[dict]) -> list[dict]:
    """Rows of which those that failed were run again, as after a time-out on a busy machine."""
    again = run_tests([str(TESTS.parent / row["test"]) for row in rows if not row["passed"]])
    found = {(row["group"], row["name"]): row for row in again}
    return [found.get((row["group"], row["name"]), row) for row in rows]


def table(runs: dict[str, list[dict]]) -> str:
    """The page's block for the kept runs, {versions: rows}."""
    rows = next(iter(runs.values()))
    lines = [f"{len(rows)} rows, all of them run by `python tests/support/compat_table.py` with:", ""]
    lines += [f"- {versions}" for versions in runs]
    group = None
    for row in rows:
        if row["group"] != group:
            group = row["group"]
            lines += ["", f"| {group} | status | proof | note |", "|---|---|---|---|"]
        file, _, test = row["test"].partition("::")
        file = file.removeprefix("tests/")
        lines.append(f"| {row['name']} | {row['status']} | [`{test}`]({file}) | {row['note']} |")
    return "\n".join(lines)


def dump(runs: dict[str, list[dict]]) -> str:
    """The kept runs as JSON, one row a line, so that a change of one row is a change of one line."""
    lines = ((f"  {json.dumps(row, ensure_ascii=False)}" for row in rows) for rows in runs.values())
    blocks = (f" {json.dumps(name)}: [\n" + ",\n".join(rows) + "\n ]" for name, rows in zip(runs, lines))
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def problems(runs: dict[str, list[dict]]) -> list[str]:
    """Why there can be no table: a row that failed or that one set of versions lacks, or an oldest version not run."""
    every_name = {row["name"]: None for rows in runs.values() for row in rows}
    found = []
    for versions, rows in runs.items():
        passed = {row["name"]: row["passed"] for row in rows}
        found += [f"{name}: failed with {versions}" for name in every_name if not passed.get(name, True)]
        found += [f"{name}: not run with {versions}" for name in every_name if name not in passed]
    for name, floor in floors().items():
        if not any(re.search(rf"{name} {re.escape(floor)}(\.0)*(,|$)", versions) for versions in runs):
            found.append(f"the oldest declared version {name} {floor}: not run")
    return found


def with_table(page: str, block: str) -> str:
    """The page with the text between its two markers replaced."""
    before, begin, rest = page.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{PAGE.name} has no lines {BEGIN} and {END} to write the table between")
    return f"{before}{begin}\n{block}\n{end}{after}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--failed", action="store_true", help="run again only what failed with these versions")
    parser.add_argument("--no-run", action="store_true", help="rewrite the table from the kept results")
    parser.add_argument("--fresh", action="store_true", help="forget the kept results of other versions")
    options = parser.parse_args(arguments)

    runs = json.loads(RESULTS.read_text()) if RESULTS.exists() and not options.fresh else {}
    if not options.no_run:
        versions = installed()
        rows = run_failed(runs[versions]) if options.failed else run_matrix()
        runs = {versions: rows, **{key: value for key, value in runs.items() if key != versions}}
        RESULTS.write_text(dump(runs))
    if found := problems(runs):
        raise SystemExit("no table: " + "; ".join(found))
    PAGE.write_text(with_table(PAGE.read_text(), table(runs)))


if __name__ == "__main__":
    sys.exit(main())
