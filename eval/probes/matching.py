"""matching_stage: over how few keys the best possible matching of noisy patches would spread, by window size."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from agentsd.files import write_atomically
from eval.common.tables import markdown
from eval.denoising.inputs import load_inputs
from eval.denoising.judged import load_judged
from eval.denoising.patterns import SMOOTHING

TIMESTEPS = (610, 720, 830, 940)
WINDOWS = (7, 15, 25, 37)
"""Sides in pixels: the network's first layer sees 7 × 7 pixels, its last two about 37 × 37."""

_SEED = 1
_COMPONENTS = 60
_QUERIES = 200


def matching_stage(out: Path, samples: int = 8) -> str:
    """Print and write matching.md for the patterns of the model in `out/model`. Returns the text.

    Raises:
        BenchError: the folder holds no probe.
    """
    judged = load_judged(str(out / "model"), device="cpu")
    images = load_inputs(judged, None, None, samples, _SEED).latents
    rows = []
    for timestep in TIMESTEPS:
        signal = float(judged.signal[timestep])
        shares = [matched_share(images, signal, side, SMOOTHING * judged.scale) for side in WINDOWS]
        rows.append([str(timestep), *(f"{share:.3f}" for share in shares)])
    said = "Effective keys of the best matching of two noisy windows, as a fraction of all, median:"
    text = f"{said}\n\n{markdown(['t', *(f'{side} × {side}' for side in WINDOWS)], rows, 'r')}\n"
    write_atomically(out / "matching.md", text)
    print(text)
    return text


def matched_share(images: Tensor, signal: float, window: int, smoothing: float) -> float:
    """Median number of effective keys over the number of keys, where each weight is the likelihood of a match.

    The weight of a key is p(query, key | same content) / (p(query) p(key)), of windows of a Gaussian image with noise,
    which softmax makes of its logarithm. Query and key have independent noise, so that no window finds itself by it.

    Args:
        images: [B, C, H, W] without noise.
        signal: the product of 1 − beta, as Judged.signal.
        window: side in pixels.
        smoothing: standard deviation in pixels of the Gaussian that smoothed the image.
    """
    place = torch.arange(window, dtype=torch.float32)
    covariance = torch.exp(-((place[:, None] - place) ** 2) / (4 * smoothing**2))
    values, vectors = torch.linalg.eigh(covariance)
    products = (values[:, None] * values).flatten().clamp_min(0)
    kept = products.argsort(descending=True)[:_COMPONENTS]
    ratio = products[kept] * signal / (1 - signal)  # signal over noise of each component
    correlation = ratio / (1 + ratio)

    def components(image: Tensor, seed: int) -> Tensor:
        """[windows, C, components] of unit variance."""
        noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(seed))
        noisy = image * (signal / (1 - signal)) ** 0.5 + noise
        patches = noisy.unfold(1, window, 1).unfold(2, window, 1)
        found = torch.einsum("chwij,ia,jb->hwcab", patches, vectors, vectors).flatten(3)[..., kept]
        return (found / (1 + ratio).sqrt()).flatten(0, 1)

    shares = []
    for number, image in enumerate(images):
        keys, queries = components(image, number), components(image, number + len(images))
        queries = queries[:: max(1, len(queries) // _QUERIES)]
        spread = 1 - correlation**2
        # What depends on the query alone is the same for all its keys.
        logits = torch.einsum("qck,nck->qn", queries * correlation / spread, keys)
        logits = logits - (correlation**2 / (2 * spread) * keys**2).sum(dim=(1, 2))
        weights = logits.log_softmax(dim=1)
        shares.append((-(weights.exp() * weights).sum(dim=1)).exp() / len(keys))
    return float(torch.cat(shares).median())
