"""Models in ComfyUI's words: SD 1.5, SDXL and the demo network; the node; and ComfyUI's process for the benchmarks.

Imports of ComfyUI stand in the functions that run in its own environment.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from typing import Any

from eval.common.protocol import BenchError
from eval.launch import REPOSITORY

SD15: dict[str, Any] = dict(
    image_size=32,
    use_spatial_transformer=True,
    legacy=False,
    in_channels=4,
    out_channels=4,
    adm_in_channels=None,
    model_channels=320,
    num_res_blocks=[2, 2, 2, 2],
    channel_mult=[1, 2, 4, 4],
    transformer_depth=[1, 1, 1, 1, 1, 1, 0, 0],
    transformer_depth_output=[1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    transformer_depth_middle=1,
    use_linear_in_transformer=False,
    context_dim=768,
    num_heads=8,
    num_head_channels=-1,
)
SDXL: dict[str, Any] = {
    **SD15,
    "adm_in_channels": 2816,
    "num_classes": "sequential",
    "num_res_blocks": [2, 2, 2],
    "channel_mult": [1, 2, 4],
    "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "transformer_depth_middle": 10,
    "use_linear_in_transformer": True,
    "context_dim": 2048,
    "num_heads": -1,
    "num_head_channels": 64,
}
DEMO: dict[str, Any] = {
    **SD15,
    "image_size": 64,
    "model_channels": 48,
    "num_res_blocks": [1] * 4,
    "channel_mult": [1, 1, 2, 4],
    "transformer_depth": [1] * 4,
    "transformer_depth_output": [1] * 8,
    "transformer_depth_middle": -1,
    "context_dim": 128,
    "num_heads": -1,
    "num_head_channels": 48,
    "disable_self_attentions": [False, True, True, True],
}
"""The demo network of agentsd, which has half as many groups in its normalisations as ComfyUI's UNets."""
SHAPES = {"sd15": SD15, "sdxl": SDXL, "demo": DEMO}


def run_in_comfyui(module: str, options: argparse.Namespace, **given: Any) -> int:
    """Run a module in ComfyUI's environment, with the options as JSON; returns that process's exit code.

    Raises:
        BenchError: options.folder has no ComfyUI.
    """
    folder = options.folder.resolve()
    if not (folder / "ComfyUI" / "main.py").is_file():
        raise BenchError(f"{options.folder} has no ComfyUI; .ci/comfyui FOLDER prepares one")
    path = os.pathsep.join([str(folder / "ComfyUI"), str(REPOSITORY)])
    # Waiting threads must not count as CPU time.
    environment = {**os.environ, "PYTHONPATH": path, "OMP_WAIT_POLICY": "passive"}
    given = {**{name: value for name, value in vars(options).items() if name != "folder"}, **given}
    command = [folder / "venv" / "bin" / "python", "-m", module, json.dumps(given)]
    return subprocess.run(command, env=environment, cwd=REPOSITORY).returncode


def start(options: argparse.Namespace) -> Any:
    """Set ComfyUI and torch up, in ComfyUI's environment; returns the device."""
    import comfy.cli_args

    comfy.cli_args.args.cpu = options.device == "cpu"
    comfy.cli_args.args.use_pytorch_cross_attention = True  # the fastest one that ComfyUI has
    import torch

    torch.set_num_threads(options.threads)
    return torch.device(options.device)


def node_functions() -> Any:
    """The module `nodes` of the node's folder, loaded as ComfyUI itself loads a folder of custom_nodes."""
    name = "agentsd_nodes"
    if name not in sys.modules:
        place = REPOSITORY / "apps" / "comfyui" / "__init__.py"
        spec = importlib.util.spec_from_file_location(name, place)
        if spec is None or spec.loader is None:
            raise FileNotFoundError(place)
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    return importlib.import_module(f"{name}.nodes")


def random_model(kind: str, dtype: Any, device: Any) -> Any:
    """A ComfyUI model of real size with random weights: "sd15" or "sdxl"."""
    import torch

    patcher = _patcher(SHAPES[kind], dtype, device)
    with torch.no_grad():
        for name, parameter in patcher.model.diffusion_model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.fill_(name.endswith("weight"))
    patcher.model.to(device)
    return patcher


def demo_model(weights: dict[str, Any], device: Any) -> Any:
    """The demo network as a ComfyUI model, from the weights of its diffusers UNet, in float32."""
    import comfy.ops
    import comfy.utils
    import torch

    class FewGroups(comfy.ops.disable_weight_init):
        class GroupNorm(comfy.ops.disable_weight_init.GroupNorm):
            def __init__(self, num_groups, num_channels, **more):
                super().__init__(16, num_channels, **more)  # ComfyUI's UNets have 32 groups, this one 16

    patcher = _patcher(DEMO, torch.float32, device, custom_operations=FewGroups)
    names = comfy.utils.unet_to_diffusers(DEMO)
    patcher.model.diffusion_model.load_state_dict({names[name]: tensor.float() for name, tensor in weights.items()})
    return patcher


def _patcher(shape: dict[str, Any], dtype: Any, device: Any, **attributes: Any) -> Any:
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models_base

    config = type("Config", (comfy.supported_models_base.BASE,), {"unet_extra_config": {}, **attributes})(dict(shape))
    config.set_inference_dtype(dtype, None)
    model = comfy.model_base.BaseModel(config, device=device)
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)
