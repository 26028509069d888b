"""save_single_file: a pipeline of diffusers as one safetensors file in the layout of the original code.

Written from the names in CompVis' `ldm` (UNetModel, AutoencoderKL) and OpenAI's CLIP, so that loading it back through
diffusers' `from_single_file` is a round trip through two tables that know nothing of each other. For text encoders of
SD 1.x's kind (CLIP as transformers has it).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

_RESNET = {
    "norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "norm2": "out_layers.0",
    "conv2": "out_layers.3", "conv_shortcut": "skip_connection",
}  # fmt: skip
_UNET_ENDS = {
    "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2",
}  # fmt: skip
_VAE_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}


def save_single_file(pipe: Any, file: Path, **more: torch.Tensor) -> None:
    """Write all weights of a pipeline to one file; `more` are tensors beside them."""
    save_file(original_weights(pipe) | more, file)


def original_weights(pipe: Any) -> dict[str, torch.Tensor]:
    """The weights of a pipeline by their names in an original checkpoint."""
    layers = pipe.unet.config.layers_per_block
    weights = {
        f"model.diffusion_model.{_unet_name(name, layers, pipe.unet.up_blocks)}": tensor
        for name, tensor in pipe.unet.state_dict().items()
    }
    blocks = len(pipe.vae.config.block_out_channels)
    for name, tensor in pipe.vae.state_dict().items():
        original = _vae_name(name, blocks)
        linear = ".attn_1." in original and original.endswith("weight") and ".norm." not in original
        weights[f"first_stage_model.{original}"] = tensor[:, :, None, None] if linear else tensor
    for name, tensor in pipe.text_encoder.state_dict().items():
        inner = name.removeprefix("text_model.")
        weights[f"cond_stage_model.transformer.text_model.{inner}"] = tensor
    return {name: tensor.contiguous().clone() for name, tensor in weights.items()}


def _unet_name(name: str, layers: int, up_blocks: Any) -> str:
    for ours, theirs in _UNET_ENDS.items():
        if name.startswith(f"{ours}."):
            return theirs + name.removeprefix(ours)
    if found := re.fullmatch(r"down_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", name):
        block, kind, number, rest = int(found[1]), found[2], int(found[3]), found[4]
        place = f"input_blocks.{1 + block * (layers + 1) + number}"
    elif found := re.fullmatch(r"up_blocks\.(\d+)\.(resnets|attentions)\.(\d+)\.(.*)", name):
        block, kind, number, rest = int(found[1]), found[2], int(found[3]), found[4]
        place = f"output_blocks.{block * (layers + 1) + number}"
    elif found := re.fullmatch(r"mid_block\.(resnets|attentions)\.(\d+)\.(.*)", name):
        kind, number, rest = found[1], int(found[2]), found[3]
        return f"middle_block.1.{rest}" if kind == "attentions" else f"middle_block.{2 * number}.{_resnet(rest)}"
    elif found := re.fullmatch(r"down_blocks\.(\d+)\.downsamplers\.0\.conv\.(.*)", name):
        return f"input_blocks.{(int(found[1]) + 1) * (layers + 1)}.0.op.{found[2]}"
    elif found := re.fullmatch(r"up_blocks\.(\d+)\.upsamplers\.0\.conv\.(.*)", name):
        block = int(found[1])
        after = 2 if getattr(up_blocks[block], "attentions", None) else 1
        return f"output_blocks.{block * (layers + 1) + layers}.{after}.conv.{found[2]}"
    else:
        raise AssertionError(name)
    return f"{place}.0.{_resnet(rest)}" if kind == "resnets" else f"{place}.1.{rest}"


def _resnet(name: str) -> str:
    part, rest = name.split(".", 1)
    return f"{_RESNET[part]}.{rest}"


def _vae_name(name: str, blocks: int) -> str:
    name = name.replace("conv_norm_out.", "norm_out.").replace("conv_shortcut.", "nin_shortcut.")
    name = re.sub(r"encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.down.\1.block.", name)
    name = re.sub(r"encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"encoder.down.\1.downsample.", name)
    for kind, theirs in (("resnets", "block."), ("upsamplers.0", "upsample")):
        name = re.sub(
            rf"decoder\.up_blocks\.(\d+)\.{kind}\.",
            lambda found, theirs=theirs: f"decoder.up.{blocks - 1 - int(found[1])}.{theirs.rstrip('.')}.",
            name,
        )
    name = re.sub(r"mid_block\.resnets\.(\d+)\.", lambda found: f"mid.block_{int(found[1]) + 1}.", name)
    if "mid_block.attentions.0." in name:
        for ours, theirs in _VAE_ATTENTION.items():
            name = name.replace(f"mid_block.attentions.0.{ours}.", f"mid.attn_1.{theirs}.")
    return name
