"""One call of a ComfyUI model: pre-hooks on its blocks and attention patches that exist for this call only.

ComfyUI's transformer block calls, in this order: the pre-hook, which sees the block's un-normalised input; the attn1
patches, which may change what becomes query, key and value; its attention, or the attn1 replacement; the attn1 output
patches. The layer's own projections stay between them, so LoRA and low-memory modes hold.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from agentsd.attention import agent_attention
from agentsd.config import AgentConfig, Phase
from agentsd.layer_plan import LayerCall, LayerPlan, layer_calls, plan_layer, token_grid
from agentsd.merging import TokenMatching, merge_tokens, select_tokens, unmerge_tokens

from .layers import Layer

NOT_REACHED = "the call did not reach it"
BYPASSED = "another extension replaces its block's forward and leaves attention patches out"
OTHER_TOKENS = "another node changes its tokens (HyperTile and ToMe do); use either that node or AgentSD on this model"
OTHER_KEYS = "another node gives it other keys or values (reference-only nodes do); use either that node or AgentSD"
REPLACED = (
    "another node replaces its attention (perturbed- or self-attention guidance do); it works there without agentsd"
)
WARNED = (BYPASSED, OTHER_TOKENS, OTHER_KEYS, REPLACED)
"""Outcomes that a user should know about; the others follow from the settings."""


@dataclass
class _Pending:
    """What the output patch of the layer in progress has to do.

    Attributes:
        matching: of its tokens; None where nothing was merged.
        num_merged: r.
    """

    matching: TokenMatching | None
    num_merged: int


class UNetCall:
    """What every layer does in one call. A new object for each call, so that nothing of an earlier call can serve.

    Args:
        config: the settings.
        phase: of the call.
        timestep: noise level of the call, or one for each sample of the batch.
        size: (height, width) of the latent.
        layers: the layers to patch.

    Attributes:
        plans: what each layer did, by its name.
        reasons: why a layer ran unpatched, by its name.
    """

    def __init__(
        self,
        config: AgentConfig,
        phase: Phase,
        timestep: float | tuple[float, ...],
        size: tuple[int, int],
        layers: list[Layer],
    ):
        self.config, self.phase, self.timestep, self.size, self.layers = config, phase, timestep, size, layers
        self.plans: dict[str, LayerPlan] = {}
        self.reasons = {layer.name: NOT_REACHED for layer in layers}
        self._calls: dict[tuple[int, tuple[int, int]], list[LayerCall]] = {}
        self._replacements: dict[Any, Callable] = {}
        self._layer: Layer | None = None
        self._block_input: Tensor | None = None
        self._pending: _Pending | None = None

    @contextlib.contextmanager
    def hooked(self) -> Iterator[None]:
        """Hooks on the layers' blocks for the length of a `with` block."""
        handles = []
        try:
            for layer in self.layers:
                handles.append(layer.block.register_forward_pre_hook(self._hook_of(layer), with_kwargs=True))
                handles.append(layer.block.register_forward_hook(self._end_layer))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def transformer_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """ComfyUI's options of the call with our patches beside those of other nodes. The argument is not changed."""
        patches = dict(options.get("patches", {}))
        # The last before attention and the first after it: the patches of other nodes see whole grids.
        patches["attn1_patch"] = [*patches.get("attn1_patch", ()), self._before_attention]
        patches["attn1_output_patch"] = [self._after_attention, *patches.get("attn1_output_patch", ())]
        replace = dict(options.get("patches_replace", {}))
        replace["attn1"] = self._replacements = dict(replace.get("attn1", {}))
        return {**options, "patches": patches, "patches_replace": replace}

    def _hook_of(self, layer: Layer) -> Callable:
        def hook(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            self._layer, self._block_input = layer, args[0] if args else kwargs.get("x")
            self.reasons[layer.name] = BYPASSED

        return hook

    def _end_layer(self, block: nn.Module, args: tuple, output: Any) -> None:
        # A block that left the patches out must not leave its layer to the next block, which may not be ours.
        self._layer = self._block_input = self._pending = None

    def _before_attention(self, tokens: Tensor, keys: Tensor, values: Tensor, extra: dict) -> tuple:
        """attn1 patch: [B, N, C] thrice -> what the layer projects to queries, keys and values."""
        layer, block_input = self._layer, self._block_input
        self._layer = self._block_input = self._pending = None
        if layer is None or block_input is None:
            return tokens, keys, values
        grid = self._grid(layer, extra)
        reason = self._why_unpatched(grid, block_input, tokens, keys, values, extra)
        plan = plan_layer(self.config, self.phase, grid)
        if reason or plan.action == "none":
            self.reasons[layer.name] = reason or plan.reason
            return tokens, keys, values
        self.reasons.pop(layer.name)
        self.plans[layer.name] = plan

        call = self._call_of(layer, plan, tokens)
        if plan.action in ("downsample", "grid agents"):
            assert call.split is not None  # its action is not "none"
            kept = select_tokens(tokens, call.split.dst_index)
            if plan.action == "downsample":
                return tokens, kept, kept
            self._pending, self._replacements[_block_key(extra)] = _Pending(None, 0), self._attend
            return torch.cat([tokens, kept], dim=1), tokens, tokens
        matching = call.match(block_input)
        merged = merge_tokens(tokens, matching, call.num_merged)
        self._pending = _Pending(matching, call.num_merged)
        if plan.action == "merge":
            return merged, merged, merged
        # The agents follow the queries, so that one projection serves both, as on diffusers.
        agents = merge_tokens(tokens, matching, call.num_merged_for_agents)
        self._replacements[_block_key(extra)] = self._attend
        return torch.cat([merged, agents], dim=1), merged, merged

    def _attend(self, query: Tensor, key: Tensor, value: Tensor, extra: dict) -> Tensor:
        """attn1 replacement: agent attention. [B, M + agents, C], [B, M, C] twice -> [B, M, C]."""
        heads, num_tokens = extra["n_heads"], key.shape[1]
        query, key, value = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
        upcast = _precision(extra.get("attn_precision"), query.dtype) is torch.float32
        if self.config.upcast is not None:
            upcast = self.config.upcast
        queries, agents = query[:, :, :num_tokens], query[:, :, num_tokens:]
        alpha, exponent = self.config.alpha, self.config.broadcast_exponent
        out = agent_attention(queries, agents, key, value, alpha, exponent, upcast=upcast)
        return out.transpose(1, 2).flatten(2)

    def _after_attention(self, out: Tensor, extra: dict) -> Tensor:
        """attn1 output patch: [B, M, C] -> [B, N, C]."""
        pending, self._pending = self._pending, None
        if pending is None:
            return out
        # Only this layer's: a later call of another block with the same key must not find it.
        if self._replacements.get(_block_key(extra)) == self._attend:
            del self._replacements[_block_key(extra)]
        return out if pending.matching is None else unmerge_tokens(out, pending.matching, pending.num_merged)

    def _grid(self, layer: Layer, extra: dict) -> tuple[int, int]:
        """(height, width) in tokens. ComfyUI says it; a node such as Kohya Deep Shrink may make it smaller."""
        shape = extra.get("activations_shape")
        if shape is None:
            return token_grid(*self.size, layer.downsample)
        return int(shape[-2]), int(shape[-1])

    def _why_unpatched(
        self,
        grid: tuple[int, int],
        block_input: Tensor,
        tokens: Tensor,
        keys: Tensor,
        values: Tensor,
        extra: dict,
    ) -> str:
        if tokens.shape[:2] != block_input.shape[:2] or tokens.shape[1] != grid[0] * grid[1]:
            return OTHER_TOKENS
        if isinstance(self.timestep, tuple) and tokens.shape[0] != len(self.timestep):
            return OTHER_TOKENS
        if keys is not tokens or values is not tokens:
            return OTHER_KEYS
        if _block_key(extra) in self._replacements or extra.get("block") in self._replacements:
            return REPLACED
        return ""

    def _call_of(self, layer: Layer, plan: LayerPlan, tokens: Tensor) -> LayerCall:
        """What the layer does with [B, N, C]; the dsts of all layers of its level are drawn at once."""
        key = (layer.downsample, plan.grid)
        if key not in self._calls:
            count = sum(other.downsample == layer.downsample for other in self.layers)
            self._calls[key] = layer_calls(plan, self.config, self.timestep, count, tokens.shape[0], tokens.device)
        return self._calls[key][layer.number]


def _precision(of_layer: torch.dtype | None, dtype: torch.dtype) -> torch.dtype | None:
    """The precision of attention: the layer's own, or what ComfyUI's --force-upcast-attention and macOS ask for."""
    attention = sys.modules.get("comfy.ldm.modules.attention")  # loaded by ComfyUI, never by us
    rule = getattr(attention, "get_attn_precision", None)
    return of_layer if rule is None else rule(of_layer, dtype)


def _block_key(extra: dict) -> Any:
    """How ComfyUI names a block where attention is replaced: (part, number, index)."""
    block = extra.get("block")
    return None if block is None else (*block[:2], extra.get("block_index", 0))
