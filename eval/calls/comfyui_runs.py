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
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from agentsd.images.rounds import rotated, speed_up
from eval.calls import comfyui_models as models
from eval.calls.comfyui import OWN

PROMPTS = tuple(f"a high quality photograph of a {name}." for name in ("castle", "zebra", "dog", "lobster"))
"""In the words that the demo network was trained on."""

KINDS = WHOLE, CACHED = "whole", "cached"
"""What a model call is; one that another node answers is neither."""

STEP_CACHING = dict(ratio=0.0, early=0.0)
"""With a cache_interval: step caching alone, nothing merged, no agents."""
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tome": ("ToMe node, 0.4", "ToMe", dict(ratio=0.4)),
    "interval-1": ("AgentSD, paper, cache_interval 1", "AgentSD", {}),
    "interval-3": ("AgentSD, caching alone, cache_interval 3", "AgentSD", dict(cache_interval=3, **STEP_CACHING)),
    "interval-5": ("AgentSD, caching alone, cache_interval 5", "AgentSD", dict(cache_interval=5, **STEP_CACHING)),
    "fast": ("AgentSD, preset fast", "AgentSD", dict(preset="fast")),
    "fast-5": ("AgentSD, preset fast, cache_interval 5", "AgentSD", dict(cache_interval=5)),
    "fastest": ("AgentSD, preset fastest", "AgentSD", dict(preset="fastest")),
    "easycache-0.2": ("EasyCache 0.2", "EasyCache", dict(threshold=0.2)),
    "easycache-0.4": ("EasyCache 0.4", "EasyCache", dict(threshold=0.4)),
    "lazycache-0.2": ("LazyCache 0.2", "LazyCache", dict(threshold=0.2)),
    "lazycache-0.4": ("LazyCache 0.4", "LazyCache", dict(threshold=0.4)),
}
"""What is compared with ComfyUI's own run: its label, node and settings, by the name that `--variants` takes."""


def run(options: argparse.Namespace) -> int:
    """Measure in ComfyUI's environment; returns that process's exit code.

    Raises:
        BenchError: the folder has no ComfyUI.
    """
    with tempfile.TemporaryDirectory() as place:
        demo = str(_write_demo(Path(place), options.images)) if options.model == "demo" else None
        return models.run_in_comfyui("eval.calls.comfyui_runs", options, demo=demo)


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
    device = models.start(options)
    import torch

    if options.model == "demo":
        given = torch.load(options.demo)
        model, texts = models.demo_model(given["weights"], device), given["texts"]
    else:
        model = models.random_model(options.model, getattr(torch, options.dtype), device)
        channels = models.SHAPES[options.model]["context_dim"]
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
        factor = speed_up(own_cpu, [one["cpu"] for one in runs])
        calls = [kind for kind, _ in runs[0]["calls"]]
        whole, cached = ([cpu for one in runs for kind, cpu in one["calls"] if kind == which] for which in KINDS)
        near = [_decibel(one["latents"], own["latents"]) for one, own in zip(runs, results[OWN])]
        cells = [
            variant,
            str(len(calls)),
            str(calls.count(WHOLE)),
            f"{statistics.median(one['wall'] for one in runs):.3g}",
            f"{statistics.median(one['cpu'] for one in runs):.3g}",
            "" if factor is None else f"{factor:.2f}",
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


def _variants(model, options):
    """What is compared, by label: (model, steps)."""
    from comfy_extras.nodes_easycache import EasyCacheNode, LazyCacheNode
    from comfy_extras.nodes_tomesd import TomePatchModel

    def patched(kind, settings):
        if kind == "AgentSD":
            return models.node_functions().patch(model, **settings)
        if kind == "ToMe":
            return TomePatchModel.execute(model, settings["ratio"]).args[0]
        other = EasyCacheNode if kind == "EasyCache" else LazyCacheNode
        return other.execute(model, settings["threshold"], 0.15, 0.95, False).args[0]

    return {
        OWN: (model, options.steps),
        **{
            label: (patched(kind, settings), options.steps)
            for label, kind, settings in (VARIANTS[name] for name in options.variants or VARIANTS)
        },
        **{f"ComfyUI, {steps} steps": (model, steps) for steps in options.fewer},
    }


def _sample(patcher, steps, text, seed, options):
    """One run: seconds, CPU seconds, (kind, CPU seconds) of each model call, and the latents."""
    import comfy.sample
    import torch

    calls: list[tuple[str, float]] = []
    ran: list[bool] = []
    pooled = models.SHAPES[options.model].get("adm_in_channels")

    def more(batch):
        # SDXL's pooled text and sizes, which a model without a checkpoint's text encoder has not.
        return {} if pooled is None else {"y": torch.linspace(-1, 1, pooled).expand(batch, -1)}

    wrappers = patcher.get_wrappers("apply_model", "agentsd")

    def note(apply, arguments):
        run = wrappers[-1].run if wrappers else None
        before, start = run.cached if run else 0, time.process_time()
        ran.clear()
        out = apply(arguments["input"], arguments["timestep"], **arguments["c"], **more(len(arguments["input"])))
        cached = run is not None and run.cached > before
        # EasyCache answers some calls without running the UNet.
        calls.append((CACHED if cached else WHOLE if ran else "answered", time.process_time() - start))
        return out

    patcher = patcher.clone()
    patcher.set_model_unet_function_wrapper(note)
    size = options.size // 8
    noise = torch.randn(1, 4, size, size, generator=torch.Generator().manual_seed(seed + 1))
    handle = patcher.model.diffusion_model.time_embed.register_forward_pre_hook(lambda *args: ran.append(True))
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
    handle.remove()
    return {
        "wall": time.perf_counter() - start,
        "cpu": time.process_time() - cpu,
        "calls": calls,
        "latents": latents.float(),
    }


if __name__ == "__main__":
    _measure(argparse.Namespace(**json.loads(sys.argv[1])))
