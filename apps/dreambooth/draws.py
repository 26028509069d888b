"""generator: every random number of a training as a function of the seed and what it is for, and nothing else."""

from __future__ import annotations

import hashlib

import torch


def number(seed: int, *key: object) -> int:
    """An integer in 0 … 2**63 − 1 that depends on `seed` and `key` alone."""
    digest = hashlib.blake2b(repr((seed, *key)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") >> 1


def generator(seed: int, *key: object) -> torch.Generator:
    """A CPU generator that depends on `seed` and `key` alone: a resumed run gets the same numbers, on any device."""
    return torch.Generator().manual_seed(number(seed, *key))


def element_of(seed: int, name: str, sample: int, count: int) -> int:
    """Which of `count` images the sample with number `sample` shows.

    All images come once before any comes again, in a new random order each time.
    """
    epoch, position = divmod(sample, count)
    return int(torch.randperm(count, generator=generator(seed, "order", name, epoch))[position])
