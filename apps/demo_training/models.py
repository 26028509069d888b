"""A preset's networks, with their first weights, and scheduler, as parts of a StableDiffusionPipeline."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from .presets import Preset
from .run import Run, UsageError

# diffusers and transformers take seconds to import: the functions that build their models import them.


def build_autoencoder(preset: Preset, scaling_factor: float = 1.0):
    """An AutoencoderTiny: images [B, 3, H, W] in -1 … 1 to latents [B, 4, H/8, W/8]."""
    from diffusers import AutoencoderTiny

    channels = (preset.autoencoder_channels,) * len(preset.autoencoder_encoder_blocks)
    return AutoencoderTiny(
        encoder_block_out_channels=channels,
        decoder_block_out_channels=channels,
        num_encoder_blocks=preset.autoencoder_encoder_blocks,
        num_decoder_blocks=preset.autoencoder_decoder_blocks,
        scaling_factor=scaling_factor,
    )


def build_unet(preset: Preset):
    """A UNet2DConditionModel with cross-attention at every level, and self-attention at every one or the first."""
    from diffusers import UNet2DConditionModel

    levels = len(preset.unet_channels)
    attention = {}
    if preset.unet_attends_at_top_only:
        # UNetMidBlock2DCrossAttn ignores mid_block_only_cross_attention: it always has self-attention.
        attention = {
            "only_cross_attention": (False,) + (True,) * (levels - 1),
            "mid_block_only_cross_attention": True,
            "mid_block_type": "UNetMidBlock2D",
        }
    return UNet2DConditionModel(
        sample_size=preset.image_size // 8,
        block_out_channels=preset.unet_channels,
        down_block_types=("CrossAttnDownBlock2D",) * levels,
        up_block_types=("CrossAttnUpBlock2D",) * levels,
        layers_per_block=1,
        # The number of heads, in spite of its name: as in Stable Diffusion's own configs.
        attention_head_dim=preset.unet_heads,
        cross_attention_dim=preset.text_width,
        norm_num_groups=preset.unet_groups,
        **attention,
    )


def build_text_encoder(preset: Preset, tokenizer):
    """A CLIPTextModel of the preset's size for that tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel

    return CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=preset.text_width,
            intermediate_size=preset.text_hidden,
            projection_dim=preset.text_width,
            num_hidden_layers=preset.text_layers,
            num_attention_heads=preset.text_heads,
            max_position_embeddings=77,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_scheduler():
    """The PNDM scheduler of Stable Diffusion 1.5."""
    from diffusers import PNDMScheduler

    return PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        skip_prk_steps=True,
        set_alpha_to_one=False,
        steps_offset=1,
    )


def build_pipeline(vae, text_encoder, tokenizer, unet):
    """The parts as a StableDiffusionPipeline without safety checker."""
    from diffusers import StableDiffusionPipeline

    pipeline = StableDiffusionPipeline(
        vae=vae,
        text_encoder=text_encoder,
        tokenizer=tokenizer,
        unet=unet,
        scheduler=build_scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def seed_initial_weights(run: Run, stage: str) -> None:
    """Seed the global generator, which the models' constructors draw their first weights from."""
    torch.manual_seed(run.generator(stage, "initial weights").initial_seed())


def take_over(model: nn.Module, path: Path) -> None:
    """Fill a whole model from a safetensors file.

    Raises:
        UsageError: the file is of a model of another format.
    """
    # The text encoder's names begin with "text_model." in files and, in newer transformers, not in the model.
    found = {key.removeprefix("text_model."): value for key, value in load_file(path).items()}
    own = model.state_dict()
    if {key.removeprefix("text_model."): value.shape for key, value in own.items()} != {
        key: value.shape for key, value in found.items()
    }:
        raise UsageError(f"{path} is of a model of another format than the preset's")
    model.load_state_dict({key: found[key.removeprefix("text_model.")] for key in own})
