"""The probe's network and noise schedule, and how it is put into a folder in diffusers' format."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from diffusers import DDPMPipeline, DDPMScheduler, UNet2DConditionModel
from torch import nn

from agentsd.files import write_atomically
from eval.denoising.judged import PATTERNS
from eval.denoising.patterns import CHANNELS, SIDE

TEXT_SIZE = 8
"""Size of the text embedding. Cross-attention is part of every block that has self-attention; it is given zeros."""


def make_unet(channels: tuple[int, int] = (40, 80), side: int = SIDE) -> UNet2DConditionModel:
    """A UNet of two levels with random weights, self-attention in three layers at full resolution and nowhere else.

    One head of 40 channels, the head_dim of Stable Diffusion 1.5. No block in the middle, so that convolutions see a
    neighbourhood and only attention sees the whole image.
    """
    return UNet2DConditionModel(
        sample_size=side,
        in_channels=CHANNELS,
        out_channels=CHANNELS,
        block_out_channels=channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        mid_block_type=None,
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        norm_num_groups=8,
        cross_attention_dim=TEXT_SIZE,
        attention_head_dim=1,  # the number of heads, as diffusers names it
    )


def make_scheduler() -> DDPMScheduler:
    """Stable Diffusion's noise schedule; the network predicts the noise."""
    return DDPMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False)


def export(unet: nn.Module, folder: Path, scale: float = 1.0) -> None:
    """Write unet/ and scheduler/ as a diffusers pipeline, and the scale of the patterns, each file atomically."""
    with tempfile.TemporaryDirectory() as name:
        DDPMPipeline(unet, make_scheduler()).save_pretrained(name)
        for file in sorted(Path(name).rglob("*")):
            if file.is_file():
                target = folder / file.relative_to(name)
                target.parent.mkdir(parents=True, exist_ok=True)
                write_atomically(target, file.read_bytes())
    write_atomically(folder / PATTERNS, json.dumps({"scale": scale}) + "\n")
