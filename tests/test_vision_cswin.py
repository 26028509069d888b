"""vision/cswin.py: a tiny Agent-CSwin against the equations, stripes that do not divide the map among them."""

from __future__ import annotations

import pytest
import torch
import vision_reference as reference

from agentsd.vision import AgentCswin

TINY = dict(
    img_size=64, embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 4), mlp_ratio=2, agents=(4, 9, None, None),
    split=2, num_classes=5,
)  # fmt: skip
HEADS = TINY["num_heads"]


def make(seed=0, **settings):
    torch.manual_seed(seed)
    model = AgentCswin(**{**TINY, **settings})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def image(height=64, width=64, channels=3):
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
@pytest.mark.parametrize("size, split", [((64, 64), 2), ((64, 64), 3), ((97, 70), 4), ((32, 96), 7)])
def test_equals_the_equations(size, split):
    model = make(split=split, dynamic_img_size=size != (64, 64))
    expected = reference.cswin(model.state_dict(), image(*size), HEADS, split)
    torch.testing.assert_close(model(image(*size)), expected, rtol=1e-4, atol=1e-4)


def test_eps_is_the_authors():
    norms = [m for m in make().modules() if isinstance(m, torch.nn.LayerNorm)]
    assert len(norms) == 1 + 2 * 5 + 3 + 1 and {norm.eps for norm in norms} == {1e-5}


def test_stripes_stand_upright_first():
    block = make().stage3[0]
    assert [branch.vertical for branch in block.attns] == [True, False]
    query = torch.zeros(1, 16, 16)
    value = torch.zeros(1, 4, 4, 16)
    value[0, 0, 0] = 1.0
    for branch, reached in zip(block.attns, ((slice(None), slice(0, 2)), (slice(0, 2), slice(None)))):
        branch.get_v.weight.data.zero_()
        branch.get_v.bias.data.zero_()
        out = branch(query, query, value.flatten(1, 2), (4, 4)).view(4, 4, 16)
        expected = torch.zeros(4, 4, 16)
        expected[reached] = 1 / 8  # the stripe's average
        torch.testing.assert_close(out, expected)


def test_intermediates_norm_and_pruning():
    model = make()
    final, maps = model.forward_intermediates(image(), norm=True)
    assert [tuple(m.shape[1:]) for m in maps] == [(8, 16, 16), (16, 8, 8), (32, 4, 4), (64, 2, 2)]
    torch.testing.assert_close(maps[3].flatten(2).mT, final)
    plain = model.forward_intermediates(image(), [3], intermediates_only=True)[0]
    torch.testing.assert_close(model.norm(plain.flatten(2).mT), final)
    assert model.prune_intermediate_layers([1, 2]) == [1, 2]
    assert not any(name.startswith(("stage4", "merge3", "norm", "head")) for name in model.state_dict())
    torch.testing.assert_close(model.forward_intermediates(image(), [2])[1][0], maps[2])


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
def test_input_size_and_more_agents():
    model = make(agent_grid=(3, 5, None, None))
    model.set_input_size((96, 64))
    assert model(image(96, 64)).shape == (2, 5)
    with pytest.raises(ValueError, match="64×64.*built for 96×64"):
        model(image())
    with pytest.raises(ValueError, match="at least 32"):
        make(dynamic_img_size=True)(image(64, 31))


def test_wrong_settings_are_explained():
    with pytest.raises(ValueError, match="agents=.*4 stages"):
        make(agents=(4, 9))
    with pytest.raises(ValueError, match="num_agents=5"):
        make(agents=(5, 9, None, None))


@torch.no_grad()
def test_compiles_whole_and_exports():
    model = make()
    expected = model(image())
    torch.testing.assert_close(torch.compile(model, backend="eager", fullgraph=True)(image()), expected)
    torch.testing.assert_close(torch.export.export(model, (image(),)).module()(image()), expected)
