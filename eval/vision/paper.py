"""What the papers report of the 18 agent transformers (Agent Attention, table 14) and of their baselines."""

from __future__ import annotations

from typing import NamedTuple


class Reported(NamedTuple):
    """A row of the table: millions of parameters, billions of multiply-adds, ImageNet top-1 in per cent."""

    parameters: float
    gmacs: float
    top1: float


AGENT = {
    "agent_deit_tiny_patch16_224": Reported(6.0, 1.2, 74.9),
    "agent_deit_small_patch16_224": Reported(22.7, 4.4, 80.5),
    "agent_deit_base_patch16_224": Reported(87.2, 17.6, 82.0),
    "agent_deit_small_patch16_448": Reported(23.1, 17.7, 83.1),
    "agent_pvt_tiny": Reported(11.6, 2.0, 78.4),
    "agent_pvt_small": Reported(20.6, 4.0, 82.2),
    "agent_pvt_medium": Reported(35.9, 7.0, 83.4),
    "agent_pvt_medium_256": Reported(36.1, 9.2, 83.8),
    "agent_pvt_large": Reported(48.7, 10.4, 83.7),
    "agent_swin_tiny_patch4_window56_224": Reported(29, 4.5, 82.6),
    "agent_swin_small_patch4_window56_224": Reported(50, 8.7, 83.7),
    "agent_swin_small_patch4_window72_288": Reported(50, 14.6, 84.1),
    "agent_swin_base_patch4_window56_224": Reported(88, 15.4, 84.0),
    "agent_swin_base_patch4_window96_384": Reported(88, 46.3, 84.9),
    "agent_cswin_tiny_224": Reported(21, 4.3, 83.1),
    "agent_cswin_small_224": Reported(33, 6.8, 83.9),
    "agent_cswin_base_224": Reported(73, 14.9, 84.7),
    "agent_cswin_base_384": Reported(73, 46.3, 85.8),
}

BASELINE_TOP1 = {
    "deit_tiny_patch16_224": 72.2,
    "deit_small_patch16_224": 79.8,
    "deit_base_patch16_224": 81.8,
    "pvt_v1_tiny": 75.1,
    "pvt_v1_small": 79.8,
    "pvt_v1_medium": 81.2,
    "pvt_v1_large": 81.7,
    "swin_tiny_patch4_window7_224": 81.3,
    "swin_small_patch4_window7_224": 83.0,
    "swin_base_patch4_window7_224": 83.5,
}
"""As the DeiT, PVT and Swin papers report them at 224 pixels."""


class Pair(NamedTuple):
    """Two models that are timed in turn.

    Attributes:
        why: what they have in common.
    """

    baseline: str
    agent: str
    why: str


_SAME = "same size"
_ACCURACY = "larger, of at most equal accuracy"

PAIRS: dict[str, tuple[Pair, ...]] = {
    "small": (
        Pair("deit_tiny_patch16_224", "agent_deit_tiny_patch16_224", _SAME),
        Pair("deit_small_patch16_224", "agent_deit_small_patch16_224", _SAME),
        Pair("pvt_v1_small", "agent_pvt_small", _SAME),
        Pair("swin_tiny_patch4_window7_224", "agent_swin_tiny_patch4_window56_224", _SAME),
        Pair("pvt_v1_large", "agent_pvt_small", _ACCURACY),
        Pair("swin_base_patch4_window7_224", "agent_swin_small_patch4_window56_224", _ACCURACY),
    ),
}
PAIRS["all"] = PAIRS["small"] + (
    Pair("deit_base_patch16_224", "agent_deit_base_patch16_224", _SAME),
    Pair("pvt_v1_tiny", "agent_pvt_tiny", _SAME),
    Pair("pvt_v1_medium", "agent_pvt_medium", _SAME),
    Pair("pvt_v1_large", "agent_pvt_large", _SAME),
    Pair("pvt_v1_medium", "agent_pvt_small", _ACCURACY),
    Pair("swin_small_patch4_window7_224", "agent_swin_small_patch4_window56_224", _SAME),
    Pair("swin_base_patch4_window7_224", "agent_swin_base_patch4_window56_224", _SAME),
)
