"""losses_at: the loss of each image under a scenario at one timestep."""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

from eval.common.protocol import BenchError, Scenario
from eval.common.scenarios import use_scenario

from .judged import Inputs, Judged
from .settings import name_of


def losses_at(
    judged: Judged, inputs: Inputs, scenario: Scenario, timestep: int, seed: int = 0, batch_size: int = 16
) -> np.ndarray:
    """‖ε̂ − ε‖² / (C · H · W) of each image: [N], float64.

    The noise of an image is a function of (seed, its key, timestep): the same under every scenario, in any order and
    batch.

    Raises:
        BenchError: a loss that is not finite.
    """
    found = []
    for start in range(0, len(inputs), batch_size):
        numbers = list(range(start, min(start + batch_size, len(inputs))))
        count = len(numbers)
        if scenario.method == "tomesd" and count % 2:
            numbers.append(start)  # ToMeSD makes no random choices in a batch of odd size: no batch is one
        batch = inputs.take(numbers)
        noise = torch.stack([noise_of(batch.latents.shape[1:], seed, key, timestep) for key in batch.keys])
        noisy = judged.add_noise(batch.latents, noise, timestep)
        # Anew for each call, so that ToMeSD's random choices are the same in every batch.
        with use_scenario(judged.pipe, scenario):
            predicted = judged.predict_noise(noisy, timestep, batch)
        found.append((predicted - noise)[:count].double().square().mean(dim=(1, 2, 3)))
    losses = torch.cat(found).numpy()
    if not np.isfinite(losses).all():
        raise BenchError(
            f"{judged.name}: the loss of {name_of(scenario)} at timestep {timestep} is not finite for "
            f"{inputs.keys[int(np.argmin(np.isfinite(losses)))]}: try --dtype float32"
        )
    return losses


def noise_of(shape: torch.Size, seed: int, key: str, timestep: int) -> Tensor:
    """Standard normal noise [*shape], float32, a function of its arguments alone."""
    digest = hashlib.blake2b(f"{seed}/{timestep}/{key}".encode(), digest_size=8).digest()
    return torch.randn(shape, generator=torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1))
