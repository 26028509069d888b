"""similarity_of_pairs: PSNR and SSIM of images to the baseline's of the same prompt and seed."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch

from .images import read_image

_HIGHEST_PSNR = 100.0  # dB; equal images have an infinite one, which JSON lacks


def similarity_of_pairs(files: Sequence[Path], baseline_files: Sequence[Path]) -> np.ndarray:
    """PSNR in dB (100 for equal images) and SSIM (Wang et al. 2004: Gaussian window, σ = 1.5), by torchmetrics.

    Returns:
        [N, 2], a row a pair.

    Raises:
        ValueError: images of a pair differ in size.
    """
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    def compare(pair: tuple[Path, Path]) -> tuple[float, float]:
        a, b = (np.array(read_image(path)) for path in pair)
        if a.shape != b.shape:
            raise ValueError(f"{pair[0]} and {pair[1]} differ in size")
        ours, theirs = (torch.from_numpy(x).permute(2, 0, 1)[None].float() for x in (a, b))
        ssim = structural_similarity_index_measure(ours, theirs, data_range=255.0)
        psnr = float(peak_signal_noise_ratio(ours, theirs, data_range=255.0))
        return min(psnr, _HIGHEST_PSNR), float(torch.as_tensor(ssim))

    with ThreadPoolExecutor(4) as pool:
        return np.array(list(pool.map(compare, zip(files, baseline_files))))
