"""Makes parts of a UNet or ControlNet skippable: in a cached call they return stand-ins of the right shapes."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from .layers import UNet
from .weak_link import WeakLink


class Switch:
    """Decides whether the skippable parts of one model are skipped. Read inside compiled graphs.

    Attributes:
        skipping: the call in progress skips them.
        feature: [B, C, H, W] what a cached call uses in place of what it skips.
        kept: what the whole call in progress computed there.
        split: the part that computes it ran several times in that call, on some of the samples each.
        filler: the value of stand-ins; None leaves them as the memory was, which launches nothing. What is not skipped
            reads none of them.
    """

    filler: float | None = None

    def __init__(self) -> None:
        self.set(None)

    def set(self, feature: Tensor | None) -> None:
        """Begin a call: one that is cached with this feature, or a whole one."""
        self.skipping, self.feature = feature is not None, feature
        self.kept: Tensor | None = None
        self.split = False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "skipping": False, "feature": None, "kept": None}  # a copy has calls of its own


# Compiled graphs hold for one object in the place of a module's forward. So that the next patch needs no new graphs, it
# takes those of the last one.
_REMOVED: WeakKeyDictionary[nn.Module, SkippableForward] = WeakKeyDictionary()


class SkippableForward:
    """Stands before a module's forward. In a cached call it returns stand-ins; the last skipped part the kept feature.

    Args:
        module: what can be skipped.
    """

    def __init__(self, module: nn.Module):
        # Weak, as it hangs on the module: a reference cycle would keep a dropped UNet alive until Python collects it.
        self.module = WeakLink(module, pickled=True)
        self.switch: Switch | None = None
        self.keeps = False
        self.inner: Any = None  # what offloading put there
        self.like: Any = None  # tensors of the output's shapes that take no memory

    def install(self, switch: Switch, keeps: bool) -> None:
        """Take the place of the module's forward.

        Args:
            switch: says whether a call is cached.
            keeps: this is the last skipped part, whose output is the feature; the switch takes it.
        """
        module = self.module.target()
        self.switch, self.keeps, self.inner = switch, keeps, vars(module).get("forward")
        module.forward = self

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        switch = self.switch
        if switch is not None and switch.skipping:
            return self._stand_in(switch)
        if self.inner is not None:
            output = self.inner(*args, **kwargs)
        else:
            module = self.module.target()
            output = type(module).forward(module, *args, **kwargs)
        if switch is not None and not torch.is_grad_enabled():
            self.like = _like(output, switch.filler)
            if self.keeps:
                switch.split = switch.kept is not None
                # A copy, as diffusers may write into the tensor that goes on.
                switch.kept = (output[0] if isinstance(output, tuple) else output).clone()
        return output

    def _stand_in(self, switch: Switch) -> Any:
        """The output's first tensor as one that can be written to, the residuals beside it as they are."""
        if isinstance(self.like, tuple):
            return (self._hidden_states(switch, self.like[0]), *self.like[1:])
        return self._hidden_states(switch, self.like)

    def _hidden_states(self, switch: Switch, like: Tensor) -> Tensor:
        if not self.keeps:  # memory of its own, as diffusers may write into it
            return _filled(torch.empty_like(like, memory_format=torch.contiguous_format), switch.filler)
        assert switch.feature is not None  # a cached call has one
        return switch.feature

    def leave_graph(self) -> None:
        """Replace tensors that a compiled graph made, as its next run may overwrite them."""
        self.like = _like(self.like, self.switch.filler if self.switch else None)

    def remove(self) -> None:
        """Restore the forward that was there; where somebody has wrapped this one since, it stays and does nothing."""
        module = self.module()
        if module is not None and vars(module).get("forward") is self:
            if self.inner is None:
                del module.forward
            else:
                module.forward = self.inner
            self.inner = None  # it may refer to the module, which would then never be freed
            _REMOVED[module] = self
        self.switch, self.like = None, None


def _like(output: Any, filler: float | None) -> Any:
    if isinstance(output, tuple):
        return tuple(_like(one, filler) for one in output)
    if output is None:  # a stage without residuals, as the last one of the latent upscaler
        return None
    return _filled(output.new_empty((1,)), filler).expand(output.shape)


def _filled(tensor: Tensor, filler: float | None) -> Tensor:
    return tensor if filler is None else tensor.fill_(filler)


def skippable_forwards(unet: nn.Module) -> list[SkippableForward]:
    """What `install_skipping` put on a UNet."""
    found = (vars(module).get("forward") for module in unet.modules())
    return [forward for forward in found if isinstance(forward, SkippableForward)]


def install_skipping(unet: UNet, switch: Switch, depth: int | str) -> None:
    """Wrap everything that a cached call of a UNet skips.

    Args:
        unet: the UNet.
        switch: decides whether it is skipped.
        depth: how many pairs of resnet and transformer at the end of the last up block are recomputed; "auto" is 1.

    Raises:
        ValueError: the last up block has fewer pairs.
    """
    parts, keeper = skipped_parts(unet, depth)
    for module in parts:
        install_forward(module, switch, module is keeper)


def install_forward(module: nn.Module, switch: Switch, keeps: bool = False) -> None:
    """Make one module skippable; arguments as those of `SkippableForward.install`."""
    forward = _REMOVED.pop(module, None) or SkippableForward(module)
    forward.install(switch, keeps)


def skipped_parts(unet: UNet, depth: int | str) -> tuple[list[nn.Module], nn.Module]:
    """What a cached call skips, and the last of it, whose output is the kept feature. As `install_skipping`."""
    last = unet.up_blocks[-1]
    pairs = len(last.resnets)
    depth = 1 if isinstance(depth, str) else depth  # "auto"
    if depth > pairs:
        raise ValueError(
            f"cache_depth={depth}: the last up block of this {type(unet).__name__} has {pairs} pairs of resnet and "
            f'transformer; use "auto" or 1 … {pairs}'
        )
    # The recomputed pairs read the first residuals: those of conv_in and of the first pairs of the first down block.
    parts = [*first_layers_apart(unet, depth), *unet.down_blocks[1:]]
    if unet.mid_block is not None:
        parts.append(unet.mid_block)
    parts += unet.up_blocks[:-1]
    parts += _layers(last, slice(pairs - depth))
    return parts, parts[-1]


def first_layers_apart(model: Any, depth: int) -> list[nn.Module]:
    """What is skipped of the first down block of a UNet or ControlNet, of which `depth` - 1 pairs are computed."""
    first = model.down_blocks[0]
    return [first] if depth == 1 else _layers(first, slice(depth - 1, None), with_samplers=True)


def skipped_names(unet: UNet, depth: int | str) -> tuple[str, ...]:
    """Prefixes of the names of all modules that a cached call skips. Raises as `install_skipping`."""
    parts = skipped_parts(unet, depth)[0]
    return tuple(f"{name}." for name, module in unet.named_modules() if any(module is part for part in parts))


def _layers(block: nn.Module, which: slice, with_samplers: bool = False) -> list[nn.Module]:
    """Resnets, transformers and motion modules of a stage, in the order in which they run."""
    lists = [getattr(block, name, None) for name in ("resnets", "attentions", "motion_modules")]
    runs = zip(*([*modules][which] for modules in lists if modules))
    layers = [module for pair in runs for module in pair]
    if with_samplers:
        layers += getattr(block, "downsamplers", None) or []
    return layers
