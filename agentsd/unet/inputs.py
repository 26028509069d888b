"""The arguments of a call of a UNet or ControlNet: by name, and its timesteps as numbers."""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn


def by_name(model: nn.Module, args: tuple, kwargs: dict) -> dict[str, Any]:
    """The arguments of a call by the names of the forward's parameters."""
    names = _parameters(type(model))  # type: ignore[arg-type]  # mypy asks for the hash of an instance
    return {**dict(zip(names, args)), **kwargs}


@lru_cache(maxsize=16)
def _parameters(kind: type[nn.Module]) -> tuple[str, ...]:
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def sample_and_timestep(args: tuple, kwargs: dict) -> tuple[Tensor, Tensor | float]:
    """The first two arguments of such a call, by position or by name."""
    sample = args[0] if args else kwargs["sample"]
    timestep = args[1] if len(args) > 1 else kwargs["timestep"]
    return sample, timestep


def read_timesteps(timestep: Tensor | float, others: Tensor | None) -> tuple[float | tuple[float, ...], list[float]]:
    """Read the timestep of a call, or one for each sample where they differ: the one synchronisation with the device.

    Args:
        timestep: a number, or a tensor of one or of several.
        others: [n] more to read at once.
    """
    if not isinstance(timestep, Tensor):
        return float(timestep), [] if others is None else others.tolist()
    if others is None:
        values = [timestep.item()] if timestep.numel() == 1 else timestep.flatten().tolist()
        read = []
    else:
        precise = torch.float32 if others.device.type == "mps" else torch.float64
        both = torch.cat([timestep.flatten().to(others.device, precise), others.to(precise)]).tolist()
        values, read = both[: timestep.numel()], both[timestep.numel() :]
    timesteps = tuple(float(value) for value in values)
    return timesteps[0] if len(set(timesteps)) == 1 else timesteps, read
