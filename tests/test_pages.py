"""The pages agree with the results they name and with the commands they show."""

from __future__ import annotations

import argparse
import importlib
import re
import runpy
import shlex
from collections.abc import Iterator

import page_tables
import pytest
from child import ROOT

PAGES = page_tables.pages()
ROWS = [row for page in PAGES for row in page_tables.rows(page)]


# --- figures ----------------------------------------------------------------------------------------------------------


def test_figures_of_tables_are_those_of_the_results_they_name():
    wrong = [f"{row.page}: {', '.join(found)} in {row.text}" for row in ROWS if (found := page_tables.unfounded(row))]
    assert not wrong, "not in the results that the table links to (tests/support/page_tables.py):\n" + "\n".join(wrong)
    assert len({row.page for row in ROWS}) >= 4 and sum(len(row.figures) for row in ROWS) > 200


def test_figures_that_are_no_results_are_found(tmp_path, monkeypatch):
    monkeypatch.setattr(page_tables, "ROOT", tmp_path)
    monkeypatch.setattr(page_tables, "RESULTS", tmp_path / "results")
    (tmp_path / "results" / "a").mkdir(parents=True)
    (tmp_path / "results" / "a" / "results.json").write_text(
        '{"rows": [{"seconds": [12.34, 15.0, 13.0], "ms": 457.6}]}'
    )
    page = tmp_path / "page.md"
    table = "| | time | other |\n|---|---|---|\n| x, ≥ 9.9 | {0} | 7.7 |\n"
    cases = {"12.3 s": [], "13.0×": [], "0.458": [], "12.4 s": ["12.4"], "14.1, 13.0": ["14.1"]}
    for cell, expected in cases.items():
        text = "See [results](results/a/results.md).\n<!-- arithmetic: other -->\n\n" + table.format(cell)
        (tmp_path / "results" / "a" / "results.md").touch()
        page.write_text(text)
        (row,) = page_tables.rows(page)
        assert page_tables.unfounded(row) == expected, cell
    page.write_text("<!-- not checked: why -->\n" + table.format("14.1 [table](results/a/results.md)"))
    assert list(page_tables.rows(page)) == []


# --- commands ---------------------------------------------------------------------------------------------------------

SHOWN = re.compile("agentsd |python (apps|eval|examples)/")


def commands(text: str) -> Iterator[tuple[str, bool]]:
    """The commands of our programs in a page, each on one line, and whether they stand in a block or in a sentence."""
    for block in re.findall(r"```(?:bash|sh)\n(.*?)```", text, re.S):
        variables = dict(re.findall(r'^(\w+)="([^"]*)"', block, re.M))
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"\s#.*", "", line)
            for name, value in variables.items():
                line = line.replace(f"${name}", value)
            yield from ((part.strip(), True) for part in line.split("&&") if SHOWN.match(part.strip()))
    prose = re.sub(r"```.*?```", "", text, flags=re.S)
    yield from ((code, False) for code in re.findall(r"`([^`\n]+)`", prose) if SHOWN.match(code))


COMMANDS = sorted(
    {
        (str(page.relative_to(ROOT)), " ".join(one.split()), in_block)
        for page in PAGES
        for one, in_block in commands(page.read_text("utf-8"))
        if "$" not in one  # of a loop
    }
)


class Parsed(BaseException):
    """The arguments are right; nothing is run."""


@pytest.fixture
def parse_only(monkeypatch):
    """Every program ends once its arguments are read, so that none runs."""
    parse = argparse.ArgumentParser.parse_known_args

    def parse_known_args(self, *args, **kwargs):
        found, unknown = parse(self, *args, **kwargs)
        if not unknown:
            raise Parsed
        self.error(f"unknown {unknown}")

    monkeypatch.setattr(argparse.ArgumentParser, "parse_known_args", parse_known_args)


def plain(command: str) -> list[str]:
    """The words of a command as it could be given: of alternatives the first, what is optional included."""
    command = re.sub(r" \| [^\]]*\]", "]", command)  # [--method NAME | --compare]
    command = (
        re.sub(r"(?<=\w)\|[\w|]+", "", command)
        .replace(" …]", "]")
        .removesuffix(" …")
        .split(" > ")[0]
        .replace("COMMAND", "info")
    )
    return shlex.split(re.sub(r"[\[\]]", "", command))


def read(words: list[str]) -> None:
    """Give a program its arguments."""
    if words[0] == "agentsd":
        from agentsd.cli import main

        main(words[1:])
    elif words[1].startswith("eval/"):
        importlib.import_module(words[1].removesuffix(".py").replace("/", ".")).main(words[2:])
    else:
        runpy.run_path(str(ROOT / words[1]), run_name="shown")["main"](words[2:])


def test_pages_show_commands():
    assert len(COMMANDS) > 50 and any("serve.py" in command for _, command, _ in COMMANDS)


@pytest.mark.parametrize("page, command, in_block", COMMANDS)
def test_commands_of_pages_are_understood(page, command, in_block, parse_only, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    try:
        read(plain(command))
    except Parsed:
        return
    except SystemExit as error:
        said = capsys.readouterr()
        if error.code == 0:
            assert said.out  # --help, --version, a completion script
            return
        # In a sentence a command may be named with the options that matter alone.
        assert not in_block and "the following arguments are required" in said.err, f"{page}: {said.err}"
        return
    raise AssertionError(f"{page}: {command} read no arguments")


@pytest.mark.parametrize(
    "command",
    [
        'agentsd generate "a frog" -o frog.png --rato 0.4',
        "python eval/fid_bench.py --rounsd 3",
        "python apps/demo.py --no-such",
    ],
)
def test_commands_with_a_misspelt_option_are_found(command, parse_only, capsys):
    with pytest.raises(SystemExit) as error:
        read(plain(command))
    assert error.value.code == 2 and "unknown ['--" in capsys.readouterr().err
