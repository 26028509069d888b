"""make_config: the settings meant by a config, a preset's name and single fields; imports nothing heavy."""

from __future__ import annotations

import dataclasses
from typing import Any

from ..config import FIELD_NAMES, PRESETS, AgentConfig


def make_config(config: AgentConfig | None = None, preset: str | None = None, **settings: Any) -> AgentConfig:
    """Settings from a config or a preset, and single fields that win over it, as `apply_patch` takes them.

    Raises:
        TypeError: an unknown field, a value of the wrong type, a config that is not an AgentConfig, or both a config
            and a preset.
        ValueError: an unknown preset, or a value out of its range.
    """
    unknown = sorted(set(settings) - set(FIELD_NAMES))
    if unknown:
        raise TypeError(f"unknown setting {', '.join(unknown)}; the settings are {', '.join(FIELD_NAMES)}")
    if config is not None and not isinstance(config, AgentConfig):
        raise TypeError(f"config={config!r}: must be an AgentConfig; single settings go by name, as in ratio=0.4")
    if preset is None:
        return dataclasses.replace(config or AgentConfig(), **settings)
    if config is not None:
        raise TypeError("config and preset: give one of them; single settings go by name, as in ratio=0.4")
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r}: must be one of {', '.join(PRESETS)}")
    fields: dict[str, Any] = {**PRESETS[preset], **settings}
    return AgentConfig(**fields)
