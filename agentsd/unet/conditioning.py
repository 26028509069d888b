"""What a kept feature depends on beside latent and timestep: the conditioning of a call, and the model's own state."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .inputs import by_name
from .layers import UNet

# Everything in a UNet call that conditions it. ControlNet's and T2I-Adapter's residuals are new ones in every step:
# only their presence counts.
_CONDITIONS = (
    "encoder_hidden_states",
    "class_labels",
    "timestep_cond",
    "attention_mask",
    "cross_attention_kwargs",
    "added_cond_kwargs",
    "encoder_attention_mask",
)
_RESIDUALS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)


class Conditioning:
    """The conditioning inputs of a call, to be compared with those of another call.

    Args:
        inputs: by name; tensors may lie in lists and dictionaries.

    Attributes:
        structure: everything but the tensors' contents.
        tensors: the tensors, in a fixed order.
    """

    def __init__(self, inputs: dict[str, Any]):
        self.tensors: list[Tensor] = []
        self.structure = self._describe(inputs)
        self._places = [_place(tensor) for tensor in self.tensors]

    @classmethod
    def of_call(cls, model: nn.Module, args: tuple, kwargs: dict) -> Conditioning:
        """The conditioning of a call of a UNet or ControlNet."""
        named = by_name(model, args, kwargs)
        present = {name: named.get(name) is not None for name in _RESIDUALS}
        return cls({**{name: named.get(name) for name in _CONDITIONS}, **present})

    def copied(self) -> Conditioning:
        """The same with copies of the tensors, as callers may write into theirs.

        The tensors themselves are referenced too, so that no other one can take their place in memory.
        """
        copied = object.__new__(Conditioning)
        copied.__dict__ = {**self.__dict__, "tensors": [one.clone() for one in self.tensors], "_held": self.tensors}
        return copied

    def same_as(self, other: Conditioning) -> bool | Tensor:
        """Whether both have the same contents: a tensor of no dimensions where that must be read from the device."""
        if self.structure != other.structure:
            return False
        if self._places == other._places:  # the usual case: pipelines pass the same tensors in every step
            return True
        return torch.stack([(one == another).all() for one, another in zip(self.tensors, other.tensors)]).all()

    def _describe(self, value: Any) -> Any:
        if isinstance(value, Tensor):
            self.tensors.append(value)
            return value.shape, value.dtype, value.device
        if isinstance(value, dict):
            return tuple((key, self._describe(value[key])) for key in sorted(value, key=str))
        if isinstance(value, (list, tuple)):
            return tuple(self._describe(one) for one in value)
        return value if value is None or isinstance(value, (bool, int, float, str)) else (type(value), id(value))


def _place(tensor: Tensor) -> tuple:
    """Where a tensor's contents lie, and how often they were written to; for an inference tensor nothing is known."""
    version = object() if tensor.is_inference() else tensor._version
    return tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride(), version


def model_state(unet: UNet, adapter_layers: list[Any]) -> tuple:
    """What of the model can change between two calls: FreeU, adapters, and weights that were written to.

    Args:
        unet: the UNet.
        adapter_layers: what `find_adapter_layers` returned.
    """
    freeu = tuple(tuple(getattr(block, name, None) for name in ("s1", "s2", "b1", "b2")) for block in unet.up_blocks)
    stages = [*unet.down_blocks, *([unet.mid_block] if unet.mid_block is not None else []), *unet.up_blocks]
    # A weight of each stage stands for all: what loads, merges or trains weights writes to every stage.
    versions = tuple(_version(stage) for stage in stages)
    adapters = tuple(
        (tuple(module.active_adapters), tuple(module.scaling.items()), module.merged, module.disable_adapters)
        for module in adapter_layers
    )
    return freeu, versions, adapters


def _version(stage: Any) -> int:
    weight = stage.resnets[0].conv1.weight if hasattr(stage, "resnets") else next(stage.parameters(), None)
    return -1 if weight is None or weight.is_inference() else weight._version


def find_adapter_layers(unet: UNet) -> list[Any]:
    """The layers of a UNet that LoRA adapters stand on."""
    return [module for module in unet.modules() if hasattr(module, "scaling") and hasattr(module, "active_adapters")]
