"""The 18 registered models: parameters, FLOPs and every published name and shape, all on the meta device."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
import timm
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from agentsd.vision import VARIANTS, official_state_dict
from agentsd.vision.checkpoints import convert_checkpoint

KEYS = json.loads(gzip.decompress((Path(__file__).parent / "vision_keys.json.gz").read_bytes()))
"""By the authors' file name: image side, number of parameters, and [name, shape] of every tensor of their models."""

OFFICIAL = {
    "agent_deit_tiny_patch16_224": ("agent_deit_t", 1.176),
    "agent_deit_small_patch16_224": ("agent_deit_s", 4.443),
    "agent_deit_base_patch16_224": ("agent_deit_b", 17.552),
    "agent_deit_small_patch16_448": ("agent_deit_s_448", 17.705),
    "agent_pvt_tiny": ("agent_pvt_t", 2.000),
    "agent_pvt_small": ("agent_pvt_s", 3.978),
    "agent_pvt_medium": ("agent_pvt_m", 7.035),
    "agent_pvt_large": ("agent_pvt_b", 10.390),
    "agent_pvt_medium_256": ("agent_pvt_m_256", 9.189),
    "agent_swin_tiny_patch4_window56_224": ("agent_swin_t", 4.528),
    "agent_swin_small_patch4_window56_224": ("agent_swin_s", 8.733),
    "agent_swin_base_patch4_window56_224": ("agent_swin_b", 15.444),
    "agent_swin_small_patch4_window72_288": ("agent_swin_s_288", 14.586),
    "agent_swin_base_patch4_window96_384": ("agent_swin_b_384", 46.337),
    "agent_cswin_tiny_224": ("agent_cswin_t", 4.315),
    "agent_cswin_small_224": ("agent_cswin_s", 6.778),
    "agent_cswin_base_224": ("agent_cswin_b", 14.923),
    "agent_cswin_base_384": ("agent_cswin_b_384", 46.333),
}
"""timm's name -> the authors' name and the GFLOPs that their counter (fvcore) gives for their code."""

DROP_PATH = {
    "deit_t": 0.0, "deit_s": 0.1, "deit_b": 0.3, "deit_s_448": 0.1, "pvt_t": 0.1, "pvt_s": 0.1, "pvt_m": 0.3,
    "pvt_b": 0.3, "pvt_m_256": 0.3, "swin_t": 0.2, "swin_s": 0.3, "swin_b": 0.5, "swin_s_288": 0.3, "swin_b_384": 0.5,
    "cswin_t": 0.2, "cswin_s": 0.4, "cswin_b": 0.5, "cswin_b_384": 0.7,
}  # fmt: skip
"""Stochastic depth of the last block, by the authors' name without "agent_"."""


@pytest.fixture(scope="module", params=sorted(OFFICIAL))
def model(request):
    with torch.device("meta"):
        return timm.create_model(request.param)


def facts(model):
    return KEYS[OFFICIAL[model.pretrained_cfg["architecture"]][0]]


def test_the_table_is_complete():
    assert set(OFFICIAL) == set(VARIANTS) and {official for official, _ in OFFICIAL.values()} == set(KEYS)
    assert set(timm.list_models("agent_*")) >= set(VARIANTS)


def test_parameters_are_as_many_as_the_authors(model):
    assert sum(p.numel() for p in model.parameters()) == facts(model)["parameters"]


def test_every_published_tensor_has_its_place_and_back(model):
    published = {name: torch.empty(shape, device="meta") for name, shape in facts(model)["keys"]}
    converted = convert_checkpoint({"model": published}, model)
    assert {k: v.shape for k, v in converted.items()} == {k: v.shape for k, v in model.state_dict().items()}
    weights = {k: v.shape for k, v in published.items() if not k.endswith(("relative_position_index", "attn_mask"))}
    assert {k: v.shape for k, v in official_state_dict(model).items()} == weights
    # Every tensor goes where the names say, not only somewhere of the same shape.
    back = {id(v): k for k, v in converted.items()}
    renamed = {back[id(published[k])] for k in weights}
    assert len(renamed) == len(weights)


def test_norms_and_stochastic_depth_are_the_authors(model):
    official = OFFICIAL[model.pretrained_cfg["architecture"]][0].removeprefix("agent_")
    rates = [module.drop_prob for module in model.modules() if isinstance(module, timm.layers.DropPath)]
    assert max(rates, default=0.0) == pytest.approx(DROP_PATH[official])
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            small = official.startswith("deit") or official.startswith("pvt") and "patch_embed" not in name
            assert module.eps == (1e-6 if small else 1e-5), name


def test_flops_are_the_authors(model):
    model.eval()
    side = facts(model)["size"]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.empty(1, 3, side, side, device="meta"))
    gflops = counter.get_total_flops() / 2e9
    assert gflops == pytest.approx(OFFICIAL[model.pretrained_cfg["architecture"]][1], rel=0.03)


def test_evaluation_settings_are_the_authors(model):
    config = timm.data.resolve_model_data_config(model)
    side = facts(model)["size"]
    straight = side in (288, 384) and "swin_" in model.pretrained_cfg["architecture"].replace("cswin", "")
    assert config["input_size"] == (3, side, side) and config["crop_mode"] == "squash"
    assert config["crop_pct"] == (1.0 if straight else 0.875) and config["interpolation"] == "bicubic"
    assert config["mean"] == timm.data.IMAGENET_DEFAULT_MEAN and config["std"] == timm.data.IMAGENET_DEFAULT_STD
    transform = timm.data.create_transform(**config)
    assert tuple(transform.transforms[0].size) == ((side, side) if straight else (int(side / 0.875),) * 2)


def test_layers_are_grouped_and_named_for_transfer(model):
    names = dict(model.named_modules())
    config = model.pretrained_cfg
    assert isinstance(names[config["first_conv"]], torch.nn.Conv2d)
    assert names[config["classifier"]] is model.get_classifier()
    groups = timm.models.group_parameters(model, model.group_matcher())
    coarse = timm.models.group_parameters(model, model.group_matcher(coarse=True))
    assert sum(map(len, groups.values())) == sum(map(len, coarse.values())) == len(list(model.parameters()))
    assert len(groups) > len(coarse) or "deit" in config["architecture"]
    order = [name for _, part in sorted(groups.items()) for name in part]
    assert order.index(config["first_conv"] + ".weight") < order.index(config["classifier"] + ".weight")


def test_weights_that_are_nowhere_are_explained():
    with pytest.raises(ValueError, match="load_official_checkpoint"):
        timm.create_model("agent_deit_tiny_patch16_224", pretrained=True)
    with pytest.raises(ValueError, match="feature_cls='list'"):
        timm.create_model("agent_pvt_tiny", features_only=True, feature_cls="list")
