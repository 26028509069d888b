"""run: time the kinds of UNet calls, unpatched, whole and cached, interleaved, and what 50 steps of them come to.

A run's time is arithmetic: how many calls of each kind 50 PLMS steps make (counted by the patch itself, on a tiny
UNet), times their medians. A whole run adds text encoder, scheduler and autoencoder, timed with a UNet that does
nothing. With `--controlnet` a call is that of a ControlNet and the UNet after it.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from datetime import date
from importlib.metadata import version
from typing import Any

import torch
from diffusers import ControlNetModel, PNDMScheduler, StableDiffusionControlNetPipeline

import agentsd
from agentsd.images.rounds import FEWEST, rotated
from agentsd.patch import get_patch
from eval.common.environment import commit, device_name
from eval.common.models import random_pipeline
from eval.common.operations import count_operations
from eval.common.tables import markdown

from .methods import METHODS

STEP = 20  # timesteps between two calls of 50 steps
STARTS = {"agent": 950, "merge": 400}
_KINDS = ("whole, agent phase", "whole, later", "cached, agent phase", "cached, later")
CONTROLNET_WHOLE = "agents, ControlNet whole"  # patched without the pipeline, so that cached calls do not skip it


def call_inputs(pipe: Any, size: int) -> dict[str, Any]:
    """Inputs of one UNet call with guidance, at an image size in pixels."""
    unet = pipe.unet
    generator = torch.Generator().manual_seed(0)
    latent = size // pipe.vae_scale_factor
    draw = lambda *shape: torch.randn(*shape, generator=generator).to(unet.device, unet.dtype)  # noqa: E731
    inputs: dict[str, Any] = {"sample": draw(2, unet.config.in_channels, latent, latent)}
    inputs["encoder_hidden_states"] = draw(2, 77, unet.config.cross_attention_dim)
    if unet.config.addition_embed_type == "text_time":
        pooled = unet.config.projection_class_embeddings_input_dim - 6 * unet.config.addition_time_embed_dim
        inputs["added_cond_kwargs"] = {"text_embeds": draw(2, pooled), "time_ids": draw(2, 6)}
    return inputs


def with_controlnet(pipe: Any) -> Any:
    """A pipeline of SD 1.x or 2.x with a ControlNet of its UNet's shapes."""
    controlnet = ControlNetModel.from_unet(pipe.unet).to(pipe.unet.device, pipe.unet.dtype).eval()
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    return StableDiffusionControlNetPipeline(**parts, controlnet=controlnet, requires_safety_checker=False)


@torch.no_grad()
def timed(unet: Any, timestep: int, inputs: dict[str, Any], controlnet: Any = None, image: Any = None) -> float:
    """Seconds of one call, and of the ControlNet's before it."""
    if unet.device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    step = torch.tensor(timestep, device=unet.device)
    if controlnet is not None:
        down, mid = controlnet(timestep=step, controlnet_cond=image, **inputs, return_dict=False)
        inputs = {**inputs, "down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    unet(timestep=step, **inputs)
    if unet.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def kinds_of_calls(method: str) -> Iterator[tuple[str, int]]:
    """Names and timesteps of the calls of a method, in the order in which to run them on a newly patched UNet."""
    for phase, start in STARTS.items():
        for index, kind in enumerate(("whole", "cached")):
            yield f"{method}, {kind}, {phase}", start - index * STEP


def measure(
    pipe: Any,
    size: int,
    rounds: int,
    methods: dict[str, dict[str, Any]],
    compile: bool = False,
    controlled: Any = None,
    mode: str | None = None,
) -> dict[str, list[float]]:
    """Seconds of every kind of call by round: "sdpa", "METHOD, whole|cached, PHASE", and "outside" the UNet.

    Args:
        pipe: an unpatched pipeline.
        size: pixels a side.
        rounds: of timing, after one of warm-up.
        methods: settings by name.
        compile: compile a copy of the UNet for each method, as one graph for each kind of call.
        controlled: the same pipeline with a ControlNet, to time its call before each of the UNet.
        mode: of torch.compile.
    """
    inputs = call_inputs(pipe, size)
    control: tuple[Any, ...] = ()
    if controlled is not None:
        control = (controlled.controlnet, torch.rand(2, 3, size, size).to(pipe.unet.device, pipe.unet.dtype))
    unets = {name: pipe.unet for name in ("sdpa", *methods)}
    if compile:
        torch._dynamo.config.recompile_limit = 64  # the copies share their code
        unets = {name: copy.deepcopy(pipe.unet) for name in unets}
        for name, unet in unets.items():
            unet.compile(fullgraph=True, mode=mode)
            if name != "sdpa":
                agentsd.apply_patch(unet, **methods[name])
    # Apart from the rounds, as the call after the autoencoder's work is a slow one.
    seconds = {"outside": [outside_the_unet(pipe, size) for _ in range(rounds + 1)][1:]}
    for number in range(-2 if compile else -1, rounds):  # before them the warm-up
        taken: dict[str, float] = {}
        for method in rotated(list(unets), number):
            unet = unets[method]
            if method == "sdpa":
                taken["sdpa"] = timed(unet, 500, inputs, *control)
                continue
            target = unet if controlled is None or method == CONTROLNET_WHOLE else controlled
            # A compiled copy keeps its patch: PyTorch looks its graphs through again after a new one.
            with nullcontext() if compile else agentsd.patched(target, **methods[method]):
                for name, timestep in kinds_of_calls(method):
                    taken[name] = timed(unet, timestep, inputs, *control)
                    assert _is_cached(unet) == ("cached" in name)
        said = json.dumps({name: round(value, 2) for name, value in taken.items()})
        print(f"round {number + 1}: {said}" if number >= 0 else f"warm-up: {said}", flush=True)
        for name, value in taken.items() if number >= 0 else ():
            seconds.setdefault(name, []).append(value)
    return seconds


@torch.no_grad()
def outside_the_unet(pipe: Any, size: int) -> float:
    """Seconds of a whole run of 50 steps at guidance 7.5 in which the UNet does nothing."""
    unet = pipe.unet
    forward = lambda sample, *_, **__: (torch.zeros_like(sample),)  # noqa: E731
    unet.forward = forward
    try:
        start = time.perf_counter()
        pipe("a castle", height=size, width=size, num_inference_steps=50, guidance_scale=7.5)
        return time.perf_counter() - start
    finally:
        del unet.forward


def operations(pipe: Any, size: int, methods: dict[str, dict[str, Any]]) -> dict[str, int]:
    """Number of tensor operations of each kind of call, without torch.compile; keys as those of `measure`."""
    inputs, unet = call_inputs(pipe, size), pipe.unet
    found = {"sdpa": count_operations(lambda: timed(unet, 500, inputs))}
    for method, fields in methods.items():
        with agentsd.patched(unet, **fields):
            for name, timestep in kinds_of_calls(method):
                found[name] = count_operations(lambda timestep=timestep: timed(unet, timestep, inputs))  # type: ignore[misc]
    return found


def calls_of_a_run(settings: dict[str, Any], interval: int, steps: int = 50) -> Counter:
    """How many calls of each (kind, phase) a run of PLMS steps makes, by the patch itself on a tiny UNet."""
    unet = _tiny_unet()
    scheduler = PNDMScheduler(skip_prk_steps=True, steps_offset=1)
    scheduler.set_timesteps(steps)
    agentsd.apply_patch(unet, **{**settings, "cache_interval": interval})
    sample, text = torch.randn(1, 4, 16, 16), torch.randn(1, 4, 8)
    calls: Counter = Counter()
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            unet(sample, timestep, text)
            early = timestep >= 600  # also where the settings have no agents: the calls are timed there
            calls["cached" if _is_cached(unet) else "whole", "agent" if early else "merge"] += 1
    return calls


def _is_cached(unet: Any) -> bool:
    """Whether the last call of a patched UNet was cached."""
    patch = get_patch(unet)
    return patch is not None and patch.last_call is not None and patch.last_call.cached


def _tiny_unet() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, cross_attention_dim=8,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"), up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2,
    )  # fmt: skip


def table(seconds: dict[str, list[float]], methods: dict[str, dict[str, Any]], intervals: list[int]) -> list[str]:
    """Markdown tables: the calls, the UNet calls of 50 steps, and whole runs of 50 steps; of one round no speed-ups."""
    compared = len(seconds["sdpa"]) >= FEWEST
    median = {key: statistics.median(values) for key, values in seconds.items()}
    base, outside = median["sdpa"], median["outside"]
    of_kinds = [["SDPA", f"{base:.2f} s", f"{base:.2f} s", "", ""]]
    for method in methods:
        cells = [median[f"{method}, {kind}, {phase}"] for kind in ("whole", "cached") for phase in STARTS]
        of_kinds.append([method, *(f"{s:.2f} s" + (f" ({base / s:.2f}×)" if compared else "") for s in cells)])
    call_rows, run_rows = [], []
    for method, settings in methods.items():
        of_calls, of_runs = [], []
        for interval in intervals:
            calls = calls_of_a_run(settings, interval)
            total = sum(n * median[f"{method}, {kind}, {phase}"] for (kind, phase), n in calls.items())
            whole = sum(n for (kind, _), n in calls.items() if kind == "whole")
            unpatched = calls.total() * base
            of_calls.append(f"{unpatched / total:.2f}× ({whole} of {calls.total()} whole)")
            of_runs.append(f"{(unpatched + outside) / (total + outside):.2f}×")
        call_rows.append([method, *of_calls])
        run_rows.append([method, *of_runs])
    columns = [f"interval {interval}" for interval in intervals]
    if not compared:
        return [markdown(["method", *_KINDS], of_kinds), "", "One round: no speed-up is given."]
    return [
        markdown(["method", *_KINDS], of_kinds), "", markdown(["UNet calls of 50 PLMS steps", *columns], call_rows), "",
        f"Outside the UNet a run takes {outside:.2f} s.", "",
        markdown(["whole run of 50 PLMS steps", *columns], run_rows),
    ]  # fmt: skip


def operations_table(found: dict[str, int], methods: dict[str, dict[str, Any]]) -> list[str]:
    """A Markdown table of the numbers of operations."""
    said = "Tensor operations of a call without torch.compile, about the kernels it would launch on a GPU:"
    rows: list[list[object]] = [["SDPA", found["sdpa"], found["sdpa"], "", ""]]
    for method in methods:
        cells = [found[f"{method}, {kind}, {phase}"] for kind in ("whole", "cached") for phase in STARTS]
        rows.append([method, *cells])
    return ["", said, "", markdown(["method", *_KINDS], rows)]


def run(options: argparse.Namespace, command: str) -> None:
    """Measure and print; with --out write MODEL-SIZE.md and .json there."""
    if options.threads:
        torch.set_num_threads(options.threads)
    methods = {name: fields for name, fields in METHODS.items() if name not in options.skip}
    if options.dry_run:
        for name in ("sdpa", *methods):
            kinds = [kind for kind, _ in kinds_of_calls(name)] if name in methods else [name]
            print(f"{options.random_weights}, {options.size} px, {options.rounds} rounds: {'; '.join(kinds)}")
        return
    pipe = random_pipeline(options.random_weights, options.device, options.dtype)
    pipe.set_progress_bar_config(disable=True)
    counts = {} if options.controlnet else operations(pipe, options.size, methods)
    controlled = with_controlnet(pipe) if options.controlnet else None
    if options.controlnet and "agents" in methods:
        methods[CONTROLNET_WHOLE] = methods["agents"]
    seconds = measure(pipe, options.size, options.rounds, methods, options.compile, controlled, options.mode)
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers"))
    device = f"{device_name(pipe.unet.device)}, commit {commit()}"
    kind = f", compiled ({options.mode or 'default'})" * options.compile + ", with a ControlNet" * options.controlnet
    said = (
        f"`{command}`, {date.today()}, {device}, {torch.get_num_threads()} "
        f"threads, {versions}. UNet of {options.random_weights} with random weights, {options.size} px, guidance, "
        f"{options.dtype}{kind}; medians of {options.rounds} interleaved rounds."
    )
    lines = table(seconds, methods, options.intervals) + (operations_table(counts, methods) if counts else [])
    text = "\n".join([said, "", *lines]) + "\n"
    print(text)
    if options.out:
        options.out.mkdir(parents=True, exist_ok=True)
        name = f"{options.random_weights}-{options.size}"
        name += (
            f"-compiled{'-' + options.mode if options.mode else ''}" * options.compile
            + "-controlnet" * options.controlnet
        )
        (options.out / f"{name}.md").write_text(f"# UNet calls, {options.random_weights}, {options.size} px\n\n{text}")
        (options.out / f"{name}.json").write_text(json.dumps(seconds, indent=1))
