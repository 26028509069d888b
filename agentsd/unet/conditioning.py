"""The arguments of a UNet or ControlNet call: by name, and what of them a kept feature depends on beside the latent."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

# ControlNet's and T2I-Adapter's residuals are new ones in every step: only their presence counts.
_RESIDUALS = (
    "down_block_additional_residuals",
    "mid_block_additional_residual",
    "down_intrablock_additional_residuals",
)


def by_name(model: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments of a call by the names of the forward's parameters."""
    return {**dict(zip(_parameters(type(model)), args)), **kwargs}  # type: ignore[arg-type]  # mypy hashes an instance


@lru_cache(maxsize=16)
def _parameters(kind: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def sample_and_timestep(args: tuple, kwargs: dict) -> tuple[Tensor, Tensor | float]:
    """The first two arguments of such a call, by position or by name."""
    sample = args[0] if args else kwargs["sample"]
    timestep = args[1] if len(args) > 1 else kwargs["timestep"]
    return sample, timestep


class Conditioning:
    """All inputs of a call but latent and timestep; == compares them with those of a later call.

    Pipelines pass the same tensors in every step, which is seen without reading them. Contents are compared, and read
    from the device, only where they pass others.
    """

    def __init__(self, model: nn.Module, args: tuple, kwargs: dict):
        self._tensors: list[Tensor] = []  # held, so that no other tensor can take their place in memory
        self._structure = {
            name: name in _RESIDUALS or self._describe(value)
            for name, value in by_name(model, args, kwargs).items()
            if value is not None and name not in ("sample", "timestep")
        }
        self._places = [_place(tensor) for tensor in self._tensors]

    def __eq__(self, later: object) -> bool:
        if not isinstance(later, Conditioning) or self._structure != later._structure:
            return False
        if self._places == later._places:
            return True
        if self._places != [_place(tensor) for tensor in self._tensors]:
            return False  # someone has written into them since
        pairs = zip(self._tensors, later._tensors)
        return all(one is other or torch.equal(one, other) for one, other in pairs)

    __hash__ = None  # type: ignore[assignment]

    def _describe(self, value: Any) -> Any:
        """Everything but the tensors' contents; tensors may lie in lists and dictionaries."""
        if isinstance(value, Tensor):
            # Nothing tells whether an inference tensor is written to, so a copy is what later ones are compared with.
            self._tensors.append(value.clone() if value.is_inference() else value)
            return value.shape, value.dtype, value.device
        if isinstance(value, dict):
            return tuple((key, self._describe(value[key])) for key in sorted(value, key=str))
        if isinstance(value, (list, tuple)):
            return tuple(self._describe(one) for one in value)
        return value if value is None or isinstance(value, (bool, int, float, str)) else (type(value), id(value))


def _place(tensor: Tensor) -> tuple:
    """Where a tensor's contents lie, and how often they were written to."""
    version = None if tensor.is_inference() else tensor._version
    return tensor.untyped_storage()._cdata, tensor.storage_offset(), tensor.stride(), version
