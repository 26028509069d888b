"""vision/dense.py: features of all families, torchvision's detectors and segmentation_models_pytorch."""

from __future__ import annotations

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from torchvision.models.detection import MaskRCNN, RetinaNet
from torchvision.models.detection._utils import BoxCoder
from torchvision.ops import MultiScaleRoIAlign
from torchvision.ops.feature_pyramid_network import LastLevelP6P7

from agentsd.vision import FeaturePyramid, dense_backbone

SWIN = dict(embed_dim=32, depths=(1, 1, 1, 2), agent_blocks=(1, 1, 1, 0), num_heads=(1, 2, 4, 8))
PVT = dict(depths=(1, 1, 1, 1), dims=(8, 16, 24, 32), num_heads=(1, 1, 1, 1), mlp_ratios=(1, 1, 1, 1))
CSWIN = dict(embed_dim=16, depths=(1, 1, 1, 1), num_heads=(1, 2, 4, 8))
SMALL = {
    "agent_pvt_tiny": (PVT, (8, 16, 24, 32)),
    "agent_swin_tiny_patch4_window56_224": (SWIN, (32, 64, 128, 256)),
    "agent_cswin_tiny_224": (CSWIN, (16, 32, 64, 128)),
}


def small(name, **settings):
    torch.manual_seed(0)
    return dense_backbone(name, **{**SMALL[name][0], **settings})


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("size", [(65, 99), (96, 40)])
def test_maps_of_any_size_forward_and_backward(name, size):
    backbone = small(name)
    assert backbone.feature_info.reduction() == [4, 8, 16, 32]
    assert tuple(backbone.feature_info.channels()) == SMALL[name][1]
    maps = backbone(torch.randn(1, 3, *size))
    assert tuple(m.shape[1] for m in maps) == SMALL[name][1]
    for found, stride in zip(maps, (4, 8, 16, 32)):
        assert all(abs(side - pixels / stride) < 1 for side, pixels in zip(found.shape[2:], size))
    sum(m.square().mean() for m in maps).backward()
    assert all(p.grad is not None for p in backbone.parameters())


def test_features_of_agent_deit():
    model = timm.create_model("agent_deit_tiny_patch16_224", features_only=True, depth=4, dynamic_img_size=True)
    assert model.feature_info.reduction() == [16] * 3 and model.feature_info.channels() == [192] * 3
    maps = model(torch.randn(1, 3, 50, 33))
    assert [tuple(m.shape) for m in maps] == [(1, 192, 4, 3)] * 3
    sum(m.mean() for m in maps).backward()


def test_backbones_have_the_authors_agents():
    pvt, swin = small("agent_pvt_tiny"), small("agent_swin_tiny_patch4_window56_224")
    stages = (pvt.model.block1, pvt.model.block2, pvt.model.block3, pvt.model.block4)
    assert [stage[0].attn.agent_grid for stage in stages] == [12, 16, 28, 28]
    assert [layer.blocks[0].attn.agent_grid for layer in swin.model.layers[:3]] == [9, 12, 14]
    assert swin.model.layers[3].blocks[1].shift_size == (3, 3)  # kept on small maps
    assert small("agent_pvt_tiny", agent_grid=None).model.block1[0].attn.agent_grid == 3


def test_only_pyramids_are_backbones():
    with pytest.raises(ValueError, match="agent_deit.*four strides.*agent_pvt_tiny"):
        dense_backbone("agent_deit_tiny_patch16_224")
    with pytest.raises(ValueError, match="resnet18"):
        dense_backbone("resnet18")


@pytest.mark.parametrize("kind", ["getter", "list"])
def test_pyramid_takes_both_orders_of_axes(kind):
    name = "agent_swin_tiny_patch4_window56_224"
    pyramid = FeaturePyramid(small(name, feature_cls=kind), 16, norm_maps=True)
    maps = pyramid(torch.randn(1, 3, 64, 96))
    assert [tuple(m.shape) for m in maps.values()] == [(1, 16, *s) for s in ((16, 24), (8, 12), (4, 6), (2, 3), (1, 2))]
    sum(m.square().mean() for m in maps.values()).backward()
    assert all(norm.weight.grad.any() for norm in pyramid.norms)


def target(masks=False):
    found = {"boxes": torch.tensor([[5.0, 6.0, 40.0, 50.0]]), "labels": torch.tensor([1])}
    return {**found, "masks": torch.ones(1, 61, 90, dtype=torch.uint8)} if masks else found


@pytest.mark.parametrize("name", ["agent_pvt_tiny", "agent_swin_tiny_patch4_window56_224"])
def test_mask_rcnn_trains_and_detects(name):
    few = dict(
        rpn_pre_nms_top_n_train=20, rpn_post_nms_top_n_train=10, rpn_pre_nms_top_n_test=20, box_detections_per_img=3
    )
    backbone = FeaturePyramid(small(name), 16)
    model = MaskRCNN(backbone, 3, min_size=64, max_size=128, **few, rpn_post_nms_top_n_test=10)
    losses = model([torch.rand(3, 61, 90), torch.rand(3, 61, 90)], [target(True), target(True)])
    sum(losses.values()).backward()
    assert all(p.grad is not None for p in backbone.backbone.parameters())
    with torch.no_grad():
        assert set(model.eval()([torch.rand(3, 70, 45)])[0]) == {"boxes", "labels", "scores", "masks"}


def test_retinanet_trains_and_detects():
    backbone = FeaturePyramid(small("agent_pvt_tiny", out_indices=(1, 2, 3)), 16, LastLevelP6P7(16, 16))
    model = RetinaNet(backbone, 3, min_size=64, max_size=128)
    sum(model([torch.rand(3, 61, 90)], [target()]).values()).backward()
    # Pruned to the maps asked for, no parameter is without use.
    assert all(p.grad is not None for p in backbone.backbone.parameters())
    with torch.no_grad():
        assert set(model.eval()([torch.rand(3, 70, 45)])[0]) == {"boxes", "labels", "scores"}


def test_a_cascade_refines_boxes_on_the_same_maps():
    pyramid = FeaturePyramid(small("agent_swin_tiny_patch4_window56_224"), 16)
    maps, coder = pyramid(torch.rand(1, 3, 64, 96)), BoxCoder((10.0, 10.0, 5.0, 5.0))
    pool = MultiScaleRoIAlign(["0", "1", "2", "3"], output_size=3, sampling_ratio=1)
    boxes = torch.tensor([[4.0, 4.0, 40.0, 50.0], [10.0, 8.0, 60.0, 30.0]])
    for _ in range(3):
        head = torch.nn.Linear(16 * 9, 4)
        moved = head(pool(maps, [boxes], [(64, 96)]).flatten(1))
        boxes = coder.decode(moved, [boxes])[:, 0]
    boxes.sum().backward()
    assert pyramid.fpn.inner_blocks[0][0].weight.grad.any()


@pytest.mark.parametrize("decoder", [smp.FPN, smp.UPerNet])
@pytest.mark.parametrize("name", ["agent_pvt_tiny", "agent_swin_tiny_patch4_window56_224"])
def test_segmentation_models(decoder, name):
    torch.manual_seed(0)
    model = decoder(f"tu-{name}", encoder_weights=None, classes=4, dynamic_img_size=True, **SMALL[name][0])
    for size in ((64, 96), (160, 32)):
        out = model(torch.randn(2, 3, *size))
        assert out.shape == (2, 4, *size)
        out.square().mean().backward()
    assert all(p.grad is not None for p in model.encoder.parameters())
