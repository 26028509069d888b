"""vision/maps.py: the agents' attention of a classifier, recorded and rendered by agentsd.visualize."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from agentsd import visualize
from agentsd.vision import AgentCswin, AgentDeit, AgentPvt, look_into_classifier

DEIT = dict(
    img_size=(24, 32), patch_size=4, embed_dim=16, depth=3, num_heads=2, agents=4, agent_blocks=2, num_classes=5
)
PYRAMID = dict(img_size=64, depths=(1, 1, 1, 1), num_heads=(1, 2, 2, 4), num_classes=5)


def image(height=24, width=32):
    return torch.randn(1, 3, height, width, generator=torch.Generator().manual_seed(1))


def deit():
    torch.manual_seed(0)
    return AgentDeit(**DEIT).eval()


@torch.no_grad()
def test_views_hold_the_weights_of_the_layer():
    model = deit()
    view = look_into_classifier(model, image(), layer=1)
    assert view.layer == "blocks.1.attn" and view.grid == (6, 8)
    x, grid = model.embed(image())
    x = model.blocks[0](x, grid)
    attention = model.blocks[1].attn
    query, key, _ = attention.project(model.blocks[1].norm1(x))
    aggregation, broadcast = attention.weights(query, key, grid)
    torch.testing.assert_close(view.agent_attention, aggregation[0].mean(0)[:, 1:])
    torch.testing.assert_close(view.query_attention, broadcast[0].mean(0)[1:])
    torch.testing.assert_close(view.class_attention, broadcast[0].mean(0)[0])
    assert not attention._forward_pre_hooks
    # Agents of 2 × 2 cells of 3 × 4 tokens: the middles are rows 1 and 4, columns 1 and 5.
    assert view.agent_tokens.tolist() == [8 * 1 + 1, 8 * 1 + 5, 8 * 4 + 1, 8 * 4 + 5]


@torch.no_grad()
@pytest.mark.parametrize(
    "model, name",
    [
        (AgentPvt(dims=(8, 8, 8, 8), agents=4, **PYRAMID), "block4.0.attn"),
        (AgentCswin(embed_dim=8, agents=(4, 4, None, None), **PYRAMID), "stage2.0.attns.0"),
    ],
)
def test_pyramids_have_views_too(model, name):
    view = look_into_classifier(model.eval(), image(64, 64), layer=-1)
    assert view.layer == name and view.class_attention is None
    torch.testing.assert_close(view.agent_attention.sum(1), torch.ones(4))


def test_the_map_is_hot_where_the_agent_looks():
    model = deit()
    attention = model.blocks[0].attn
    with torch.no_grad():  # agent 2 looks at row 4, column 6
        attention.ah_bias[0, :, 2, 4, 0] = 30.0
        attention.aw_bias[0, :, 2, 0, 6] = 30.0
    view = look_into_classifier(model, image(), "blocks.0.attn")
    assert view.agent_attention[2].argmax() == 4 * 8 + 6
    canvas = Image.new("RGB", (80, 60), "gray")
    heat = visualize.agent_map(view, 2, canvas)
    assert heat.size == (80, 60)
    brightness = [sum(heat.getpixel((10 * x + 5, 10 * y + 5))) for y in range(6) for x in range(8)]
    assert brightness.index(max(brightness)) == 4 * 8 + 6
    assert visualize.agent_at(view, 0.9, 0.1) == 1
    assert visualize.agents_sheet(view, canvas, 4).width > 2 * 192


def test_wrong_requests_are_explained():
    with pytest.raises(ValueError, match="layer=2.*0: blocks.0.attn; 1: blocks.1.attn"):
        look_into_classifier(deit(), image(), 2)
    with pytest.raises(ValueError, match="one image"):
        look_into_classifier(deit(), image().expand(2, -1, -1, -1))
    with pytest.raises(ValueError, match="Linear has no agent attention"):
        look_into_classifier(torch.nn.Linear(1, 1), image())
