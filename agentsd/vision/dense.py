"""Backbones for detection and segmentation: images of any size, more agents than trained, one adapter for torchvision.

The settings are those of the authors' detection and segmentation backbones.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import timm
from timm.layers import Format
from timm.models._registry import get_arch_name
from torch import Tensor, nn
from torchvision.ops import FeaturePyramidNetwork
from torchvision.ops.feature_pyramid_network import ExtraFPNBlock, LastLevelMaxPool

from .deit import AgentDeit
from .pvt import AgentPvt
from .registry import VARIANTS
from .swin import AgentSwin

AGENT_GRIDS = {AgentPvt: (12, 16, 28, 28), AgentSwin: (9, 12, 14, 7)}
"""Side of the agents' grid in each stage that the authors use on the large images of dense prediction."""


def dense_backbone(name: str, out_indices: tuple[int, ...] = (0, 1, 2, 3), **settings: Any) -> nn.Module:
    """Create a backbone with maps [B, C, H / stride, W / stride] at strides 4, 8, 16 and 32 for images of any size.

    Args:
        name: a registered Agent-PVT, Agent-Swin or Agent-CSwin.
        out_indices: which of the four maps.
        **settings: further arguments of timm.create_model. By default agent_grid is the authors' for dense prediction
            (of CSwin, that of training); agent_grid=None keeps that of training in all families.

    Raises:
        ValueError: the model has no such maps.
    """
    variant = VARIANTS.get(get_arch_name(name))
    if variant is None or variant.family is AgentDeit:
        pyramids = ", ".join(n for n, v in VARIANTS.items() if v.family is not AgentDeit)
        raise ValueError(f"name={name!r}: must be a model with maps at four strides ({pyramids})")
    settings.setdefault("agent_grid", AGENT_GRIDS.get(variant.family))
    settings.setdefault("dynamic_img_size", True)
    if variant.family is AgentSwin:
        settings.setdefault("always_partition", True)
    return timm.create_model(name, features_only=True, out_indices=out_indices, **settings)


class FeaturePyramid(nn.Module):
    """A backbone with a feature pyramid network (Lin et al., 2017) on top, as torchvision's detectors take it.

    Args:
        backbone: a model of features_only=True; maps in NHWC order are turned.
        out_channels: of each map of the pyramid.
        extra: what adds smaller maps: by default one for Mask R-CNN; for RetinaNet,
            LastLevelP6P7(out_channels, out_channels).
        norm_maps: first norm each map over its channels, as the authors do with Swin; trained with the detector.
    """

    def __init__(
        self, backbone: Any, out_channels: int = 256, extra: ExtraFPNBlock | None = None, norm_maps: bool = False
    ):
        super().__init__()
        channels = backbone.feature_info.channels()
        self.backbone = backbone
        self.norms = nn.ModuleList(nn.LayerNorm(width) if norm_maps else nn.Identity() for width in channels)
        self.fpn = FeaturePyramidNetwork(channels, out_channels, extra_blocks=extra or LastLevelMaxPool())
        self.out_channels = out_channels
        self._channels_last = getattr(backbone, "output_fmt", Format.NCHW) == Format.NHWC

    def forward(self, image: Tensor) -> OrderedDict[str, Tensor]:
        """[B, 3, H, W] -> maps [B, out_channels, h, w] by name, "0" the largest."""
        maps = OrderedDict()
        for number, (found, norm) in enumerate(zip(self.backbone(image), self.norms)):
            channels_last = found if self._channels_last else found.permute(0, 2, 3, 1)
            maps[str(number)] = norm(channels_last).permute(0, 3, 1, 2).contiguous()
        return self.fpn(maps)
