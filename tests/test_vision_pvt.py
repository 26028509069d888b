"""vision/pvt.py and vision/stages.py: a tiny Agent-PVT against the equations, and timm's interface of a pyramid."""

from __future__ import annotations

import pytest
import torch
import vision_reference as reference

from agentsd.vision import AgentPvt
from agentsd.vision.common import resized_positions

TINY = dict(
    img_size=64, depths=(1, 2, 1, 1), dims=(8, 16, 24, 32), num_heads=(1, 2, 3, 4), mlp_ratios=(2, 2, 1, 1),
    agents=(4, 9, 9, 4), num_classes=5,
)  # fmt: skip
HEADS = TINY["num_heads"]


def make(seed=0, **settings):
    torch.manual_seed(seed)
    model = AgentPvt(**{**TINY, **settings})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def image(height=64, width=64, channels=3):
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_equals_the_equations():
    model = make()
    torch.testing.assert_close(model(image()), reference.pvt(model.state_dict(), image(), HEADS), rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("size", [(96, 128), (32, 64), (512, 32)])
def test_any_size_equals_the_equations(size):
    """(512, 32): stage 2 has as many tokens (64·4) as stage 1 in training (16·16), where upstream's code fails."""
    model = make(dynamic_img_size=True)
    expected = reference.pvt(model.state_dict(), image(*size), HEADS)
    torch.testing.assert_close(model(image(*size)), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_more_agents_than_trained():
    model = make(dynamic_img_size=True, agent_grid=(4, 5, 6, 3))
    expected = reference.pvt(model.state_dict(), image(96, 64), HEADS, pooled=(4, 5, 6, 3))
    torch.testing.assert_close(model(image(96, 64)), expected, rtol=1e-4, atol=1e-4)


def test_eps_is_the_authors():
    for name, module in make().named_modules():
        if isinstance(module, torch.nn.LayerNorm):
            assert module.eps == (1e-5 if "patch_embed" in name else 1e-6), name


def test_stochastic_depth_grows_linearly():
    model = make(drop_path_rate=0.4)
    rates = [block.drop_path.drop_prob for stage in range(4) for block in model.blocks_of(stage)]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


@torch.no_grad()
def test_odd_sizes_lose_no_pixel():
    model = make(dynamic_img_size=True)
    maps = model.forward_intermediates(image(65, 99), intermediates_only=True)
    assert [tuple(m.shape[1:]) for m in maps] == [(8, 17, 25), (16, 9, 13), (24, 5, 7), (32, 3, 4)]
    changed = image(65, 99)
    changed[:, :, -1, -1] += 5
    assert not torch.equal(model(changed), model(image(65, 99)))


def test_intermediates_norms_and_pruning():
    model = make()
    final, maps = model.forward_intermediates(image(), [1, 3])
    assert [m.shape for m in maps] == [(2, 16, 8, 8), (2, 32, 2, 2)]
    torch.testing.assert_close(maps[1].flatten(2).mT, final)
    early = model.forward_intermediates(image(), [0], stop_early=True, intermediates_only=True, output_fmt="NLC")
    assert early[0].shape == (2, 256, 8)
    assert model.prune_intermediate_layers([0, 1]) == [0, 1]
    assert not any("3" in name.split(".")[0] or "4" in name.split(".")[0] for name in model.state_dict())
    torch.testing.assert_close(model.forward_intermediates(image(), [1])[1][0], maps[0])
    assert model(image()).shape == (2, 64, 16) and model.num_features == 16


def test_checkpointing_gives_the_same_gradients():
    grads = []
    for enabled in (False, True):
        model = make().train()
        model.set_grad_checkpointing(enabled)
        torch.manual_seed(3)
        model(image()).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
        assert all(grad is not None for grad in grads[-1])
    for plain, recomputed in zip(*grads):
        torch.testing.assert_close(plain, recomputed)


@torch.no_grad()
def test_set_input_size_resizes_positions():
    model = make()
    before = model.pos_embed2.clone()
    model.set_input_size((96, 64))
    torch.testing.assert_close(model.pos_embed2, resized_positions(before, (8, 8), (12, 8)))
    assert model(image(96, 64)).shape == (2, 5)
    with pytest.raises(ValueError, match="64×64.*built for 96×64"):
        model(image())


def test_classifier_pooling_and_channels():
    model = make(in_chans=1, num_classes=0, global_pool="")
    assert model(image(channels=1)).shape == (2, 4, 32)
    model.reset_classifier(7, "avg")
    assert model(image(channels=1)).shape == (2, 7) and model.get_classifier().out_features == 7


def test_wrong_settings_are_explained():
    with pytest.raises(ValueError, match="global_pool='max'"):
        make(global_pool="max")
    with pytest.raises(ValueError, match="agent_grid=.*4 stages"):
        make(agent_grid=(1, 2))
    with pytest.raises(ValueError, match="num_agents=5"):
        make(agents=(4, 5, 9, 9))
    with pytest.raises(ValueError, match="attn_drop_rate=0.1"):
        make(attn_drop_rate=0.1)
    with pytest.raises(ValueError, match="at least 32"):
        make(dynamic_img_size=True)(image(31, 64))


@torch.no_grad()
def test_compiles_whole_and_exports():
    model = make()
    expected = model(image())
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(image()), expected)
    torch.testing.assert_close(torch.export.export(model, (image(),)).module()(image()), expected)
