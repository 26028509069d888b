"""Agent-DeiT, Agent-PVT, Agent-Swin and Agent-CSwin for timm: importing this package registers them."""

from __future__ import annotations

try:
    import timm as _timm  # noqa: F401
except ImportError as error:
    raise ImportError("agentsd.vision needs timm, which its extra brings: pip install 'agentsd[vision]'") from error

from .attention import AgentAttention, AgentCore, SeparateAgentAttention
from .cswin import AgentCswin
from .deit import AgentDeit
from .pvt import AgentPvt
from .swin import AgentSwin

__all__ = ["AgentAttention", "AgentCore", "AgentCswin", "AgentDeit", "AgentPvt", "AgentSwin", "SeparateAgentAttention"]
