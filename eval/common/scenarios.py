"""use_scenario: have a pipeline generate images by a scenario for the length of a `with` block."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, nn

import agentsd
from agentsd.images.methods import refuse_patched, use_method

from .fair_schedules import steps_of_equal_time
from .methods import METHODS, check_packages
from .protocol import BenchError, Scenario


@contextlib.contextmanager
def use_scenario(pipe: Any, scenario: Scenario) -> Iterator[Callable[..., Any]]:
    """Patch an unpatched pipeline; afterwards it is as before.

    Enter it anew for every call of the pipeline: the random choices of ToMeSD and the steps of DeepCache start again
    with each entry, so that an image does not depend on those generated before it.

    Yields:
        What to call in place of the pipeline, with the same arguments.

    Raises:
        BenchError: the pipeline is patched already, or a package is missing.
    """
    try:
        refuse_patched(pipe)
    except ValueError as error:
        raise BenchError(str(error)) from error
    method = METHODS[scenario.method]
    check_packages([method.name])
    before = _left_by(pipe.unet) if method.source else None  # ours have tests
    with method.resolved()(pipe, scenario) as call:
        yield pipe if call is None else call
    if before is not None and (changed := _first_change(before, _left_by(pipe.unet))):
        raise BenchError(
            f"method {method.name} of {method.source} was not taken off: {changed}; restore that in put_on"
        )


def _left_by(unet: nn.Module) -> dict[str, dict[str, Any]]:
    """What methods change in a UNet, by module: classes, processors, forwards, hooks."""
    return {
        name: {
            "class": type(module),
            "processor": getattr(module, "processor", None),
            "forward": vars(module).get("forward", type(module).forward),
            "hooks": (*module._forward_pre_hooks.values(), *module._forward_hooks.values()),
        }
        for name, module in unet.named_modules()
    }


def _first_change(before: dict[str, dict[str, Any]], after: dict[str, dict[str, Any]]) -> str:
    for name in dict.fromkeys([*before, *after]):
        for key in ("class", "processor", "forward", "hooks"):
            if before.get(name, {}).get(key) != after.get(name, {}).get(key):
                return f"the UNet's {name or 'top'} has another {key}"
    return ""


@contextlib.contextmanager
def unpatched(pipe: Any, scenario: Scenario) -> Iterator[None]:
    """Change nothing."""
    yield


@contextlib.contextmanager
def by_package(pipe: Any, scenario: Scenario) -> Iterator[None]:
    """ToMeSD or AgentSD, as agentsd's own commands put them on."""
    with use_method(pipe, scenario.method, scenario.settings):
        yield


class MeanValueProcessor:
    """Attention with all weights equal: every token gets the mean of the values, whatever query and key say."""

    def __call__(self, attn: Attention, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        value = attn.to_v(hidden_states).mean(dim=1, keepdim=True)
        return attn.to_out[1](attn.to_out[0](value)).expand_as(hidden_states)


class ZeroProcessor:
    """No attention at all: zero, so that the block's residual passes unchanged."""

    def __call__(self, attn: Attention, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        return torch.zeros_like(hidden_states)


class NoMixingProcessor:
    """The four projections of attention, and no attention: what is left where mixing tokens costs nothing."""

    def __call__(self, attn: Attention, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        attn.to_q(hidden_states), attn.to_k(hidden_states)
        return attn.to_out[1](attn.to_out[0](attn.to_v(hidden_states)))


_STAND_INS = {"mean-value": MeanValueProcessor, "no-attention": ZeroProcessor}


@contextlib.contextmanager
def naive_attention(pipe: Any, scenario: Scenario) -> Iterator[None]:
    """Every layer with an explicit softmax."""
    before = pipe.unet.attn_processors
    pipe.unet.set_attn_processor(AttnProcessor())  # explicit softmax, as Stable Diffusion's first code had it
    try:
        yield
    finally:
        pipe.unet.set_attn_processor(before)


@contextlib.contextmanager
def control(pipe: Any, scenario: Scenario) -> Iterator[None]:
    """agentsd's patch, with another processor on its layers for the length of each UNet call in the agent phase."""
    stand_in = _STAND_INS[scenario.method]()
    with agentsd.patched(pipe, scenario.config):
        layers = _patched_layers(pipe.unet)
        # Its hook runs after the patch's own pre-hook, which looks whether its processors are still there.
        with in_agent_phase(pipe, scenario.settings, {layer: stand_in for layer in layers.values()}):
            yield


@contextlib.contextmanager
def in_agent_phase(pipe: Any, config: agentsd.AgentConfig, stand_ins: Mapping[Attention, Any]) -> Iterator[None]:
    """Put other processors (by layer) in place during each UNet call in the agent phase, restore the former after it.

    The pipeline may be patched or not; config says which timesteps the agent phase is.
    """
    unet = pipe.unet
    num_train_timesteps = pipe.scheduler.config.num_train_timesteps
    before = {layer: layer.processor for layer in stand_ins}

    def enter(module: nn.Module, args: tuple, kwargs: dict) -> None:
        timestep = float(kwargs["timestep"] if "timestep" in kwargs else args[1])
        if config.phase_at(timestep, num_train_timesteps) is agentsd.Phase.AGENT:
            for layer, processor in stand_ins.items():
                layer.processor = processor

    def leave(*_: Any) -> None:
        for layer, processor in before.items():
            layer.processor = processor

    handles = [
        unet.register_forward_pre_hook(enter, with_kwargs=True),
        unet.register_forward_hook(leave, always_call=True),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def limit(pipe: Any, scenario: Scenario) -> Iterator[None]:
    """The layers that agentsd patches, mixing no tokens."""
    layers = full_resolution_layers(pipe).values()
    before = [layer.processor for layer in layers]
    for layer in layers:
        layer.processor = NoMixingProcessor()
    try:
        yield
    finally:
        for layer, processor in zip(layers, before):
            layer.processor = processor


def full_resolution_layers(pipe: Any) -> dict[str, Attention]:
    """The self-attention layers of a pipeline's UNet that agentsd patches by default, by module name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is none, which the caller finds out
        with agentsd.patched(pipe):
            return _patched_layers(pipe.unet)


def _patched_layers(unet: nn.Module) -> dict[str, Attention]:
    return {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, Attention) and type(module.processor).__name__ == "AgentAttnProcessor"
    }


@contextlib.contextmanager
def deepcache(pipe: Any, scenario: Scenario) -> Iterator[None]:
    """DeepCache with its own defaults at the scenario's interval."""
    from DeepCache import DeepCacheSDHelper

    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=scenario.interval, **METHODS["deepcache"].fixed)
    with _forwards_restored(pipe.unet):
        helper.enable()
        try:
            yield
        finally:
            helper.disable()


@contextlib.contextmanager
def tgate(pipe: Any, scenario: Scenario) -> Iterator[Callable[..., Any]]:
    """T-GATE as its README recommends for Stable Diffusion: 10 gated steps of 25, self-attention every 5th step."""
    from tgate import TgateSDLoader, TgateSDXLLoader

    loaders = {"StableDiffusionPipeline": TgateSDLoader, "StableDiffusionXLPipeline": TgateSDXLLoader}
    fixed = METHODS["tgate"].fixed
    if type(pipe).__name__ not in loaders:
        raise BenchError(f"tgate has no support for {type(pipe).__name__}: leave tgate out of --methods")
    loaders[type(pipe).__name__](pipe)

    def call(*args: Any, num_inference_steps: int, **options: Any) -> Any:
        gate = max(1, round(fixed["gate"] * num_inference_steps))
        settings = {key: fixed[key] for key in ("sp_interval", "fi_interval")}
        settings |= {"gate_step": gate, "warm_up": min(fixed["warm_up"], gate - 1)}
        return pipe.tgate(*args, num_inference_steps=num_inference_steps, **settings, **options)

    try:
        with _forwards_restored(pipe.unet):
            yield call
    finally:
        del pipe.tgate
        for module in pipe.unet.modules():
            if isinstance(module, Attention):
                vars(module).pop("cache", None)


@contextlib.contextmanager
def fewer_steps(pipe: Any, scenario: Scenario) -> Iterator[Callable[..., Any]]:
    """The unpatched pipeline with as many steps as take the time of a cache at the scenario's interval."""

    def call(*args: Any, num_inference_steps: int, **options: Any) -> Any:
        whole = -(-num_inference_steps // scenario.interval)
        return pipe(*args, num_inference_steps=steps_of_equal_time(num_inference_steps, whole), **options)

    yield call


@contextlib.contextmanager
def _forwards_restored(unet: nn.Module) -> Iterator[None]:
    """Both packages set `forward` on modules and leave it there; put back what each module had."""
    before = {module: vars(module).get("forward") for module in unet.modules()}
    try:
        yield
    finally:
        for module, forward in before.items():
            vars(module).pop("forward", None)
            if forward is not None:
                module.forward = forward
