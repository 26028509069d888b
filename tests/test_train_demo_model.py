"""apps/train_demo_model.py as a user runs it: the smoke preset end to end, killed and resumed, and with bad input."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

SCRIPT = Path(__file__).resolve().parents[1] / "apps" / "train_demo_model.py"
DEMO_MODEL = SCRIPT.parents[1] / "agentsd" / "demo_model"
# One thread: the order of a sum over threads is the only thing that could tell two runs on one CPU apart.
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1"}


def command(*arguments: object) -> list[str]:
    return [sys.executable, str(SCRIPT), *map(str, arguments)]


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*arguments), env=ENVIRONMENT | environment, capture_output=True, text=True, timeout=300, check=False
    )


def kill_at(file: Path, *arguments: object) -> None:
    """Starts the script and kills it, as a crash would, as soon as `file` exists."""
    process = subprocess.Popen(
        command(*arguments), env=ENVIRONMENT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        while not file.exists():
            assert process.poll() is None, f"it ended before {file} was there"
            time.sleep(0.01)
    finally:
        process.kill()
        assert process.wait() == -signal.SIGKILL


@pytest.fixture(scope="module")
def script():
    """The script as a module, for its functions."""
    spec = importlib.util.spec_from_file_location("train_demo_model", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def canvases(script):
    """The module that composes training pictures."""
    return sys.modules["demo_training.canvases"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """The folder of an undisturbed smoke run."""
    out = tmp_path_factory.mktemp("undisturbed") / "out"
    done = run("--smoke", "--out", out)
    assert done.returncode == 0, done.stderr
    return out


@pytest.fixture(scope="module")
def grown(finished, tmp_path_factory) -> Path:
    """The folder of an undisturbed run that grew from the smoke run's model, on composed canvases."""
    out = tmp_path_factory.mktemp("grown") / "out"
    done = run("--preset", "smoke-grown", "--grow-from", finished / "model", "--out", out, "--count", 2)
    assert done.returncode == 0, done.stderr
    return out


def test_smoke_run_exports_a_pipeline_that_draws(finished):
    from diffusers import AutoencoderTiny, PNDMScheduler, StableDiffusionPipeline

    files = {str(path.relative_to(finished / "model")) for path in (finished / "model").rglob("*") if path.is_file()}
    assert files >= {
        "model_index.json",
        "scheduler/scheduler_config.json",
        "text_encoder/config.json",
        "text_encoder/model.safetensors",
        "tokenizer/merges.txt",
        "tokenizer/tokenizer_config.json",
        "tokenizer/vocab.json",
        "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors",
        "vae/config.json",
        "vae/diffusion_pytorch_model.safetensors",
    }
    for file in files:
        if file.endswith(".safetensors"):
            assert {tensor.dtype for tensor in load_file(finished / "model" / file).values()} == {torch.float16}

    names = load_file(finished / "model" / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in names)  # or transformers 4 starts from random weights

    pipeline = StableDiffusionPipeline.from_pretrained(finished / "model", safety_checker=None).to(torch.float32)
    assert isinstance(pipeline.vae, AutoencoderTiny)
    assert isinstance(pipeline.scheduler, PNDMScheduler)
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline(
        "a high quality photograph of a lemon.",
        num_inference_steps=3,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
    ).images[0]
    assert image.shape == (64, 64, 3)
    assert np.isfinite(image).all()
    assert image.std() > 0.01


def test_words_of_the_names_are_single_tokens(finished):
    from transformers import CLIPTokenizer

    tokenizer = CLIPTokenizer.from_pretrained(finished / "model" / "tokenizer")
    row = tokenizer("A high quality photograph of a basketball.", padding="max_length").input_ids
    assert len(row) == 77
    words = [token for token in tokenizer.convert_ids_to_tokens(row) if not token.startswith("<|")]
    assert [word.removesuffix("</w>") for word in words] == "a high quality photograph of a basketball .".split()


def test_pictures_grids_and_contact_sheet_are_left_to_look_at(finished):
    index = json.loads((finished / "data" / "index.json").read_text())
    assert sorted(row["name"] for row in index) == ["basketball", "door", "lemon", "tent"]
    for path in ("autoencoder/grids/step_000040.png", "unet/grids/step_000060.png", "samples.png"):
        assert (finished / path).read_bytes().startswith(b"\x89PNG")
    assert not list(finished.rglob("checkpoint.safetensors")), "a finished stage keeps no checkpoint"
    assert not list(finished.rglob("*.part"))


def test_a_killed_run_goes_on_to_the_same_weights(finished, tmp_path):
    out = tmp_path / "out"
    everything = ("--smoke", "--out", out, "--checkpoint-seconds", 0)
    kill_at(out / "autoencoder" / "checkpoint.safetensors", *everything)
    assert not (out / "autoencoder" / "weights.safetensors").exists()
    # In the second phase of the UNet, whose start replaces weights and optimiser: after the grid of step 30.
    kill_at(out / "unet" / "grids" / "step_000030.png", *everything)
    assert not (out / "unet" / "weights.safetensors").exists()
    done = run(*everything)
    assert done.returncode == 0, done.stderr
    assert "data: already done" in done.stdout
    assert "autoencoder: already done" in done.stdout

    for stage in ("autoencoder", "unet"):
        resumed = load_file(out / stage / "weights.safetensors")
        undisturbed = load_file(finished / stage / "weights.safetensors")
        assert resumed.keys() == undisturbed.keys()
        for key, value in undisturbed.items():
            assert torch.equal(resumed[key], value), f"{stage}: {key}"


def test_an_interrupted_run_says_so_and_keeps_its_steps(tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        command("autoencoder", "--smoke", "--out", prepared_data(out), "--checkpoint-seconds", 0),
        env=ENVIRONMENT,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (out / "autoencoder" / "checkpoint.safetensors").exists():
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 130
    assert "the same command goes on from here" in errors
    assert (out / "autoencoder" / "checkpoint.safetensors").exists()


def prepared_data(out: Path) -> Path:
    assert run("data", "--smoke", "--out", out).returncode == 0
    return out


def fails_with(status: subprocess.CompletedProcess[str]) -> str:
    """The one sentence that a refused command ends with."""
    assert status.returncode == 2, status.stderr
    assert "Traceback" not in status.stderr
    return status.stderr.strip().splitlines()[-1]


def test_other_settings_are_refused(finished):
    sentence = fails_with(run("unet", "--smoke", "--out", finished, "--seed", 1))
    assert "another seed (0, not 1)" in sentence


def test_without_npm_and_icons_it_names_the_packages(tmp_path):
    sentence = fails_with(run("data", "--out", tmp_path / "out", PATH=str(tmp_path)))
    assert "npm is not installed" in sentence
    assert "@iconify-json/noto" in sentence
    assert "--icons" in sentence


def test_unknown_preset_names_the_known_ones(tmp_path):
    sentence = fails_with(run("--preset", "huge", "--out", tmp_path / "out"))
    assert "first" in sentence
    assert "smoke" in sentence


def test_a_folder_that_cannot_be_written_is_refused(script, tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    assert script.main(["data", "--smoke", "--out", str(file / "out")]) == 2
    assert f"--out {file / 'out'} cannot be written to" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["unet"], "run the stage autoencoder"),
        (["autoencoder"], "run the stage data"),
        (["export"], "run the stage unet"),
        (["samples"], "run the stage export"),
        (["data", "--icons", "absent.tgz"], "absent.tgz is not a file"),
        (["data", "--device", "toaster"], "--device toaster is not available"),
        (["samples", "--count", "0"], "at least 1"),
    ],
)
def test_what_cannot_work_is_said_in_a_sentence(script, tmp_path, capsys, arguments, sentence):
    assert script.main([*arguments, "--smoke", "--out", str(tmp_path / "out")]) == 2
    assert sentence in capsys.readouterr().err


def icon_set(**icons: dict) -> dict:
    return {"prefix": "noto", "icons": icons, "width": 8, "height": 8}


def test_icon_files_that_do_not_fit_are_refused(script, tmp_path, capsys):
    broken = tmp_path / "broken.tgz"
    broken.write_bytes(b"no archive")
    assert script.main(["data", "--smoke", "--out", str(tmp_path / "out"), "--icons", str(broken)]) == 2
    assert "neither an npm package" in capsys.readouterr().err

    lemon_only = tmp_path / "icons.json"
    lemon_only.write_text(json.dumps(icon_set(lemon={"body": "<path/>"})))
    assert script.main(["data", "--smoke", "--out", str(tmp_path / "out2"), "--icons", str(lemon_only)]) == 2
    assert "no icon named 'basketball'" in capsys.readouterr().err
    assert script.main(["data", "--out", str(tmp_path / "out3"), "--icons", str(lemon_only)]) == 2
    assert "also needs @iconify-json/fluent-emoji" in capsys.readouterr().err


def test_icons_are_read_from_npm_packages_without_variants(script, tmp_path):
    icons = {
        "hot-dog": {"body": "<a/>", "width": 9},
        "astronaut": {"body": "<b/>"},
        "astronaut-medium-dark": {"body": "<c/>"},
        "astronaut-dark-skin-tone": {"body": "<d/>"},
        "traffic-light": {"body": "<e/>"},
        "old": {"body": "<f/>", "hidden": True},
    }
    source = tmp_path / "icons.json"
    source.write_text(json.dumps(icon_set(**icons)))
    with tarfile.open(tmp_path / "noto.tgz", "w:gz") as archive:
        archive.add(source, "package/icons.json")

    read = script.icons_by_caption(script.read_icon_set(tmp_path / "noto.tgz"))
    assert sorted(read) == ["astronaut", "hot dog", "traffic light"]
    assert 'viewBox="0 0 9 8"><a/></svg>' in read["hot dog"]


def test_icons_are_rasterised_centred_in_their_own_proportions(script):
    pytest.importorskip("resvg_py")
    svg = script.icons_by_caption(icon_set(bar={"body": '<path fill="#f00" d="M0 0h4v8H0z"/>', "width": 4}))["bar"]
    picture = script.compose_picture(script.rasterise(svg, 100), 50)
    pixels = np.asarray(picture)
    assert pixels.shape == (50, 50, 3)
    assert tuple(pixels[25, 25]) == (255, 0, 0)
    assert tuple(pixels[25, 5]) == tuple(pixels[25, 44]) == (255, 255, 255)
    assert tuple(pixels[0, 25]) == (255, 255, 255), "the margin"


def test_vocabulary_keeps_every_word_whole(script):
    words = ["ball", "basketball", "banana", "pineapple", "apple", "a", "an"]
    vocabulary, merges = script.build_vocabulary(words)
    ranks = {pair: number for number, pair in enumerate(merges)}
    for word in words:
        assert script.split_word(word, ranks) == [word + "</w>"]
        assert word + "</w>" in vocabulary
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert set(script.split_word("xyz", ranks)) <= vocabulary.keys()


def test_first_preset_is_the_published_model(script):
    assert len(script.CLEAR_NAMES) == len(set(script.CLEAR_NAMES)) == 121
    assert len(set(script.CLEAR_NAMES + script.OTHER_NAMES)) == 178
    preset = script.PRESETS["first"]
    names = {name for phase in preset.phases for name in phase.names}
    vocabulary, _ = script.build_vocabulary([*script.EXTRA_WORDS, *(w for name in names for w in name.split())])
    assert len(vocabulary) == 1290
    assert sum(p.numel() for p in script.build_unet(preset).parameters()) == 9_525_412
    assert sum(p.numel() for p in script.build_autoencoder(preset).parameters()) == 1_003_495


def test_learning_rate_warms_up_and_ends_near_zero(script):
    rates = [script.learning_rate(step, 100, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 1e-3


def test_loss_weight_is_the_clamped_inverse_root_of_the_signal_to_noise_ratio(script):
    alphas = torch.tensor([0.9999, 0.5, 0.2, 0.0001])  # SNR = ᾱ / (1 - ᾱ): 9999, 1, 1/4, 1/9999
    assert torch.allclose(script.loss_weight(alphas), torch.tensor([0.15, 1.0, 2.0, 6.0]))


# ---------------------------------------------------------------------------------------------- composed canvases

NAMES = ("zebra", "teapot", "lemon", "tent")
ICONS = [(name, style) for style in ("fluent-emoji", "noto") for name in NAMES]


def plans(canvases, recipe, count: int = 300, size: int = 96):
    return [canvases.plan_canvas(recipe, ICONS, number % len(ICONS), size, seed=number) for number in range(count)]


def red_square(name: str, style: str) -> Image.Image:
    return Image.new("RGBA", (40, 40), "#c00000")


def is_red(pixels: np.ndarray) -> np.ndarray:
    return pixels[..., 0].astype(int) - pixels[..., 1] > 60


def full_recipe(script):
    return script.PRESETS["full"].canvases


def test_a_canvas_depends_on_its_seed_alone(script, canvases):
    recipe = full_recipe(script)
    first, second = plans(canvases, recipe), plans(canvases, recipe)
    assert first == second
    assert len(set(first)) == len(first)
    drawn = [canvases.draw_canvas(plan, red_square, 96).tobytes() for plan in first[:20]]
    assert drawn == [canvases.draw_canvas(plan, red_square, 96).tobytes() for plan in second[:20]]


@pytest.mark.parametrize("preset", ["cpu", "full", "smoke-grown"])
def test_objects_stay_inside_and_do_not_cover_each_other(script, canvases, preset):
    size = 96
    for plan in plans(canvases, script.PRESETS[preset].canvases):
        for placed in plan.objects:
            for centre in (placed.x, placed.y):
                assert placed.reach - 1e-6 <= centre <= size - placed.reach + 1e-6
        for number, one in enumerate(plan.objects):
            for other in plan.objects[:number]:
                apart = max(abs(one.x - other.x), abs(one.y - other.y))
                assert apart >= one.reach + other.reach - 1e-6


def test_objects_are_drawn_where_the_plan_says(script, canvases):
    for plan in plans(canvases, full_recipe(script), count=60, size=256):
        red = is_red(np.asarray(canvases.draw_canvas(plan, red_square, 256)))
        assert red.sum() == pytest.approx(sum(placed.side**2 for placed in plan.objects), rel=0.1)
        for placed in plan.objects:
            assert red[int(placed.y), int(placed.x)]


def test_the_cpu_preset_shows_one_large_object_near_the_middle(script, canvases):
    found = plans(canvases, script.PRESETS["cpu"].canvases, size=512)
    assert {plan.kind for plan in found} == {"one"}
    objects = [plan.objects[0] for plan in found]
    assert all(52 * 8 <= placed.side <= 58 * 8 for placed in objects)
    assert all(abs(centre - 256) <= 24 for placed in objects for centre in (placed.x, placed.y))
    assert 100 < sum(placed.mirrored for placed in objects) < 200
    assert 100 < sum(plan.background.kind == "plain" for plan in found) < 200
    assert {plan.background.kind for plan in found} == {"plain", *canvases.BACKGROUNDS}
    assert any(plan.background.colours[0] == (1, 1, 1) for plan in found if plan.background.kind == "plain")


def test_backgrounds_are_light_and_of_little_contrast(script, canvases):
    kinds = set()
    for plan in plans(canvases, full_recipe(script), count=100, size=512):
        pixels = np.asarray(canvases.draw_background(plan.background, 512))
        assert pixels.shape == (512, 512, 3)
        assert pixels.min() >= 0.72 * 255
        contrast = pixels.reshape(-1, 3).max(0).astype(int) - pixels.reshape(-1, 3).min(0)
        kinds.add(plan.background.kind)
        if plan.background.kind == "plain":
            assert not contrast.any()
        else:
            assert contrast.min() >= 5
            assert contrast.max() <= 32
            assert 32 <= plan.background.period <= 80
    assert kinds == {"plain", *canvases.BACKGROUNDS}


@pytest.mark.parametrize(("kind", "down", "right"), [("stripes", 0, 40), ("checks", 40, 40), ("dots", 40, 0)])
def test_patterns_repeat_with_their_period(canvases, kind, down, right):
    colours = ((1.0, 1.0, 1.0), (0.9, 0.9, 0.9))
    ground = canvases.Background(kind, colours, period=40.0, phase=(3.0, 11.0), angle=0.0)
    pixels = np.asarray(canvases.draw_background(ground, 160)).astype(int)
    assert abs(pixels[down:, right:] - pixels[: 160 - down, : 160 - right]).max() <= 1
    assert abs(pixels[:, 20:] - pixels[:, :-20]).max() > 10, "not with half of it"


def test_held_out_placements_never_occur(script, canvases):
    recipe, size = full_recipe(script), 96
    cells = [(row, column) for row in range(recipe.cells) for column in range(recipe.cells)]
    held_out = {(name, cell) for name in NAMES for cell in cells if canvases.is_held_out(recipe, name, cell)}
    assert 0.1 < len(held_out) / (len(NAMES) * len(cells)) < 0.3
    assert not any(canvases.is_held_out(recipe, name, (2, 2)) for name in script.CLEAR_NAMES)
    seen = set()
    for plan in plans(canvases, recipe, count=1500):
        if plan.kind == "repeat":
            assert not canvases.is_held_out(recipe, plan.objects[0].name, canvases.REPEATED)
        else:
            seen |= {(placed.name, canvases.cell_of(recipe, placed.x, placed.y, size)) for placed in plan.objects}
    assert not seen & held_out
    assert len(seen) > 60, "the other cells are used"

    never = [name for name in script.CLEAR_NAMES if canvases.is_held_out(recipe, name, canvases.REPEATED)]
    assert 10 < len(never) < 40
    for seed in range(20):
        plan = canvases.plan_canvas(recipe, [(never[0], "noto")], 0, size, seed, kind="repeat")
        assert plan.kind == "one"


def test_captions_name_what_is_drawn(script, canvases):
    recipe = full_recipe(script)
    found = plans(canvases, recipe, count=600)
    shares = {kind: sum(plan.kind == kind for plan in found) / len(found) for kind in ("one", "group", "repeat")}
    assert shares["group"] == pytest.approx(0.25, abs=0.07)
    assert shares["repeat"] == pytest.approx(0.12, abs=0.07)  # some names are held out from it
    assert {len(plan.objects) for plan in found if plan.kind == "group"} == {2, 3}
    for plan in found:
        captions = canvases.captions_of(plan, recipe)
        assert sum(chance for _, chance in captions) == pytest.approx(1)
        assert captions[-1][0] == ""
        named = {name for name in NAMES if name in captions[0][0]}
        assert named == {placed.name for placed in plan.objects}
        assert len({placed.style for placed in plan.objects}) == 1
        word = {"fluent-emoji": "3d", "noto": "flat"}[plan.objects[0].style]
        assert any(text.endswith(f", {word} style") for text, _ in captions)
        if plan.kind == "repeat":
            assert captions[0][0] == f"a pattern of {plan.objects[0].name}"
            assert len({(placed.side, placed.angle, placed.mirrored) for placed in plan.objects}) == 1
            assert len(plan.objects) in (4, 9, 16)


def test_captions_are_worded_as_documented(script, canvases):
    def texts(recipe, *names):
        objects = tuple(canvases.Placed(name, "noto", 1, 1, 1, 0, False) for name in names)
        ground = canvases.Background("plain", ((1, 1, 1), (1, 1, 1)), 1, (0, 0), 0)
        return [text for text, _ in canvases.captions_of(canvases.Canvas("one", objects, ground), recipe)]

    plain, styled = script.PRESETS["cpu"].canvases, full_recipe(script)
    assert texts(plain, "zebra") == ["a zebra", "a high quality photograph of a zebra.", "zebra", ""]
    assert texts(plain, "zebra") == [form.format("zebra") for form, _ in script.CAPTIONS]
    assert texts(styled, "zebra")[2] == "zebra, flat style"
    assert texts(plain, "zebra", "teapot")[0] == "a zebra and a teapot"
    assert texts(plain, "zebra", "teapot", "lemon")[0] == "a zebra, a teapot and a lemon"


# ------------------------------------------------------------------------------------------- growing and its format


def test_growing_copies_what_agrees_and_starts_as_the_smaller_network(script):
    small = script.build_unet(script.PRESETS["smoke"])
    for parameter in small.parameters():  # biases start at zero, where a copy could not be told from a fresh one
        torch.nn.init.normal_(parameter, std=0.05)
    large = script.build_unet(script.replace(script.PRESETS["smoke-grown"], unet_attends_at_top_only=None))
    fresh = script.grow(large, small.state_dict(), old_levels=2)
    assert all(key.startswith(("down_blocks.0.", "up_blocks.2.", "up_blocks.1.upsamplers")) for key in fresh)

    state, old = large.state_dict(), small.state_dict()
    assert torch.equal(state["down_blocks.2.resnets.0.conv1.weight"], old["down_blocks.1.resnets.0.conv1.weight"])
    assert torch.equal(state["up_blocks.1.resnets.1.conv1.weight"], old["up_blocks.1.resnets.1.conv1.weight"])
    assert {sys.modules["demo_training.growing"].old_name(key, 2) for key in state.keys() - fresh} == old.keys(), (
        "nothing is lost"
    )

    # From conv_in's features to conv_norm_out's: the smaller network on their 2 × 2 means, its output enlarged.
    seen = {}

    def watch(network, name: str) -> None:
        network.conv_in.register_forward_hook(lambda module, args, out: seen.update({f"{name} in": out}))
        network.conv_norm_out.register_forward_pre_hook(lambda module, args: seen.update({f"{name} out": args[0]}))

    watch(small, "small")
    watch(large, "large")
    sample, text, timestep = torch.randn(1, 4, 16, 16), torch.randn(1, 3, 32), torch.tensor([500])
    with torch.no_grad():
        large(sample, timestep, text)
        means = torch.nn.functional.avg_pool2d(seen["large in"], 2)
        small.conv_in.register_forward_hook(lambda module, args, out: means)
        small(sample[..., ::2, ::2], timestep, text)
    enlarged = seen["small out"].repeat_interleave(2, -1).repeat_interleave(2, -2)
    assert torch.allclose(seen["large out"], enlarged, atol=1e-4)


def test_growing_to_text_only_levels_starts_them_silent(script):
    small = script.build_unet(script.PRESETS["smoke"])
    large = script.build_unet(script.PRESETS["smoke-grown"])
    fresh = script.grow(large, small.state_dict(), old_levels=2)
    crossing = [m for name, m in large.named_modules() if name.endswith("attn1") and m.is_cross_attention]
    assert len(crossing) == 6  # per lower level one on the way down and two on the way up
    assert not any(m.to_out[0].weight.any() or m.to_out[0].bias.any() for m in crossing)
    assert "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k.weight" in fresh
    assert "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight" not in fresh

    with pytest.raises(ValueError, match="3 levels grows to 4, not 3"):
        script.grow(large, small.state_dict(), old_levels=3)


@pytest.mark.parametrize("preset", ["cpu", "full", "smoke-grown"])
def test_the_only_self_attention_is_at_full_resolution(script, preset):
    preset = script.PRESETS[preset]
    unet = script.build_unet(preset)
    tops = ("down_blocks.0.", f"up_blocks.{len(preset.unet_channels) - 1}.")
    own = {name for name, m in unet.named_modules() if name.endswith("attn1") and not m.is_cross_attention}
    assert len(own) == 3
    assert all(name.startswith(tops) for name in own)
    if preset.image_size == 512:
        for name, module in unet.named_modules():
            if name.endswith(("attn1", "attn2")):
                assert 32 <= module.to_q.out_features // module.heads <= 64
    # The config says it all: nothing is done to the model after its constructor.
    again = type(unet).from_config(unet.config)
    assert {key: value.shape for key, value in again.state_dict().items()} == {
        key: value.shape for key, value in unet.state_dict().items()
    }


@pytest.mark.parametrize("preset", ["cpu", "full"])
def test_weights_fit_into_32_megabytes(script, preset, tmp_path):
    preset = script.PRESETS[preset]
    assert preset.image_size // 8 == 64
    words = [f"{a}{b}x{c}" for a in "abcdefghij" for b in "klmnopqrst" for c in "abcdefghijklmnopqrst"]
    tokenizer = script.build_tokenizer(argparse.Namespace(grow_from=None, preset=preset), words, tmp_path)
    assert len(tokenizer) > 2000  # about as many words as the names of both sets have
    models = script.build_unet(preset), script.build_autoencoder(preset), script.build_text_encoder(preset, tokenizer)
    assert sum(2 * p.numel() for model in models for p in model.parameters()) <= 32e6


def test_a_subset_of_all_keys_is_plain_attention(script):
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    torch.manual_seed(0)
    layer = Attention(query_dim=16, heads=2, dim_head=8)
    tokens = torch.randn(2, 64, 16)
    layer.set_processor(AttnProcessor2_0())
    expected = layer(tokens)
    subset = script.SubsetAttnProcessor()
    layer.set_processor(subset)
    assert torch.allclose(layer(tokens), expected, atol=1e-6)

    subset.chosen = script.one_per_cell(8, 2, torch.Generator().manual_seed(1))
    assert layer(tokens).shape == tokens.shape
    assert not torch.allclose(layer(tokens), expected, atol=1e-4)
    assert len(subset.chosen) == 16
    rows, columns = subset.chosen // 8, subset.chosen % 8
    assert set(zip((rows // 2).tolist(), (columns // 2).tolist())) == {(r, c) for r in range(4) for c in range(4)}
    assert not torch.equal(script.one_per_cell(8, 2, torch.Generator().manual_seed(2)), subset.chosen)


@pytest.mark.parametrize("heads", [1, 2])
def test_sharpened_attention_averages_tokens_that_look_alike(script, heads):
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    layer = Attention(query_dim=16, heads=heads, dim_head=16 // heads)
    four_kinds = torch.randn(2, 4, 16).repeat_interleave(32, dim=1)
    tokens = torch.nn.functional.layer_norm(four_kinds + 0.5 * torch.randn_like(four_kinds), (16,))
    script.sharpen(layer, tokens, share=1 / 4)
    means = tokens.unflatten(1, (4, 32)).mean(dim=2, keepdim=True).expand(-1, -1, 32, -1).flatten(1, 2)
    averaged = layer(tokens) / 2  # it is given out twofold
    to_own, to_mean = averaged - means, averaged - tokens.mean(dim=1, keepdim=True)
    assert to_own.square().mean() < 0.3 * to_mean.square().mean()
    assert to_own.square().mean() < (tokens - means).square().mean()  # the noise is averaged out


@pytest.mark.parametrize("share", [1 / 16, 1 / 4, 3 / 4])
def test_sharpened_attention_has_the_share_asked_for(script, share):
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    layer = Attention(query_dim=16, heads=2, dim_head=8)
    tokens = torch.nn.functional.layer_norm(torch.randn(2, 256, 16), (16,))
    script.sharpen(layer, tokens, share)
    query, key = (p(tokens).unflatten(-1, (2, 8)).transpose(1, 2) for p in (layer.to_q, layer.to_k))
    weights = (query @ key.mT * layer.scale).softmax(dim=-1)
    effective = torch.exp(-(weights * weights.clamp_min(1e-30).log()).sum(dim=-1))
    assert effective.median().item() / 256 == pytest.approx(share, rel=0.1)


def test_sharpening_needs_as_many_inner_channels_as_outer(script):
    from diffusers.models.attention_processor import Attention

    with pytest.raises(ValueError, match="not .16, 16."):
        script.sharpen(Attention(query_dim=16, heads=2, dim_head=4), torch.randn(1, 64, 16), 0.1)


# ------------------------------------------------------------------------------------- a grown model from end to end


def test_a_grown_model_draws_and_keeps_what_it_came_from(finished, grown):
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline.from_pretrained(grown / "model", safety_checker=None).to(torch.float32)
    assert list(pipeline.unet.config.block_out_channels) == [16, 16, 32]
    assert list(pipeline.unet.config.only_cross_attention) == [False, True, True]
    pipeline.set_progress_bar_config(disable=True)
    image = pipeline("a lemon", num_inference_steps=2, output_type="np").images[0]
    assert image.shape == (64, 64, 3)
    assert np.isfinite(image).all()

    for file in ("vae/diffusion_pytorch_model.safetensors", "tokenizer/vocab.json", "tokenizer/merges.txt"):
        assert (grown / "model" / file).read_bytes() == (finished / "model" / file).read_bytes()
    # The text encoder is trained on from where it was, not from random weights.
    before, after = (load_file(folder / "model" / "text_encoder" / "model.safetensors") for folder in (finished, grown))
    key = "text_model.embeddings.token_embedding.weight"
    assert 0 < (after[key].float() - before[key].float()).abs().max() < 0.2
    # Its last phase sharpens the self-attention, one projection for queries and keys, and trains only the others.
    layers = [m for name, m in pipeline.unet.named_modules() if name.endswith("attn1") and not m.is_cross_attention]
    assert len(layers) == 3
    for layer in layers:
        assert torch.equal(layer.to_q.weight, layer.to_k.weight)
        assert 0 < (layer.to_v.weight - torch.eye(16)).abs().max() < 0.2
    assert (grown / "unet" / "grids" / "step_000018.png").exists()
    assert (grown / "samples.png").exists()


def test_a_killed_pool_and_training_go_on_to_the_same_bytes(finished, grown, tmp_path):
    out = tmp_path / "out"
    everything = ("--preset", "smoke-grown", "--grow-from", finished / "model", "--out", out, "--count", 2)
    everything += ("--checkpoint-seconds", 0)
    kill_at(out / "pool" / "000000.safetensors", *everything)
    assert not (out / "pool" / "000128.safetensors").exists()
    kill_at(out / "unet" / "grids" / "step_000012.png", *everything)
    assert not (out / "unet" / "weights.safetensors").exists()
    done = run(*everything)
    assert done.returncode == 0, done.stderr
    files = sorted(path.name for path in (grown / "pool").glob("*.safetensors"))
    assert files == ["000000.safetensors", "000128.safetensors"]
    for file in (*(f"pool/{name}" for name in files), "unet/weights.safetensors"):
        assert (out / file).read_bytes() == (grown / file).read_bytes(), file


def test_growing_needs_a_model_that_fits(script, finished, tmp_path, capsys):
    def refused(*arguments: object) -> str:
        assert script.main([*map(str, arguments), "--out", str(tmp_path / "out")]) == 2
        return capsys.readouterr().err

    assert "give its folder with --grow-from" in refused("data", "--preset", "smoke-grown")
    assert f"({tmp_path} is none)" in refused("data", "--preset", "smoke-grown", "--grow-from", tmp_path)
    assert "starts from random weights" in refused("data", "--smoke", "--grow-from", finished / "model")
    grow_from_demo = ("--preset", "smoke-grown", "--grow-from", DEMO_MODEL)
    assert script.main([*map(str, ("data", *grow_from_demo)), "--out", str(tmp_path / "out")]) == 0
    assert "of another format" in refused("autoencoder", *grow_from_demo)


def test_the_full_preset_sees_every_icon_of_both_sets(script, tmp_path):
    files = []
    for prefix, names in (("fluent-emoji", ["zebra", "tent"]), ("noto", ["zebra", "lemon", "one-way"])):
        icons = {name: {"body": '<path d="M0 0h4v8H0z"/>'} for name in names}
        files.append(tmp_path / f"{prefix}.json")
        files[-1].write_text(json.dumps(icon_set(**icons) | {"prefix": prefix}))
    run = script.make_run(script.parse_arguments(["data", "--preset", "full", "--out", str(tmp_path / "out")]))
    wanted = script.wanted_pictures(run.preset, script.icon_sources(run, files))
    assert wanted == [
        ("tent", "fluent-emoji"),
        ("zebra", "fluent-emoji"),
        ("lemon", "noto"),
        ("one way", "noto"),
        ("zebra", "noto"),
    ]


def test_the_full_preset_runs_at_toy_size(script, monkeypatch, tmp_path):
    pytest.importorskip("resvg_py")
    from transformers import CLIPTokenizer

    files = []
    for prefix in ("fluent-emoji", "noto"):
        icons = {name: {"body": '<path fill="#c00" d="M0 0h4v8H0z"/>'} for name in ("zebra", "hot-dog", "tent")}
        files.append(tmp_path / f"{prefix}.json")
        files[-1].write_text(json.dumps(icon_set(**icons) | {"prefix": prefix}))
    full = script.PRESETS["full"]
    toy = script.replace(
        script.PRESETS["smoke"],
        phases=tuple(script.replace(phase, steps=4) for phase in full.phases),
        canvases=full.canvases,
        unet_attends_at_top_only=True,
        autoencoder_steps=4,
        autoencoder_canvases=8,
        pool=12,
        grid_steps=4,
        grid_samples=1,
        sample_steps=1,
    )
    monkeypatch.setitem(script.PRESETS, "full", toy)
    out = tmp_path / "out"
    arguments = ["--preset", "full", "--out", out, "--device", "cpu", "--count", 1, "--icons", *files]
    assert script.main([*map(str, arguments)]) == 0
    assert len(json.loads((out / "data" / "index.json").read_text())) == 6
    tokenizer = CLIPTokenizer.from_pretrained(out / "model" / "tokenizer")
    words = tokenizer.convert_ids_to_tokens(tokenizer("a pattern of hot dog, flat style").input_ids)[1:-1]
    assert [word.removesuffix("</w>") for word in words] == "a pattern of hot dog , flat style".split()
