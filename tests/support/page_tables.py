"""The tables of figures in the pages, with the files of eval/results that they name, and what numbers these hold.

A table names the results that are linked in it, in the paragraph before it or in the one after it. A link to a file
stands for those of its name (sdxl-1024.md and .json), a link to results.md or README.md for its folder. Not looked up
are whole numbers, aims (cells with ≥ or ≤), what stands as code, and what a comment before the table excludes:

    <!-- not checked: earlier models, whose results are not kept -->      the whole table
    <!-- arithmetic: 50 PLMS steps; whole run -->                         columns, by their headings
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "eval" / "results"

_NOT_CHECKED = re.compile(r"<!-- not checked: \S.*?-->", re.S)
_ARITHMETIC = re.compile(r"<!-- arithmetic: (.*?) -->")
_FIGURE = re.compile(r"(?<![\w.,^])(\d+\.\d+)(?![\w]*\.\d)")
_NUMBER = re.compile(r"\d+(?:\.\d+)?(?:e-?\d+)?")
_CODE_AND_TARGETS = re.compile(r"\]\([^)]*\)|`[^`]*`")


@dataclass(frozen=True)
class Row:
    """One row of a table that names results: its figures as written, and the files."""

    page: str
    text: str
    figures: tuple[str, ...]
    files: tuple[Path, ...]


def pages() -> list[Path]:
    """The pages that people write, not those that a report writes beside its data."""
    found = [*ROOT.glob("*.md"), *ROOT.glob("a*/**/*.md"), *ROOT.glob("eval/*.md"), *RESULTS.glob("*.md")]
    return sorted({*found, *RESULTS.glob("*/README.md")})


def rows(page: Path) -> Iterator[Row]:
    """The rows of a page whose figures can be looked up."""
    blocks = page.read_text("utf-8").split("\n\n")
    for before, block, after in zip(["", *blocks], blocks, [*blocks[1:], ""]):
        table = [line for line in block.splitlines() if line.startswith("|")]
        if len(table) < 3 or _NOT_CHECKED.search(before + block):
            continue
        files = _files(
            page, "\n".join(one for one in (before, block, after) if not one.startswith(("#", "|")) or one == block)
        )
        header = _cells(table[0])
        computed = [name for found in _ARITHMETIC.findall(before + block) for name in found.split("; ")]
        assert set(computed) <= set(header), f"{page.name}: no columns {computed}"
        for line in table[2:]:
            looked_up = [cell for name, cell in zip(header, _cells(line)) if name not in computed]
            looked_up = [cell for cell in looked_up if "≥" not in cell and "≤" not in cell]
            figures = tuple(_FIGURE.findall(_CODE_AND_TARGETS.sub("", " | ".join(looked_up))))
            if figures and files:
                yield Row(str(page.relative_to(ROOT)), line, figures, files)


def unfounded(row: Row) -> list[str]:
    """The figures of a row that no named file holds, in the digits shown, in its own unit or a thousandth of it."""
    held = frozenset().union(*(numbers(file) for file in row.files))

    def holds(figure: str) -> bool:
        half = 0.5000001 * 10 ** -len(figure.partition(".")[2])
        return any(abs(one * unit - float(figure)) <= half for one in held for unit in (1, 0.001))

    return [figure for figure in row.figures if not holds(figure)]


@cache
def numbers(file: Path) -> frozenset[float]:
    """All numbers of a file, without sign: of JSON its values and its lists' medians, else what reads as a number."""
    text = file.read_text("utf-8")
    if file.suffix == ".json":
        return frozenset(abs(one) for one in _values(json.loads(text)))
    return frozenset(float(number) for number in _NUMBER.findall(_CODE_AND_TARGETS.sub("", text)))


def _values(data: object) -> Iterator[float]:
    if isinstance(data, dict):
        data = list(data.values())
    if isinstance(data, list):
        plain = [float(one) for one in data if isinstance(one, (int, float))]
        if plain:
            yield statistics.median(plain)
        for one in data:
            yield from _values(one)
    elif isinstance(data, (int, float)) and not isinstance(data, bool):
        yield float(data)


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _files(page: Path, text: str) -> tuple[Path, ...]:
    """The files of results that a text links to."""
    found = set()
    for target in re.findall(r"\]\(([^)#]+)", text):
        path = (page.parent / target).resolve()
        if RESULTS in path.parents and path.exists():
            whole = path.is_dir() or path.stem in ("results", "README")
            folder = path if path.is_dir() else path.parent
            found.update(folder.glob("*" if whole else f"{path.stem}.*"))
    return tuple(sorted(file for file in found if file.suffix in (".json", ".csv", ".md") and file != page))
