"""cli.py: the command as a user types it; wrong input is exit code 2, one sentence, and nothing half-written."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import make_pipeline
from diffusers import DDIMScheduler, UNet2DConditionModel
from PIL import Image
from torch.nn.modules.module import register_module_forward_pre_hook

from agentsd import AgentConfig, cli
from agentsd.config import PRESET_NOTES, PRESETS, SETTINGS
from agentsd.images.png import free_path, read_settings
from agentsd.messages import install_hint

QUICK = ["--steps", "4", "--height", "64", "--width", "64"]


def run(capsys, *arguments):
    """The command inside this process: exit code, what it printed, what it complained about."""
    try:
        code = cli.main([str(argument) for argument in arguments])
    except SystemExit as stop:  # argparse
        code = stop.code
    out, err = capsys.readouterr()
    return code, out, err


def test_generate(capsys, tmp_path):
    path = tmp_path / "zebra.png"
    code, out, _ = run(capsys, "generate", "a zebra", "-o", path, *QUICK, "--ratio", "0.3", "--seed", "5")
    assert code == 0 and str(path) in out and "AgentSD" in out
    assert Image.open(path).size == (64, 64)
    settings = read_settings(path)
    assert settings["method"] == "agentsd" and settings["seed"] == 5 and settings["patch"]["ratio"] == 0.3
    again = tmp_path / "again.png"
    run(capsys, "generate", "a zebra", "-o", again, *QUICK, "--ratio", "0.3", "--seed", "5")
    assert np.array_equal(np.asarray(Image.open(path)), np.asarray(Image.open(again)))


def test_generate_compare(capsys, tmp_path):
    path = tmp_path / "compare.png"
    code, out, err = run(capsys, "generate", "a zebra", "-o", path, *QUICK, "--compare", "--rounds", "1")
    assert code == 0
    # Off a terminal there is a line a run, and no bar.
    told = err.splitlines()
    assert told.pop(0).startswith("agentsd: 4 steps are few for the scheduler plms: expect mush")
    assert told.pop(0).startswith("agentsd: 64 × 64 px are far below")
    assert (
        told[0] == "3 methods, 1 round of 4 steps, after a warm-up" and "\r" not in err and len(told) == 1 + 3 + 3 + 1
    )
    assert re.match(r"Stable Diffusion, warm-up: [\d.]+ s$", told[1])
    assert re.match(r"ToMeSD, round 1 of 1: [\d.]+ s; \d+ s left in all$", told[4])
    assert re.match(r"Stable Diffusion, round 1 of 1: [\d.]+ s$", told[6]) and told[7].endswith(" s in all")
    lines = out.splitlines()
    assert [line.split("  ")[0] for line in lines[:3]] == ["Stable Diffusion", "ToMeSD", "AgentSD"]
    assert "x as fast" not in out and "one run each" in out and lines[-1] == str(path)
    assert [entry["method"] for entry in read_settings(path)["compare"]] == ["sd", "tomesd", "agentsd"]
    assert Image.open(path).width > 3 * 64


def test_info(capsys):
    code, out, _ = run(capsys, "info", "--ratio", "0.5", "--height", "512", "--width", "512")
    assert code == 0 and "512×512 px" in out and "64×64 = 4096" in out and "256" in out
    code, out, _ = run(capsys, "info", "--json", "--early", "0")
    data = json.loads(out)
    assert code == 0 and data["config"]["early"] == 0.0 and sum(e["status"] == "active" for e in data["layers"]) == 3
    code, out, _ = run(capsys, "info", "--layers")
    assert code == 0 and len(out.splitlines()) == 12
    assert out.splitlines()[0] == "  0  down_blocks.0.attentions.0.transformer_blocks.0.attn1: active"
    assert "  2  up_blocks.3.attentions.1.transformer_blocks.0.attn1: active" in out


def test_every_setting_has_an_option_with_help():
    """Options and their help follow the fields of AgentConfig by themselves."""
    commands = cli._parser()._subparsers._group_actions[0]
    for command in ("generate", "info", "visualize"):
        told = commands.choices[command].format_help()
        unbroken = "".join(told.split())  # lines are broken at hyphens too
        for name, setting in SETTINGS.items():
            assert re.search(rf"^  {cli.option_of(name)}[ ,]", told, re.MULTILINE), name
            assert "".join(setting.help.split()) in unbroken, name
        assert all("".join(preset.help.removesuffix(".").split()) in unbroken for preset in PRESET_NOTES.values())
    given = (
        "--ratio 0.3 --early 1 --early-ratio 0.2 --agents-from grid --late full --alpha 0 --broadcast-exponent -0.5 "
        "--agent-ratio 0.9 --agent-stride 8x4 "
        "--merge-stride 3 --max-agents 100 --max-keys none --match-tile 16 --max-downsample 2 --no-rand --patch-seed 9 "
        "--merge-crossattn --merge-mlp --no-upcast --cache-interval 3 --cache-order 0 --cache-depth 2"
    )
    options = cli._parser().parse_args(["info", *given.split()])
    assert cli._config(options) == AgentConfig(
        ratio=0.3, early=1.0, early_ratio=0.2, agents="grid", late="full", alpha=0.0, broadcast_exponent=-0.5,
        agent_ratio=0.9, agent_stride=(8, 4),
        merge_stride=3, max_agents=100, max_keys=None, match_tile=16, max_downsample=2, use_rand=False, seed=9,
        merge_crossattn=True, merge_mlp=True, upcast=False, cache_interval=3, cache_order=0, cache_depth=2,
    )  # fmt: skip
    assert cli._config(cli._parser().parse_args(["info"])) == AgentConfig()


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_the_start_and_single_options_win(preset):
    options = cli._parser().parse_args(["info", "--preset", preset, "--early", "0.9"])
    assert cli._config(options) == AgentConfig(**{**PRESETS[preset], "early": 0.9})


def test_a_prompt_that_the_demo_model_does_not_know(capsys, tmp_path):
    path = tmp_path / "a.png"
    code, _, err = run(capsys, "generate", "an astronaut riding a horse", "-o", path, "--steps", "1", *QUICK[2:])
    assert code == 0 and "the demo model knows 121 things" in err and "agentsd prompts" in err
    code, _, err = run(capsys, "generate", "a zebra", "-o", path, "--steps", "1", *QUICK[2:], "--overwrite")
    assert "knows" not in err
    code, out, _ = run(capsys, "prompts")
    assert code == 0 and "121 things" in out and "zebra" in out


def test_visualize(capsys, tmp_path):
    folder = tmp_path / "a" / "maps"
    code, out, _ = run(
        capsys, "visualize", "a zebra", "-o", folder, *QUICK, "--layer", "2", "--call", "0", "--agents", "4"
    )
    assert code == 0 and "agent phase" in out
    assert sorted(os.listdir(folder)) == ["agents.png", "image.png", "merge_map.png"]
    view = read_settings(folder / "merge_map.png")["view"]
    assert view["layer"].startswith("up_blocks.3.attentions.1") and view["call"] == 0
    code, out, _ = run(capsys, "visualize", "a zebra", "-o", folder, *QUICK, "--call", "4", "--overwrite")
    assert code == 0 and sorted(os.listdir(folder)) == ["image.png", "merge_map.png"]  # no agents, none left over
    assert "no agents\n--call: only call 0 has agents, of 0 … 4" in out
    (folder / "agents.png").mkdir()
    before = (folder / "image.png").read_bytes()
    code, _, err = run(capsys, "visualize", "a frog", "-o", folder, *QUICK, "--call", "0", "--overwrite")
    assert code == 2 and "agents.png" in err and (folder / "image.png").read_bytes() == before


def test_models_from_folders(capsys, tmp_path):
    make_pipeline().save_pretrained(tmp_path / "model")
    make_pipeline(scheduler=DDIMScheduler()).save_pretrained(tmp_path / "ddim")
    run(capsys, "generate", "x", "-o", tmp_path / "b.png", "--model", tmp_path / "ddim", *QUICK)
    assert read_settings(tmp_path / "b.png")["scheduler"] == "DDIMScheduler"  # the model's own, unless told otherwise
    code, _, err = run(
        capsys, "generate", "x", "-o", tmp_path / "a.png", "--model", tmp_path / "model", *QUICK, "--scheduler", "euler"
    )
    assert code == 0, err
    assert read_settings(tmp_path / "a.png")["scheduler"] == "EulerDiscreteScheduler"


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--ratio", "1.2"], "ratio=1.2"),
        (["--ratio", "abc"], "ratio='abc': must be a number in 0 … 1"),
        (["--agents-from", "pooling"], 'agents=\'pooling\': must be "merge" or "grid"'),
        (["--ratio", "0.8"], "merge_stride=2"),
        (["--early", "-1"], "early=-1"),
        (["--agent-stride", "0"], "agent_stride=0"),
        (["--merge-stride", "2x2x2"], "merge_stride"),
        (["--agent-stride", "wide"], "ROWSxCOLUMNS"),
        (["--max-downsample", "3"], "max_downsample=3"),
        (["--late", "todo"], "late='todo'"),
        (["--max-agents", "0"], "max_agents=0"),
        (["--match-tile", "many"], "match_tile='many': must be None or an integer of at least 2"),
        (["--patch-seed", "-1"], "seed=-1"),
        (["--height", "100"], "height=100: must be a multiple of 8"),
        (["--steps", "0"], "steps=0"),
        (["--steps", "1000"], "steps=1000"),
        (["--guidance", "nan"], "guidance=nan"),
        (["--scheduler", "plsm"], "scheduler='plsm'"),
        (["--dtype", "int8"], "dtype='int8'"),
        (["--device", "abacus"], "device='abacus'"),
        (["--method", "magic"], "invalid choice: 'magic'"),
        (["--rounds", "2"], "rounds: belongs to --compare"),
        (["--compare", "--rounds", "0"], "rounds=0"),
        (["--method", "sd", "--ratio", "0.3"], "ratio: no setting of --method sd"),
        (["--method", "tomesd", "--ratio", "0.3", "--early", "1"], "early: no setting of --method tomesd"),
        (["--model", "nobody/nothing"], "could not be fetched"),
        (["--model", "./nowhere"], "there is no folder"),
    ],
)
def test_wrong_input_of_generate(capsys, tmp_path, arguments, message):
    path = tmp_path / "a.png"
    code, out, err = run(capsys, "generate", "a zebra", "-o", path, *QUICK[:2], *arguments)
    assert code == 2 and not out
    assert message in err and "Traceback" not in err
    assert err.startswith("agentsd: ") and len(err.strip().splitlines()) == 1
    assert os.listdir(tmp_path) == []


def test_wrong_outputs_and_prompts(capsys, tmp_path):
    for prompt, output, message in [
        ("", tmp_path / "a.png", "prompt=''"),
        ("x", tmp_path / "missing" / "a.png", "does not exist"),
        ("x", tmp_path / "a.jpeg", ".png"),
        ("x", tmp_path, ".png"),
        ("x", "/proc/self/a.png", "cannot be written to"),
    ]:
        code, _, err = run(capsys, "generate", prompt, "-o", output)
        assert code == 2 and message in err and len(err.strip().splitlines()) == 1
    (tmp_path / "file").write_text("mine")
    code, _, err = run(capsys, "visualize", "x", "-o", tmp_path / "file")
    assert code == 2 and "is a file" in err and (tmp_path / "file").read_text() == "mine"
    for arguments, message in [
        (["--layer", "9"], "layer=9"),
        (["--call", "99"], "call=99"),
        (["--call", "-1"], "call=-1"),
    ]:
        code, _, err = run(capsys, "visualize", "x", "-o", tmp_path / "new", *QUICK, *arguments)
        assert code == 2 and message in err
        assert os.listdir(tmp_path) == ["file"]  # the folder made for the pictures is gone again
    code, _, err = run(capsys, "visualize", "x", "-o", tmp_path / "a" / "b", *QUICK, "--layer", "9")
    assert code == 2 and os.listdir(tmp_path) == ["file"]  # with the folders above it


CHEAP_MISTAKES = {
    "a setting out of its range": "generate x -o x.png --ratio 2",
    "a preset that is none": "generate x -o x.png --preset fats",
    "no steps": "generate x -o x.png --steps 0",
    "a guidance that is no number": "generate x -o x.png --guidance nan",
    "a negative seed": "generate x -o x.png --seed -1",
    "a height that is no multiple of 8": "generate x -o x.png --height 500",
    "a width of a giant": "generate x -o x.png --width 80000",
    "a height for info": "info --height 500",
    "an empty prompt": "generate  -o x.png",
    "another format": "generate x -o f.jpg",
    "a missing folder": "generate x -o missing/f.png",
    "a folder for a file": "generate x -o folder.png",
    "a file for a folder": "visualize x -o file",
    "a missing model": "generate x -o x.png --model ./nowhere",
    "a missing model for info": "info --model ./nowhere",
    "a missing model for visualize": "visualize x -o maps --model ./nowhere",
    "a missing checkpoint": "generate x -o x.png --model v1-5-pruned-emaonly.safetensors",
    "a pickle": "generate x -o x.png --model model.ckpt",
    "a folder that is no model": "generate x -o x.png --model folder.png",
    "a configuration of no file": "generate x -o x.png --model-config folder.png",
    "a scheduler": "generate x -o x.png --scheduler plsm",
    "a type": "generate x -o x.png --dtype int8",
    "a device": "generate x -o x.png --device gpu",
    "rounds of one image": "generate x -o x.png --rounds 2",
    "a negative call": "visualize x -o maps --call -1",
    "a size to tune that is no multiple of 8": "tune --size 500",
    "no steps to tune": "tune --steps 0",
    "no rounds to tune": "tune --rounds 0",
    "a missing model to tune": "tune --model ./nowhere",
    "a missing folder for what was tuned": "tune --json missing/a.json",
    "no agents to show": "visualize x -o maps --agents 0",
    "a setting that the method has not": "generate x -o x.png --method sd --ratio 0.3",
}


def test_cheap_mistakes_are_answered_before_torch_is_imported(tmp_path):
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("mine")
    (tmp_path / "model.ckpt").write_bytes(b"pickle")
    before = sorted(os.listdir(tmp_path))
    code = (
        "import json, sys\nfrom agentsd.cli import main\n"
        "for kind, line in json.loads(sys.argv[1]).items():\n"
        "    try:\n        code = main(line.split(' '))\n"
        "    except SystemExit as stop:\n        code = stop.code\n"
        "    heavy = {'torch', 'diffusers', 'transformers', 'numpy'} & set(sys.modules)\n"
        "    assert code == 2 and not heavy, (kind, code, heavy)\n"
    )
    arguments = [sys.executable, "-c", code, json.dumps(CHEAP_MISTAKES)]
    done = subprocess.run(arguments, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout, done.stderr
    assert len(done.stderr.splitlines()) == len(CHEAP_MISTAKES) and sorted(os.listdir(tmp_path)) == before


def test_an_image_that_is_there_is_kept_unless_told_otherwise(capsys, tmp_path):
    """The same command twice, as one tries prompts: no image is lost, and the line says where the new one is."""
    path = tmp_path / "frog.png"
    path.write_bytes(b"another image")
    quick = [*QUICK[2:], "--steps", "1"]
    code, out, err = run(capsys, "generate", "a frog", "-o", path, *quick)
    assert code == 0 and out.startswith(f"{tmp_path / 'frog-2.png'}: ") and path.read_bytes() == b"another image"
    assert "frog.png exists and is kept, so this is frog-2.png; --overwrite replaces it" in err
    code, out, err = run(capsys, "generate", "a frog", "-o", path, *quick, "--compare", "--rounds", "1")
    assert code == 0 and out.splitlines()[-1] == str(tmp_path / "frog-3.png")
    code, out, err = run(capsys, "generate", "a frog", "-o", path, *quick, "--overwrite")
    assert code == 0 and out.startswith(f"{path}: ") and "exists" not in err and read_settings(path)["steps"] == 1
    assert sorted(os.listdir(tmp_path)) == ["frog-2.png", "frog-3.png", "frog.png"]


def test_maps_that_are_there_are_kept_unless_told_otherwise(capsys, tmp_path):
    folder = tmp_path / "maps"
    folder.mkdir()
    (folder / "notes.txt").write_text("mine")
    quick = [*QUICK[2:], "--steps", "1"]
    code, out, _ = run(capsys, "visualize", "a frog", "-o", folder, *quick)
    assert code == 0 and str(folder / "image.png") in out  # nothing of ours was in it
    before = (folder / "image.png").read_bytes()
    code, out, err = run(capsys, "visualize", "a castle", "-o", folder, *quick)
    assert code == 0 and str(tmp_path / "maps-2" / "image.png") in out and "--overwrite replaces it" in err
    assert (folder / "image.png").read_bytes() == before
    code, out, _ = run(capsys, "visualize", "a castle", "-o", folder, *quick, "--overwrite")
    assert code == 0 and (folder / "image.png").read_bytes() != before


def test_a_free_path_is_the_first_that_nothing_is_lost_by(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert free_path("a.b.png") == Path("a.b.png")
    for name in ("a.b.png", "a.b-2.png"):
        Path(name).touch()
    assert free_path("a.b.png") == Path("a.b-3.png")
    assert free_path(".", lambda path: path.name == tmp_path.name).name == f"{tmp_path.name}-2"


def completed(script, *words):
    """What bash offers for the last of these words."""
    line = " ".join(f"'{word}'" for word in words)
    code = (
        f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; "
        f"_shtab_agentsd agentsd '{words[-1]}' '{words[-2]}'; printf '%s\\n' \"${{COMPREPLY[@]}}\""
    )
    done = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
    assert not done.stderr, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_completion_offers_commands_options_and_the_words_of_settings(capsys, tmp_path, monkeypatch):
    pytest.importorskip("shtab", reason=install_hint("completion"))
    code, script, _ = run(capsys, "--print-completion", "bash")
    assert code == 0
    (tmp_path / "agentsd.bash").write_text(script)
    monkeypatch.chdir(tmp_path)
    assert set(completed("agentsd.bash", "agentsd", "")) >= {"generate", "info", "visualize", "prompts"}
    offered = set(completed("agentsd.bash", "agentsd", "generate", "--"))
    assert offered >= {"--no-rand", "--overwrite", "--model"} | {cli.option_of(name) for name in SETTINGS}
    assert completed("agentsd.bash", "agentsd", "generate", "--late", "") == ["merge", "downsample", "full"]
    assert completed("agentsd.bash", "agentsd", "info", "--preset", "pa") == ["paper"]
    assert set(completed("agentsd.bash", "agentsd", "generate", "--scheduler", "dpm")) == {"dpm++2m", "dpm++2m-karras"}
    assert completed("agentsd.bash", "agentsd", "tune", "--device", "c") == ["cuda", "cpu"]
    code, script, _ = run(capsys, "--print-completion", "zsh")
    assert code == 0 and script.startswith("#compdef agentsd") and "--cache-interval" in script


def test_completion_without_its_package_says_how_to_install_it(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    code, out, err = run(capsys, "--print-completion", "bash")
    assert code == 2 and not out and install_hint("completion") in err


@pytest.mark.parametrize("root", ["agentsd", "apps", "eval", "tests"])
def test_nobody_is_sent_to_a_package_index_for_agentsd(root):
    """The name may belong to someone else there, today or tomorrow."""
    folder = Path(__file__).parents[1]
    files = [*(folder / root).rglob("*.py"), *(folder / root).rglob("*.md"), *folder.glob("*.md")]
    sends = re.compile(r"pip install (-U |--upgrade )?[\"'`]?agentsd\b")
    found = [str(file.relative_to(folder)) for file in files if sends.search(file.read_text("utf-8"))]
    assert [file for file in found if file != "agentsd/vision/__init__.py"] == []


def test_installed_command_help_and_version():
    for arguments in (["--help"], ["--version"], ["generate", "--help"], ["info", "--help"], ["visualize", "--help"]):
        done = subprocess.run([sys.executable, "-m", "agentsd.cli", *arguments], capture_output=True, text=True)
        assert done.returncode == 0 and done.stdout and not done.stderr
    assert subprocess.run([sys.executable, "-m", "agentsd.cli"], capture_output=True).returncode == 2


def test_ctrl_c_writes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    calls = []

    def press_ctrl_c(module, _):
        if isinstance(module, UNet2DConditionModel):
            calls.append(1)
            if len(calls) == 2:
                signal.raise_signal(signal.SIGINT)

    # A test run in the background of a script is started with SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    handle = register_module_forward_pre_hook(press_ctrl_c)
    try:
        code, _, err = run(capsys, "generate", "a zebra", "-o", "a.png", *QUICK)
    finally:
        handle.remove()
        signal.signal(signal.SIGINT, before)
    assert code == 1 and "stopped" in err and "Traceback" not in err
    assert len(calls) == 2 and os.listdir(tmp_path) == []


def test_a_misspelt_option_is_answered_with_the_one_meant(capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["generate", "a zebra", "-o", "x.png", "--stpes", "3"])
    told = capsys.readouterr().err
    assert error.value.code == 2 and "--stpes 3 (did you mean --steps?)" in told and "agentsd generate --help" in told
    with pytest.raises(SystemExit):
        cli.main(["generate", "-o", "x.png", "a", "zebra"])
    assert "unrecognized arguments: zebra (put the prompt in quotes)" in capsys.readouterr().err
