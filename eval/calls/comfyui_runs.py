"""run: sampling runs in ComfyUI, their time and distance to the unpatched latents, with and without the node.

`python -m eval.calls.comfyui_runs OPTIONS` is the part that runs in ComfyUI's own environment; comfyui_bench runs it.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from agentsd.images.rounds import rotated
from eval.calls import comfyui
from eval.common.protocol import BenchError
from eval.launch import REPOSITORY

OWN = comfyui.OWN
PROMPTS = ("a photo of a castle", "a photo of a red flower", "a photo of a dog", "a photo of a boat on a lake")

DEMO = dict(
    image_size=64,
    use_spatial_transformer=True,
    legacy=False,
    in_channels=4,
    out_channels=4,
    model_channels=48,
    num_res_blocks=[1] * 4,
    channel_mult=[1, 1, 2, 4],
    transformer_depth=[1] * 4,
    transformer_depth_output=[1] * 8,
    transformer_depth_middle=-1,
    adm_in_channels=None,
    num_heads=-1,
    num_head_channels=48,
    use_linear_in_transformer=False,
    context_dim=128,
    disable_self_attentions=[False, True, True, True],
)
"""The demo network in ComfyUI's words."""


def run(options: argparse.Namespace) -> int:
    """Measure in ComfyUI's environment; returns that process's exit code.

    Raises:
        BenchError: the folder has no ComfyUI.
    """
    folder = options.folder.resolve()
    if not (folder / "ComfyUI" / "main.py").is_file():
        raise BenchError(f"{options.folder} has no ComfyUI; .ci/comfyui FOLDER prepares one")
    path = os.pathsep.join([str(folder / "ComfyUI"), str(REPOSITORY)])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_WAIT_POLICY": "passive"}
    given = {name: value for name, value in vars(options).items() if name != "folder"}
    with tempfile.TemporaryDirectory() as place:
        if options.model == "demo":
            given["demo"] = str(_write_demo(Path(place), options.images))
        python = folder / "venv" / "bin" / "python"
        command = [python, "-m", "eval.calls.comfyui_runs", json.dumps(given)]
        return subprocess.run(command, env=environment, cwd=REPOSITORY).returncode


def _write_demo(folder: Path, images: int) -> Path:
    """The demo network's weights and the features of prompts, which diffusers makes."""
    import torch

    import agentsd

    pipe = agentsd.load_pipeline("demo")
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(images)]
    with torch.no_grad():
        texts = [pipe.encode_prompt(prompt, "cpu", 1, True)[:2] for prompt in prompts]
    weights = {name: tensor.float() for name, tensor in pipe.unet.state_dict().items()}
    torch.save({"weights": weights, "texts": [tuple(text) for text in texts]}, folder / "demo.pt")
    return folder / "demo.pt"


def _measure(options: argparse.Namespace) -> None:
    import comfy.cli_args

    comfy.cli_args.args.cpu = options.device == "cpu"
    comfy.cli_args.args.use_pytorch_cross_attention = True
    import torch

    torch.set_num_threads(options.threads)
    device = torch.device(options.device)
    if options.model == "demo":
        given = torch.load(options.demo)
        model, texts = _demo_model(given["weights"], device), given["texts"]
    else:
        model = comfyui._model(options.model, getattr(torch, options.dtype), device)
        channels = 768 if options.model == "sd15" else 2048
        generator = torch.Generator().manual_seed(0)
        texts = [tuple(torch.randn(2, 1, 77, channels, generator=generator)) for _ in range(options.images)]
    variants = _variants(model, options)
    name = torch.cuda.get_device_name() if options.device == "cuda" else f"{os.cpu_count()} CPU cores"
    dtype = "float32" if options.model == "demo" else options.dtype
    print(f"{name}, {dtype}, {options.threads} threads, torch {torch.__version__}, Python {platform.python_version()}")
    print(
        f"{options.model}, {options.size} px, {options.sampler} {options.scheduler}, {options.steps} steps, guidance "
        f"{options.guidance}, {options.images} images, rounds interleaved by image\n"
    )
    results: dict[str, list[dict[str, Any]]] = {name: [] for name in variants}
    with torch.inference_mode():
        for image in range(-1, options.images):
            for variant, (patcher, steps) in rotated(list(variants.items()), max(image, 0)):
                if image < 0 and variant != OWN:
                    continue
                own = steps if image >= 0 else 2  # a warm-up before the first
                done = _sample(patcher, own, texts[max(image, 0)], image, options)
                if image >= 0:
                    results[variant].append(done)
    _print(results)


def _print(results: dict[str, list[dict[str, Any]]]) -> None:
    print(
        "| run | calls | whole | seconds | CPU s | × ComfyUI, CPU s | CPU s a whole call | a cached one "
        "| dB, mean (least) |"
    )
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |")
    own_cpu = [one["cpu"] for one in results[OWN]]
    for variant, runs in results.items():
        factor = statistics.median(own / one["cpu"] for own, one in zip(own_cpu, runs))
        calls = runs[0]["calls"]
        whole = [cpu for one in runs for cached, cpu in one["calls"] if not cached]
        cached = [cpu for one in runs for cached, cpu in one["calls"] if cached]
        near = [_decibel(one["latents"], own["latents"]) for one, own in zip(runs, results[OWN])]
        cells = [
            variant,
            str(len(calls)),
            str(sum(not cached for cached, _ in calls)),
            f"{statistics.median(one['wall'] for one in runs):.3g}",
            f"{statistics.median(one['cpu'] for one in runs):.3g}",
            f"{factor:.2f}",
            f"{statistics.median(whole):.3g}" if whole else "",
            f"{statistics.median(cached):.3g}" if cached else "",
            "" if variant == OWN else f"{statistics.mean(near):.1f} ({min(near):.1f})",
        ]
        print("| " + " | ".join(cells) + " |", flush=True)


def _decibel(one, other) -> float:
    """Peak signal to noise of latents: the peak is the range of the unpatched ones."""
    error = float((one - other).double().square().mean())
    peak = float(other.max() - other.min())
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)


def _demo_model(weights, device):
    import comfy.model_base
    import comfy.model_patcher
    import comfy.ops
    import comfy.supported_models_base
    import comfy.utils
    import torch

    class FewGroups(comfy.ops.disable_weight_init):
        class GroupNorm(comfy.ops.disable_weight_init.GroupNorm):
            def __init__(self, num_groups, num_channels, **more):
                super().__init__(16, num_channels, **more)  # ComfyUI's UNets have 32 groups, this one 16

    config = type("Config", (comfy.supported_models_base.BASE,), {"unet_extra_config": {}})(dict(DEMO))
    config.custom_operations = FewGroups
    config.set_inference_dtype(torch.float32, None)
    model = comfy.model_base.BaseModel(config, device=device)
    names = comfy.utils.unet_to_diffusers(DEMO)
    model.diffusion_model.load_state_dict({names[name]: tensor for name, tensor in weights.items()})
    return comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=device)


def _variants(model, options):
    """What is compared, by name: (model, steps)."""
    from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode

    node = comfyui.load_node()
    widgets = {**node.INPUT_TYPES()["required"], **node.INPUT_TYPES()["optional"]}
    defaults = {name: widget[1].get("default") for name, widget in widgets.items() if name != "model"}

    def ours(**settings):
        return node().patch(model, **{**defaults, **settings})[0], options.steps

    def easy(kind, threshold):
        return kind.execute(model, threshold, 0.15, 0.95, False).args[0], options.steps

    cache = dict(ratio=0.0, early=0.0)
    variants = {OWN: (model, options.steps)}
    if options.model != "demo":
        return {**variants, "AgentSD, cache_interval 3": ours(cache_interval=3, **cache)}
    return {
        **variants,
        "AgentSD, defaults, no caching": ours(),
        "AgentSD, cache_interval 3": ours(cache_interval=3, **cache),
        "AgentSD, cache_interval 5": ours(cache_interval=5, **cache),
        "AgentSD, preset fast": ours(preset="fast"),
        "EasyCache 0.2": easy(EasyCacheNode, 0.2),
        "EasyCache 0.4": easy(EasyCacheNode, 0.4),
        "LazyCache 0.2": easy(LazyCacheNode, 0.2),
        "LazyCache 0.4": easy(LazyCacheNode, 0.4),
        **{f"ComfyUI, {steps} steps": (model, steps) for steps in options.fewer},
    }


def _sample(patcher, steps, text, seed, options):
    """One run: seconds, CPU seconds, (cached, CPU seconds) of each model call, and the latents."""
    import comfy.sample
    import torch

    calls = []
    wrappers = patcher.get_wrappers("apply_model", "agentsd")

    def note(apply, arguments):
        run = wrappers[-1].run if wrappers else None
        before, start = run.cached if run else 0, time.process_time()
        out = apply(arguments["input"], arguments["timestep"], **arguments["c"])
        calls.append((run is not None and run.cached > before, time.process_time() - start))
        return out

    patcher = patcher.clone()
    patcher.set_model_unet_function_wrapper(note)
    size = options.size // 8
    noise = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(seed + 1))
    start, cpu = time.perf_counter(), time.process_time()
    latents = comfy.sample.sample(
        patcher,
        noise,
        steps,
        options.guidance,
        options.sampler,
        options.scheduler,
        [[text[0], {}]],
        [[text[1], {}]],
        torch.zeros_like(noise),
        seed=seed + 1,
        disable_pbar=True,
    )
    return {
        "wall": time.perf_counter() - start,
        "cpu": time.process_time() - cpu,
        "calls": calls,
        "latents": latents.float(),
    }


if __name__ == "__main__":
    _measure(argparse.Namespace(**json.loads(sys.argv[1])))
