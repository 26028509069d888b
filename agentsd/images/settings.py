"""make_config: the settings meant by a config, a preset's name and single fields; imports nothing heavy."""

from __future__ import annotations

import dataclasses
from typing import Any

from .. import config as _config
from ..config import AgentConfig

PRESETS: dict[str, dict[str, Any]] = getattr(_config, "PRESETS", {})
"""Name of a preset -> the fields that it sets."""


def make_config(config: AgentConfig | None = None, preset: str | None = None, **settings: Any) -> AgentConfig:
    """Settings from a config, a preset and single fields; a later one of these wins over an earlier one.

    Raises:
        TypeError: an unknown field, a value of the wrong type, or a config that is not an AgentConfig.
        ValueError: an unknown preset, or a value out of its range.
    """
    names = [field.name for field in dataclasses.fields(AgentConfig)]
    unknown = sorted(set(settings) - set(names))
    if unknown:
        raise TypeError(f"unknown setting {', '.join(unknown)}; the settings are {', '.join(names)}")
    if config is not None and not isinstance(config, AgentConfig):
        raise TypeError(f"config={config!r}: must be an AgentConfig; single settings go by name, as in ratio=0.4")
    if preset is not None and preset not in PRESETS:
        raise ValueError(f"preset={preset!r}: must be one of {', '.join(PRESETS)}")
    fields = PRESETS[preset] if preset is not None else {}
    return dataclasses.replace(config or AgentConfig(), **{**fields, **settings})
