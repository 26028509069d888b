"""processor.py: one patched layer against naive loops over tokens, in every shape and phase."""

from __future__ import annotations

import pytest
import reference
import torch
from conftest import call_unet, make_unet

import agentsd
from agentsd.patch import get_patch


class Recorder:
    """Hooks on real modules that keep what one layer was given and what it returned."""

    def __init__(self, unet, layer):
        patch = get_patch(unet)
        self.layer = patch.layers[layer]
        block = unet.get_submodule(self.layer.name.removesuffix(".attn1"))
        block.register_forward_pre_hook(
            lambda m, a, k: self.keep("block_input", a[0] if a else k["hidden_states"]), with_kwargs=True
        )
        block.attn1.register_forward_pre_hook(lambda *_: setattr(self, "split", patch.states[layer].now.parts[0].split))
        block.attn1.register_forward_pre_hook(lambda m, a, k: self.keep("hidden_states", a[0]), with_kwargs=True)
        block.attn1.register_forward_hook(lambda m, a, out: self.keep("output", out))

    def keep(self, name, value):
        setattr(self, name, value.detach())

    def expected(self, config, phase, size):
        height, width = size
        stride = config.stride(phase, size)
        num_tokens = height * width
        num_src = num_tokens - (height // stride[0]) * (width // stride[1])
        offsets = None
        if config.use_rand:
            dst = self.split.dst_index
            row, column = dst // width, dst % width
            offsets = torch.empty_like(dst)
            offsets[row // stride[0] * (width // stride[1]) + column // stride[1]] = (
                row % stride[0] * stride[1] + column % stride[1]
            )
        if phase is agentsd.Phase.MERGE and config.late == "downsample":
            dsts = [
                (cell // (width // stride[1]) * stride[0] + place // stride[1]) * width
                + cell % (width // stride[1]) * stride[1] + place % stride[1]
                for cell, place in enumerate(offsets.tolist() if config.use_rand else [0] * (num_tokens - num_src))
            ]  # fmt: skip
            return reference.downsampled_layer(self.layer.attn, self.hidden_states, dsts)
        r_agents = None
        if phase is agentsd.Phase.AGENT:
            most = config.max_agents or num_tokens
            r_agents = min(num_src, max(int(num_tokens * config.agent_ratio), num_tokens - most))
        tile = config.match_tile and (config.match_tile, config.match_tile)
        return reference.layer(
            self.layer.attn, self.block_input, self.hidden_states, height, width, stride,
            offsets, min(num_src, int(num_tokens * config.ratio)), r_agents,
            config.alpha, config.broadcast_exponent, tile,
        )  # fmt: skip


@pytest.mark.parametrize("phase, timestep", [(agentsd.Phase.AGENT, 900), (agentsd.Phase.MERGE, 100)])
@pytest.mark.parametrize("use_rand", [True, False])
@pytest.mark.parametrize(
    "kind, size, settings",
    [
        ("sd15", (8, 8), {}),
        ("sd15", (12, 8), {"ratio": 0.2}),
        ("sd15", (10, 7), {"ratio": 0.5}),
        ("sd15", (9, 11), {"agent_stride": (3, 2), "merge_stride": (1, 3)}),
        ("sd15", (8, 8), {"agent_ratio": 0.6, "alpha": 0.3, "broadcast_exponent": -0.4}),
        ("sd15", (12, 8), {"late": "downsample"}),
        ("sd15", (9, 7), {"late": "downsample", "merge_stride": (3, 2), "ratio": 0.9, "agent_stride": 4}),
        ("sd15", (13, 8), {"late": "downsample", "max_keys": 5}),
        ("sd15", (16, 8), {"max_agents": 2}),
        ("sd15", (9, 11), {"max_agents": 3, "agent_ratio": 0.7}),
        ("sd15", (16, 8), {"match_tile": 4}),
        ("sd15", (16, 8), {"match_tile": 8, "max_agents": 4}),
        ("sd2", (8, 10), {}),
        ("sdxl", (16, 18), {}),  # its attention sees 8 × 9 tokens
        ("sdxl", (17, 13), {}),  # … 9 × 7
    ],
)
def test_equals_naive_loops(kind, size, settings, use_rand, phase, timestep):
    unet = make_unet(kind)
    config = agentsd.AgentConfig(use_rand=use_rand, seed=5, **settings)
    agentsd.apply_patch(unet, config)
    # Where nothing is drawn, layers differ in their weights alone: the last one stands for all.
    for layer in range(len(get_patch(unet).layers))[0 if use_rand else -1 :]:
        recorder = Recorder(unet, layer)
        call_unet(unet, timestep=timestep, size=size)
        grid = size if kind != "sdxl" else (-(-size[0] // 2), -(-size[1] // 2))
        expected = recorder.expected(config, phase, grid)
        assert expected.std() > 0.01  # not a comparison of zeros
        torch.testing.assert_close(recorder.output, expected.float(), atol=1e-4, rtol=1e-4)


def test_ratio_zero_still_uses_agents():
    unet = make_unet()
    config = agentsd.AgentConfig(ratio=0.0)
    agentsd.apply_patch(unet, config)
    recorder = Recorder(unet, 0)
    call_unet(unet, timestep=900, size=(8, 8))
    expected = recorder.expected(config, agentsd.Phase.AGENT, (8, 8))
    torch.testing.assert_close(recorder.output, expected.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("timestep", [900, 100])
def test_upcast_survives_logits_beyond_float16(dtype, timestep):
    unet = make_unet("sd2")
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if ".attn1.to_q." in name or ".attn1.to_k." in name:
                parameter.mul_(400)
    unet = unet.to(dtype)
    agentsd.apply_patch(unet)  # SD 2's own upcast_attention=True decides
    seen = []
    attn = get_patch(unet).layers[0].attn
    attn.to_q.register_forward_hook(lambda m, a, out: seen.append(out.detach()))
    attn.to_k.register_forward_hook(lambda m, a, out: seen.append(out.detach()))
    out = call_unet(unet, timestep=timestep)
    query, key = (x.float().unflatten(-1, (attn.heads, -1)).transpose(1, 2) for x in (seen[0], seen[1]))
    key, query = sorted((key, query), key=lambda x: x.shape[2])
    assert (query @ key.mT).abs().max() > 65504  # the trouble is really there
    assert torch.isfinite(out).all()


def test_rebuilt_with_no_arguments_it_still_works():
    """load_ip_adapter and unload_ip_adapter remake processors with processor.__class__()."""
    unet = make_unet()
    agentsd.apply_patch(unet)
    before = call_unet(unet)
    unet.set_attn_processor({name: p.__class__() for name, p in unet.attn_processors.items()})
    assert torch.equal(call_unet(unet), before)


def test_without_a_patch_it_is_the_standard_processor():
    unet = make_unet()
    before = call_unet(unet)
    from agentsd.unet.processor import AgentAttnProcessor

    for name, module in unet.named_modules():
        if name.endswith("attn1"):
            module.set_processor(AgentAttnProcessor())
    assert torch.equal(call_unet(unet), before)


def test_fallback_on_mask_says_so():
    # One resolution only: diffusers hands the same mask to every level, so it fits no other UNet.
    unet = make_unet(mid_block_type=None)
    sample = torch.randn(2, 4, 16, 16, generator=torch.Generator().manual_seed(0))
    text = torch.randn(2, 7, 32, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(2, 256)
    mask[:, 200:] = 0
    with torch.no_grad():
        before = unet(sample, 900, text, attention_mask=mask).sample
        agentsd.apply_patch(unet)
        with pytest.warns(UserWarning, match="attention mask"):
            after = unet(sample, 900, text, attention_mask=mask).sample
    assert torch.equal(before, after)


def test_too_small_a_grid_runs_unpatched():
    unet = make_unet()
    before = call_unet(unet, size=(2, 2))
    agentsd.apply_patch(unet)
    with pytest.warns(UserWarning, match="2×2 grid is smaller than a cell"):
        assert torch.equal(call_unet(unet, size=(2, 2)), before)
