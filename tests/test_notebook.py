"""examples/agentsd.ipynb: every cell runs, in order, in small."""

from __future__ import annotations

import json
import warnings

from child import ROOT

import agentsd
from agentsd.config import PRESETS

NOTEBOOK = json.loads((ROOT / "examples" / "agentsd.ipynb").read_text("utf-8"))
SMALL = {"SIZE": 64, "STEPS": 5, "ROUNDS": 1}


def test_it_is_a_notebook_without_outputs():
    assert (NOTEBOOK["nbformat"], NOTEBOOK["nbformat_minor"]) == (4, 5)
    assert len({cell["id"] for cell in NOTEBOOK["cells"]}) == len(NOTEBOOK["cells"])
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code())
    assert "".join(NOTEBOOK["cells"][0]["source"]).startswith("# ")


def test_every_cell_runs_in_order(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for cell in code():
        source = "".join(cell["source"])
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message="agentsd")
            exec(compile(source, cell["id"], "exec"), names)
        if "parameters" in cell["metadata"].get("tags", ()):
            assert set(SMALL) < set(names)
            names.update(SMALL)
    pipe, out = names["pipe"], capsys.readouterr().out
    assert all(f"\n{preset} " in out for preset in list(PRESETS)[1:]) and " dB " in out
    assert names["comparison"]["agentsd"].image.size == (64, 64) and names["strip"].width == (1 + len(PRESETS)) * 64
    assert names["report"].active and names["view"].agent_attention is not None
    assert agentsd.remove_patch(pipe) is pipe
    assert list(tmp_path.iterdir()) == []


def code() -> list[dict]:
    return [cell for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]
