"""What a request asks for: from the values of a form or an API call to checked settings."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from agentsd import AgentConfig
from agentsd.config import PRESET_NOTES, PRESETS, SETTINGS
from agentsd.fields import written
from agentsd.images.pipelines import SCHEDULERS
from agentsd.images.request import Request
from agentsd.trained import read_trained

OWN_SCHEDULER = "model's own"
"""Name of the scheduler that came with the model."""

RECOMMENDED = "recommended"
"""DDIM for a model that comes with PLMS (which wants 50 steps), the model's own scheduler for others."""

SCHEDULER_CHOICES = (RECOMMENDED, OWN_SCHEDULER, *SCHEDULERS)

SWEEP_RANGES = {"ratio": (0.1, 0.7), "early": (0.0, 1.0), "alpha": (0.0, 0.3), "cache_interval": (1, 4)}
"""Fields that a sweep may vary, each with a useful range."""

SWEEPABLE = tuple(SWEEP_RANGES)

_OWN_SIZE = 1024  # SDXL's own size, which it generates at whatever the limits say


@dataclass(frozen=True)
class Limits:
    """What one request may ask for, so that it cannot keep all others waiting or take all memory.

    Attributes:
        smallest, largest: height and width in pixels.
        steps: denoising steps.
        prompt: characters.
        rounds: timed rounds of each method.
        values: images of a sweep, besides the unpatched one.
        recording: bytes of agents' attention that one look inside a layer may record, and that all kept looks may take
            together. 2**30 has room for every step at 1024 px with the patch's default settings.
    """

    smallest: int = 64
    largest: int = 1024
    steps: int = 150
    prompt: int = 2000
    rounds: int = 5
    values: int = 9
    recording: int = 2**30

    @property
    def pixels(self) -> int:
        """Most pixels of an image that settings are read from: no sheet of a sweep made here has more."""
        side = max(self.largest, _OWN_SIZE)
        return 2 * (self.values + 1) * side**2  # twice: captions, margins and the empty places of the last line


@dataclass(frozen=True)
class Settings:
    """A checked request.

    Attributes:
        model: a name the app was started with.
        scheduler: a key of SCHEDULERS, OWN_SCHEDULER or RECOMMENDED.
        request: what to generate.
        config: the patch.
        rounds: how many times each method is timed.
    """

    model: str
    scheduler: str
    request: Request
    config: AgentConfig
    rounds: int


# --- the fields -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Field:
    """One value of a form, and one parameter of the API.

    Attributes:
        name: of both.
        kind: the type it has there; tuples and other structures travel as text ("2x4").
        default: what it is where nothing is said.
    """

    name: str
    kind: Any
    default: Any


ROUNDS = Field("rounds", int, 3)
"""How many times each method is timed; three rounds show whether they agree."""

PATCH_FIELDS: dict[str, Field] = {}
"""Field by the name of the AgentConfig field. Made from the dataclass, so that a new setting appears by itself."""

_PLAIN = {"number": float, "integer": int, "flag": bool}

for _key, _setting in SETTINGS.items():
    # Both the noise and the random destinations have a seed; the command line has the same two names.
    _name = "patch_seed" if _key == "seed" else _key
    _default = getattr(AgentConfig, _key)
    if _setting.kind in _PLAIN and not _setting.choices and not _setting.optional:
        PATCH_FIELDS[_key] = Field(_name, _PLAIN[_setting.kind], _default)
    else:  # None, a word or a pair travels as text
        PATCH_FIELDS[_key] = Field(_name, str, written(_default))


def request_fields(models: Sequence[str], limits: Limits) -> dict[str, Field]:
    """The fields that say what to generate and with which model; only the prompt has no default (`...`)."""
    fields = [
        Field("prompt", str, ...),
        Field("negative_prompt", str, ""),
        Field("seed", int, 0),
        Field("steps", int, min(25, limits.steps)),
        Field("guidance", float, 5.0),
        Field("scheduler", str, RECOMMENDED),
        Field("width", int | None, None),
        Field("height", int | None, None),
        Field("model", str, models[0]),
    ]
    return {field.name: field for field in fields}


def check(values: Mapping[str, Any], models: Sequence[str], limits: Limits) -> Settings:
    """Checked settings from the values of a form.

    Args:
        values: by field name; numbers may be floats without a fraction, as browsers send them. Missing ones and None
            (an emptied box) take their defaults.
        models: the names that may be asked for.
        limits: bounds.

    Raises:
        ValueError, TypeError: the message names the field, the value, and what is allowed.
    """
    given = {name: field.default for name, field in request_fields(models, limits).items()}
    given |= {name: value for name, value in values.items() if name in given and value is not None}
    if given["model"] not in models:
        raise ValueError(f"model={short(given['model'])}: must be one this app was started with: {', '.join(models)}")
    if given["scheduler"] not in SCHEDULER_CHOICES:
        raise ValueError(
            f"scheduler={short(given['scheduler'])}: must be {RECOMMENDED!r}, {OWN_SCHEDULER!r} or one of "
            f"{', '.join(SCHEDULERS)}"
        )
    for name in ("prompt", "negative_prompt"):
        text = given[name]
        if isinstance(text, str) and len(text) > limits.prompt:
            raise ValueError(f"{name}: has {len(text):,} characters; must have at most {limits.prompt:,}")
    if not isinstance(given["prompt"], str) or not given["prompt"].strip():
        raise ValueError("prompt: is empty; say what the image shall show")
    for name in ("seed", "steps", "width", "height"):
        given[name] = _whole(given[name])
    for name in ("width", "height"):
        given[name] = given[name] or None  # an emptied number field may arrive as 0
        _check_range(name, given[name], limits.smallest, limits.largest, " (a multiple of 8)")
    _check_range("steps", given["steps"], 1, limits.steps)
    rounds = _whole(ROUNDS.default if values.get("rounds") is None else values["rounds"])
    _check_range("rounds", rounds, 1, limits.rounds)
    request = Request(**{field.name: given[field.name] for field in dataclasses.fields(Request)})
    config = check_patch(values, trained_config(given["model"]))
    return Settings(given["model"], given["scheduler"], request, config, rounds)


def check_patch(values: Mapping[str, Any], start: AgentConfig | None = None) -> AgentConfig:
    """The patch settings among the values of a form, checked; missing ones are those of `start`. Raises as `check`."""
    return dataclasses.replace(
        start or AgentConfig(),
        **{
            name: _read(name, values[field.name])
            for name, field in PATCH_FIELDS.items()
            if values.get(field.name) is not None
        },
    )


def preset_values(name: Any) -> dict[str, Any]:
    """The form values of a preset's fields, by field name. Raises ValueError for an unknown preset."""
    if name not in PRESETS:
        raise ValueError(f"preset={short(name)}: must be one of {', '.join(PRESETS)}")
    return _form_values(PRESETS[name])


def preset_help(name: str) -> str:
    """What a preset does, who takes it and what it measured."""
    preset = PRESET_NOTES[name]
    return " ".join(text for text in (preset.help, preset.time, preset.distance) if text)


def trained_config(model: str) -> AgentConfig | None:
    """The settings that a model was trained for, where its folder has an agentsd.json with any.

    Raises:
        ValueError: that file is damaged.
    """
    trained = read_trained(model) if model.strip() and model != "demo" else None
    return None if trained is None else trained.config


def patch_values(config: AgentConfig) -> dict[str, Any]:
    """The form values of all fields of a config, by field name."""
    return _form_values(dataclasses.asdict(config))


def _form_values(fields: Mapping[str, Any]) -> dict[str, Any]:
    return {
        field.name: written(fields[key]) if field.kind is str else fields[key]
        for key, field in PATCH_FIELDS.items()
        if key in fields
    }


def preset_of(config: AgentConfig) -> str | None:
    """The preset that gives exactly this config, None where there is none."""
    return next((name for name, fields in PRESETS.items() if AgentConfig(**fields) == config), None)


def sweep_values(name: str, first: Any, last: Any, count: Any, limits: Limits) -> list[float]:
    """`count` values of a field, evenly spaced from first to last; those of an integer field are rounded.

    Raises:
        ValueError, TypeError: as `check`.
    """
    if name not in SWEEPABLE:
        raise ValueError(f"field={short(name)}: must be one of {', '.join(SWEEPABLE)}")
    for end, value in (("first", first), ("last", last), ("count", count)):
        if value is None:
            raise TypeError(f"{end}: is empty; must be a number")
    count = _whole(count)
    _check_range("count", count, 2, limits.values)
    for end, value in (("first", first), ("last", last)):
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise TypeError(f"{end}={short(value)}: must be a number, a value of {name}")
    if first == last:
        raise ValueError(f"first={first}, last={last}: must differ, or there is nothing to compare")
    values = [round(first + (last - first) * i / (count - 1), 6) for i in range(count)]
    if PATCH_FIELDS[name].kind is not int:
        return values
    whole = [round(value) for value in values]
    if len(set(whole)) < count:
        raise ValueError(f"count={count}: there are fewer integers from {first} to {last}; {name} takes integers only")
    return whole


def check_index(name: str, value: Any) -> int:
    """A number that counts from 0. Raises as `check`."""
    value = _whole(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise ValueError(f"{name}={short(value)}: must be an integer, 0 or more")
    return value


def with_value(config: AgentConfig, name: str, value: float) -> AgentConfig:
    """The config with one field changed; an error names the value of the sweep that is impossible."""
    changed: dict[str, Any] = {name: value}
    return dataclasses.replace(config, **changed)


def _check_range(name: str, value: Any, low: int, high: int, more: str = "") -> None:
    if value is None and name in ("width", "height"):
        return
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}={short(value)}: must be an integer in {low} … {high}{more}")
    if not low <= value <= high:
        raise ValueError(f"{name}={value}: must be an integer in {low} … {high}{more}")


def _whole(value: Any) -> Any:
    """A float without a fraction as the integer it is; anything else as it came, for the check to refuse."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def short(value: Any) -> str:
    """A value in an error message, cut where it is long."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "…" + text[-1]


def _read(name: str, value: Any) -> Any:
    """A value of a patch field as AgentConfig takes it."""
    if isinstance(value, str):
        return SETTINGS[name].read(value)
    return _whole(value) if PATCH_FIELDS[name].kind is int else value
