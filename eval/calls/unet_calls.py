"""run: time the kinds of UNet calls, unpatched, whole and cached, in interleaved rounds; `call_tables` prints them.

What a whole run adds (text encoder, scheduler, autoencoder) is timed with a UNet that does nothing. With `--controlnet`
a call is that of a ControlNet and the UNet after it.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Callable
from contextlib import nullcontext
from datetime import date
from functools import partial
from importlib.metadata import version
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import ControlNetModel, DDIMScheduler, StableDiffusionControlNetPipeline
from torch import Tensor

import agentsd
from agentsd.config import AgentConfig, Phase
from agentsd.images.methods import use_method
from agentsd.images.rounds import rotated
from agentsd.images.unet_calls import RandomInputs, first_of_each_phase, set_timesteps, synchronize
from agentsd.patch import get_patch
from eval.common.environment import commit, device_name
from eval.common.fair_schedules import parse_runs
from eval.common.models import random_pipeline
from eval.common.operations import TensorWatch

from .call_tables import operations_table, table
from .methods import METHODS, SDPA, TOMESD, call_name

STEPS = 50  # of the run that calls are timed in
OUTSIDE_STEPS = 25
CONTROLNET_WHOLE = "agents, ControlNet whole"  # patched without the pipeline, so that cached calls do not skip it


def call_inputs(pipe: Any, size: int) -> dict[str, Any]:
    """Inputs of one UNet call with guidance, at an image size in pixels."""
    latent = size // pipe.vae_scale_factor
    inputs = RandomInputs.of(pipe.unet, latent, latent)
    return {"sample": torch.cat([inputs.latents] * 2), **inputs.others}


def with_controlnet(pipe: Any) -> Any:
    """A pipeline of SD 1.x or 2.x with a ControlNet of its UNet's shapes."""
    controlnet = ControlNetModel.from_unet(pipe.unet).to(pipe.unet.device, pipe.unet.dtype).eval()
    parts = {name: part for name, part in pipe.components.items() if name != "image_encoder"}
    return StableDiffusionControlNetPipeline(**parts, controlnet=controlnet, requires_safety_checker=False)


@torch.no_grad()
def timed(unet: Any, timestep: Tensor, inputs: dict[str, Any], controlnet: Any = None, image: Any = None) -> float:
    """Seconds of one call, and of the ControlNet's before it."""
    synchronize(unet.device)
    start = time.perf_counter()
    given = (inputs["sample"], timestep)  # by position, as pipelines do and ToMeSD needs it
    others = {name: value for name, value in inputs.items() if name != "sample"}
    if controlnet is not None:
        down, mid = controlnet(*given, controlnet_cond=image, **others, return_dict=False)
        others |= {"down_block_additional_residuals": down, "mid_block_additional_residual": mid}
    unet(*given, **others)
    synchronize(unet.device)
    return time.perf_counter() - start


def run_timesteps(device: Any) -> tuple[Tensor, dict[Phase, int]]:
    """The timesteps of a run of DDIM, by which a patch knows it, and the position of each phase's first call."""
    scheduler = DDIMScheduler(timestep_spacing="trailing")
    timesteps = set_timesteps(scheduler, STEPS, device)
    return timesteps, first_of_each_phase(AgentConfig(), timesteps.tolist(), scheduler.config.num_train_timesteps)


def kinds_of_calls(method: str) -> list[str]:
    """Names of a method's calls, in the order in which they are timed; of one without step caching its own."""
    if method in (SDPA, TOMESD):
        return [method]
    return [call_name(method, whole, phase) for phase in Phase for whole in (True, False)]


def timed_method(
    pipe: Any, method: str, settings: dict[str, Any] | None, inputs: dict[str, Any], control: tuple[Any, ...] = ()
) -> dict[str, float]:
    """Seconds of one call of each kind that a method has, by name; "sdpa" is the unpatched UNet.

    Args:
        pipe: a pipeline whose UNet is unpatched, or patched with the method where `settings` is None.
        method: "sdpa" or of METHODS.
        settings: of the method.
        inputs: of the UNet.
        control: a ControlNet and its image.
    """
    timesteps, begins = run_timesteps(pipe.unet.device)
    if method in (SDPA, TOMESD):
        put_on = use_method(pipe, "tomesd", AgentConfig(**(settings or {}))) if method == TOMESD else nullcontext()
        with put_on:
            return {method: timed(pipe.unet, timesteps[begins[Phase.MERGE]], inputs, *control)}
    target = pipe.unet if method == CONTROLNET_WHOLE else pipe
    taken = {}
    with nullcontext() if settings is None else agentsd.patched(target, **settings):
        positions = [begins[phase] + after for phase in Phase for after in (0, 1)]
        for name, position in zip(kinds_of_calls(method), positions):
            taken[name] = timed(pipe.unet, timesteps[position], inputs, *control)
            assert _is_cached(pipe.unet) == ("cached" in name)
    return taken


def measure(
    pipe: Any,
    size: int,
    rounds: int,
    methods: dict[str, dict[str, Any]],
    compile: bool = False,
    mode: str | None = None,
    warm: bool = False,
) -> dict[str, list[float]]:
    """Seconds by round of the unpatched UNet ("sdpa"), ToMeSD's and each "METHOD, whole|cached, PHASE".

    Args:
        pipe: an unpatched pipeline; with a ControlNet, that is called before each call of the UNet.
        size: pixels a side.
        rounds: of timing, after one of warm-up.
        methods: settings by name.
        compile: compile a copy of the UNet for each method, as one graph for each kind of call.
        mode: of torch.compile.
        warm: everything has run once already, so that there is no round of warm-up.
    """
    inputs, control = call_inputs(pipe, size), _control(pipe, size)
    names = [SDPA, *methods]
    pipes = {name: pipe for name in names}
    if compile:
        torch._dynamo.config.recompile_limit = 64  # the copies share their code
        for name in names:
            pipes[name] = SimpleNamespace(unet=copy.deepcopy(pipe.unet))
            pipes[name].unet.compile(fullgraph=True, mode=mode)
            if name != SDPA:
                agentsd.apply_patch(pipes[name].unet, **methods[name])
    seconds: dict[str, list[float]] = {}
    for number in range(-2 if compile else int(warm) - 1, rounds):  # before them the warm-up
        taken: dict[str, float] = {}
        for name in rotated(names, number):
            # A compiled copy keeps its patch: PyTorch looks its graphs through again after a new one.
            taken |= timed_method(pipes[name], name, None if compile else methods.get(name), inputs, control)
        said = json.dumps({name: round(value, 2) for name, value in taken.items()})
        print(f"round {number + 1}: {said}" if number >= 0 else f"warm-up: {said}", flush=True)
        for name, value in taken.items() if number >= 0 else ():
            seconds.setdefault(name, []).append(value)
    return seconds


def _control(pipe: Any, size: int) -> tuple[Any, ...]:
    """The ControlNet of a pipeline and an image for it, if it has one."""
    controlnet = getattr(pipe, "controlnet", None)
    return () if controlnet is None else (controlnet, torch.rand(2, 3, size, size).to(controlnet.device, pipe.dtype))


@torch.no_grad()
def outside_the_unet(pipe: Any, size: int) -> float:
    """Seconds of a whole run of OUTSIDE_STEPS steps with guidance in which the UNet does nothing."""
    unet = pipe.unet
    forward = lambda sample, *_, **__: (torch.zeros_like(sample),)  # noqa: E731
    unet.forward = forward
    try:
        start = time.perf_counter()
        pipe("a castle", height=size, width=size, num_inference_steps=OUTSIDE_STEPS, guidance_scale=7.5)
        return time.perf_counter() - start
    finally:
        del unet.forward


def watched(pipe: Any, size: int, methods: dict[str, dict[str, Any]]) -> tuple[dict[str, int], dict[str, int]]:
    """Operations of each kind of call, and each method's greatest memory in bytes, both without torch.compile.

    Memory is that of the tensors made in a whole and a cached call of each phase, kept features among them, weights
    not. Keys are those of `measure`, and the methods' names.
    """
    inputs, control = call_inputs(pipe, size), _control(pipe, size)
    operations: dict[str, int] = {}
    memory: dict[str, int] = {}
    for method in (SDPA, *methods):
        counts, memory[method] = _watch(
            pipe.unet, partial(timed_method, pipe, method, methods.get(method), inputs, control)
        )
        operations |= dict(zip(kinds_of_calls(method), counts))
    return operations, memory


def _watch(unet: Any, run: Callable[[], Any]) -> tuple[list[int], int]:
    """Operations from each call of a UNet on to the next, and the greatest memory of all."""
    begins: list[int] = []
    with TensorWatch() as watch:
        handle = unet.register_forward_pre_hook(lambda *_: begins.append(watch.operations))
        run()
        handle.remove()
    return [after - before for before, after in pairwise([*begins, watch.operations])], watch.peak


def _is_cached(unet: Any) -> bool:
    """Whether the last call of a patched UNet was cached."""
    patch = get_patch(unet)
    return patch is not None and patch.last_call is not None and patch.last_call.cached


def run(options: argparse.Namespace, command: str) -> None:
    """Measure and print; with --out write MODEL-SIZE.md and .json there."""
    if options.threads:
        torch.set_num_threads(options.threads)
    runs = parse_runs(options.runs)
    # ToMeSD's draws break a graph.
    left_out = {*options.skip, *([TOMESD] if options.compile else [])}
    methods = {name: fields for name, fields in METHODS.items() if name not in left_out}
    if options.dry_run:
        for name in (SDPA, *methods):
            kinds = "; ".join(kinds_of_calls(name))
            print(f"{options.random_weights}, {options.size} px, {options.rounds} rounds: {kinds}")
        return
    pipe = random_pipeline(options.random_weights, options.device, options.dtype)
    pipe.set_progress_bar_config(disable=True)
    # Before the ControlNet comes, as the autoencoder and the text encoder are the same; and apart from the rounds, as
    # the call after the autoencoder's work is a slow one.
    outside = [outside_the_unet(pipe, options.size) for _ in range(options.rounds + 1)][1:]
    if options.controlnet:
        pipe = with_controlnet(pipe)
        if "agents" in methods:
            methods[CONTROLNET_WHOLE] = methods["agents"]
    counts, memory = ({}, {}) if options.compile else watched(pipe, options.size, methods)
    seconds = measure(pipe, options.size, options.rounds, methods, options.compile, options.mode, warm=bool(counts))
    seconds["outside"] = outside
    versions = ", ".join(f"{name} {version(name)}" for name in ("torch", "diffusers", "tomesd"))
    device = f"{device_name(pipe.unet.device)}, commit {commit()}"
    kind = f", compiled ({options.mode or 'default'})" * options.compile + ", with a ControlNet" * options.controlnet
    said = (
        f"`{command}`, {date.today()}, {device}, {torch.get_num_threads()} "
        f"threads, {versions}. UNet of {options.random_weights} with random weights, {options.size} px, guidance, "
        f"{options.dtype}{kind}; medians of {options.rounds} interleaved rounds. Memory: greatest of the tensors that "
        "calls make, kept features among them, weights not."
    )
    lines = table(seconds, list(methods), runs, pipe, memory, OUTSIDE_STEPS)
    if counts and not options.controlnet:  # whose operations would be among those of the UNet's calls
        lines += operations_table(counts, list(methods))
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
        (options.out / f"{name}.json").write_text(json.dumps({"seconds": seconds, "memory": memory}, indent=1) + "\n")
