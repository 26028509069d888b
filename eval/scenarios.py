"""use_scenario: makes a pipeline draw by a scenario for the length of a `with` block."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor
from torch import Tensor, nn

import agentsd
from agentsd.images.methods import use_method

from .protocol import CONTROLS, BenchError, Scenario


@contextlib.contextmanager
def use_scenario(pipe: Any, scenario: Scenario) -> Iterator[None]:
    """Patch an unpatched pipeline; afterwards it is as before.

    Entered anew for every call of the pipeline: ToMeSD's draws and DeepCache's steps begin again with each entry, so
    that a picture does not depend on those drawn before it.

    Raises:
        BenchError: DeepCache is asked for and not installed.
    """
    with contextlib.ExitStack() as stack:
        if scenario.method == "sd-naive":
            stack.enter_context(_naive_attention(pipe))
        elif scenario.method in CONTROLS:
            stack.enter_context(_control(pipe, scenario))
        elif scenario.method == "limit":
            stack.enter_context(_limit(pipe))
        elif scenario.method != "sd":
            stack.enter_context(use_method(pipe, scenario.method, scenario.config))
        if scenario.cache_interval > 1:
            stack.enter_context(_deepcache(pipe, scenario.cache_interval))
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
def _naive_attention(pipe: Any) -> Iterator[None]:
    before = pipe.unet.attn_processors
    pipe.unet.set_attn_processor(AttnProcessor())  # explicit softmax, as Stable Diffusion's first code had it
    try:
        yield
    finally:
        pipe.unet.set_attn_processor(before)


@contextlib.contextmanager
def _control(pipe: Any, scenario: Scenario) -> Iterator[None]:
    """agentsd's patch, with another processor on its layers for the length of each UNet call in the agent phase."""
    stand_in = _STAND_INS[scenario.method]()
    with agentsd.patched(pipe, scenario.config):
        layers = _patched_layers(pipe.unet)
        # Its hook runs after the patch's own pre-hook, which looks whether its processors are still there.
        with in_agent_phase(pipe, scenario.config, {layer: stand_in for layer in layers.values()}):
            yield


@contextlib.contextmanager
def in_agent_phase(pipe: Any, config: agentsd.AgentConfig, stand_ins: Mapping[Attention, Any]) -> Iterator[None]:
    """Other processors on these layers for the length of each UNet call in the agent phase; afterwards those before.

    Args:
        pipe: a pipeline, patched or not.
        config: says which timesteps the agent phase is.
        stand_ins: layer of the pipeline's UNet to the processor that stands in.
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
def _limit(pipe: Any) -> Iterator[None]:
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
    """The self-attention layers of an unpatched pipeline's UNet that agentsd patches by default, by module name."""
    with agentsd.patched(pipe):
        return _patched_layers(pipe.unet)


def _patched_layers(unet: nn.Module) -> dict[str, Attention]:
    return {
        name: module
        for name, module in unet.named_modules()
        if isinstance(module, Attention) and type(module.processor).__name__ == "AgentAttnProcessor"
    }


@contextlib.contextmanager
def _deepcache(pipe: Any, interval: int) -> Iterator[None]:
    try:
        from DeepCache import DeepCacheSDHelper
    except ImportError:
        raise BenchError("DeepCache is not installed: pip install DeepCache, or leave --with-deepcache out") from None
    modules = [pipe.unet, *pipe.unet.modules()]
    before = {module: "forward" in vars(module) for module in modules}
    helper = DeepCacheSDHelper(pipe=pipe)
    helper.set_params(cache_interval=interval, cache_branch_id=0)
    helper.enable()
    try:
        yield
    finally:
        helper.disable()
        for module, had_its_own in before.items():
            if not had_its_own:  # DeepCache puts the class's forward back as an attribute of the object
                vars(module).pop("forward", None)
