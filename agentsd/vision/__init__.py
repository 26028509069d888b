"""Agent-DeiT, Agent-PVT, Agent-Swin and Agent-CSwin for timm: importing this package registers them."""

from __future__ import annotations

try:
    import timm as _timm  # noqa: F401
except ImportError as error:
    from ..messages import install_hint

    raise ImportError(f"agentsd.vision needs timm, which its extra brings: {install_hint('vision')}") from error

from .attention import AgentAttention, AgentCore, SeparateAgentAttention
from .checkpoints import LoadedCheckpoint, load_official_checkpoint, official_state_dict, save_safetensors
from .cswin import AgentCswin
from .deit import AgentDeit
from .dense import FeaturePyramid, dense_backbone
from .maps import ClassifierView, look_into_classifier
from .pvt import AgentPvt
from .registry import VARIANTS
from .swin import AgentSwin

__all__ = [
    "VARIANTS",
    "AgentAttention",
    "AgentCore",
    "AgentCswin",
    "AgentDeit",
    "AgentPvt",
    "AgentSwin",
    "ClassifierView",
    "FeaturePyramid",
    "LoadedCheckpoint",
    "SeparateAgentAttention",
    "dense_backbone",
    "load_official_checkpoint",
    "look_into_classifier",
    "official_state_dict",
    "save_safetensors",
]
