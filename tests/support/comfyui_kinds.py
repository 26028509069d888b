"""Kinds of conditionings and models for comfyui_worker.py, tiny and with random weights, of ComfyUI's own classes.

Each kind takes the model's patcher, the positive and the negative conditioning and the noise, writes into the
conditionings, and returns the patcher to sample with.
"""

from __future__ import annotations

import comfy.cldm.cldm
import comfy.controlnet
import comfy.gligen
import comfy.hooks
import comfy.model_patcher
import comfy.t2i_adapter.adapter
import torch
from comfy_extras.nodes_context_windows import ContextWindowsManualNode

CPU = torch.device("cpu")
TEXT = 32
"""Channels of the text features of the tiny models."""


def fill(module, seed, scale=0.2):
    """Random weights; ComfyUI's classes leave them as the memory was."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
    return module


def _hint(size=128):
    return torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(1))


def t2i_adapter(patcher, positive, negative, noise):
    """One for two resnets a level, as SD 1.5 has."""
    adapter = comfy.t2i_adapter.adapter.Adapter(
        [32, 64], nums_rb=2, cin=192, ksize=1, sk=True, use_conv=False, xl=False
    )
    control = comfy.controlnet.T2IAdapter(fill(adapter, 2), 3, 8, "nearest-exact", device=CPU)
    positive[0][1]["control"] = control.set_cond_hint(_hint(), 1.0)
    return patcher


def control_lora(patcher, positive, negative, noise):
    """A ControlNet made of the model's own weights, with a LoRA on some, and zero convolutions of its own."""
    config = {**patcher.model.model_config.unet_config, "hint_channels": 3}
    del config["out_channels"]
    whole = fill(comfy.cldm.cldm.ControlNet(**config), 3, 0.1).state_dict()
    own = ("input_hint_block", "zero_convs", "middle_block_out")
    weights = {name: tensor for name, tensor in whole.items() if name.startswith(own)}
    generator = torch.Generator().manual_seed(4)
    for name, tensor in whole.items():
        if ".attn1.to_q" in name:
            base = name.removesuffix(".weight")
            weights[f"{base}.up"] = torch.randn(tensor.shape[0], 4, generator=generator) * 0.1
            weights[f"{base}.down"] = torch.randn(4, tensor.shape[1], generator=generator) * 0.1
    positive[0][1]["control"] = comfy.controlnet.ControlLora(weights).set_cond_hint(_hint(), 1.0)
    return patcher


def gligen(patcher, positive, negative, noise):
    """A text box in the left half of the image."""
    blocks = patcher.model.diffusion_model.modules()
    widths = [block.attn1.to_q.in_features for block in blocks if type(block).__name__ == "BasicTransformerBlock"]
    fusers = [comfy.gligen.GatedSelfAttentionDense(width, TEXT, 4, width // 4) for width in widths]
    model = comfy.gligen.Gligen(fusers, comfy.gligen.PositionNet(TEXT, TEXT), TEXT)
    grounding = comfy.model_patcher.ModelPatcher(fill(model, 5), CPU, CPU)
    box = (
        torch.randn(1, TEXT, generator=torch.Generator().manual_seed(6)),
        noise.shape[-2],
        noise.shape[-1] // 2,
        0,
        0,
    )
    positive[0][1]["gligen"] = ("position", grounding, [box])
    return patcher


def inpainting(patcher, positive, negative, noise):
    """Nine channels: the mask and the image to fill beside the latent."""
    mask = torch.zeros(1, 1, *noise.shape[-2:])
    mask[..., : noise.shape[-1] // 2] = 1
    image = torch.randn(noise.shape, generator=torch.Generator().manual_seed(7))
    for conditioning in (positive, negative):
        conditioning[0][1].update(concat_latent_image=image, concat_mask=mask)
    return patcher


def lora_hooks(patcher, positive, negative, noise):
    """A LoRA on the positive prompt alone, stronger in the second half of the run."""
    generator, file = torch.Generator().manual_seed(8), {}
    for name, tensor in patcher.model.diffusion_model.state_dict().items():
        if ".attn2.to_" in name and name.endswith("weight"):
            key = f"diffusion_model.{name.removesuffix('.weight')}"
            file[f"{key}.lora_up.weight"] = torch.randn(tensor.shape[0], 4, generator=generator) * 0.2
            file[f"{key}.lora_down.weight"] = torch.randn(4, tensor.shape[1], generator=generator) * 0.2
    hooks, frames = comfy.hooks.create_hook_lora(file, 1.0, 0.0), comfy.hooks.HookKeyframeGroup()
    frames.add(comfy.hooks.HookKeyframe(0.3, 0.0))
    frames.add(comfy.hooks.HookKeyframe(1.0, 0.5))
    hooks.set_keyframes_on_hooks(frames)
    positive[:] = comfy.hooks.set_hooks_for_conditioning(positive, hooks)
    return patcher


def context_windows(patcher, positive, negative, noise):
    """Eight rows of sixteen at a time, with four in common; a window of images fails in ComfyUI 0.3.75 itself."""
    return ContextWindowsManualNode.execute(patcher, 8, 4, "standard_static", 1, False, "pyramid", 2).args[0]


KINDS = {
    "T2I-Adapter": t2i_adapter,
    "ControlLoRA": control_lora,
    "GLIGEN": gligen,
    "inpainting": inpainting,
    "LoRA hooks": lora_hooks,
    "context windows": context_windows,
}
