"""apps/train_agent_deit.py: its renderings, its models and its table, in runs of seconds without icons."""

from __future__ import annotations

import json

import pytest
import torch
import train_agent_deit as script


def test_renderings_are_reproducible_and_test_ones_are_others():
    icons = script.drawn_shapes(5)
    images, labels = script.batch(icons, "train", 3, 16)
    again, same = script.batch(icons, "train", 3, 16)
    assert torch.equal(images, again) and torch.equal(labels, same) and images.shape == (16, 3, 64, 64)
    assert not torch.equal(images, script.batch(icons, "test", 3, 16)[0])
    assert not torch.equal(images, script.batch(icons, "train", 4, 16)[0])


def test_icons_are_placed_where_they_should_be():
    icons = torch.ones(1, 4, script._ICON, script._ICON)
    one = lambda value: torch.tensor([value])  # noqa: E731
    layer = script._placed(icons, one(0.0), one(0.5), one(0.5), one(-0.5))[0, 3]
    assert layer[:32, 32:].min() > 0.99 and layer.sum() == pytest.approx(32 * 32, rel=0.01)
    turned = script._placed(icons, one(torch.pi / 4), one(0.5), one(0.0), one(0.0))[0, 3]
    assert (
        turned.sum() == pytest.approx(32 * 32, rel=0.02)
        and turned[32, 32 + 20] > 0.9
        and turned[32 - 15, 32 - 15] < 0.1
    )


def test_rows_differ_in_what_the_table_says():
    models = {row: script.make_model(row, 7) for row in script.ROWS}
    names = {row: set(model.state_dict()) for row, model in models.items()}
    assert names["deit"] == names["linear"] == names["agents"]
    assert {n.rsplit(".", 1)[1] for n in names["bias"] - names["agents"]} == {
        f"{kind}_bias" for kind in ("an", "na", "ah", "aw", "ha", "wa", "ac", "ca")
    }
    assert all("dwc" in name for name in names["conv"] - names["bias"])
    assert sum(p.numel() for p in models["linear"].parameters()) == sum(p.numel() for p in models["deit"].parameters())


def test_linear_attention_is_the_formula():
    torch.manual_seed(0)
    attention = script.LinearAttention(8, 2)
    x = torch.randn(1, 5, 8)
    query, key, value = attention.qkv(x)[0].view(5, 3, 2, 4).permute(1, 2, 0, 3)
    phi = lambda t: torch.where(t > 0, t + 1, t.exp())  # noqa: E731
    weights = phi(query) @ phi(key).mT
    out = (weights / weights.sum(-1, keepdim=True) @ value).transpose(0, 1).reshape(5, 8)
    torch.testing.assert_close(attention(x)[0], attention.proj(out))


def test_training_learns():
    icons = script.drawn_shapes(3)
    found = script.train("conv", icons, steps=30, batch_size=16, test_images=64)
    untrained = script._right_answers(script.make_model("conv", 3), icons, 64, 16)
    assert found["final_loss"] < 1.2 and found["right"] > untrained


def test_finished_rows_are_kept(tmp_path, capsys, monkeypatch):
    arguments = ["--smoke", "--rows", "deit,agents", "--out", str(tmp_path)]
    assert script.main(arguments) == 0
    text = (tmp_path / "results.md").read_text()
    assert "| deit |" in text and "| agents |" in text and "--smoke" in text
    before = json.loads((tmp_path / "rows" / "deit.json").read_text())
    monkeypatch.setattr(script, "train", None)  # a second training would fail
    assert script.main(arguments) == 0 and json.loads((tmp_path / "rows" / "deit.json").read_text()) == before
    changed = {**before, "settings": {**before["settings"], "steps": 9}}
    (tmp_path / "rows" / "deit.json").write_text(json.dumps(changed))
    assert script.main(arguments) == 2 and "other settings" in capsys.readouterr().err


def test_wrong_arguments_are_explained(tmp_path, capsys):
    (tmp_path / "no.tgz").write_text("text")
    for arguments, said in (
        (["--rows", "rnn"], "--rows rnn"),
        (["--steps", "0"], "--steps 0"),
        (["--icons", str(tmp_path / "no.tgz")], "is not the package|resvg-py is not installed"),
        (["--test-images", "3"], "--test-images 3"),
    ):
        assert script.main([*arguments, "--out", str(tmp_path)]) == 2
        error = capsys.readouterr().err
        assert any(part in error for part in said.split("|"))
