"""Training-free faster Stable Diffusion by token-merged agent attention: the public names, imported when first used."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

__version__ = "0.2.0"

if TYPE_CHECKING:
    from .attention import agent_attention as agent_attention
    from .config import AgentConfig as AgentConfig
    from .config import Phase as Phase
    from .describing import describe as describe
    from .images.compare import compare as compare
    from .images.pipelines import load_pipeline as load_pipeline
    from .images.tune import tune as tune
    from .patch import apply_patch as apply_patch
    from .patch import new_run as new_run
    from .patch import patched as patched
    from .patch import remove_patch as remove_patch

_HOME = {
    "AgentConfig": "config",
    "Phase": "config",
    "agent_attention": "attention",
    "apply_patch": "patch",
    "compare": "images.compare",
    "describe": "describing",
    "load_pipeline": "images.pipelines",
    "new_run": "patch",
    "patched": "patch",
    "remove_patch": "patch",
    "tune": "images.tune",
}

__all__ = ["__version__", *_HOME]


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(set(globals()) | set(__all__))
