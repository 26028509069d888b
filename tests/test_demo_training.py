"""The parts of the demo model's training: presets, vocabulary, composed canvases, growing, sharpening."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "apps"))

from demo_training import canvases  # noqa: E402
from demo_training.growing import grow, old_name  # noqa: E402
from demo_training.key_subset import SubsetAttnProcessor, one_per_cell  # noqa: E402
from demo_training.models import build_autoencoder, build_text_encoder, build_unet  # noqa: E402
from demo_training.presets import CLEAR_NAMES, OTHER_NAMES, PRESETS  # noqa: E402
from demo_training.sharpening import calibrate, sharpen  # noqa: E402
from demo_training.tokenizer import EXTRA_WORDS, build_tokenizer, build_vocabulary, split_word  # noqa: E402
from demo_training.training import learning_rate  # noqa: E402
from demo_training.unet import CAPTIONS, loss_weight  # noqa: E402

DEMO_MODEL = Path(__file__).resolve().parents[1] / "agentsd" / "demo_model"


def test_vocabulary_keeps_every_word_whole():
    words = ["ball", "basketball", "banana", "pineapple", "apple", "a", "an"]
    vocabulary, merges = build_vocabulary(words)
    ranks = {pair: number for number, pair in enumerate(merges)}
    for word in words:
        assert split_word(word, ranks) == [word + "</w>"]
        assert word + "</w>" in vocabulary
    assert sorted(vocabulary.values()) == list(range(len(vocabulary)))
    assert set(split_word("xyz", ranks)) <= vocabulary.keys()


def test_first_preset_is_the_model_that_the_built_in_one_grew_from():
    assert len(CLEAR_NAMES) == len(set(CLEAR_NAMES)) == 121
    assert len(set(CLEAR_NAMES + OTHER_NAMES)) == 178
    preset = PRESETS["first"]
    names = {name for phase in preset.phases for name in phase.names}
    vocabulary, _ = build_vocabulary([*EXTRA_WORDS, *(w for name in names for w in name.split())])
    assert len(vocabulary) == 1290
    assert sum(p.numel() for p in build_unet(preset).parameters()) == 9_525_412
    assert sum(p.numel() for p in build_autoencoder(preset).parameters()) == 1_003_495


def test_cpu_preset_is_the_built_in_model():
    unet = build_unet(PRESETS["cpu"])
    shapes = {key: list(value.shape) for key, value in unet.state_dict().items()}
    with safe_open(DEMO_MODEL / "unet" / "diffusion_pytorch_model.safetensors", "pt") as file:
        assert {key: file.get_slice(key).get_shape() for key in file.keys()} == shapes
    config = json.loads((DEMO_MODEL / "unet" / "config.json").read_text())
    assert config["sample_size"] == unet.config.sample_size == 64
    assert config["only_cross_attention"] == list(unet.config.only_cross_attention)


def test_learning_rate_warms_up_and_ends_near_zero():
    rates = [learning_rate(step, 100, 10) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert max(rates) == rates[9] == rates[10] == 1.0
    assert rates[10:] == sorted(rates[10:], reverse=True)
    assert 0 < rates[-1] < 1e-3


def test_loss_weight_is_the_clamped_inverse_root_of_the_signal_to_noise_ratio():
    alphas = torch.tensor([0.9999, 0.5, 0.2, 0.0001])  # SNR = ᾱ / (1 - ᾱ): 9999, 1, 1/4, 1/9999
    assert torch.allclose(loss_weight(alphas), torch.tensor([0.15, 1.0, 2.0, 6.0]))


# ---------------------------------------------------------------------------------------------- composed canvases

NAMES = ("zebra", "teapot", "lemon", "tent")
ICONS = [(name, style) for style in ("fluent-emoji", "noto") for name in NAMES]


def plans(recipe, count: int = 300, size: int = 96):
    return [canvases.plan_canvas(recipe, ICONS, number % len(ICONS), size, seed=number) for number in range(count)]


def red_square(name: str, style: str) -> Image.Image:
    return Image.new("RGBA", (40, 40), "#c00000")


def is_red(pixels: np.ndarray) -> np.ndarray:
    return pixels[..., 0].astype(int) - pixels[..., 1] > 60


def full_recipe():
    return PRESETS["full"].canvases


def test_a_canvas_depends_on_its_seed_alone():
    recipe = full_recipe()
    first, second = plans(recipe), plans(recipe)
    assert first == second
    assert len(set(first)) == len(first)
    drawn = [canvases.draw_canvas(plan, red_square, 96).tobytes() for plan in first[:20]]
    assert drawn == [canvases.draw_canvas(plan, red_square, 96).tobytes() for plan in second[:20]]


@pytest.mark.parametrize("preset", ["cpu", "full", "smoke-grown"])
def test_objects_stay_inside_and_do_not_cover_each_other(preset):
    size = 96
    for plan in plans(PRESETS[preset].canvases):
        for placed in plan.objects:
            for centre in (placed.x, placed.y):
                assert placed.reach - 1e-6 <= centre <= size - placed.reach + 1e-6
        for number, one in enumerate(plan.objects):
            for other in plan.objects[:number]:
                apart = max(abs(one.x - other.x), abs(one.y - other.y))
                assert apart >= one.reach + other.reach - 1e-6


def test_objects_are_drawn_where_the_plan_says():
    for plan in plans(full_recipe(), count=60, size=256):
        red = is_red(np.asarray(canvases.draw_canvas(plan, red_square, 256)))
        assert red.sum() == pytest.approx(sum(placed.side**2 for placed in plan.objects), rel=0.1)
        for placed in plan.objects:
            assert red[int(placed.y), int(placed.x)]


def test_the_cpu_preset_shows_one_large_object_in_the_middle_of_a_plain_ground():
    found = plans(PRESETS["cpu"].canvases, size=512)
    assert {plan.kind for plan in found} == {"one"}
    objects = [plan.objects[0] for plan in found]
    assert {round(placed.side) for placed in objects} == {440}
    assert {(placed.x, placed.y) for placed in objects} == {(256, 256)}
    assert not any(placed.mirrored for placed in objects)
    assert {plan.background.kind for plan in found} == {"plain"}
    assert len({plan.background.colours[0] for plan in found}) > 100


def test_backgrounds_are_light_and_of_little_contrast():
    kinds = set()
    for plan in plans(full_recipe(), count=100, size=512):
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
def test_patterns_repeat_with_their_period(kind, down, right):
    colours = ((1.0, 1.0, 1.0), (0.9, 0.9, 0.9))
    ground = canvases.Background(kind, colours, period=40.0, phase=(3.0, 11.0), angle=0.0)
    pixels = np.asarray(canvases.draw_background(ground, 160)).astype(int)
    assert abs(pixels[down:, right:] - pixels[: 160 - down, : 160 - right]).max() <= 1
    assert abs(pixels[:, 20:] - pixels[:, :-20]).max() > 10, "not with half of it"


def test_held_out_placements_never_occur():
    recipe, size = full_recipe(), 96
    cells = [(row, column) for row in range(recipe.cells) for column in range(recipe.cells)]
    held_out = {(name, cell) for name in NAMES for cell in cells if canvases.is_held_out(recipe, name, cell)}
    assert 0.1 < len(held_out) / (len(NAMES) * len(cells)) < 0.3
    assert not any(canvases.is_held_out(recipe, name, (2, 2)) for name in CLEAR_NAMES)
    seen = set()
    for plan in plans(recipe, count=1500):
        if plan.kind == "repeat":
            assert not canvases.is_held_out(recipe, plan.objects[0].name, canvases.REPEATED)
        else:
            seen |= {(placed.name, canvases.cell_of(recipe, placed.x, placed.y, size)) for placed in plan.objects}
    assert not seen & held_out
    assert len(seen) > 60, "the other cells are used"

    never = [name for name in CLEAR_NAMES if canvases.is_held_out(recipe, name, canvases.REPEATED)]
    assert 10 < len(never) < 40
    for seed in range(20):
        plan = canvases.plan_canvas(recipe, [(never[0], "noto")], 0, size, seed, kind="repeat")
        assert plan.kind == "one"


def test_captions_name_what_is_drawn():
    recipe = full_recipe()
    found = plans(recipe, count=600)
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


def test_captions_are_worded_as_documented():
    def texts(recipe, *names):
        objects = tuple(canvases.Placed(name, "noto", 1, 1, 1, 0, False) for name in names)
        ground = canvases.Background("plain", ((1, 1, 1), (1, 1, 1)), 1, (0, 0), 0)
        return [text for text, _ in canvases.captions_of(canvases.Canvas("one", objects, ground), recipe)]

    plain, styled = PRESETS["cpu"].canvases, full_recipe()
    assert texts(plain, "zebra") == ["a zebra", "a high quality photograph of a zebra.", "zebra", ""]
    assert texts(plain, "zebra") == [form.format("zebra") for form, _ in CAPTIONS]
    assert texts(styled, "zebra")[2] == "zebra, flat style"
    assert texts(plain, "zebra", "teapot")[0] == "a zebra and a teapot"
    assert texts(plain, "zebra", "teapot", "lemon")[0] == "a zebra, a teapot and a lemon"


# ------------------------------------------------------------------------------------------- growing and its format


def test_growing_copies_what_agrees_and_starts_as_the_smaller_network():
    small = build_unet(PRESETS["smoke"])
    for parameter in small.parameters():  # biases start at zero, where a copy could not be told from a fresh one
        torch.nn.init.normal_(parameter, std=0.05)
    large = build_unet(dataclasses.replace(PRESETS["smoke-grown"], unet_attends_at_top_only=None))
    fresh = grow(large, small.state_dict(), old_levels=2)
    assert all(key.startswith(("down_blocks.0.", "up_blocks.2.", "up_blocks.1.upsamplers")) for key in fresh)

    state, old = large.state_dict(), small.state_dict()
    assert torch.equal(state["down_blocks.2.resnets.0.conv1.weight"], old["down_blocks.1.resnets.0.conv1.weight"])
    assert torch.equal(state["up_blocks.1.resnets.1.conv1.weight"], old["up_blocks.1.resnets.1.conv1.weight"])
    assert {old_name(key, 2) for key in state.keys() - fresh} == old.keys(), "nothing is lost"

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


def test_growing_to_text_only_levels_starts_them_silent():
    small = build_unet(PRESETS["smoke"])
    large = build_unet(PRESETS["smoke-grown"])
    fresh = grow(large, small.state_dict(), old_levels=2)
    crossing = [m for name, m in large.named_modules() if name.endswith("attn1") and m.is_cross_attention]
    assert len(crossing) == 6  # per lower level one on the way down and two on the way up
    assert not any(m.to_out[0].weight.any() or m.to_out[0].bias.any() for m in crossing)
    assert "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_k.weight" in fresh
    assert "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q.weight" not in fresh

    with pytest.raises(ValueError, match="3 levels grows to 4, not 3"):
        grow(large, small.state_dict(), old_levels=3)


@pytest.mark.parametrize("preset", ["cpu", "full", "smoke-grown"])
def test_the_only_self_attention_is_at_full_resolution(preset):
    preset = PRESETS[preset]
    unet = build_unet(preset)
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
def test_weights_fit_into_32_megabytes(preset, tmp_path):
    preset = PRESETS[preset]
    assert preset.image_size // 8 == 64
    words = [f"{a}{b}x{c}" for a in "abcdefghij" for b in "klmnopqrst" for c in "abcdefghijklmnopqrst"]
    tokenizer = build_tokenizer(argparse.Namespace(grow_from=None, preset=preset), words, tmp_path)
    assert len(tokenizer) > 2000  # about as many words as the names of both sets have
    models = build_unet(preset), build_autoencoder(preset), build_text_encoder(preset, tokenizer)
    assert sum(2 * p.numel() for model in models for p in model.parameters()) <= 32e6


def test_a_subset_of_all_keys_is_plain_attention():
    from diffusers.models.attention_processor import Attention, AttnProcessor2_0

    torch.manual_seed(0)
    layer = Attention(query_dim=16, heads=2, dim_head=8)
    tokens = torch.randn(2, 64, 16)
    layer.set_processor(AttnProcessor2_0())
    expected = layer(tokens)
    subset = SubsetAttnProcessor()
    layer.set_processor(subset)
    assert torch.allclose(layer(tokens), expected, atol=1e-6)

    subset.chosen = one_per_cell(8, 2, torch.Generator().manual_seed(1))
    assert layer(tokens).shape == tokens.shape
    assert not torch.allclose(layer(tokens), expected, atol=1e-4)
    assert len(subset.chosen) == 16
    rows, columns = subset.chosen // 8, subset.chosen % 8
    assert set(zip((rows // 2).tolist(), (columns // 2).tolist())) == {(r, c) for r in range(4) for c in range(4)}
    assert not torch.equal(one_per_cell(8, 2, torch.Generator().manual_seed(2)), subset.chosen)


@pytest.mark.parametrize("heads", [1, 2])
def test_sharpened_attention_averages_tokens_that_look_alike(heads):
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    layer = Attention(query_dim=16, heads=heads, dim_head=16 // heads)
    four_kinds = torch.randn(2, 4, 16).repeat_interleave(32, dim=1)
    tokens = torch.nn.functional.layer_norm(four_kinds + 0.5 * torch.randn_like(four_kinds), (16,))
    sharpen(layer, tokens, share=1 / 4)
    means = tokens.unflatten(1, (4, 32)).mean(dim=2, keepdim=True).expand(-1, -1, 32, -1).flatten(1, 2)
    averaged = layer(tokens) / 2  # it is given out twofold
    to_own, to_mean = averaged - means, averaged - tokens.mean(dim=1, keepdim=True)
    assert to_own.square().mean() < 0.3 * to_mean.square().mean()
    assert to_own.square().mean() < (tokens - means).square().mean()  # the noise is averaged out


def share_of_keys(layer, tokens: torch.Tensor) -> float:
    """exp of the entropy of the median query's weights, over the number of keys, of an Attention with two heads."""
    query, key = (p(tokens).unflatten(-1, (2, -1)).transpose(1, 2) for p in (layer.to_q, layer.to_k))
    weights = (query @ key.mT * layer.scale).softmax(dim=-1)
    effective = torch.exp(-(weights * weights.clamp_min(1e-30).log()).sum(dim=-1))
    return effective.median().item() / tokens.shape[1]


@pytest.mark.parametrize("share", [1 / 16, 1 / 4, 3 / 4])
def test_sharpened_attention_has_the_share_asked_for_and_calibrated_again_after_a_change(share):
    from diffusers.models.attention_processor import Attention

    torch.manual_seed(0)
    layer = Attention(query_dim=16, heads=2, dim_head=8)
    tokens = torch.nn.functional.layer_norm(torch.randn(2, 256, 16), (16,))
    sharpen(layer, tokens, share)
    assert share_of_keys(layer, tokens) == pytest.approx(share, rel=0.1)

    kept = {key: value.clone() for key, value in layer.state_dict().items()}
    flatter = 0.5 * tokens + 0.1 * torch.randn_like(tokens)
    assert share_of_keys(layer, flatter) > 1.1 * share
    calibrate(layer, flatter, share)
    assert share_of_keys(layer, flatter) == pytest.approx(share, rel=0.1)
    scale = layer.to_q.weight.norm() / kept["to_q.weight"].norm()
    for key, value in layer.state_dict().items():
        torch.testing.assert_close(value, kept[key] * scale if key in ("to_q.weight", "to_k.weight") else kept[key])


def test_sharpening_needs_as_many_inner_channels_as_outer():
    from diffusers.models.attention_processor import Attention

    with pytest.raises(ValueError, match="not .16, 16."):
        sharpen(Attention(query_dim=16, heads=2, dim_head=4), torch.randn(1, 64, 16), 0.1)
