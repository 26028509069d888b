"""The tables of agentsd/README.md, made from the fields of AgentConfig and the presets.

`python tests/support/settings_table.py` writes them; test_config.py fails where the page says anything else.
"""

from __future__ import annotations

import re
from pathlib import Path

from agentsd.config import PRESET_NOTES, SETTINGS, AgentConfig
from agentsd.fields import written

PAGE = Path(__file__).resolve().parents[2] / "agentsd" / "README.md"


def settings_table() -> str:
    """A row a field, in the order of the dataclass."""
    rows = ["| field | default | what it is, and when to change it | in the authors' code |", "|---|---|---|---|"]
    for name, setting in SETTINGS.items():
        upstream = f"`{setting.upstream}`" if setting.upstream else ""
        rows.append(f"| `{name}` | {_code(getattr(AgentConfig, name))} | {setting.help} | {upstream} |")
    return "\n".join(rows)


def presets_table() -> str:
    """A row a preset."""
    rows = ["| preset | fields | what it is for | time | distance |", "|---|---|---|---|---|"]
    for name, preset in PRESET_NOTES.items():
        fields = ", ".join(f"{field}={_code(value)}" for field, value in preset.fields.items())
        told = f"`{fields}`" if fields else "the defaults"
        rows.append(f'| "{name}" | {told} | {preset.help} | {preset.time} | {preset.distance} |')
    return "\n".join(rows)


def _code(value: object) -> str:
    return f'"{value}"' if isinstance(value, str) else written(value)


def page_with_tables(text: str) -> str:
    """The page with both tables as they have to be."""
    for name, table in (("settings", settings_table()), ("presets", presets_table())):
        parts = re.split(rf"(<!-- {name}: [^\n]*-->\n).*?(<!-- end -->)", text, flags=re.S)
        assert len(parts) == 4, f"{PAGE}: must have one place for the table of {name}"
        before, begin, end, after = parts
        text = f"{before}{begin}\n{table}\n\n{end}{after}"
    return text


if __name__ == "__main__":
    PAGE.write_text(page_with_tables(PAGE.read_text("utf-8")), "utf-8")
