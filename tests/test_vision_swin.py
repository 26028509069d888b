"""vision/swin.py: a tiny Agent-Swin against the equations, at the trained size and as a backbone of any size."""

from __future__ import annotations

import re

import pytest
import torch
import vision_reference as reference
from timm.models.swin_transformer import SwinTransformer

from agentsd.vision import AgentSwin

TINY = dict(
    img_size=96, embed_dim=8, depths=(1, 1, 3, 2), num_heads=(1, 2, 2, 4), mlp_ratio=2, agents=(4, 9, 4, 4),
    agent_blocks=(1, 1, 1, 0), window_size=4, num_classes=5,
)  # fmt: skip
HEADS = TINY["num_heads"]


def make(seed=0, **settings):
    torch.manual_seed(seed)
    model = AgentSwin(**{**TINY, **settings})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def official(model):
    """The state dict under the authors' names: a stage owns the downsampling at its end."""
    down = lambda found: f"layers.{int(found[1]) - 1}.downsample"  # noqa: E731
    return {
        re.sub(r"layers\.(\d)\.downsample", down, name).replace("head.fc", "head"): value
        for name, value in model.state_dict().items()
    }


def image(height=96, width=96, channels=3):
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [False, True])
def test_equals_the_equations(dynamic):
    model = make(dynamic_img_size=dynamic)  # grids 24, 12, 6, 3: windows padded in stage 3, one window in stage 4
    logits, _ = reference.swin(official(model), image(), HEADS, window=4)
    torch.testing.assert_close(model(image()), logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("size", [(52, 76), (92, 44)])
def test_backbone_of_any_size_equals_the_equations(size):
    """With the shift kept on small maps, padded before the roll, and more agents than in training."""
    pooled = (3, 4, 3, None)
    model = make(dynamic_img_size=True, always_partition=True, agent_grid=pooled, window_size=3)
    _, expected = reference.swin(official(model), image(*size), HEADS, window=3, always_partition=True, pooled=pooled)
    maps = model.forward_intermediates(image(*size), intermediates_only=True)
    for found, wanted in zip(maps, expected):
        torch.testing.assert_close(found, wanted.permute(0, 3, 1, 2), rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_timms_order_of_roll_and_padding_differs():
    """Guards the test above: timm's own block, on the same weights, is far off."""
    model = make(dynamic_img_size=True, always_partition=True, window_size=3, agent_blocks=0)
    settings = {name: value for name, value in TINY.items() if "agent" not in name}
    plain = SwinTransformer(**{**settings, "window_size": 3}, strict_img_size=False, always_partition=True).eval()
    plain.load_state_dict(model.state_dict())
    ours, theirs = (m.forward_intermediates(image(52, 76), intermediates_only=True)[3] for m in (model, plain))
    assert (ours - theirs).norm() / ours.norm() > 0.05


def test_is_timms_transformer_with_other_blocks():
    model = make()
    assert isinstance(model, SwinTransformer)
    kinds = [[type(block).__name__[0] for block in stage.blocks] for stage in model.layers]
    assert kinds == [["A"], ["A"], ["A", "W", "W"], ["W", "W"]]
    shifts = [[getattr(block, "shift_size", None) for block in stage.blocks] for stage in model.layers]
    assert shifts[2][1:] == [(2, 2), (0, 0)] and shifts[3] == [(0, 0), (0, 0)]
    settings = {name: value for name, value in TINY.items() if "agent" not in name}
    plain = set(SwinTransformer(**settings).state_dict())
    ours = set(model.state_dict())
    assert {k for k in plain - ours if "relative_position" not in k} == set()
    assert all("_bias" in k or "dwc" in k for k in ours - plain)


def test_eps_is_the_authors():
    norms = [m for m in make().modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 1 + 2 * 7 + 3 + 1 and {norm.eps for norm in norms} == {1e-5}


@torch.no_grad()
def test_odd_sizes_lose_no_pixel():
    model = make(dynamic_img_size=True)
    maps = model.forward_intermediates(image(65, 99), intermediates_only=True)
    assert [tuple(m.shape[1:]) for m in maps] == [(8, 17, 25), (16, 9, 13), (32, 5, 7), (64, 3, 4)]
    padded = torch.nn.functional.pad(image(65, 99), (0, 1, 0, 3))
    torch.testing.assert_close(model(image(65, 99)), model(padded))


def test_set_input_size_regains_the_shift():
    model = make()
    model.set_input_size((128, 128), window_size=2)
    assert model.layers[3].blocks[1].shift_size == (1, 1)  # a map of 4 × 4 is larger than a window
    with torch.no_grad():
        logits, _ = reference.swin(official(model), image(128, 128), HEADS, window=2)
        torch.testing.assert_close(model(image(128, 128)), logits, rtol=1e-4, atol=1e-4)


def test_sizes_and_settings_are_explained():
    with pytest.raises(ValueError, match="64×48.*built for 96×96"):
        make()(image(64, 48))
    with pytest.raises(ValueError, match="at least 32"):
        make(dynamic_img_size=True)(image(31, 48))
    with pytest.raises(ValueError, match="num_agents=7"):
        make(agents=7)
    with pytest.raises(ValueError, match="agent_blocks=.*4 stages"):
        make(agent_blocks=(1, 1))
    with pytest.raises(ValueError, match="attn_drop_rate"):
        make(attn_drop_rate=0.1)


def test_drop_path_checkpointing_and_gradients():
    grads = []
    for enabled in (False, True):
        model = make(drop_path_rate=0.3).train()
        rates = [
            getattr(getattr(b, "drop_path", None) or b.drop_path1, "drop_prob", 0)
            for s in model.layers
            for b in s.blocks
        ]
        assert rates == pytest.approx([0.3 * i / 6 for i in range(7)])
        model.set_grad_checkpointing(enabled)
        torch.manual_seed(3)
        model(image()).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
        assert all(grad is not None for grad in grads[-1])
    for plain, recomputed in zip(*grads):
        torch.testing.assert_close(plain, recomputed)


@torch.no_grad()
def test_compiles_whole_and_exports():
    fixed, backbone = make(), make(dynamic_img_size=True, always_partition=True)
    torch.testing.assert_close(torch.compile(fixed, backend="eager", fullgraph=True)(image()), fixed(image()))
    torch.testing.assert_close(torch.export.export(backbone, (image(),)).module()(image()), backbone(image()))
