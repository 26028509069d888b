"""How far an image is from another one: PSNR, SSIM and FLIP."""

from __future__ import annotations

import numpy as np
import torch
from torchmetrics.functional.image import structural_similarity_index_measure

try:
    import flip_evaluator
except ModuleNotFoundError:  # it has no wheels for Python 3.14 yet; `flip` is None then
    flip_evaluator = None

HAS_FLIP = flip_evaluator is not None
_HIGHEST_PSNR = 100.0  # dB; equal images have an infinite one


def psnr(image: np.ndarray, full: np.ndarray) -> float:
    """PSNR in dB, 100 at most, of two images, [H, W, 3] in 0 … 1."""
    error = float(((image.astype(np.float64) - full.astype(np.float64)) ** 2).mean())
    return min(_HIGHEST_PSNR, float(-10 * np.log10(max(error, 1e-10))))


def ssim(image: np.ndarray, full: np.ndarray) -> float:
    """SSIM (Wang et al., 2004; Gaussian window, σ = 1.5) of two images, [H, W, 3] in 0 … 1."""
    ours, theirs = (torch.from_numpy(one).permute(2, 0, 1)[None].float() for one in (image, full))
    return float(torch.as_tensor(structural_similarity_index_measure(ours, theirs, data_range=1.0)))


def flip(image: np.ndarray, full: np.ndarray) -> float | None:
    """Mean of LDR-FLIP of two images, [H, W, 3] in 0 … 1, as on a screen with 67 pixels per degree.

    0 where they look alike in alternation, 1 at most (Andersson et al., "FLIP: A Difference Evaluator for Alternating
    Images", 2020). None without the package flip-evaluator.
    """
    if flip_evaluator is None:
        return None
    return float(flip_evaluator.evaluate(full, image, "LDR", applyMagma=False)[1])
