"""Gradients through the patched UNet: equal to those of naive loops, with checkpointing, LoRA and bfloat16 autocast."""

from __future__ import annotations

import copy

import pytest
import reference
import torch
from conftest import make_unet

import agentsd
from agentsd import AgentConfig, Phase, layer_plan
from agentsd.unet.layers import find_layers

SIDE = 8
TIMESTEPS = {Phase.AGENT: 900, Phase.MERGE: 100}
PHASES = pytest.mark.parametrize("phase", Phase, ids=lambda phase: phase.value)
CONFIG = AgentConfig(seed=3)


def make_models(lora: bool):
    """(a UNet in float32, the same one in float64); with LoRA its adapters alone are trained."""
    unet = make_unet().train()
    if lora:
        from peft import LoraConfig

        torch.manual_seed(1)
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        unet.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=targets))
        with torch.no_grad():
            for name, parameter in unet.named_parameters():
                if "lora_B" in name:  # fresh ones are zero, and so are the gradients of their lora_A
                    parameter.normal_(0, 0.1)
    return unet, copy.deepcopy(unet).double()


class NaiveAttention:
    """Processor of one layer: the method in loops over tokens, with autograd's gradients."""

    def __init__(self, block, number, num_layers, phase, matchings=None):
        stride = CONFIG.stride(phase)
        cells = (SIDE // stride[0]) * (SIDE // stride[1])
        drawn = layer_plan.draw_offsets(CONFIG.seed, TIMESTEPS[phase], num_layers, cells, stride[0] * stride[1])
        self.stride, self.offsets = stride, drawn[number]
        self.r = int(SIDE * SIDE * CONFIG.ratio)
        self.r_agents = (
            min(SIDE * SIDE - cells, int(SIDE * SIDE * CONFIG.agent_ratio)) if phase is Phase.AGENT else None
        )
        self.matching = None if matchings is None else matchings[number]
        block.register_forward_pre_hook(lambda _, args: setattr(self, "block_input", args[0].detach()))

    def matched(self):
        if self.matching is None:
            return [reference.match(x, SIDE, SIDE, self.stride, self.offsets) for x in self.block_input]
        found = []
        for tokens, best_dst in zip(self.matching.tokens.tolist(), self.matching.best_dst.tolist()):
            ranked, dsts = tokens[: len(best_dst)], tokens[len(best_dst) :]
            found.append((ranked, {src: dsts[best] for src, best in zip(ranked, best_dst)}, dsts))
        return found

    def __call__(self, attn, hidden_states, *args, **kwargs):
        return reference.attend_merged(
            attn, hidden_states, self.matched(), self.r, self.r_agents, CONFIG.alpha, CONFIG.broadcast_exponent
        )


def put_naive_attention(unet, phase, matchings=None):
    layers, _ = find_layers(unet, CONFIG)
    for number, layer in enumerate(layers):
        block = layer.block
        block.attn1.set_processor(NaiveAttention(block, number, len(layers), phase, matchings))
    assert len(layers) == 3


def gradients_of(unet, timestep, autocast=False):
    """Gradients of a loss by name: of the input, the text, and every parameter that is trained."""
    generator = torch.Generator().manual_seed(0)
    dtype = next(unet.parameters()).dtype
    inputs = {"sample": torch.randn(1, 4, SIDE, SIDE, generator=generator).to(dtype).requires_grad_()}
    inputs["text"] = torch.randn(1, 7, 32, generator=generator).to(dtype).requires_grad_()
    target = torch.randn(1, 4, SIDE, SIDE, generator=generator).to(dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        predicted = unet(inputs["sample"], timestep, inputs["text"]).sample
    (predicted - target).square().mean().backward()
    trained = {name: parameter for name, parameter in unet.named_parameters() if parameter.requires_grad}
    return {name: tensor.grad for name, tensor in (inputs | trained).items()}


@pytest.fixture(scope="module")
def naive_gradients():
    """(phase, lora) -> the gradients of naive loops in float64, each computed once."""
    known = {}

    def of(phase, lora):
        if (phase, lora) not in known:
            _, unet = make_models(lora)
            put_naive_attention(unet, phase)
            known[phase, lora] = gradients_of(unet, TIMESTEPS[phase])
        return known[phase, lora]

    return of


@PHASES
@pytest.mark.parametrize("lora", [False, True], ids=["all-weights", "lora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "checkpointed"])
def test_equal_to_naive_loops(naive_gradients, phase, lora, checkpointing):
    unet, _ = make_models(lora)
    if checkpointing:
        unet.enable_gradient_checkpointing()
    agentsd.apply_patch(unet, CONFIG)
    found, expected = gradients_of(unet, TIMESTEPS[phase]), naive_gradients(phase, lora)
    assert found.keys() == expected.keys() and any("attn1" in name for name in found)
    for name, gradient in expected.items():
        # Relative to the tensor's largest entry: 1e-4 of numbers that are themselves 1e-5 would show nothing.
        assert (found[name] - gradient).abs().max() <= 1e-4 * gradient.abs().max(), name


@PHASES
@pytest.mark.parametrize("lora", [False, True], ids=["all-weights", "lora"])
def test_bfloat16_autocast_adds_only_its_rounding(monkeypatch, phase, lora):
    """Mixed precision: the error is that of autocast on the unpatched UNet, not one of the patch.

    bfloat16 has 8 bits, so similarities that are nearly equal change places, and another token is merged. The naive
    loops are therefore told which tokens were merged; that choice has no gradient. What is left is rounding, and the
    unpatched UNet's rounding, measured against its own float64 gradients, is the measure.
    """
    unet, precise = make_models(lora)
    plain = relative_error(gradients_of(unet, TIMESTEPS[phase], autocast=True), gradients_of(precise, TIMESTEPS[phase]))
    assert 0.01 < plain < 0.15  # autocast was on

    unet, precise = make_models(lora)
    unet.enable_gradient_checkpointing()
    matchings = []
    match = layer_plan.match_tokens
    monkeypatch.setattr(layer_plan, "match_tokens", lambda *given: matchings.append(match(*given)) or matchings[-1])
    agentsd.apply_patch(unet, CONFIG)
    found = gradients_of(unet, TIMESTEPS[phase], autocast=True)
    assert len(matchings) == 6  # three layers, each again in the backward pass
    for layer in range(3):  # which goes from the last layer to the first, and merges the same tokens
        again = matchings[5 - layer]
        assert torch.equal(again.tokens, matchings[layer].tokens)
        assert torch.equal(again.best_dst, matchings[layer].best_dst)
    put_naive_attention(precise, phase, matchings[:3])
    patched = relative_error(found, gradients_of(precise, TIMESTEPS[phase]))
    assert patched < 2 * plain  # from network to network rounding differs by half; without α it would be beyond
    assert all(gradient.dtype is torch.float32 for gradient in found.values())


def relative_error(found, expected):
    """|found − expected| / |expected| of all gradients as one vector."""
    difference = sum((found[name] - gradient).square().sum() for name, gradient in expected.items())
    return float((difference / sum(gradient.square().sum() for gradient in expected.values())).sqrt())
