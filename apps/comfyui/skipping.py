"""How parts of a ComfyUI UNet or ControlNet are skipped for the length of one call.

ComfyUI's UNet concatenates what comes up from below with the residual of the same level. A skipped layer returns its
input with no channels left, `x[:, :0]`, so that concatenation leaves nothing in the way and the last skipped layer can
return the kept feature. Nothing of the UNet's own forward is copied.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn


def num_pairs(unet: Any) -> int:
    """How many pairs of resnet and transformer the last level of a UNet has: the most that can be recomputed."""
    blocks = list(unet.output_blocks)
    level = 0
    for block in reversed(blocks):
        if any(type(layer).__name__ == "Upsample" for layer in block):
            break
        level += 1
    return min(level, len(blocks) - 1)


class SkippedParts:
    """What a cached call of a UNet skips.

    Args:
        unet: the UNet.
        depth: how many pairs of resnet and transformer at the end are recomputed, 1 … `num_pairs`.
    """

    def __init__(self, unet: Any, depth: int):
        self._depth = depth
        self._num_output = len(unet.output_blocks)
        blocks = [*list(unet.input_blocks)[depth:], unet.middle_block, *list(unet.output_blocks)[:-depth]]
        self._layers = [layer for block in blocks if block is not None for layer in block]
        self._last = self._layers[-1]

    @contextlib.contextmanager
    def skipped(self, feature: Tensor) -> Iterator[None]:
        """Skip them in a `with` block; what follows goes on with a feature, [B, C, H, W]."""
        with contextlib.ExitStack() as stack:
            for layer in self._layers:
                stack.enter_context(_replaced(layer, _nothing))
            stack.enter_context(_replaced(self._last, lambda *args, **kwargs: feature))
            yield

    @contextlib.contextmanager
    def kept(self) -> Iterator[list[Tensor]]:
        """Keep in a `with` block what the last of them returns, in the list that it gives."""
        found: list[Tensor] = []

        def keep(layer: nn.Module, args: tuple, output: Tensor) -> None:
            found.append(output.clone())  # other nodes write into it (FreeU)

        handle = self._last.register_forward_hook(keep)
        try:
            yield found
        finally:
            handle.remove()

    def control(self, control: Any) -> Any:
        """The residuals of ControlNets and T2I-Adapters that a cached call takes; ComfyUI pops them from the end."""
        if not isinstance(control, dict):
            return control
        left = {}
        for part, residuals in control.items():
            count = len(residuals)
            left[part] = [
                None if self._skips((part, count - 1 - place)) else residual for place, residual in enumerate(residuals)
            ]
        return left

    def transformer_options(self, options: dict[str, Any]) -> dict[str, Any]:
        """ComfyUI's options with the patches of other nodes left out in skipped blocks. The argument is unchanged."""
        patches = dict(options.get("patches", {}))
        for kind in ("input_block_patch", "input_block_patch_after_skip"):
            if kind in patches:
                patches[kind] = [self._unless_skipped(patch, 1) for patch in patches[kind]]
        if "output_block_patch" in patches:
            patches["output_block_patch"] = [self._unless_skipped(patch, 2) for patch in patches["output_block_patch"]]
        if "forward_timestep_embed_patch" in patches:
            patches["forward_timestep_embed_patch"] = [
                (kind, self._embedding_patch(handler)) for kind, handler in patches["forward_timestep_embed_patch"]
            ]
        return {**options, "patches": patches}

    def _skips(self, block: tuple) -> bool:
        part, number = block[:2]
        if part == "input":
            return number >= self._depth
        return part == "middle" or number < self._num_output - self._depth

    def _unless_skipped(self, patch: Callable, count: int) -> Callable:
        def patched(*args: Any) -> Any:
            if self._skips(args[-1]["block"]):
                return args[0] if count == 1 else args[:count]
            return patch(*args)

        return patched

    def _embedding_patch(self, handler: Callable) -> Callable:
        def patched(layer: Any, x: Tensor, emb: Any, context: Any, options: dict[str, Any], *args: Any) -> Tensor:
            return x[:, :0] if self._skips(options["block"]) else handler(layer, x, emb, context, options, *args)

        return patched


class Keeper:
    """A patch of ComfyUI's output blocks that keeps what comes up from the skipped layers: hooks are not seen by a
    compiled graph. `keeper_of` gives a UNet always the same one, as a graph is compiled anew for another.

    Args:
        place: of the first output block that is recomputed.

    Attributes:
        feature: [B, C, H, W] of the last call; a graph may overwrite it.
    """

    def __init__(self, place: int):
        self._place = place
        self.feature: Tensor | None = None

    def __call__(self, hidden_states: Tensor, residual: Tensor, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
        if options["block"] == ("output", self._place):
            self.feature = hidden_states
        return hidden_states, residual


_KEEPERS: weakref.WeakKeyDictionary[nn.Module, dict[int, Keeper]] = weakref.WeakKeyDictionary()


def keeper_of(unet: Any, depth: int) -> Keeper:
    """The Keeper of a UNet for a depth as SkippedParts."""
    place = len(unet.output_blocks) - depth
    return _KEEPERS.setdefault(getattr(unet, "_orig_mod", unet), {}).setdefault(place, Keeper(place))


@contextlib.contextmanager
def stopped_controlnets(controls: list[Any], depth: int) -> Iterator[None]:
    """Stop ControlNets after their first layers in a `with` block: a cached call takes no other residuals.

    Args:
        controls: ComfyUI's control objects, each the last one of a chain.
        depth: as SkippedParts.
    """
    with contextlib.ExitStack() as stack:
        stopped: set[int] = set()
        for control in controls:
            models: list[Any] = [getattr(one, "control_model", None) for one in chain(control)]
            # Residuals of a chain are added to each other, so that all of one must be of the same kind.
            if not all(_stops(model) for model in models):
                continue
            for model in models:
                if id(model) in stopped:
                    continue
                stopped.add(id(model))
                blocks = [*list(model.input_blocks)[depth:], *list(model.zero_convs)[depth:]]
                for block in (*blocks, model.middle_block, model.middle_block_out):
                    stack.enter_context(_replaced(block, _nothing))
        yield


def chain(control: Any) -> list[Any]:
    """A control object and those before it, whose residuals are added."""
    found: list[Any] = []
    while control is not None:
        found.append(control)
        control = getattr(control, "previous_controlnet", None)
    return found


def _stops(model: Any) -> bool:
    parts = ("input_blocks", "zero_convs", "middle_block", "middle_block_out")
    return all(hasattr(model, part) for part in parts) and not hasattr(model, "_orig_mod")


def _nothing(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return x[:, :0]


@contextlib.contextmanager
def _replaced(module: nn.Module, forward: Callable) -> Iterator[None]:
    own = vars(module).get("forward")
    vars(module)["forward"] = forward
    try:
        yield
    finally:
        if own is None:
            del vars(module)["forward"]
        else:
            vars(module)["forward"] = own
