"""The parts of the demo model's training: presets, vocabulary, training images, growing, sharpening."""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from demo_training.growing import grow, old_name
from demo_training.icons import Icon
from demo_training.images import compose_image, ground_colour, training_images
from demo_training.key_subset import SubsetAttnProcessor, one_per_cell
from demo_training.models import build_autoencoder, build_text_encoder, build_unet
from demo_training.presets import CLEAR_NAMES, OTHER_NAMES, PRESETS
from demo_training.run import Run
from demo_training.sharpening import calibrate, sharpen
from demo_training.tokenizer import EXTRA_WORDS, build_tokenizer, build_vocabulary, split_word
from demo_training.training import learning_rate
from demo_training.unet import loss_weight
from PIL import Image
from safetensors import safe_open

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


# --------------------------------------------------------------------------------------------------- training images


def test_an_icon_stands_centred_within_its_margin_on_its_ground():
    icon = Image.new("RGBA", (40, 40), "#c00000")
    pixels = np.asarray(compose_image(icon, 100, margin=0.07, ground=(250, 240, 230)))
    assert pixels.shape == (100, 100, 3)
    red = (pixels == (192, 0, 0)).all(-1)
    rows, columns = (np.flatnonzero(red.any(axis)) for axis in (1, 0))
    assert (rows[0], rows[-1], columns[0], columns[-1]) == (7, 92, 7, 92) and red.sum() == 86**2
    assert (pixels[~red] == (250, 240, 230)).all()
    assert compose_image(icon, 100, margin=0.04).getpixel((0, 0)) == (255, 255, 255)


def test_grounds_are_light_and_depend_on_the_seed_alone():
    # Recorded from the code that made the built-in model's images and eval's reference features.
    assert [ground_colour(seed) for seed in (0, 2, 3)] == [(255, 255, 255), (252, 234, 229), (234, 252, 240)]
    found = [ground_colour(seed) for seed in range(300)]
    assert found == [ground_colour(seed) for seed in range(300)]
    assert min(map(min, found)) >= 219 and 0.1 < found.count((255, 255, 255)) / 300 < 0.3
    assert len(set(found)) > 200


def test_training_images_take_turns_over_the_icons(tmp_path):
    icons = []
    for name, colour in (("lemon", "#f8e030"), ("tent", "#3070d0"), ("door", "#80502a")):
        (tmp_path / "data").mkdir(exist_ok=True)
        Image.new("RGBA", (8, 8), colour).save(tmp_path / "data" / f"{name}.png")
        icons.append(Icon(name, "drawn", f"{name}.png", ""))

    def images(preset, seed=0):
        options = dict(precision="fp32", device=torch.device("cpu"), compile=False, icons=(), grow_from=None)
        options |= dict(count=1, checkpoint_seconds=1.0, preset_name="toy", preset=preset, seed=seed, out=tmp_path)
        return training_images(Run(**options), icons)

    smoke = PRESETS["smoke"]
    white = images(smoke)
    assert white.shape == (3, 3, 64, 64) and white.dtype == torch.uint8 and (white[:, :, 0, 0] == 255).all()
    many = images(dataclasses.replace(smoke, grounds=4))
    assert many.shape == (12, 3, 64, 64)
    assert torch.equal(many[:3, :, 32, 32], white[:, :, 32, 32]), "in the icons' order"
    assert torch.equal(many[9:, :, 32, 32], white[:, :, 32, 32])
    assert len(many[:, :, 0, 0].unique(dim=0)) > 6, "on other grounds each time"
    assert not torch.equal(many, images(dataclasses.replace(smoke, grounds=4), seed=1))


# ------------------------------------------------------------------------------------------- growing and its format


def test_growing_copies_what_agrees_and_starts_as_the_smaller_network():
    small = build_unet(PRESETS["smoke"])
    for parameter in small.parameters():  # biases start at zero, where a copy could not be told from a fresh one
        torch.nn.init.normal_(parameter, std=0.05)
    large = build_unet(dataclasses.replace(PRESETS["smoke-grown"], unet_attends_at_top_only=False))
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


@pytest.mark.parametrize("preset", ["cpu", "smoke-grown"])
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


def test_weights_fit_into_32_megabytes(tmp_path):
    preset = PRESETS["cpu"]
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
