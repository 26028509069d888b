"""What timm's own tests assert of a model, asserted of all 18: forward, backward, settings, features, FX, TorchScript.

Written after the subjects of timm's tests/test_models.py, which no wheel carries. The models keep their kinds of
attention, but have few channels and blocks, and small images. Devices, and training after an FX trace, are those of one
model per family.
"""

from __future__ import annotations

import io

import pytest
import timm
import torch
from timm.layers import apply_test_time_pool
from timm.models import create_feature_extractor
from timm.models._features import FeatureGetterNet, FeatureInfo
from timm.models._manipulate import group_parameters
from vision_small import NAMES, images, settings, small

from agentsd.vision import VARIANTS, AgentCswin, AgentDeit, AgentPvt, AgentSwin

ONE_PER_FAMILY = [
    "agent_deit_base_patch16_224",  # with softmax blocks after the agent blocks
    "agent_pvt_tiny",
    "agent_swin_base_patch4_window56_224",  # with a stage of both kinds
    "agent_cswin_tiny_224",
]

SWINS = [name for name in NAMES if VARIANTS[name].family is AgentSwin]
DEITS = [name for name in NAMES if VARIANTS[name].family is AgentDeit]

pytestmark = pytest.mark.filterwarnings("ignore")  # TorchScript is announced to end; FX compares train with eval


@pytest.fixture(scope="module", params=NAMES)
def name(request):
    return request.param


def missing_gradients(model):
    return [n for n, p in model.named_parameters() if p.grad is None]


# ---- forward, backward, settings ----


def test_forward_is_the_same_with_checkpointing_and_every_parameter_trains(name):
    model = small(name, drop_path_rate=0.0)
    expected = model(images())
    assert expected.shape == (1, 1000) and expected.isfinite().all()
    model.set_grad_checkpointing()
    torch.testing.assert_close(model(images()), expected, rtol=1e-4, atol=1e-5)
    model.train()(images()).mean().backward()
    assert missing_gradients(model) == []


def test_settings_describe_the_model(name):
    model = small(name)
    config, state = model.default_cfg, model.state_dict()
    side = VARIANTS[name].size
    assert config["input_size"] == (3, side, side) and model.in_chans == 3 and model.num_classes == 1000
    assert config["classifier"] + ".weight" in state and config["first_conv"] + ".weight" in state
    assert config["pool_size"] == ((side // 32, side // 32) if name in SWINS else None)
    features = model.forward_features(images())
    assert features.shape[-1] == model.num_features
    if name in SWINS:
        assert features.shape[1:3] == (2, 2)
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (1, model.head_hidden_size)
    model.reset_classifier(0)
    torch.testing.assert_close(model(images()), pooled)
    assert model.num_classes == 0
    groups = group_parameters(small(name), model.group_matcher(coarse=False), reverse=True)
    assert len(set(groups.values())) > 1
    with pytest.raises(TypeError):
        timm.create_model(name, not_an_argument=1, **settings(name))


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_devices_dtypes_and_frozen_parameters_are_followed(name):
    model = timm.create_model(name, device="meta", dtype=torch.float32, **settings(name)).eval()
    assert all(t.device.type == "meta" for t in (*model.parameters(), *model.buffers()))
    model(torch.empty(1, 3, 64, 64, device="meta"))
    model.to(torch.bfloat16)  # nothing that was made before may upcast
    assert model(torch.empty(1, 3, 64, 64, device="meta", dtype=torch.bfloat16)).dtype == torch.bfloat16
    model.to(torch.float64).reset_classifier(2)
    assert all(p.device.type == "meta" and p.dtype == torch.float64 for p in model.parameters())
    assert not any(module.training for module in model.modules())
    model = small(name).requires_grad_(False)
    model.reset_classifier(0)
    model.set_input_size(img_size=(96, 96))
    assert not any(p.requires_grad for p in model.parameters()) and model(images(96)).isfinite().all()


def test_cached_tensors_follow_the_dtype(name):
    model = small(name)
    with torch.no_grad():
        expected = model(images())
        model.to(torch.bfloat16)
        assert model(images().bfloat16()).dtype == torch.bfloat16
        torch.testing.assert_close(model.float()(images()), expected, rtol=0.2, atol=0.2)


@pytest.mark.parametrize("swin", SWINS)
def test_pooling_for_larger_test_images_takes_the_pool_size_of(swin):
    model, pooled = apply_test_time_pool(small(swin), {"input_size": (3, 512, 512)})
    assert pooled and model.original_pool == (VARIANTS[swin].size // 32,) * 2


# ---- features ----


@torch.no_grad()
def test_features_have_the_channels_and_sizes_they_announce(name):
    model = small(name, features_only=True, **({"out_indices": 2} if name in DEITS else {}))
    maps = model(images())
    assert len(maps) >= 2
    for found, channels, stride in zip(maps, model.feature_info.channels(), model.feature_info.reduction()):
        assert found.shape == (1, channels, 64 // stride, 64 // stride) and found.isfinite().all()
    whole = small(name)
    tokens, between = whole.forward_intermediates(images())
    assert [m.shape[1] for m in between] == FeatureInfo(whole.feature_info, len(whole.feature_info)).channels()
    torch.testing.assert_close(tokens, whole.forward_features(images()))
    for index in (0, -1):
        early = whole.forward_intermediates(images(), [index], stop_early=True, intermediates_only=True)
        torch.testing.assert_close(early[0], between[index])
    only = whole.forward_intermediates(images(), [0, 1], norm=True, stop_early=True)[1]
    assert len(only) == 2


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_pruned_models_keep_their_features_and_have_no_unused_parameter(name):
    x = images()
    whole = small(name, drop_path_rate=0.0)
    with torch.no_grad():
        expected, between = whole(x), whole.forward_intermediates(x, intermediates_only=True)
        whole.prune_intermediate_layers([len(between) - 1], prune_head=False)
        torch.testing.assert_close(whole(x), expected)
    for index in range(len(between)):
        model = small(name, drop_path_rate=0.0)
        taken = model.prune_intermediate_layers([index], prune_norm=True)
        found = model.forward_intermediates(x, taken, intermediates_only=True)
        torch.testing.assert_close(found[0], between[index])
        (found[0].sum() + model.train().forward_features(x).sum()).backward()
        assert missing_gradients(model) == []
        model.reset_classifier(7, "avg")
        assert model.eval()(x).shape == (1, 7)


# ---- FX ----


def test_fx_trace_computes_the_same(name):
    model = small(name)
    traced = create_feature_extractor(model, ["head"])
    with torch.inference_mode():
        torch.testing.assert_close(traced(images())["head"], model(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_fx_trace_trains_every_parameter(name):
    traced = create_feature_extractor(small(name), ["head"]).train()
    traced(images(batch=2))["head"].mean().backward()
    assert missing_gradients(traced) == []


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_fx_trace_of_any_size_serves_other_sizes(name):
    model = small(name, dynamic_img_size=True)
    traced = create_feature_extractor(model, ["head"])
    with torch.no_grad():
        for size in ((96, 64), (70, 101)):
            x = torch.randn(1, 3, *size)
            torch.testing.assert_close(traced(x)["head"], model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["agent_deit_tiny_patch16_224", *ONE_PER_FAMILY[:3]])
def test_fx_trace_without_timms_list_of_leaves(name):
    """torch.fx alone, as timm's own models of these families allow; CSwin's stripes need timm's tracer."""
    model = small(name)
    torch.testing.assert_close(torch.fx.symbolic_trace(model)(images()), model(images()))


@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_fx_trace_refuses_other_sizes_and_masks_as_the_model_does(name):
    """A check whose result nobody reads would be dropped from the graph."""
    traced = create_feature_extractor(small(name), ["head"])
    with pytest.raises(ValueError, match="this model was built for 64×64"):
        traced(images(96))
    if name in DEITS:
        whole = torch.fx.symbolic_trace(small(name))
        for given in ({"attn_mask": torch.ones(17, 17)}, {"is_causal": True}):
            with pytest.raises(ValueError, match="takes no mask"):
                whole(images(), **given)


@torch.no_grad()
@pytest.mark.parametrize("name", SWINS)
@pytest.mark.parametrize("feature_class", ["fx", "hook", "list"])
def test_maps_by_another_feature_class(name, feature_class):
    maps = small(name, features_only=True, feature_cls=feature_class)(images())
    for found, expected in zip(maps, small(name).forward_intermediates(images(), intermediates_only=True)):
        torch.testing.assert_close(found.permute(0, 3, 1, 2), expected)


@torch.no_grad()
@pytest.mark.parametrize("name", DEITS)
@pytest.mark.parametrize("feature_class", ["fx", "hook", FeatureGetterNet])
def test_tokens_by_another_feature_class(name, feature_class):
    found = small(name, features_only=True, feature_cls=feature_class, out_indices=(0, 1))(images())
    expected = small(name).forward_intermediates(images(), [0, 1], return_prefix_tokens=True, intermediates_only=True)
    for tokens, (patches, token) in zip(found, expected):
        if feature_class is FeatureGetterNet:
            torch.testing.assert_close(tokens, patches)
        else:
            torch.testing.assert_close(tokens, torch.cat([token, patches.flatten(2).mT], dim=1))


@pytest.mark.parametrize("feature_class", ["fx", "hook", "list", "dict"])
def test_feature_classes_that_give_no_maps_are_refused(feature_class):
    for family in (AgentPvt, AgentCswin):
        name = next(n for n in NAMES if VARIANTS[n].family is family)
        with pytest.raises(ValueError, match=f"feature_cls='{feature_class}'.*'getter' only"):
            small(name, features_only=True, feature_cls=feature_class)


# ---- TorchScript ----


def scripted(model):
    return torch.jit.script(model)


@pytest.fixture(scope="module", autouse=True)
def simple_executor():
    """As timm's tests: without the specialization of the second call, which takes longer than the rest."""
    torch._C._jit_set_profiling_executor(True)
    before = torch._C._jit_set_profiling_mode(False)
    yield
    torch._C._jit_set_profiling_mode(before)


@torch.no_grad()
def test_torchscript_computes_the_same(name):
    model = small(name)
    torch.testing.assert_close(scripted(model)(images()), model(images()), rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_torchscript_of_any_size_is_saved_and_loaded(name):
    model = small(name, dynamic_img_size=True)
    file = io.BytesIO()
    torch.jit.save(scripted(model), file)
    file.seek(0)
    loaded = torch.jit.load(file)
    for size in ((64, 64), (96, 70)):
        x = torch.randn(1, 3, *size)
        torch.testing.assert_close(loaded(x), model(x), rtol=1e-4, atol=1e-5)
    with pytest.raises(torch.jit.Error, match="each side must have at least"):
        loaded(images(8))


@torch.no_grad()
@pytest.mark.parametrize("name", ONE_PER_FAMILY)
@pytest.mark.parametrize("first", [False, True])
def test_torchscript_of_features(name, first):
    model = small(name, features_only=True, **({"out_indices": (0,)} if first else {}))
    for found, expected in zip(scripted(model)(images()), model(images()), strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("name", ONE_PER_FAMILY)
def test_torchscript_of_an_fx_trace(name):
    model = small(name)
    traced = scripted(create_feature_extractor(model, ["head"]))
    torch.testing.assert_close(traced(images())["head"], model(images()), rtol=1e-4, atol=1e-5)


def test_torchscript_trains():
    model = scripted(small("agent_deit_tiny_patch16_224").train())
    model(images(batch=2)).mean().backward()
    assert missing_gradients(model) == []


@torch.no_grad()
@pytest.mark.parametrize(
    "ablation", [{"use_bias": False}, {"use_conv": False}, {"class_token": False, "global_pool": "avg"}]
)
def test_torchscript_of_an_ablation(ablation):
    model = small("agent_deit_tiny_patch16_224", **ablation)
    torch.testing.assert_close(scripted(model)(images()), model(images()), rtol=1e-4, atol=1e-5)
