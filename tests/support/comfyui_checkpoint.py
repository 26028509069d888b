"""Writes a checkpoint with random weights when ComfyUI loads this file as a custom node, before the server starts.

ComfyUI accepts SD 1.5's widths only: the UNet has its 320 channels but one level, the text encoder passes its
embeddings through, and the autoencoder is a tiny one.
"""

from pathlib import Path

import comfy.ldm.modules.diffusionmodules.openaimodel
import comfy.ops
import comfy.taesd.taesd
import folder_paths
import torch
from safetensors.torch import save_file

NODE_CLASS_MAPPINGS = {}


def _random_unet():
    unet = comfy.ldm.modules.diffusionmodules.openaimodel.UNetModel(
        image_size=32,
        in_channels=4,
        out_channels=4,
        model_channels=320,
        num_res_blocks=[1],
        channel_mult=[1],
        num_heads=8,
        use_spatial_transformer=True,
        transformer_depth=[1],
        transformer_depth_output=[1, 1],
        transformer_depth_middle=1,
        context_dim=768,
        legacy=False,
        dtype=torch.float32,
        operations=comfy.ops.disable_weight_init,
    )
    _fill(unet, 1.0)
    weights = unet.state_dict()
    for name, tensor in weights.items():
        if ".attn1.to_" in name:  # random attention is nearly uniform: too weak to show a difference in an image
            tensor.mul_(3)
    return weights


@torch.no_grad()
def _fill(module, scale):
    """Fill weights with random numbers; ComfyUI's classes leave them as the memory was."""
    for name, parameter in module.named_parameters():
        if parameter.ndim > 1:
            parameter.normal_(std=scale * parameter[0].numel() ** -0.5)
        elif parameter.ndim == 1:
            parameter.fill_(name.endswith("weight"))


def _passing_text_encoder(channels=768):
    text = {
        "embeddings.token_embedding.weight": torch.randn(49408, channels, dtype=torch.float16),
        "embeddings.position_embedding.weight": torch.zeros(77, channels, dtype=torch.float16),
        "final_layer_norm.weight": torch.ones(channels, dtype=torch.float16),
        "final_layer_norm.bias": torch.zeros(channels, dtype=torch.float16),
    }
    shapes = {f"self_attn.{name}_proj": (channels, channels) for name in ("q", "k", "v", "out")}
    shapes |= {"mlp.fc1": (4 * channels, channels), "mlp.fc2": (channels, 4 * channels)}
    shapes |= {"layer_norm1": (channels,), "layer_norm2": (channels,)}
    for layer in range(12):
        for name, shape in shapes.items():
            text[f"encoder.layers.{layer}.{name}.weight"] = torch.zeros(*shape, dtype=torch.float16)
            text[f"encoder.layers.{layer}.{name}.bias"] = torch.zeros(shape[0], dtype=torch.float16)
    return text


def _write(path):
    torch.manual_seed(0)
    weights = {f"model.diffusion_model.{name}": tensor for name, tensor in _random_unet().items()}
    text = _passing_text_encoder()
    weights.update({f"cond_stage_model.transformer.text_model.{name}": tensor for name, tensor in text.items()})
    autoencoder = comfy.taesd.taesd.TAESD()
    _fill(autoencoder, 1.4)
    weights.update({f"first_stage_model.{name}": tensor for name, tensor in autoencoder.state_dict().items()})
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in weights.items()}, path)


_write(Path(folder_paths.models_dir) / "checkpoints" / "tiny.safetensors")
