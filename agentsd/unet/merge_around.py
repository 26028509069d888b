"""Merge the tokens before a block's cross-attention or feed-forward and unmerge them after it."""

from __future__ import annotations

from typing import Any

from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor, nn

from ..merging import TokenMatching, merge_tokens, unmerge_tokens
from .layers import class_name, is_plain_softmax, replaced_forward
from .processor import LayerState


class MergeAround:
    """Hooks that merge a module's input tokens and unmerge its output, by the matching of the block's self-attention.

    Args:
        block: the transformer block.
        layer: its self-attention's state, which keeps the matching of the call.
        last: nothing after this module needs the matching, which is let go then. Compiled graphs cannot return it.
    """

    def __init__(self, block: BasicTransformerBlock, layer: LayerState, last: bool):
        self.block = block
        self.layer = layer
        self.last = last

    def install(self, module: nn.Module) -> list[Any]:
        """Add the hooks to the block's `attn2` or `ff`; returns their handles."""
        return [
            module.register_forward_pre_hook(self.merge, with_kwargs=True),
            module.register_forward_hook(self.unmerge),
        ]

    def merge(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        """The pre-hook."""
        found = self._matching(module)
        if found is None:
            return None
        if args:
            return (merge_tokens(args[0], *found), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": merge_tokens(kwargs["hidden_states"], *found)}

    def unmerge(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        """The hook after it."""
        found = self._matching(module)
        if self.last and self.layer.now is not None:
            self.layer.now.matching = None
        return None if found is None else unmerge_tokens(output, *found)

    def _matching(self, module: nn.Module) -> tuple[TokenMatching, int] | None:
        if module is self.block.ff and self.block._chunk_size is not None:
            return None  # forward chunking hands it slices of the batch or of the tokens, which do not match
        if module is self.block.attn2 and why_unmerged(module) is not None:
            return None
        return None if self.layer.now is None else self.layer.now.matching


def why_unmerged(attn2: nn.Module) -> str | None:
    """The note on a cross-attention that may treat tokens by their place in the image; None where merging may go on.

    IP-Adapter's masks and regional prompts do. Only diffusers' plain softmax processors are known not to.
    """
    what = replaced_forward(attn2)
    if what is None and not is_plain_softmax(processor := getattr(attn2, "processor", None)):
        what = f"the processor {class_name(processor)}"
    return what and f"its cross-attention is not merged, as {what} may depend on the tokens' places"
