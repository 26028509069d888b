"""How one setting is described, read from text and checked: what a field of AgentConfig carries as its metadata.

The command's options, the widgets of the app and of the ComfyUI node, and the table in agentsd/README.md take help,
bounds and choices from here. Standard library only.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NoReturn, TypeGuard


@dataclass(frozen=True)
class Setting:
    """What is known about one setting.

    Attributes:
        kind: "number", "integer", "flag" (True or False), "choice" (one of `choices`) or "cell" (rows and columns of a
            grid's cell: an integer or a pair).
        help: what it is, and when one would change it; plain text that starts with a capital letter.
        hint: ends the error about a refused value: what to do.
        low, high: bounds of a number or an integer, both allowed; None where there is none.
        choices: all values of a choice; the words that an integer may be beside its numbers ("auto").
        optional: None is allowed too.
        upstream: name of the same setting in the authors' code; "" where there is none.
        advanced: most users leave it alone; pages and forms show it after the others.
        slider: (low, high, step) of the values that are useful; None where a slider is of no use.
        option: the option of commands, where it is not the field's name.
    """

    kind: str
    help: str
    hint: str = ""
    low: float | None = None
    high: float | None = None
    choices: tuple[str | int, ...] = ()
    optional: bool = False
    upstream: str = ""
    advanced: bool = True
    slider: tuple[float, float, float] | None = None
    option: str = ""

    @property
    def allowed(self) -> str:
        """What the setting can be, as in "a number in 0 … 1"."""
        none = "None or " if self.optional else ""
        words = [f'"{choice}"' if isinstance(choice, str) else str(choice) for choice in self.choices]
        if self.kind == "flag":
            return "True, False or None" if self.optional else "True or False"
        if self.kind == "cell":
            return f"{none}an integer or a pair (rows, columns)"
        if self.kind == "choice":
            return f"{none}{', '.join(words[:-1])} or {words[-1]}"
        noun = "a number" if self.kind == "number" else "an integer"
        high = "2**63 − 1" if self.high == 2**63 - 1 else f"{self.high:g}" if self.high is not None else ""
        bounds = f"in {self.low:g} … {high}" if high else f"of at least {self.low:g}"
        return " or ".join([f"{none}{noun} {bounds}", *words])

    def check(self, name: str, value: Any) -> Any:
        """The value as AgentConfig keeps it: plain int, float, bool, str, tuple or None.

        Raises:
            TypeError, ValueError: the message names the field, the value, what is allowed and what to do.
        """
        if value is None and self.optional:
            return None
        if self.kind == "flag":
            return value if isinstance(value, bool) else self._refuse(TypeError, name, value)
        if self.kind == "cell":
            return self._check_cell(name, value)
        if self.choices and isinstance(value, str):
            return value if value in self.choices else self._refuse(ValueError, name, value)
        if self.kind == "choice":
            if not is_int(value) or all(isinstance(choice, str) for choice in self.choices):
                self._refuse(TypeError, name, value)
            return int(value) if value in self.choices else self._refuse(ValueError, name, value)
        if self.kind == "integer":
            if not is_int(value):
                self._refuse(TypeError, name, value)
            number: int | float = int(value)
        else:
            if not isinstance(value, Real) or isinstance(value, bool):
                self._refuse(TypeError, name, value, f", not {type(value).__name__}")
            number = float(value)
        below = self.low is not None and number < self.low
        if below or not math.isfinite(number) or (self.high is not None and number > self.high):
            self._refuse(ValueError, name, value)
        return number

    def _check_cell(self, name: str, value: Any) -> int | tuple[int, int]:
        parts = (value, value) if is_int(value) else value
        if not isinstance(parts, (tuple, list)) or not all(is_int(part) for part in parts):
            self._refuse(TypeError, name, value)
        if len(parts) != 2 or min(parts) < 1 or math.prod(parts) < 2:
            self._refuse(ValueError, name, value)
        return int(value) if is_int(value) else (int(parts[0]), int(parts[1]))

    def _refuse(self, error: type[Exception], name: str, value: Any, more: str = "") -> NoReturn:
        raise error(f"{name}={value!r}: must be {self.allowed}{more}" + (f"; {self.hint}" if self.hint else ""))

    def read(self, text: str) -> Any:
        """The value that a text stands for ("0.4", "2x4", "none", "auto"); a text that stands for none comes back as it
        is, so that `check` refuses it by its name."""
        word = text.strip()
        if self.optional and word.lower() == "none":
            return None
        if self.kind == "flag":
            return {"true": True, "false": False}.get(word.lower(), text)
        try:
            if self.kind == "number":
                return float(word)
            if self.kind == "cell":
                parts = tuple(int(part) for part in word.lower().replace("×", "x").split("x"))
                return parts[0] if len(parts) == 1 else parts
            return int(word)
        except ValueError:
            return word


def written(value: Any) -> str:
    """A value as text that `Setting.read` reads back: "2x4", "None", "auto"."""
    return "x".join(map(str, value)) if isinstance(value, (tuple, list)) else str(value)


def number(low: float, high: float, help: str, **more: Any) -> Mapping[str, Setting]:
    """Metadata of a field that is a float in low … high."""
    return {"setting": Setting("number", help, low=low, high=high, **more)}


def integer(low: int, high: int | None, help: str, **more: Any) -> Mapping[str, Setting]:
    """Metadata of a field that is an integer in low … high, or of at least `low` where high is None."""
    return {"setting": Setting("integer", help, low=low, high=high, **more)}


def flag(help: str, **more: Any) -> Mapping[str, Setting]:
    """Metadata of a field that is True or False."""
    return {"setting": Setting("flag", help, **more)}


def choice(choices: tuple[str | int, ...], help: str, **more: Any) -> Mapping[str, Setting]:
    """Metadata of a field that is one of a few values."""
    return {"setting": Setting("choice", help, choices=choices, **more)}


def cell(help: str, **more: Any) -> Mapping[str, Setting]:
    """Metadata of a field that is a cell of a grid, an integer or (rows, columns), of two tokens at least."""
    return {"setting": Setting("cell", help, **more)}


def is_int(value: object) -> TypeGuard[int]:
    """Whether a value is an integer, NumPy's included, and no bool."""
    return isinstance(value, Integral) and not isinstance(value, bool)
