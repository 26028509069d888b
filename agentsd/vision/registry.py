"""The 18 published models by name, registered with timm: timm.create_model("agent_swin_tiny_patch4_window56_224")."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import FeatureGetterNet
from torch import nn

from .checkpoints import convert_checkpoint
from .cswin import AgentCswin
from .deit import AgentDeit
from .pvt import AgentPvt
from .swin import AgentSwin

__all__: list[str] = []  # timm's decorator appends the names


@dataclass(frozen=True)
class Variant:
    """One published model.

    Attributes:
        family: its class.
        settings: arguments of the class.
        size: side of its images in pixels.
        crop_pct: part of the resized image that the authors' evaluation crops from the middle.
    """

    family: type[nn.Module]
    settings: dict[str, Any]
    size: int = 224
    crop_pct: float = 0.875


def _deit(dim: int, heads: int, drop_path: float, size: int = 224, **settings: Any) -> Variant:
    return Variant(AgentDeit, dict(embed_dim=dim, num_heads=heads, drop_path_rate=drop_path, **settings), size)


def _pvt(depths: tuple[int, ...], drop_path: float, size: int = 224) -> Variant:
    return Variant(AgentPvt, dict(depths=depths, drop_path_rate=drop_path), size)


def _swin(
    dim: int,
    deep: int,
    agent_blocks: tuple[int, ...],
    drop_path: float,
    size: int = 224,
    window: int = 7,
    crop: float = 0.875,
) -> Variant:
    heads = tuple(dim // 32 * 2**i for i in range(4))
    settings = dict(embed_dim=dim, depths=(2, 2, deep, 2), num_heads=heads, agent_blocks=agent_blocks)
    return Variant(AgentSwin, dict(settings, window_size=window, drop_path_rate=drop_path), size, crop)


def _cswin(dim: int, depths: tuple[int, ...], drop_path: float, size: int = 224, split: int = 7) -> Variant:
    heads = tuple((2 if dim == 64 else 4) * 2**i for i in range(4))
    settings = dict(embed_dim=dim, depths=depths, num_heads=heads, split=split)
    return Variant(AgentCswin, dict(settings, drop_path_rate=drop_path), size)


VARIANTS: dict[str, Variant] = {
    "agent_deit_tiny_patch16_224": _deit(192, 3, 0.0),
    "agent_deit_small_patch16_224": _deit(384, 6, 0.1),
    "agent_deit_base_patch16_224": _deit(768, 12, 0.3, agents=81, agent_blocks=4),
    "agent_deit_small_patch16_448": _deit(384, 6, 0.1, 448),
    "agent_pvt_tiny": _pvt((2, 2, 2, 2), 0.1),
    "agent_pvt_small": _pvt((3, 4, 6, 3), 0.1),
    "agent_pvt_medium": _pvt((3, 4, 18, 3), 0.3),
    "agent_pvt_large": _pvt((3, 8, 27, 3), 0.3),
    "agent_pvt_medium_256": _pvt((3, 4, 18, 3), 0.3, 256),
    "agent_swin_tiny_patch4_window56_224": _swin(96, 6, (2, 2, 6, 0), 0.2),
    "agent_swin_small_patch4_window56_224": _swin(96, 18, (2, 2, 0, 0), 0.3),
    "agent_swin_base_patch4_window56_224": _swin(128, 18, (2, 2, 2, 0), 0.5),
    "agent_swin_small_patch4_window72_288": _swin(96, 18, (2, 2, 0, 0), 0.3, 288, 9, crop=1.0),
    "agent_swin_base_patch4_window96_384": _swin(128, 18, (2, 2, 2, 0), 0.5, 384, 12, crop=1.0),
    "agent_cswin_tiny_224": _cswin(64, (2, 4, 18, 1), 0.2),
    "agent_cswin_small_224": _cswin(64, (3, 6, 29, 2), 0.4),
    "agent_cswin_base_224": _cswin(96, (3, 6, 29, 2), 0.5),
    "agent_cswin_base_384": _cswin(96, (3, 6, 29, 2), 0.7, 384, 12),
}
"""timm's name -> model."""

_FEATURE_CLASSES = {AgentDeit: ("getter", "fx", "hook"), AgentPvt: ("getter",), AgentCswin: ("getter",)}
"""How a family gives features: as in timm, a transformer's blocks are no chain that "list" could cut, and by "fx" and
"hook" one gets tokens; a pyramid's stages end in tokens, which are no maps yet. Swin takes all."""

_FIRST_CONV = {AgentDeit: "patch_embed.proj", AgentPvt: "patch_embed1.proj", AgentSwin: "patch_embed.proj"}


def _pretrained_cfg(variant: Variant) -> dict[str, Any]:
    """What timm's data loading and transfer learning read: the authors' evaluation, the first and the last layer."""
    side = variant.size // 32
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, variant.size, variant.size),
        "pool_size": (side, side) if variant.family is AgentSwin else None,  # of maps; the others end in tokens
        "fixed_input_size": True,
        "crop_pct": variant.crop_pct,
        "crop_mode": "squash",  # the authors resize to a square, whatever the image's shape
        "interpolation": "bicubic",
        "mean": IMAGENET_DEFAULT_MEAN,
        "std": IMAGENET_DEFAULT_STD,
        "first_conv": _FIRST_CONV.get(variant.family, "stage1_conv_embed.0"),
        "classifier": "head.fc" if variant.family is AgentSwin else "head",
    }


default_cfgs = generate_default_cfgs({name: _pretrained_cfg(variant) for name, variant in VARIANTS.items()})


def _build(name: str, pretrained: bool, settings: dict[str, Any]) -> nn.Module:
    """Build a model with timm's machinery.

    Raises:
        ValueError: weights are asked for and no file is named, or features are asked for in a way that only a chain of
            modules allows.
    """
    variant = VARIANTS[name]
    named = settings.get("pretrained_cfg")
    source = {**(named if isinstance(named, dict) else {}), **(settings.get("pretrained_cfg_overlay") or {})}
    if pretrained and not any(source.get(key) for key in ("file", "url", "hf_hub_id", "state_dict")):
        raise ValueError(
            f"pretrained=True: no weights of {name} are published where timm could find them; download the authors' "
            "file and call agentsd.vision.load_official_checkpoint(model, path), or pass "
            "pretrained_cfg_overlay=dict(file=path)"
        )
    feature_class = settings.get("feature_cls", "getter")
    allowed = _FEATURE_CLASSES.get(variant.family)
    if allowed is not None and feature_class not in (*allowed, FeatureGetterNet):
        listed = " or ".join(repr(name) for name in allowed)
        raise ValueError(f"feature_cls={feature_class!r}: {name} gives features by {listed} only; leave it out")
    is_pyramid = variant.family is not AgentDeit
    return build_model_with_cfg(
        variant.family,
        name,
        pretrained,
        pretrained_filter_fn=convert_checkpoint,
        feature_cfg={
            "feature_cls": "getter",
            "out_indices": (0, 1, 2, 3) if is_pyramid else 3,
            **({"flatten_sequential": True} if variant.family is AgentSwin else {}),  # for feature_cls="list"
        },
        **{"img_size": variant.size, **variant.settings, **settings},
    )


def _entrypoint(name: str) -> Callable[..., nn.Module]:
    def create(pretrained: bool = False, **settings: Any) -> nn.Module:
        return _build(name, pretrained, settings)

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"{VARIANTS[name].family.__name__} at {VARIANTS[name].size} × {VARIANTS[name].size} pixels."
    return create


for _name in VARIANTS:
    globals()[_name] = register_model(_entrypoint(_name))
