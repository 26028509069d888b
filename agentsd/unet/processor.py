"""AgentAttnProcessor: the forward of one patched self-attention layer, put together from the tensor operations."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, replace
from typing import Any

import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from ..attention import agent_attention, softmax_attention
from ..config import AgentConfig
from ..grid_split import GridSplit
from ..layer_plan import LayerCall, LayerPlan
from ..merging import TokenMatching, merge_each, select_tokens, unmerge_tokens
from .outcomes import Outcome, Warnings

LAYER_ATTRIBUTE = "_agentsd"
"""Where a patched `Attention` module keeps its LayerState. It hangs on the module and not on the processor because
diffusers remakes processors with `processor.__class__()` (load_ip_adapter, unload_ip_adapter)."""

_STANDARD_PROCESSOR = AttnProcessor2_0()


@dataclass(eq=False)
class LayerInCall:
    """What one layer does in one UNet call, and what became of it; made anew for each call.

    Attributes:
        plan: the numbers of the first part.
        parts: one LayerCall, or one for each phase where the samples of a batch differ.
        order: [B] puts the samples back into their order where there are several parts.
        batch: number of samples of the UNet call.
        block_input: [B, N, C] un-normalised input of the block, between the block's pre-hook and the attention.
        matching: the tokens' matching and r, where they are needed after attention.
        outcome: what became of the layer.
    """

    plan: LayerPlan
    parts: tuple[LayerCall, ...]
    order: Tensor | None
    batch: int
    block_input: Tensor | None = None
    matching: tuple[TokenMatching, int] | None = None
    outcome: Outcome = Outcome.NOT_REACHED

    def does_nothing(self) -> bool:
        """Whether the layer's own processor does it all in this call."""
        return len(self.parts) == 1 and self.parts[0].action == "none"

    def leave_alone(self) -> None:
        """Have the layer's own processor do it all in this call, as a guider's hook works on the layer."""
        self.plan = replace(self.plan, action="none", reason="a guider works on it in this call")
        self.parts, self.order = (LayerCall("none"),), None


@dataclass(eq=False)
class LayerState:
    """What hangs on a patched `Attention`: what is always true of it, and its part in the UNet call in progress.

    Attributes:
        name: module name of the `Attention` in the UNet.
        downsample: the layer's tokens form the latent's grid divided by this.
        config: settings, shared by all layers.
        warnings: the patch's, shared by all layers.
        fallback: the processor that stood here; it serves what this method does not apply to.
        keeps_matching: the matching is needed after attention, to merge around cross-attention or feed-forward.
        now: its part in the call in progress; None outside a call. Nothing of a call that has ended may be used.
    """

    name: str
    downsample: int
    config: AgentConfig
    warnings: Warnings
    fallback: Any
    keeps_matching: bool = False
    now: LayerInCall | None = None


class AgentAttnProcessor:
    """Self-attention through agents in the agent phase, and on merged tokens or by what else the settings say.

    Stateless: all it needs hangs on the `Attention` module (LAYER_ATTRIBUTE), so a copy made with no arguments serves
    as well. On a module without that state it is diffusers' AttnProcessor2_0.

    Source: Agent Attention, appendix B, with the token merging of ToMe for Stable Diffusion.
    """

    def __repr__(self) -> str:
        # diffusers shows it where it refuses a processor it does not know (set_default_attn_processor).
        return "agentsd's AgentAttnProcessor (call agentsd.remove_patch(unet) first, it restores the original ones)"

    def __call__(
        self,
        attn: Attention,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        temb: Tensor | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        """Attention over the block's normalised input [B, N, C]; returns [B, N, C], the residual not yet added."""
        layer: LayerState | None = getattr(attn, LAYER_ATTRIBUTE, None)
        if layer is None:
            standard = _STANDARD_PROCESSOR
            return standard(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)

        now, block_input = layer.now, None
        if now is not None:
            block_input, now.block_input = now.block_input, None
            now.outcome = _outcome(now, block_input, hidden_states, encoder_hidden_states, attention_mask)
        elif not layer.warnings.outside:
            layer.warnings.outside = True
            _warn_outside_a_call()
        if now is None or block_input is None or now.outcome is not Outcome.RAN or now.does_nothing():
            return layer.fallback(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)
        if now.order is None:  # one part
            return _attend(attn, layer, now, now.parts[0], hidden_states, block_input)

        # A timestep per sample: each sample follows its own phase. A video's frames come as samples of their own.
        frames = hidden_states.shape[0] // now.batch
        outputs = []
        for part in now.parts:
            assert part.samples is not None  # several parts each have their own
            samples = _repeat_frames(part.samples, frames)
            tokens, inputs = hidden_states.index_select(0, samples), block_input.index_select(0, samples)
            if part.action == "none":
                outputs.append(layer.fallback(attn, tokens, None, None, temb, *args, **kwargs))
            else:
                outputs.append(_attend(attn, layer, now, part, tokens, inputs))
        return torch.cat(outputs).index_select(0, _repeat_frames(now.order, frames))


def _attend(
    attn: Attention, layer: LayerState, now: LayerInCall, part: LayerCall, hidden_states: Tensor, block_input: Tensor
) -> Tensor:
    """What one part of a call does with its samples. [B', N, C] twice -> [B', N, C]."""
    split = part.split
    assert split is not None  # its action is not "none"
    if split.tokens.ndim == 2 and hidden_states.shape[0] != split.tokens.shape[0]:
        split = split.repeat(hidden_states.shape[0] // split.tokens.shape[0])
        part = replace(part, split=split)
    matching = agents = None
    if part.action == "downsample":
        # Keys and values of one token per cell: Smith et al., "ToDo: Token Downsampling for Efficient Generation of
        # High-Resolution Images" (arXiv 2402.13573), section 3; the token of a cell is drawn here, as a dst is.
        query = project_queries(attn, hidden_states)
        key, value = project_key_value(attn, _dsts(hidden_states, split))
    elif part.action == "grid agents":
        projected = attn.to_q(hidden_states)
        # Agents are projected like queries, and are among them here.
        query, agents = _as_queries(attn, projected), _as_queries(attn, _dsts(projected, split))
        key, value = project_key_value(attn, hidden_states)
    else:
        matching = part.match(block_input)
        if layer.keeps_matching and len(now.parts) == 1:
            now.matching = (matching, part.num_merged)
        query, agents, key, value = _merge_and_project(attn, part, matching, hidden_states)

    config = layer.config
    upcast = attn.upcast_attention if config.upcast is None else config.upcast
    if agents is None:
        out = softmax_attention(query, key, value, upcast=upcast)
    else:
        out = agent_attention(query, agents, key, value, config.alpha, config.broadcast_exponent, upcast=upcast)
    out = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))
    if attn.rescale_output_factor != 1:
        out = out / attn.rescale_output_factor
    # Unmerging copies whole tokens, so it may come before or after anything that acts on each token alone.
    return out if matching is None else unmerge_tokens(out, matching, part.num_merged)


def _merge_and_project(
    attn: Attention, part: LayerCall, matching: TokenMatching, hidden_states: Tensor
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """Queries, agents (None where there are none), keys and values of attention on merged tokens, from [B, N, C]."""
    if part.layout is None:  # a ratio of 0: all tokens are queries, and all are agents
        query = project_queries(attn, hidden_states)
        return query, query, *project_key_value(attn, hidden_states)
    layout = part.layout_for(matching)
    rows = merge_each(hidden_states, matching, layout)
    parts = layout.parts(rows)
    if part.merges_tokens and part.merges_agents:
        # All rows in one product, as agents are projected like queries.
        query, agents = (_as_queries(attn, x) for x in layout.parts(attn.to_q(rows[None])[0]))
        return query, agents, *project_key_value(attn, parts[0])
    merged, others = (parts[0], hidden_states) if part.merges_tokens else (hidden_states, parts[0])
    projected = project_queries(attn, others) if part.action == "agents" else None
    return project_queries(attn, merged), projected, *project_key_value(attn, merged)


def _dsts(tokens: Tensor, split: GridSplit) -> Tensor:
    """One token of each cell: [B, N, C] -> [B, num_dst, C]."""
    return select_tokens(tokens, split.dst_index.to(tokens.device))


def project_queries(attn: Attention, tokens: Tensor) -> Tensor:
    """[B, M, C] -> [B, heads, M, head_dim] by the layer's own query projection; agents are projected like queries."""
    return _as_queries(attn, attn.to_q(tokens))


def _as_queries(attn: Attention, projected: Tensor) -> Tensor:
    query = _split_heads(attn, projected)
    return query if attn.norm_q is None else attn.norm_q(query)


def project_key_value(attn: Attention, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """[B, M, C] -> key, value, each [B, heads, M, head_dim], called as modules so that LoRA stays in force."""
    key, value = _split_heads(attn, attn.to_k(tokens)), _split_heads(attn, attn.to_v(tokens))
    return key if attn.norm_k is None else attn.norm_k(key), value


def _split_heads(attn: Attention, projected: Tensor) -> Tensor:
    return projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def _repeat_frames(samples: Tensor, frames: int) -> Tensor:
    """Numbers of samples -> numbers of their frames, where each sample is `frames` rows of the batch."""
    if frames == 1:
        return samples
    return (samples[:, None] * frames + torch.arange(frames, device=samples.device)).flatten()


def _outcome(
    now: LayerInCall,
    block_input: Tensor | None,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None,
    attention_mask: Tensor | None,
) -> Outcome:
    """RAN where this is self-attention over the whole grid; else the reason why the layer runs unpatched."""
    if encoder_hidden_states is not None:
        return Outcome.CROSS
    if attention_mask is not None:
        return Outcome.MASK
    if block_input is None:
        return Outcome.NO_INPUT
    split = now.parts[0].split
    if hidden_states.ndim != 3 or hidden_states.shape[:2] != block_input.shape[:2]:
        return Outcome.OTHER_TOKENS
    if split is not None and hidden_states.shape[1] != split.num_tokens:
        return Outcome.OTHER_TOKENS
    by_sample = len(now.parts) > 1 or (split is not None and split.tokens.ndim == 2)
    if by_sample and hidden_states.shape[0] % now.batch != 0:
        return Outcome.OTHER_TOKENS
    return Outcome.RAN


# Under torch.compile this runs while the graph is made, which is once, as the graph stands for such calls only.
@torch.compiler.assume_constant_result
def _warn_outside_a_call() -> None:
    warnings.warn(
        "agentsd: a patched layer was called outside a call of its UNet (unet.forward(…) called directly, or a block "
        "on its own), where phase and size are not known; it ran unpatched. Call the UNet itself: unet(…)",
        stacklevel=3,
    )
