"""How rows are shown and stored: Markdown tables, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentsd.files import write_atomically

from .environment import environment_line


@dataclass(frozen=True)
class Column:
    """A measured figure: its key in a row, and how a table shows it.

    Attributes:
        tables: "quality", "speed", both with a space between, or "" for results.json and results.csv only.
        interval: whether the row has a 95 % interval of it, under the key with _ci.
    """

    key: str
    heading: str = ""
    form: str = "{}"
    tables: str = ""
    interval: bool = False


def markdown(heading: Sequence[str], rows: Iterable[Iterable[object]], align: str = "l") -> str:
    """A Markdown table.

    Args:
        heading: of each column.
        rows: the cells of each row, without "|".
        align: l or r for each column, left or right; the last letter also stands for the columns after it.
    """
    sides = align + align[-1] * (len(heading) - len(align))
    rule = ["---" if side == "l" else "---:" for side in sides]
    return "\n".join("| " + " | ".join(map(str, cells)) + " |" for cells in (heading, rule, *rows))


def table(rows: Sequence[dict[str, Any]], columns: Sequence[Column], label: str = "") -> str:
    """The rows as a Markdown table; columns without any value are left out.

    Args:
        label: name of the Fréchet distance.
    """
    columns = [column for column in columns if any(row.get(column.key) not in (None, "") for row in rows)]
    words = [all(isinstance(row.get(column.key) or "", str) for row in rows) for column in columns]
    cells = [
        [figure(row.get(c.key), row.get(f"{c.key}_ci") if c.interval else None, c.form) for c in columns]
        for row in rows
    ]
    heading = [column.heading.format(label=label) for column in columns]
    return markdown(heading, cells, "".join("l" if word else "r" for word in words))


def figure(value: Any, interval: Sequence[float] | None, form: str) -> str:
    """A value in a format, with its interval where it has one; "" for none."""
    if value is None or value == "":
        return ""
    text = number(value, form)
    return f"{text} [{', '.join(number(end, form) for end in interval)}]" if interval else text


def number(value: Any, form: str) -> str:
    """A value in a format; what rounds to zero has no minus sign.

    Example:
        >>> number(-0.001, "{:+.2f}")
        '+0.00'
    """
    text = form.format(value)
    return form.format(0.0) if text.startswith("-") and not set(text) & set("123456789") else text


def as_csv(rows: Sequence[dict[str, Any]], environment: dict[str, Any]) -> str:
    """The rows with all their columns, an interval as two columns, and the environment in each row."""
    flat = []
    for row in rows:
        out: dict[str, Any] = {}
        for key, value in row.items():
            if key.endswith("_ci"):
                out[f"{key}_low"], out[f"{key}_high"] = value or (None, None)
            else:
                out[key] = " ".join(map(str, value)) if isinstance(value, list) else value
        flat.append({**out, "environment": environment_line(environment)})
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(key for row in flat for key in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    return text.getvalue()


def write_json(path: Path, data: dict[str, Any]) -> None:
    """Write data as JSON, atomically."""
    write_atomically(path, json.dumps(data, indent=1, ensure_ascii=False) + "\n")
