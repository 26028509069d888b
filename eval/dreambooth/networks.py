"""The networks that judge similarity: features of the subject, DINO and CLIP, each as files -> vectors."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from eval.common.protocol import BenchError
from eval.fid.features import FeatureNetwork, load_features
from eval.fid.images import first_line, read_image
from eval.fid.scores import ClipScore


@dataclass(frozen=True)
class Judges:
    """What images are judged by.

    Attributes:
        networks: key in a report ("features", "dino", "clip_i") -> network; similarity is the cosine of its vectors.
        clip: what compares images with prompts (CLIP-T), or None.
    """

    networks: dict[str, FeatureNetwork]
    clip: Clip | None = None


class Clip(ClipScore):
    """CLIP with the vectors of its images too (CLIP-I). Arguments and errors as ClipScore."""

    def network(self) -> FeatureNetwork:
        """Its image side as a feature network."""

        def prepare(image: Image.Image) -> Tensor:
            return self.processor(images=image, return_tensors="pt").pixel_values[0]

        def vectors(pixels: Tensor) -> Tensor:
            pooled = self.model.vision_model(pixel_values=pixels).pooler_output
            return self.model.visual_projection(pooled)

        size = self.model.config.projection_dim
        return FeatureNetwork("clip", "CLIP-I", size, vectors, prepare, torch.device(self.device))

    def similarities(self, files: Sequence[Path], prompts: Sequence[str]) -> list[float]:
        """Cosine of each image file and its prompt."""
        return [self.of([file], [prompt]) / 100 for file, prompt in zip(files, prompts)]


def load_judges(options: argparse.Namespace, device: Any) -> Judges:
    """The networks that the arguments name. Raises BenchError where one cannot be loaded."""
    networks = {"features": load_features(options.features, device)}
    if options.dino:
        networks["dino"] = _load_dino(Path(options.dino), torch.device(device))
    clip = None
    if options.clip:
        clip = Clip(Path(options.clip), device)
        networks["clip_i"] = clip.network()
    return Judges(networks, clip)


def _load_dino(folder: Path, device: torch.device) -> FeatureNetwork:
    """A DINO or DINOv2 model as transformers saves it; its vector is the class token, as in DreamBooth's DINO score."""
    from transformers import AutoImageProcessor, AutoModel

    try:
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True)
        model = AutoModel.from_pretrained(folder, local_files_only=True).to(device).eval()
        size = model.config.hidden_size
    except Exception as error:  # transformers raises many kinds
        raise BenchError(
            f"--dino {folder}: is no vision transformer that transformers can load ({first_line(error)}): give a "
            "folder that a DINO model and its image processor were saved to"
        ) from error

    def prepare(image: Image.Image) -> Tensor:
        return processor(images=image, return_tensors="pt").pixel_values[0]

    def vectors(pixels: Tensor) -> Tensor:
        return model(pixel_values=pixels).last_hidden_state[:, 0]

    return FeatureNetwork("dino", "DINO", size, vectors, prepare, device)


def cosines(features: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Cosines of [N, D] and [M, D]: [N, M]."""
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (features, others)]
    return unit[0] @ unit[1].T


def sharpness(file: Path, side: int | None = None) -> float:
    """The 99th percentile of the brightness gradient, in levels of 255 per pixel: blur lowers it.

    The steepest hundredth are the edges of what is shown; a mean would rise with a mottled ground.

    Args:
        side: resize to so many pixels a side first, as a subject's images are not as large as what is generated.
    """
    image = read_image(file).convert("L")
    if side is not None:
        image = image.resize((side, side), Image.Resampling.LANCZOS)
    down, right = np.gradient(np.asarray(image, dtype=np.float64))
    return float(np.percentile(np.hypot(down, right), 99))
