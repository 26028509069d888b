"""agentsd/vision/README.md: its examples run as they stand, and its table is that of the models."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import timm
import torch

from agentsd.vision import VARIANTS, official_state_dict

README = (Path(__file__).resolve().parents[1] / "agentsd" / "vision" / "README.md").read_text(encoding="utf-8")


def test_examples_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = timm.create_model("agent_deit_tiny_patch16_224")
    torch.save({"model": official_state_dict(model)}, "agent_deit_t.pth")  # stands for the authors' file
    names: dict = {}
    for block in re.findall(r"```python\n(.*?)```", README, re.S):
        exec(compile(block, "README", "exec"), names)
    assert names["logits"].shape == (1, 1000) and Path("agent_deit_t.safetensors").is_file()
    assert torch.equal(names["model"].norm.weight, model.norm.weight)
    assert names["sheet"].width > 3 * 192 and names["detector"].backbone.out_channels == 256


def test_table_is_the_registered_models():
    facts = json.loads(gzip.decompress((Path(__file__).parent / "vision_keys.json.gz").read_bytes()))
    rows = re.findall(r"^\| `(\w+)` \| (\w+) \| (\d+) \| ([\d.]+) M", README, re.M)
    assert {name for name, *_ in rows} == set(VARIANTS) and len(rows) == 18
    for name, official, size, millions in rows:
        assert VARIANTS[name].size == int(size) == facts[official]["size"]
        assert float(millions) == round(facts[official]["parameters"] / 1e6, 1)
