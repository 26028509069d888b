"""vision/checkpoints.py: files as the authors wrote them, other sizes, features_only, and what must be refused."""

from __future__ import annotations

import argparse
import pickle
import sys
import types

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F

from agentsd.vision import (
    AgentDeit,
    AgentPvt,
    AgentSwin,
    load_official_checkpoint,
    official_state_dict,
    save_safetensors,
)

DEIT = dict(img_size=32, patch_size=8, embed_dim=8, depth=2, num_heads=2, agents=4, num_classes=5)
SWIN = dict(
    img_size=64, embed_dim=8, depths=(1, 1, 2, 1), num_heads=(1, 2, 2, 4), agents=4, agent_blocks=(1, 1, 1, 0),
    window_size=3, num_classes=5,
)  # fmt: skip
PVT = dict(
    img_size=64, depths=(1,) * 4, dims=(8,) * 4, num_heads=(1,) * 4, mlp_ratios=(1,) * 4, agents=4, num_classes=5
)


def make(family, settings, seed=0, **changed):
    torch.manual_seed(seed)
    return family(**{**settings, **changed}).eval()


def image(side):
    return torch.randn(1, 3, side, side, generator=torch.Generator().manual_seed(1))


def same(model, other):
    return all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), other.state_dict().values()))


@pytest.mark.parametrize("family, settings", [(AgentDeit, DEIT), (AgentPvt, PVT), (AgentSwin, SWIN)])
def test_round_trip_under_the_authors_names(tmp_path, family, settings):
    source = make(family, settings)
    state = official_state_dict(source)
    if family is AgentSwin:
        assert "layers.0.downsample.norm.weight" in state and "head.weight" in state
        state["layers.3.blocks.0.attn.relative_position_index"] = torch.zeros(9, 9, dtype=torch.long)
        state["layers.2.blocks.1.attn_mask"] = torch.zeros(4, 9, 9)
    torch.save({"model": state, "optimizer": {"state": {}}, "epoch": 299}, tmp_path / "official.pth")
    model = make(family, settings, seed=1)
    report = load_official_checkpoint(model, tmp_path / "official.pth")
    assert same(model, source) and report.resized == report.left == report.unused == ()
    save_safetensors(model, tmp_path / "ours.safetensors")
    again = make(family, settings, seed=2)
    load_official_checkpoint(again, tmp_path / "ours.safetensors")
    assert same(again, source) and not list(tmp_path.glob(".*"))


def test_settings_beside_the_weights_are_read_as_plain_data(tmp_path, monkeypatch):
    """The authors' files hold an argparse.Namespace (DeiT, PVT) or a yacs config (Swin)."""
    yacs = types.ModuleType("yacs.config")
    yacs.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config", "__qualname__": "CfgNode"})
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", yacs)
    config = yacs.CfgNode(DATA=yacs.CfgNode(IMG_SIZE=64), AUG=["a"])
    config.__dict__["__immutable__"] = True
    source = make(AgentDeit, DEIT)
    args = argparse.Namespace(lr=1e-3, opt_betas=None)
    torch.save({"model": source.state_dict(), "config": config, "args": args, "max_accuracy": 80.5}, tmp_path / "f.pth")
    monkeypatch.delitem(sys.modules, "yacs.config")
    model = make(AgentDeit, DEIT, seed=1)
    load_official_checkpoint(model, tmp_path / "f.pth")
    assert same(model, source)


def test_averaged_weights_are_preferred_and_module_prefixes_dropped(tmp_path):
    average, last = make(AgentDeit, DEIT), make(AgentDeit, DEIT, seed=1)
    wrapped = {f"module.{k}": v for k, v in average.state_dict().items()}
    torch.save({"state_dict": last.state_dict(), "state_dict_ema": wrapped}, tmp_path / "f.pth")
    model = make(AgentDeit, DEIT, seed=2)
    load_official_checkpoint(model, tmp_path / "f.pth")
    assert same(model, average)


class Evil:
    def __reduce__(self):
        return (print, ("code from the file ran",))


def test_code_in_a_file_is_refused_and_not_run(tmp_path, capsys):
    torch.save({"model": make(AgentDeit, DEIT).state_dict(), "hook": Evil()}, tmp_path / "evil.pth")
    with pytest.raises(ValueError, match="cannot be read as weights only.*print.*nothing of it was run"):
        load_official_checkpoint(make(AgentDeit, DEIT), tmp_path / "evil.pth")
    (tmp_path / "raw.pth").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(ValueError, match="cannot be read as weights only"):
        load_official_checkpoint(make(AgentDeit, DEIT), tmp_path / "raw.pth")
    assert "ran" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"\n<!DOCTYPE html><html><title>Google Drive - can't scan for viruses", "is a web page.*save the file"),
        (b"<html><body>Sign in", "is a web page"),
        (b"", "is no checkpoint of PyTorch or safetensors .it ends too early"),
    ],
)
def test_a_download_that_went_wrong_is_explained(tmp_path, content, said):
    (tmp_path / "agent_deit_t.pth").write_bytes(content)
    with pytest.raises(ValueError, match=said):
        load_official_checkpoint(make(AgentDeit, DEIT), tmp_path / "agent_deit_t.pth")


def test_other_files_are_explained(tmp_path):
    model = make(AgentDeit, DEIT)
    with pytest.raises(FileNotFoundError):
        load_official_checkpoint(model, tmp_path / "none.pth")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    for name in ("text.pth", "text.safetensors", "empty.pth"):
        with pytest.raises(ValueError, match="cannot be read|is no checkpoint|holds no weights"):
            load_official_checkpoint(model, tmp_path / name)


@pytest.mark.parametrize(
    "changed, said",
    [
        (dict(depth=3), "of its parameters are not in the file, such as blocks.2"),
        (dict(depth=1), "tensors of the file have no place in it, such as blocks.1"),
        (dict(embed_dim=16), "of other shape, such as cls_token"),
        (dict(agents=9), r"an_bias has \(2, 4, 7, 7\) in the file.*number of agents differs"),
        (dict(agent_blocks=1), "no place in it, such as blocks.1.attn.an_bias"),
    ],
)
def test_the_weights_of_another_model_are_refused(tmp_path, changed, said):
    torch.save(make(AgentDeit, DEIT).state_dict(), tmp_path / "f.pth")
    model = make(AgentDeit, DEIT, seed=1, **changed)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=said):
        load_official_checkpoint(model, tmp_path / "f.pth")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_another_number_of_classes_or_channels(tmp_path):
    source = make(AgentDeit, DEIT)
    torch.save(source.state_dict(), tmp_path / "f.pth")
    model = make(AgentDeit, DEIT, seed=1, num_classes=7, in_chans=1)
    report = load_official_checkpoint(model, tmp_path / "f.pth")
    assert report.left == ("head.weight", "head.bias") and report.resized == ("patch_embed.proj.weight",)
    torch.testing.assert_close(model.patch_embed.proj.weight, source.patch_embed.proj.weight.sum(1, keepdim=True))
    headless = make(AgentDeit, DEIT, seed=1, num_classes=0)
    assert load_official_checkpoint(headless, tmp_path / "f.pth").unused == ("head.weight", "head.bias")
    assert torch.equal(headless.norm.weight, source.norm.weight)


def linear(line, new):
    """Linear resizing of one line, pixel centres aligned, written out."""
    old = len(line)
    place = np.clip((np.arange(new) + 0.5) * old / new - 0.5, 0, old - 1)
    return torch.tensor(np.interp(place, np.arange(old), line.numpy()), dtype=torch.float32)


def test_other_sizes_by_the_authors_interpolation(tmp_path):
    source = make(AgentDeit, DEIT)
    torch.save(source.state_dict(), tmp_path / "f.pth")
    model = make(AgentDeit, DEIT, seed=1, img_size=(48, 80))
    report = load_official_checkpoint(model, tmp_path / "f.pth")
    axes = {"ah_bias", "aw_bias", "ha_bias", "wa_bias"}
    assert {name.rsplit(".", 1)[-1] for name in report.resized} == axes | {"pos_embed"}
    old, new = source.blocks[0].attn, model.blocks[0].attn
    torch.testing.assert_close(new.ah_bias[0, 1, 2, :, 0], linear(old.ah_bias[0, 1, 2, :, 0].detach(), 6))
    torch.testing.assert_close(new.aw_bias[0, 1, 2, 0], linear(old.aw_bias[0, 1, 2, 0].detach(), 10))
    torch.testing.assert_close(new.ha_bias[0, 1, :, 0, 2], linear(old.ha_bias[0, 1, :, 0, 2].detach(), 6))
    torch.testing.assert_close(new.wa_bias[0, 1, 0, :, 2], linear(old.wa_bias[0, 1, 0, :, 2].detach(), 10))
    assert torch.equal(new.an_bias, old.an_bias) and torch.equal(new.ac_bias, old.ac_bias)
    expected = F.interpolate(source.pos_embed[:, 1:].mT.view(1, 8, 4, 4), (6, 10), mode="bicubic").flatten(2).mT
    torch.testing.assert_close(model.pos_embed[:, 1:], expected)
    assert torch.equal(model.pos_embed[:, :1], source.pos_embed[:, :1])


def test_other_sizes_of_pvt_and_windows(tmp_path):
    source = make(AgentPvt, PVT)
    torch.save(source.state_dict(), tmp_path / "f.pth")
    model = make(AgentPvt, PVT, seed=1, img_size=96)
    assert "pos_embed4" in load_official_checkpoint(model, tmp_path / "f.pth").resized
    by_method = make(AgentPvt, PVT)
    by_method.set_input_size(96)
    torch.testing.assert_close(model(image(96)), by_method(image(96)))
    source = make(AgentSwin, SWIN)
    torch.save(official_state_dict(source), tmp_path / "f.pth")
    model = make(AgentSwin, SWIN, seed=1, window_size=4)
    load_official_checkpoint(model, tmp_path / "f.pth")
    table = source.layers[2].blocks[1].attn.relative_position_bias_table
    expected = F.interpolate(table.T.view(1, 2, 5, 5), (7, 7), mode="bicubic").flatten(2)[0].T
    torch.testing.assert_close(model.layers[2].blocks[1].attn.relative_position_bias_table, expected)


@torch.no_grad()
@pytest.mark.parametrize("feature_class", ["getter", "list"])
def test_features_only_models_take_what_they_have(tmp_path, feature_class):
    name = "agent_swin_tiny_patch4_window56_224"
    small = dict(
        img_size=64, depths=(1, 1, 2, 1), embed_dim=32, num_heads=(1, 2, 2, 4), agents=4, agent_blocks=(1, 1, 1, 0)
    )
    source = timm.create_model(name, **small).eval()
    torch.save({"model": official_state_dict(source)}, tmp_path / "f.pth")
    for taken in ((0, 1, 2, 3), (1, 2)):
        model = timm.create_model(
            name, features_only=True, out_indices=taken, feature_cls=feature_class, **small
        ).eval()
        report = load_official_checkpoint(model, tmp_path / "f.pth")
        assert {"head.fc.weight", "norm.weight"} <= set(report.unused) and report.left == ()
        assert any(name.startswith("layers.3") for name in report.unused) == (3 not in taken)
        for found, wanted in zip(model(image(64)), source.forward_intermediates(image(64), list(taken))[1]):
            found = found if feature_class == "getter" else found.permute(0, 3, 1, 2)
            torch.testing.assert_close(found, wanted)
    deeper = timm.create_model(name, features_only=True, **{**small, "depths": (1, 1, 1, 1)})
    with pytest.raises(ValueError, match="no place in it, such as layers.2.blocks.1"):
        load_official_checkpoint(deeper, tmp_path / "f.pth")


def test_timm_loads_the_file_itself(tmp_path):
    small = dict(
        img_size=64, depths=(1, 1, 2, 1), embed_dim=32, num_heads=(1, 2, 2, 4), agents=4, agent_blocks=(1, 1, 1, 0)
    )
    name = "agent_swin_tiny_patch4_window56_224"
    source = timm.create_model(name, **small)
    torch.save({"model": official_state_dict(source)}, tmp_path / "f.pth")
    overlay = dict(file=str(tmp_path / "f.pth"))
    model = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, **small)
    assert same(model, source)
    other = timm.create_model(name, pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3, in_chans=1, **small)
    assert other.head.fc.out_features == 3 and torch.equal(other.norm.weight, source.norm.weight)
    save_safetensors(source, tmp_path / "ours.safetensors")
    model = timm.create_model(name, checkpoint_path=str(tmp_path / "ours.safetensors"), **small)
    assert same(model, source)


# ---- tensors that cannot be the weights ----


def refused(tmp_path, family, settings, name, value, said, **changed):
    """A file of the family with one tensor exchanged is refused, and the model is as before."""
    state = official_state_dict(make(family, settings))
    assert name in state
    state[name] = value(state[name]) if callable(value) else value
    torch.save({"model": state}, tmp_path / "f.pth")
    model = make(family, settings, seed=1, **changed)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(ValueError, match=said):
        load_official_checkpoint(model, tmp_path / "f.pth")
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


SHAPES = {
    "no_dimension": torch.tensor(1.0),
    "one_dimension": torch.ones(8),
    "two_dimensions": torch.ones(17, 8),
    "more_dimensions": torch.ones(1, 1, 1, 1, 17, 8),
    "empty": torch.ones(0),
    "empty_tokens": torch.ones(1, 0, 8),
    "empty_channels": torch.ones(1, 17, 0),
    "fewer_tokens_than_the_class_token": torch.ones(1, 1, 8),
    "tokens_of_no_square": torch.ones(1, 13, 8),
    "two_images": torch.ones(2, 17, 8),
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("changed", [{}, {"img_size": 64}])
def test_positions_of_impossible_shape_are_refused(tmp_path, shape, changed):
    refused(tmp_path, AgentDeit, DEIT, "pos_embed", SHAPES[shape], "of other shape, such as pos_embed", **changed)
    if SHAPES[shape].shape != (1, 1, 8):  # a grid of one token, where there is no class token
        refused(tmp_path, AgentPvt, PVT, "pos_embed2", SHAPES[shape], "of other shape, such as pos_embed2", **changed)


@pytest.mark.parametrize(
    "shape", [(), (0,), (5,), (1, 2, 4, 4), (1, 2, 4, 0, 1), (2, 2, 4, 4, 1), (1, 1, 1, 2, 4, 4, 1)]
)
def test_biases_of_impossible_shape_are_refused(tmp_path, shape):
    said = "of other shape, such as blocks.1.attn.ah_bias"
    refused(tmp_path, AgentDeit, DEIT, "blocks.1.attn.ah_bias", torch.ones(shape), said)


TABLE = "layers.2.blocks.1.attn.relative_position_bias_table"


@pytest.mark.parametrize("shape", [(), (25,), (0, 2), (24, 2), (15, 2), (25, 2, 1), (25, 3)])
def test_window_tables_of_impossible_shape_are_refused(tmp_path, shape):
    refused(tmp_path, AgentSwin, SWIN, TABLE, torch.ones(shape), f"of other shape, such as {TABLE}")


@pytest.mark.parametrize("shape", [(), (5,), (5, 9), (5, 8, 1, 1), (0,)])
def test_heads_of_impossible_shape_are_refused(tmp_path, shape):
    refused(tmp_path, AgentDeit, DEIT, "head.weight", torch.ones(shape), "of other shape, such as head.weight")


@torch.no_grad()
def test_windows_that_are_no_squares_take_square_tables(tmp_path):
    source = make(AgentSwin, SWIN)
    torch.save(official_state_dict(source), tmp_path / "f.pth")
    model = make(AgentSwin, SWIN, seed=1, img_size=(64, 32))  # 4 × 2 tokens in the third stage
    assert model.layers[2].blocks[1].window_size == (3, 2)
    load_official_checkpoint(model, tmp_path / "f.pth")
    table = source.get_parameter(TABLE)
    expected = F.interpolate(table.T.view(1, 2, 5, 5), (5, 3), mode="bicubic").flatten(2)[0].T
    torch.testing.assert_close(model.get_parameter(TABLE), expected)
    assert model(torch.randn(1, 3, 64, 32)).isfinite().all()
    save_safetensors(model, tmp_path / "narrow.safetensors")  # the same tables again, and in a square model
    load_official_checkpoint(make(AgentSwin, SWIN, seed=2, img_size=(64, 32)), tmp_path / "narrow.safetensors")
    with pytest.raises(ValueError, match=f"of other shape, such as {TABLE}"):
        load_official_checkpoint(make(AgentSwin, SWIN), tmp_path / "narrow.safetensors")


def one(number):
    def exchange(value):
        value = value.clone()
        value.flatten()[-1] = number
        return value

    return exchange


CONTENTS = {
    "nan": (one(float("nan")), "not all of its numbers are finite"),
    "infinite": (one(float("-inf")), "not all of its numbers are finite"),
    "beyond_the_dtype": (lambda v: one(1e300)(v.double()), "not all of its numbers are finite"),
    "bool": (lambda v: v > 0, "its numbers are of torch.bool"),
    "integer": (lambda v: v.long(), "its numbers are of torch.int64"),
    "bytes": (lambda v: v.to(torch.uint8), "its numbers are of torch.uint8"),
    "complex": (lambda v: torch.complex(v, v), "its numbers are of torch.complex64"),
    "float8": (lambda v: v.to(torch.float8_e4m3fn), "its numbers are of torch.float8"),
    "quantized": (lambda v: torch.quantize_per_tensor(v, 0.1, 0, torch.qint8), "its numbers are of torch.qint8"),
    "sparse": (lambda v: v.to_sparse(), "it is sparse or nested"),
    "sparse_rows": (lambda v: v.flatten(1).to_sparse_csr() if v.ndim > 1 else v.to_sparse(), "it is sparse or nested"),
    "meta": (lambda v: v.to("meta"), "it has a shape and no numbers"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("content", CONTENTS)
@pytest.mark.parametrize("name", ["head.weight", "pos_embed", "blocks.0.attn.an_bias", "norm.bias"])
def test_contents_that_are_no_weights_are_refused(tmp_path, content, name):
    value, said = CONTENTS[content]
    changed = {"img_size": 64} if name == "pos_embed" else {}  # which would be resized
    refused(tmp_path, AgentDeit, DEIT, name, value, f"{name} cannot be weights: {said}", **changed)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_floating_point_of_another_width_is_taken(tmp_path, dtype):
    source = make(AgentDeit, DEIT).to(dtype)
    torch.save(source.state_dict(), tmp_path / "f.pth")
    model = make(AgentDeit, DEIT, seed=1)
    load_official_checkpoint(model, tmp_path / "f.pth")
    assert same(model, source.float())


def test_one_weight_under_two_names_is_refused(tmp_path):
    model = make(AgentSwin, SWIN)
    state = official_state_dict(model)
    torch.save({**state, "module.norm.bias": torch.ones(64)}, tmp_path / "prefix.pth")
    torch.save({**state, "head.fc.bias": torch.ones(5)}, tmp_path / "mixed.pth")
    for file, name in (("prefix.pth", "norm.bias"), ("mixed.pth", "head.fc.bias")):
        with pytest.raises(ValueError, match=f"{name} under two names"):
            load_official_checkpoint(model, tmp_path / file)


def test_timm_refuses_them_too(tmp_path):
    name = "agent_deit_tiny_patch16_224"
    small = {k: v for k, v in DEIT.items() if k != "num_classes"}
    source = timm.create_model(name, **small, num_classes=1000).state_dict()
    for exchanged in ({"norm.bias": torch.full((8,), torch.nan)}, {"pos_embed": torch.ones(8)}):
        torch.save({"model": {**source, **exchanged}}, tmp_path / "f.pth")
        with pytest.raises(ValueError, match="norm.bias cannot be weights|of other shape, such as pos_embed"):
            timm.create_model(name, pretrained=True, pretrained_cfg_overlay=dict(file=str(tmp_path / "f.pth")), **small)
