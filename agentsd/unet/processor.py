"""AgentAttnProcessor: the forward of one patched self-attention layer, put together from the tensor operations."""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field
from threading import get_ident
from typing import Any

from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from torch import Tensor

from ..attention import agent_attention, softmax_attention
from ..config import AgentConfig, Phase
from ..merging import GridSplit, TokenMatching, match_tokens, merge_tokens, unmerge_tokens

LAYER_ATTRIBUTE = "_agentsd"
"""Where a patched `Attention` module keeps its LayerState. It hangs on the module and not on the processor because
diffusers remakes processors with `processor.__class__()` (load_ip_adapter, unload_ip_adapter)."""

_STANDARD_PROCESSOR = AttnProcessor2_0()


@dataclass
class RunState:
    """What the UNet call in progress is about; one object per patched UNet, written by its pre-hook.

    Attributes:
        height, width: size of the latent, in latent pixels.
        phase: what the patched layers do in this call.
        timestep: noise level of this call, 0 … num_train_timesteps − 1.
        prepared: a caller outside a compiled graph has set the above, so that the graph need not.
        caller: the thread that is inside the UNet, under the key "thread".
    """

    height: int = 0
    width: int = 0
    phase: Phase = Phase.MERGE
    timestep: float = 0.0
    prepared: bool = False
    caller: dict[str, int] = field(default_factory=dict)

    def enter(self) -> None:
        """Claim the UNet for this thread until `leave`; a second thread would change the phase under the first.

        Raises:
            RuntimeError: another thread is inside.
        """
        if self.caller.setdefault("thread", get_ident()) != get_ident():  # setdefault is atomic: one thread wins
            raise RuntimeError(
                "agentsd: two threads call this patched UNet at once. Give each thread its own copy (copy.deepcopy of "
                "a pipeline copies the patch too) or hold a lock around the call; if a call was interrupted before "
                "this one, call agentsd.apply_patch again"
            )

    def leave(self) -> None:
        """Undo `enter`; harmless in a thread that is not inside."""
        if self.caller.get("thread") == get_ident():
            self.caller.clear()


def token_grid(latent_height: int, latent_width: int, downsample: int) -> tuple[int, int]:
    """(height, width) of the tokens at a level of the UNet. Every stride-2 downsampling of diffusers rounds up."""
    return -(-latent_height // downsample), -(-latent_width // downsample)


@dataclass
class LayerState:
    """What one patched self-attention layer knows: its place, its settings, and the block's input of this call.

    Attributes:
        name: module name of the `Attention` in the UNet.
        downsample: the layer's tokens form the latent's grid divided by this.
        config: settings, shared by all layers.
        run: the UNet call in progress, shared by all layers.
        fallback: the processor that stood here; it serves what this method does not apply to.
        split: dsts and srcs of this call; None where there is nothing to merge or the grid is smaller than a cell.
        block_input: [B, N, C] un-normalised input of the block, between the block's pre-hook and the attention.
        plan: how the current block input is merged, for the cross-attention and feed-forward that follow.
    """

    name: str
    downsample: int
    config: AgentConfig
    run: RunState
    fallback: Any
    split: GridSplit | None = None
    block_input: Tensor | None = None
    plan: MergePlan | None = None
    warned: set[str] = field(default_factory=set)

    def grid(self) -> tuple[int, int]:
        """(height, width) of the layer's token grid in the UNet call in progress."""
        return token_grid(self.run.height, self.run.width, self.downsample)

    def downsamples(self) -> bool:
        """Whether this call takes keys and values from the dsts alone, in place of merging."""
        return self.run.phase is Phase.MERGE and self.config.late == "downsample" and self.split is not None

    def warn_once(self, kind: str, message: str) -> None:
        if kind not in self.warned:
            self.warned.add(kind)
            warnings.warn(f"agentsd: {self.name}: {message}", stacklevel=3)


@dataclass(frozen=True)
class MergePlan:
    """How one layer merges its tokens in one call: the edges, and how many of them serve features and agents.

    Attributes:
        matching: the ranked edges.
        r: number of tokens merged away before attention.
        r_agents: number of tokens merged away to make the agents; None where there are none (merge phase).
    """

    matching: TokenMatching
    r: int
    r_agents: int | None


def merge_plan(layer: LayerState, block_input: Tensor) -> MergePlan | None:
    """Decide what the layer merges in this call; None where that is nothing at all.

    Args:
        layer: the layer, its run state set for this call.
        block_input: [B, N, C] un-normalised input of the transformer block.
    """
    if layer.split is None or layer.downsamples():
        return None
    config, phase = layer.config, layer.run.phase
    num_tokens = block_input.shape[1]
    r = config.num_merged(num_tokens)
    if phase is Phase.MERGE and r == 0:
        return None
    # Offloading may bring the block's input to another device than the UNet was called with.
    matching = match_tokens(block_input, layer.split.to(block_input.device))
    r_agents = config.num_merged_for_agents(num_tokens, matching.num_src) if phase is Phase.AGENT else None
    return MergePlan(matching, min(r, matching.num_src), r_agents)


class AgentAttnProcessor:
    """Self-attention on merged tokens: through agents in the agent phase, plain softmax attention in the merge phase.

    Stateless: all it needs hangs on the `Attention` module (LAYER_ATTRIBUTE), so a copy made with no arguments serves
    as well. On a module without that state it is diffusers' AttnProcessor2_0.

    Source: Agent Attention, appendix B, with the token merging of ToMe for Stable Diffusion.
    """

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

        block_input, layer.block_input = layer.block_input, None
        layer.plan = None
        if _applies(layer, block_input, hidden_states, encoder_hidden_states, attention_mask):
            if layer.downsamples():
                return _downsampled_attention(attn, layer, hidden_states)
            layer.plan = merge_plan(layer, block_input)
        plan = layer.plan
        if plan is None:
            return layer.fallback(attn, hidden_states, encoder_hidden_states, attention_mask, temb, *args, **kwargs)

        merged = merge_tokens(hidden_states, plan.matching, plan.r)
        upcast = _upcasts(attn, layer)
        query, (key, value) = project_queries(attn, merged), project_key_value(attn, merged)
        if plan.r_agents is None:
            out = softmax_attention(query, key, value, upcast=upcast)
        else:
            agents = project_queries(attn, merge_tokens(hidden_states, plan.matching, plan.r_agents))
            out = agent_attention(
                query, agents, key, value, layer.config.alpha, layer.config.broadcast_exponent, upcast=upcast
            )
        # Unmerging copies whole tokens, so it may come before or after anything that acts on each token alone.
        return unmerge_tokens(_project_out(attn, out), plan.matching, plan.r)


def _downsampled_attention(attn: Attention, layer: LayerState, hidden_states: Tensor) -> Tensor:
    """Softmax attention of all tokens to one token of each cell. [B, N, C] -> [B, N, C].

    Source: Smith et al., "ToDo: Token Downsampling for Efficient Generation of High-Resolution Images"
    (arXiv 2402.13573), section 3; the token of a cell is drawn here, as a dst is.
    """
    kept = hidden_states.index_select(1, layer.split.dst_index.to(hidden_states.device))
    key, value = project_key_value(attn, kept)
    out = softmax_attention(project_queries(attn, hidden_states), key, value, upcast=_upcasts(attn, layer))
    return _project_out(attn, out)


def project_queries(attn: Attention, tokens: Tensor) -> Tensor:
    """[B, M, C] -> [B, heads, M, head_dim] by the layer's own query projection; agents are projected like queries."""
    query = _split_heads(attn, attn.to_q(tokens))
    return query if attn.norm_q is None else attn.norm_q(query)


def project_key_value(attn: Attention, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """[B, M, C] -> key, value, each [B, heads, M, head_dim], called as modules so that LoRA stays in force."""
    key, value = _split_heads(attn, attn.to_k(tokens)), _split_heads(attn, attn.to_v(tokens))
    return key if attn.norm_k is None else attn.norm_k(key), value


def _project_out(attn: Attention, out: Tensor) -> Tensor:
    """[B, heads, M, head_dim] -> [B, M, C] by the layer's own output projection."""
    out = attn.to_out[1](attn.to_out[0](out.transpose(1, 2).flatten(2)))
    return out if attn.rescale_output_factor == 1 else out / attn.rescale_output_factor


def _upcasts(attn: Attention, layer: LayerState) -> bool:
    return attn.upcast_attention if layer.config.upcast is None else layer.config.upcast


def _split_heads(attn: Attention, projected: Tensor) -> Tensor:
    return projected.unflatten(-1, (attn.heads, -1)).transpose(1, 2)


def _applies(
    layer: LayerState,
    block_input: Tensor | None,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None,
    attention_mask: Tensor | None,
) -> bool:
    """Whether this call is self-attention over the whole grid; if not, a warning says why it runs unpatched."""
    if encoder_hidden_states is not None:
        layer.warn_once("cross", "called with encoder_hidden_states; it ran unpatched, merging is for self-attention")
        return False
    if attention_mask is not None:
        layer.warn_once("mask", "called with an attention mask; it ran unpatched, as merged tokens have no mask")
        return False
    height, width = layer.grid()
    if (
        block_input is None
        or hidden_states.ndim != 3
        or hidden_states.shape[:2] != block_input.shape[:2]
        or hidden_states.shape[1] != height * width
    ):
        layer.warn_once(
            "tokens",
            f"got {hidden_states.shape[-2]} tokens where its {height}×{width} grid has {height * width}; it ran "
            "unpatched. Another tool (tomesd, HyperTile, a tiling hook) may change the tokens too: use one of them",
        )
        return False
    return True
