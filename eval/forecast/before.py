"""The same forecast for commit dab2db1, before launches and the host's time were cut; kept to compare with."""

from __future__ import annotations

from .networks import Shape

COMMIT = "dab2db1"

_AGENTS, _THREE, _FIVE, _ALONE = "agents", "interval 3", "interval 5", "caching alone, 5"

SPEED_UPS: dict[Shape, dict[str, dict[str, float]]] = {
    Shape("sd15", 512): {
        "RTX 3060": {_AGENTS: 1.10, _THREE: 2.69, _FIVE: 3.66, _ALONE: 3.29},
        "RTX 4090": {_AGENTS: 1.01, _THREE: 1.84, _FIVE: 2.25, _ALONE: 2.57},
        "A100": {_AGENTS: 1.02, _THREE: 1.85, _FIVE: 2.25, _ALONE: 2.55},
        "H100": {_AGENTS: 0.88, _THREE: 1.44, _FIVE: 1.70, _ALONE: 2.13},
    },
    Shape("sd15", 768): {
        "RTX 3060": {_AGENTS: 1.25, _FIVE: 4.24, _ALONE: 3.24},
        "RTX 4090": {_AGENTS: 1.14, _FIVE: 3.25, _ALONE: 2.92},
        "A100": {_AGENTS: 1.16, _FIVE: 3.28, _ALONE: 2.91},
        "H100": {_AGENTS: 1.06, _FIVE: 2.74, _ALONE: 2.78},
    },
    Shape("sd15", 1024): {
        "RTX 3060": {_AGENTS: 1.43, _THREE: 3.54, _FIVE: 4.82, _ALONE: 3.14},
        "RTX 4090": {_AGENTS: 1.29, _THREE: 2.93, _FIVE: 3.84, _ALONE: 2.95},
        "A100": {_AGENTS: 1.32, _THREE: 3.02, _FIVE: 4.00, _ALONE: 2.98},
        "H100": {_AGENTS: 1.20, _THREE: 2.64, _FIVE: 3.46, _ALONE: 2.93},
    },
    Shape("sdxl", 1024): {
        "RTX 3060": {_AGENTS: 1.04, _THREE: 2.91, _FIVE: 4.30, _ALONE: 4.19},
        "RTX 4090": {_AGENTS: 1.01, _THREE: 2.51, _FIVE: 3.50, _ALONE: 3.61},
        "A100": {_AGENTS: 1.01, _THREE: 2.52, _FIVE: 3.52, _ALONE: 3.64},
        "H100": {_AGENTS: 0.99, _THREE: 2.34, _FIVE: 3.20, _ALONE: 3.41},
    },
}
"""UNet calls of 50 PLMS steps, eager, fast host: shape, GPU, run -> speed-up."""

OPERATORS: dict[Shape, dict[str, str]] = {
    Shape("sd15", 512): {
        "unpatched": "728", "agents": "999", "merge": "909", "cached": "177 / 159", "cached alone": "90",
        "hooks": "3.0", "waits": "1",
    },
    Shape("sdxl", 1024): {
        "unpatched": "1866", "agents": "2367", "merge": "2187", "cached": "117", "cached alone": "76",
        "hooks": "7.6", "waits": "1",
    },
}  # fmt: skip
"""Of a UNet call: operators, the host's milliseconds in the hooks with step caching (2 CPU cores, the least of a run),
and how often it waits for the device."""
