"""vision/deit.py: a tiny Agent-DeiT against the equations, and what timm's users expect of it."""

from __future__ import annotations

import pytest
import torch
import vision_reference as reference
from timm.models.vision_transformer import VisionTransformer

from agentsd.vision import AgentAttention, AgentDeit

TINY = dict(
    img_size=(24, 32), patch_size=4, embed_dim=16, depth=3, num_heads=2, agents=9, agent_blocks=2, num_classes=5
)


def make(seed=0, **settings):
    torch.manual_seed(seed)
    model = AgentDeit(**{**TINY, **settings})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def image(height=24, width=32, channels=3):
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_equals_the_equations():
    model = make()
    expected = reference.deit(model.state_dict(), image(), heads=2, patch=4, agent_blocks=2)
    torch.testing.assert_close(model(image()), expected, rtol=1e-4, atol=1e-4)
    wrong = reference.deit(model.state_dict(), image().flip(-1), heads=2, patch=4, agent_blocks=2)
    assert (model(image()) - wrong).abs().max() > 0.1


def test_is_timms_transformer_with_other_attention():
    model = make()
    assert isinstance(model, VisionTransformer)
    assert [isinstance(block.attn, AgentAttention) for block in model.blocks] == [True, True, False]
    plain = VisionTransformer(**{k: v for k, v in TINY.items() if "agent" not in k}, qkv_bias=True)
    ours = {k for k in model.state_dict() if "_bias" not in k and "dwc" not in k}
    assert ours == set(plain.state_dict())


def test_eps_is_the_authors():
    norms = [m for m in make().modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 7 and {norm.eps for norm in norms} == {1e-6}


@torch.no_grad()
def test_any_size_agrees_with_a_model_of_that_size():
    """At run time positions and biases are resized as loading into a model of the other size resizes them."""
    dynamic = make(dynamic_img_size=True)
    torch.testing.assert_close(dynamic(image()), make()(image()))
    fixed = make()
    fixed.set_input_size((40, 28))
    torch.testing.assert_close(dynamic(image(40, 28)), fixed(image(40, 28)))
    assert fixed.pos_embed.shape == (1, 71, 16)
    padded = torch.nn.functional.pad(image(39, 25), (0, 3, 0, 1))
    torch.testing.assert_close(dynamic(image(39, 25)), dynamic(padded))


def test_other_sizes_are_explained():
    with pytest.raises(ValueError, match=r"24×28.*built for 24×32.*dynamic_img_size=True"):
        make()(image(24, 28))
    with pytest.raises(ValueError, match="at least 4"):
        make(dynamic_img_size=True)(image(3, 32))


def test_intermediates_and_pruning():
    model = make()
    final, maps = model.forward_intermediates(image(), indices=[0, 2], norm=True)
    torch.testing.assert_close(final, model.forward_features(image()))
    assert [m.shape for m in maps] == [(2, 16, 6, 8)] * 2
    torch.testing.assert_close(maps[1].flatten(2).mT, final[:, 1:])
    pairs = model.forward_intermediates(
        image(), 1, return_prefix_tokens=True, output_fmt="NLC", intermediates_only=True, stop_early=True
    )
    assert [part.shape for part in pairs[0]] == [(2, 48, 16), (2, 1, 16)]
    named = model.forward_intermediates(image(), [0, 2], return_prefix_tokens=True, norm=True, output_dict=True)
    torch.testing.assert_close(named["image_intermediates"], maps)
    torch.testing.assert_close(named["image_intermediates_prefix"][1], named["image_features"][:, :1])
    assert model.prune_intermediate_layers([1]) == [1] and len(model.blocks) == 2
    with pytest.raises(ValueError, match="output_fmt"):
        model.forward_intermediates(image(), output_fmt="NHWC")


def test_checkpointing_gives_the_same_gradients():
    grads = []
    for enabled in (False, True):
        model = make(dynamic_img_size=True).train()
        model.set_grad_checkpointing(enabled)
        first, second = model(image()), model(image(32, 24))  # as many tokens on another grid
        (first.square().mean() + second.square().mean()).backward()
        grads.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*grads):
        torch.testing.assert_close(plain, recomputed)


def test_classifier_pooling_and_channels():
    model = make(in_chans=1, num_classes=0, global_pool="avg")
    assert model(image(channels=1)).shape == (2, 16)
    model.reset_classifier(7)
    assert model(image(channels=1)).shape == (2, 7)
    without = make(class_token=False, global_pool="avg", dynamic_img_size=True)
    assert without(image(24, 36)).shape == (2, 5) and "blocks.0.attn.ac_bias" not in without.state_dict()


def test_what_agent_attention_cannot_follow_is_refused():
    for setting in (dict(qk_norm=True), dict(attn_drop_rate=0.1), dict(reg_tokens=4), dict(patch_drop_rate=0.5)):
        with pytest.raises(ValueError, match=next(iter(setting))):
            make(**setting)
    with pytest.raises(ValueError, match="takes no mask"):
        make().forward_features(image(), is_causal=True)
    with pytest.raises(ValueError, match="num_agents=8"):
        make(agents=8)


def test_initial_biases_are_small():
    torch.manual_seed(0)
    model = AgentDeit(**TINY)
    assert 0.01 < model.blocks[0].attn.an_bias.std() < 0.03 and not model.blocks[0].attn.qkv.bias.any()


@torch.no_grad()
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning")
def test_compiles_whole_and_exports():
    model = make()
    expected = model(image())
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(image()), expected)
    torch.testing.assert_close(torch.jit.trace(model, image())(image()), expected)
    torch.testing.assert_close(torch.export.export(model, (image(),)).module()(image()), expected)
