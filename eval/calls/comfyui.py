"""run: time model calls in ComfyUI with and without the node, in ComfyUI's own environment.

`python -m eval.calls.comfyui OPTIONS` is the part that runs there, its options as JSON; comfyui_bench runs it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import time

from agentsd.images.rounds import rotated, speed_up
from eval.common.protocol import BenchError
from eval.launch import REPOSITORY

OWN = "ComfyUI"
AGENT_PHASE, LATER = 900, 300
"""A timestep of each phase."""

SD15 = dict(
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
SDXL = {
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
CAPS = dict(late="downsample", max_agents=256, max_keys=1024, match_tile=16)


def run(options: argparse.Namespace) -> int:
    """Measure in ComfyUI's environment; returns that process's exit code.

    Raises:
        BenchError: the folder has no ComfyUI.
    """
    folder = options.folder.resolve()
    if not (folder / "ComfyUI" / "main.py").is_file():
        raise BenchError(f"{options.folder} has no ComfyUI; .ci/comfyui FOLDER prepares one")
    path = os.pathsep.join([str(folder / "ComfyUI"), str(REPOSITORY)])
    # Waiting threads must not count as CPU time.
    environment = {**os.environ, "PYTHONPATH": path, "OMP_WAIT_POLICY": "passive"}
    python = folder / "venv" / "bin" / "python"
    given = json.dumps({name: value for name, value in vars(options).items() if name != "folder"})
    command = [python, "-m", "eval.calls.comfyui", given]
    return subprocess.run(command, env=environment, cwd=REPOSITORY).returncode


def _measure(options: argparse.Namespace) -> None:
    import comfy.cli_args

    comfy.cli_args.args.cpu = options.device == "cpu"
    comfy.cli_args.args.use_pytorch_cross_attention = True  # the fastest one that ComfyUI has
    import torch

    torch.set_num_threads(options.threads)
    dtype = getattr(torch, options.dtype)
    model = _model(options.model, dtype, torch.device(options.device))
    variants = _variants(model)
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"{os.cpu_count()} CPU cores"
    versions = f"torch {torch.__version__}, Python {platform.python_version()}"
    print(f"{name}, {options.dtype}, {options.threads} threads, {versions}")
    print(f"{options.model}, random weights, batch {options.batch}, medians of {options.rounds} interleaved rounds")
    print("CPU seconds are those of all threads; on a machine with other work they are steadier than seconds.\n")
    print("| px | model call | seconds | CPU seconds | × ComfyUI, CPU seconds | rounds, CPU seconds |")
    print("| ---: | --- | ---: | ---: | ---: | --- |", flush=True)
    for size in map(int, options.sizes.split(",")):
        times = _rounds(variants, size, options, dtype)
        own = [cpu for _, cpu in times[OWN]]
        for variant, pairs in times.items():
            wall, cpu = (statistics.median(one) for one in zip(*pairs))
            each = ", ".join(f"{one:.3g}" for _, one in pairs)
            faster = speed_up(own, [one for _, one in pairs])
            shown = "" if faster is None else f"{faster:.2f}"
            print(f"| {size} | {variant} | {wall:.3g} | {cpu:.3g} | {shown} | {each} |", flush=True)


def _model(kind, dtype, device):
    """A ComfyUI model with random weights."""
    import comfy.model_base
    import comfy.model_patcher
    import comfy.supported_models_base
    import torch

    shape = {"sd15": SD15, "sdxl": SDXL}[kind]
    config = type("Config", (comfy.supported_models_base.BASE,), {"unet_extra_config": {}})(shape)
    config.set_inference_dtype(dtype, None)
    model = comfy.model_base.BaseModel(config, device=device)
    with torch.no_grad():
        for name, parameter in model.diffusion_model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=parameter[0].numel() ** -0.5)
            else:
                parameter.fill_(name.endswith("weight"))
    model.to(device)
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


def load_node():
    """The class of the node, loaded as ComfyUI itself loads a folder of custom_nodes."""
    place = REPOSITORY / "apps" / "comfyui" / "__init__.py"
    spec = importlib.util.spec_from_file_location("agentsd_nodes", place)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(place)
    nodes = importlib.util.module_from_spec(spec)
    sys.modules["agentsd_nodes"] = nodes
    spec.loader.exec_module(nodes)
    return nodes.NODE_CLASS_MAPPINGS["AgentSD"]


def _variants(model):
    """What is timed, by name: (model, timestep), with no node, with ComfyUI's ToMe node and with ours."""
    from comfy_extras.nodes_tomesd import TomePatchModel

    node = load_node()
    inputs = node.INPUT_TYPES()
    given = {**inputs["required"], **inputs["optional"]}
    widgets = {name: widget[1].get("default") for name, widget in given.items()}
    del widgets["model"]
    ours, capped = (node().patch(model, **{**widgets, **settings})[0] for settings in ({}, CAPS))
    return {
        OWN: (model, LATER),
        "ToMe node, 0.4": (TomePatchModel.execute(model, 0.4).args[0], LATER),
        "AgentSD, agent phase": (ours, AGENT_PHASE),
        "AgentSD, later": (ours, LATER),
        "AgentSD with caps, agent phase": (capped, AGENT_PHASE),
        "AgentSD with caps, later": (capped, LATER),
    }


def _rounds(variants, size, options, dtype):
    """(seconds, CPU seconds) of every round, by variant."""
    import torch

    def call(patcher, timestep, size):
        model, device = patcher.model, options.device
        wrapped = {**patcher.model_options["transformer_options"], "wrappers": patcher.wrappers}
        sigma = model.model_sampling.sigmas[timestep].expand(options.batch)
        latent = torch.randn(options.batch, 4, size // 8, size // 8, device=device) * sigma[0]
        text = torch.randn(options.batch, 77, 768 if options.model == "sd15" else 2048, device=device, dtype=dtype)
        y = None if options.model == "sd15" else torch.randn(options.batch, 2816, device=device, dtype=dtype)
        start, cpu = time.perf_counter(), time.process_time()
        model.apply_model(latent, sigma, c_crossattn=text, transformer_options=wrapped, y=y).sum().item()
        return time.perf_counter() - start, time.process_time() - cpu

    times: dict[str, list[tuple[float, float]]] = {variant: [] for variant in variants}
    with torch.inference_mode():
        for patcher, timestep in variants.values():
            call(patcher, timestep, size if options.device == "cuda" else 256)  # warm-up
        for number in range(options.rounds):
            for variant, (patcher, timestep) in rotated(list(variants.items()), number):
                times[variant].append(call(patcher, timestep, size))
    return times


if __name__ == "__main__":
    _measure(argparse.Namespace(**json.loads(sys.argv[1])))
