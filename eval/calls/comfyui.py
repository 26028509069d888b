"""run: time model calls in ComfyUI with and without the node, in ComfyUI's own environment.

`python -m eval.calls.comfyui OPTIONS` is the part that runs there, its options as JSON; comfyui_bench runs it.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time

from agentsd.images.rounds import rotated, speed_up
from eval.calls import comfyui_models as models

OWN = "ComfyUI"
AGENT_PHASE, LATER = 900, 300
"""A timestep of each phase."""

CAPS = dict(late="downsample", max_agents=256, max_keys=1024, match_tile=16)


def run(options: argparse.Namespace) -> int:
    """Measure in ComfyUI's environment; returns that process's exit code.

    Raises:
        BenchError: the folder has no ComfyUI.
    """
    return models.run_in_comfyui("eval.calls.comfyui", options)


def _measure(options: argparse.Namespace) -> None:
    device = models.start(options)
    import torch

    dtype = getattr(torch, options.dtype)
    model = models.random_model(options.model, dtype, device)
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


def _variants(model):
    """What is timed, by name: (model, timestep), with no node, with ComfyUI's ToMe node and with ours."""
    from comfy_extras.nodes_tomesd import TomePatchModel

    patch = models.node_functions().patch
    ours, capped = patch(model), patch(model, **CAPS)
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
