"""METHODS: the settings whose UNet calls call_bench times, by name. Nothing heavy."""

from __future__ import annotations

from typing import Any

from agentsd.config import PRESETS

METHODS: dict[str, dict[str, Any]] = {
    "cache alone": {"ratio": 0.0, "early": 0.0, "cache_interval": 2},
    "agents": {"cache_interval": 2},
    "large": {**PRESETS["large"], "cache_interval": 2},
}
