"""Form values from a saved image or from a link, checked, with remarks on what could not be used."""

from __future__ import annotations

import json
import re
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import parse_qsl

from PIL import Image

from agentsd import AgentConfig
from agentsd.fields import written
from agentsd.images.pipelines import SCHEDULERS
from agentsd.images.png import read_settings

from .settings import (
    OWN_SCHEDULER,
    PATCH_FIELDS,
    ROUNDS,
    SCHEDULER_CHOICES,
    Field,
    Limits,
    check,
    preset_values,
    request_fields,
    short,
)

_decoding = threading.Lock()  # one dropped image at a time: its pixels take more memory than its file
_GRADIO = {"view", "deep_link", "logs"}  # parameters of Gradio's own, besides those that begin with "__"
_MOST_PARAMETERS = 100


def restore(path: str | Path, models: Sequence[str], limits: Limits) -> tuple[dict[str, Any], list[str]]:
    """Read the form values that a saved image was generated with.

    Args:
        path: a PNG saved by this app or by the `agentsd` command.
        models, limits: as `check`; an image asks for no more than anyone may.

    Returns:
        (values by field name, ready for the form; remarks on what could not be restored).

    Raises:
        ValueError, TypeError, OSError: no image, a damaged one, one of too many pixels, or one without settings or
            with impossible ones.
    """
    _check_pixels(path, limits)
    try:
        with _decoding:
            settings = read_settings(path)
    except OSError as error:
        # Pillow names the file by its whole path, which visitors should not see.
        raise OSError(str(error).replace(f" {str(path)!r}", "")) from error
    if settings is None:
        raise ValueError(
            f"{Path(path).name}: carries no settings. Images saved by this app or by the agentsd command do; a "
            "screenshot or a copy from a messenger does not"
        )
    if isinstance(settings.get("compare"), list) and settings["compare"]:
        settings = settings["compare"][-1]  # the command's image of all methods
    if not isinstance(settings, dict):
        raise ValueError(f"{Path(path).name}: its settings are not in the form that agentsd writes")
    return form_values(settings, models, limits)


def _check_pixels(path: str | Path, limits: Limits) -> None:
    """Raise ValueError for an image that would take much memory to decode; its header alone is read."""
    try:
        with Image.open(path) as image:
            width, height = image.size
    except Exception:
        return  # no image: read_settings, which opens it in the same way, says so
    if width * height > limits.pixels:
        raise ValueError(
            f"{Path(path).name}: is {width:,} × {height:,} px; settings are read from images of at most "
            f"{limits.pixels:,} pixels, as all images of this app are"
        )


def form_values(settings: Mapping[str, Any], models: Sequence[str], limits: Limits) -> tuple[dict[str, Any], list[str]]:
    """As `restore`, from the settings themselves (`agentsd.images.generate.settings_of`)."""
    remarks = []
    values = {name: settings[name] for name in request_fields(models, limits) if name in settings}
    if values.get("model") not in models:
        remarks.append(
            f"It was generated with the model {short(values.get('model'))}, which this app was not started with; the "
            f"settings are kept, the model is {models[0]}."
        )
        values["model"] = models[0]
    values["scheduler"] = _scheduler_name(settings)
    if values["scheduler"] is None:
        remarks.append(f"Its scheduler {short(settings.get('scheduler'))} is not offered here; the model's own is set.")
        values["scheduler"] = OWN_SCHEDULER
    patch = settings.get("patch") or {}
    if not isinstance(patch, dict):
        raise ValueError(f"patch={short(patch)}: the image's patch settings are not in the form that agentsd writes")
    unknown = sorted(set(patch) - set(PATCH_FIELDS))
    if unknown:
        remarks.append(f"Settings of another version were left out: {short(', '.join(map(str, unknown)))}.")
    for name, field in PATCH_FIELDS.items():
        value = patch.get(name, getattr(AgentConfig(), name))
        values[field.name] = written(value) if field.kind is str else value
    check(values, models, limits)
    return values, remarks


def _scheduler_name(settings: Mapping[str, Any]) -> str | None:
    chosen = settings.get("scheduler_name")
    if chosen in SCHEDULER_CHOICES:
        return chosen
    if "scheduler" not in settings:
        return OWN_SCHEDULER
    fitting = [name for name, (kind, _) in SCHEDULERS.items() if kind == settings["scheduler"]]
    return fitting[0] if fitting else None


def link_values(query: str, models: Sequence[str], limits: Limits) -> tuple[dict[str, Any], list[str]]:
    """Read form values from the query string of the page's address.

    Args:
        query: what follows the address, with or without "?": one parameter per field ("prompt=a+castle&ratio=0.3"), or
            `settings` with all of them as JSON, as "Copy a link" writes it. `preset` sets its fields; others win.
        models, limits: as `check`.

    Returns:
        (values by field name, ready for the form; remarks on parameters that no field has).

    Raises:
        ValueError, TypeError: not a query string of this app, a parameter given twice, or an impossible value.
    """
    fields = {field.name: field for field in (*request_fields(models, limits).values(), ROUNDS, *PATCH_FIELDS.values())}
    try:
        pairs = parse_qsl(query.lstrip("?"), keep_blank_values=True, max_num_fields=_MOST_PARAMETERS)
    except ValueError as error:
        raise ValueError(f"it has more than {_MOST_PARAMETERS} parameters") from error
    given: dict[str, Any] = {}
    for name, text in pairs:
        if name.startswith("__") or name in _GRADIO:
            continue
        if name in given:
            raise ValueError(f"{short(name)}: is given twice")
        given[name] = _typed(fields[name], text) if name in fields else text
    if "settings" in given:
        given |= _settings_parameter(given.pop("settings"))
    if "preset" in given:
        given = preset_values(given.pop("preset")) | given
    unknown = [name for name in given if name not in fields]
    values = {name: value for name, value in given.items() if name in fields}
    # The link of a page without a prompt is as good as others.
    check({**values, "prompt": values.get("prompt") or "any"}, models, limits)
    remarks = []
    if unknown:
        remarks.append(f"Parameters that this app does not know were left out: {short(', '.join(unknown))}.")
    return values, remarks


def _settings_parameter(text: str) -> dict[str, Any]:
    try:
        values = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"settings={short(text)}: is not JSON") from error
    if not isinstance(values, dict):
        raise ValueError(f"settings={short(text)}: is not in the form that this app writes")
    return values


def _typed(field: Field, text: str) -> Any:
    """The text of a parameter as a form would give it; as it is where it does not fit, so that `check` names it."""
    if field.kind is str:
        return text
    if field.kind is bool:
        return {"true": True, "1": True, "false": False, "0": False}.get(text.lower(), text)
    if not text and field.kind == int | None:
        return None
    if field.kind in (int, int | None) and re.fullmatch(r"[+-]?\d{1,30}", text):
        return int(text)
    try:
        return float(text)
    except ValueError:
        return text
