"""Scores of sets of images: Fréchet distance and KID to a reference, and paired differences to the unpatched images."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import nn

from agentsd.files import write_atomically
from eval.common.protocol import BenchError

from .features import FeatureNetwork
from .images import FEWEST_IMAGES, first_line, read_image
from .similarity import similarity_of_pairs

_KID_SUBSETS, _KID_SUBSET_SIZE = 100, 1000  # torch-fidelity's defaults
_KEPT_FEATURES = 10_000
_BATCH = 32


# --- features -> statistics -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Statistics:
    """What a Fréchet distance uses of a set of images.

    Attributes:
        mean: [D].
        covariance: [D, D], unbiased.
        count: number of images; 0 where a file does not say.
        features: [N, D] of all images or of every n-th; None where a file holds mean and covariance alone.
    """

    mean: np.ndarray
    covariance: np.ndarray
    count: int = 0
    features: np.ndarray | None = None


def statistics_of(features: np.ndarray) -> Statistics:
    """Features [N, D] -> mean and covariance, as pytorch-fid computes them."""
    features = np.asarray(features, dtype=np.float64)
    return Statistics(features.mean(0), np.atleast_2d(np.cov(features, rowvar=False)), len(features), features)


def load_statistics(path: Path, network: FeatureNetwork) -> Statistics:
    """Statistics from a .npz: mu and sigma as pytorch-fid saves them, and features where save_statistics wrote it.

    Raises BenchError for another kind of file or feature network, too few images, or values that are no numbers.
    """
    try:
        with np.load(path, allow_pickle=False) as file:
            made_with = str(file["network"]) if "network" in file else None
            features = file["features"].astype(np.float64) if "features" in file else None
            if "mu" in file:
                count = int(file["count"]) if "count" in file else 0
                found = Statistics(file["mu"].astype(np.float64), file["sigma"].astype(np.float64), count, features)
            else:
                found = statistics_of(file["features"])
    except Exception as error:  # zipfile, OSError, KeyError, AttributeError …: none of them is a file of statistics
        raise BenchError(f"{path}: is no .npz file with mu and sigma ({first_line(error)})") from error
    size = len(found.mean)
    if size != network.size or found.covariance.shape != (size, size) or (made_with or network.name) != network.name:
        raise BenchError(
            f"{path}: holds {size} features" + (f" of {made_with}" if made_with else "") + f", but {network.name} has "
            f"{network.size}: give statistics of the same --features, or the images themselves"
        )
    count = found.count if features is None else min(found.count or len(features), len(features))
    if features is not None and count < FEWEST_IMAGES:
        raise BenchError(
            f"{path}: holds {count} images' features, a Fréchet distance needs at least {FEWEST_IMAGES}: make it "
            "from more images"
        )
    for name, values in (("mu", found.mean), ("sigma", found.covariance), ("features", features)):
        if values is not None and not np.isfinite(values).all():
            raise BenchError(f"{path}: {name} has values that are no finite numbers: make the file again")
    return found


@dataclass(frozen=True)
class NamedFeatures:
    """Features of images with a name each, one or several images per name.

    Attributes:
        names: name of each row.
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
                known = ", ".join(sorted(set(self.names))[:8])
                raise BenchError(f"{name!r}: the reference has no image of that name, but of {known} …")
            rows += own
        return self.features[rows]


def load_named_features(path: Path, network: FeatureNetwork) -> NamedFeatures:
    """A .npz with names and features, as eval/gate_reference.py writes.

    Raises BenchError as load_statistics, and where it has not as many names as features.
    """
    features = load_statistics(path, network).features
    with np.load(path, allow_pickle=False) as file:
        names = tuple(str(name) for name in file["names"]) if "names" in file else ()
    if features is None or len(names) != len(features):
        raise BenchError(
            f"{path}: has {len(names)} names for {0 if features is None else len(features)} images' features: give a "
            "file such as eval/gate_reference.py writes"
        )
    return NamedFeatures(names, features)


def save_statistics(path: Path, statistics: Statistics, network: FeatureNetwork) -> None:
    """Write a .npz that pytorch-fid reads too; with up to 10,000 of the features, in half precision, for KID."""
    features = statistics.features
    if features is None:
        raise ValueError("statistics without features, as a file of mean and covariance alone gives them")
    step = max(1, -(-len(features) // _KEPT_FEATURES))
    kept = features[::step].astype(np.float16)

    def write(file: BinaryIO) -> None:
        np.savez_compressed(
            file,
            mu=statistics.mean,
            sigma=statistics.covariance,
            count=statistics.count,
            features=kept,
            network=np.array(network.name),
        )

    write_atomically(path, write)


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
        return _not_negative(difference @ difference + centred.square().sum() + self.trace - 2 * overlap)


class _Resampled:
    """FrechetDistance.of many resamples of the same rows: what does not depend on the resample is computed once.

    A row that is picked twice is one row of weight 2, so the Gram matrix [N, N] shrinks to the different rows. With
    more rows than features it would not fit into memory (20 GB for 50,000 images); there the [D, D] matrix with the
    same eigenvalues is used.
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
        different, counts = np.unique(picked, return_counts=True)
        rows = torch.as_tensor(different, device=self.rooted.device)
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
    """The same distance between two sets of statistics, where neither has features."""
    values, vectors = np.linalg.eigh(statistics.covariance)
    root = vectors * np.sqrt(values.clip(min=0)) @ vectors.T
    overlap = np.sqrt(np.linalg.eigvalsh(root @ reference.covariance @ root).clip(min=0)).sum()
    difference = statistics.mean - reference.mean
    traces = np.trace(statistics.covariance) + np.trace(reference.covariance)
    return _not_negative(difference @ difference + traces - 2 * overlap)


def _not_negative(distance: Any) -> float:
    """A distance is none below 0; that of a set to itself differs from 0 by what rounding leaves."""
    return max(0.0, float(distance))


def kernel_distance(features: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """KID (Bińkowski et al. 2018, arXiv 1801.01401), computed by torch-fidelity.

    Features [N, D] and [M, D] -> mean and standard deviation over 100 random subsets of 1,000 of each; of half of the
    smaller set where that has fewer than 2,000.
    """
    from torch_fidelity.metric_kid import KEY_METRIC_KID_MEAN, KEY_METRIC_KID_STD, kid_features_to_metric

    size = min(_KID_SUBSET_SIZE, min(len(features), len(reference)) // 2)
    rows = (torch.as_tensor(x, dtype=torch.float64) for x in (features, reference))
    found = kid_features_to_metric(*rows, kid_subsets=_KID_SUBSETS, kid_subset_size=size, verbose=False)
    return found[KEY_METRIC_KID_MEAN], found[KEY_METRIC_KID_STD]


@dataclass(frozen=True)
class Interval:
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float

    def as_row(self, key: str) -> dict[str, Any]:
        """As a report's columns: the value under the key, the interval under key_ci."""
        return {key: self.value, f"{key}_ci": [self.low, self.high]}


def paired_differences(
    distance: FrechetDistance,
    features: dict[str, np.ndarray],
    pairs: Iterable[tuple[str, str]],
    resamples: int = 200,
    seed: int = 0,
    progress: Callable[[Iterable], Iterable] = iter,
    groups: Sequence[Hashable] | None = None,
) -> dict[tuple[str, str], Interval]:
    """Differences between the distances of two sets to the reference, with 95 % bootstrap intervals.

    Images of a prompt that is hard for all methods are in a resample of each set or of none, so that they do not blur
    the difference. A resample has fewer different images, which raises any Fréchet distance; the intervals are shifted
    to have their mean at the value itself. The reference is held fixed. On normal data of known distance the intervals
    covered the true difference in 90 % of the cases; those of a distance itself, in 35 %, so there are none.

    Images of one prompt under several seeds are alike, so a group of images is resampled as a whole: the cluster
    bootstrap (Field & Welsh, "Bootstrapping clustered data", J. R. Stat. Soc. B 69, 2007). It generalises to other
    prompts, not to other seeds of these prompts, and is too narrow where there are only a few groups.

    Args:
        features: name to [N, D], rows of the same prompt and seed in the same place.
        pairs: (a, b), of which the difference is a's distance less b's.
        resamples: number of bootstrap samples.
        seed: seed of the resampling.
        groups: a label for each of the N rows, equal where rows belong together; groups may differ in size. None makes
            each row a group, and so does one label for all: a single group resampled would show no spread.

    Raises:
        ValueError: there are not as many labels as rows.
    """
    pairs = list(pairs)
    used = [name for name in features if any(name in pair for pair in pairs)]
    values = {name: distance.of(features[name]) for name in used}
    members = _members(groups, len(next(iter(features.values()))))
    random = np.random.default_rng(seed)
    samples: dict[str, list[float]] = {name: [] for name in used}
    resampled = {name: _Resampled(distance, features[name]) for name in used}
    for _ in progress(range(resamples)):
        picked = np.concatenate([members[group] for group in random.integers(0, len(members), len(members))])
        for name in used:
            samples[name].append(resampled[name].of(picked))
    return {(a, b): _interval(values[a] - values[b], np.array(samples[a]) - np.array(samples[b])) for a, b in pairs}


def _members(groups: Sequence[Hashable] | None, count: int) -> list[np.ndarray]:
    """The row numbers of each group, groups in the order of their first rows; one group per row where all are one."""
    if groups is not None and len(groups) != count:
        raise ValueError(f"groups: has {len(groups)} labels for {count} rows")
    labels = range(count) if groups is None or len(set(groups)) == 1 else groups
    rows: dict[Hashable, list[int]] = {}
    for row, label in enumerate(labels):
        rows.setdefault(label, []).append(row)
    return [np.array(own) for own in rows.values()]


def _interval(value: float, samples: np.ndarray) -> Interval:
    low, high = value + np.quantile(samples - samples.mean(), (0.025, 0.975))
    return Interval(value, float(low), float(high))


def _mean(values: np.ndarray, members: Sequence[np.ndarray]) -> Interval:
    """The mean over all rows, with the interval that the spread of the groups' means gives (normal approximation)."""
    means = np.array([values[own].mean() for own in members])
    half = 1.96 * means.std(ddof=1) / len(means) ** 0.5 if len(means) > 1 else float("nan")
    value = float(values.mean())
    return Interval(value, value - half, value + half)


def _float64_device(device: Any) -> torch.device:
    device = torch.device(device)
    return torch.device("cpu") if device.type == "mps" else device  # which has no float64


# --- sets of images, and prompts --------------------------------------------------------------------------------------


def score_sets(
    features: dict[str, np.ndarray],
    files: Mapping[str, Sequence[Path]],
    network: FeatureNetwork,
    reference: Statistics,
    resamples: int = 200,
    progress: Callable[..., Iterable] = lambda steps, **_: steps,
    groups: Sequence[Hashable] | None = None,
    rivals: Mapping[tuple[str, str], str] | None = None,
) -> dict[str, dict[str, Any]]:
    """Every score of sets of images against a reference and, paired, against the set named "sd".

    Args:
        features: set to [N, D], rows of the same prompt and seed in the same place.
        files: set to the same images' files.
        network: the one that computed the features.
        resamples: number of bootstrap samples.
        progress: called with the steps, desc and unit, as tqdm.
        groups: a label for each of the N rows, as paired_differences takes them: which images are of one prompt.
        rivals: (set, method) to the set of that method that its distance is also compared with.

    Returns:
        Set to its row of a report: images, fid or fd, differences with their intervals (to sd: fd_difference, to a
        rival: fd_difference_ and its method), medians of psnr and ssim, kid, and the mean difference of PSNR to a
        rival's (psnr_difference_ and its method).

    Raises:
        ValueError: there are not as many labels as rows.
    """
    rivals = rivals or {}
    pairs = [(name, "sd") for name in features if name != "sd"] + [(name, other) for (name, _), other in rivals.items()]
    distance = FrechetDistance(reference, network.device)
    differences = paired_differences(
        distance, features, pairs, resamples, 0,
        lambda steps: progress(steps, desc="bootstrap", unit="resample"), groups,
    )  # fmt: skip
    key = "fid" if network.name == "inception" else "fd"
    rows = {}
    similar = {
        name: similarity_of_pairs(files[name], files["sd"])
        for name in progress([name for name in features if name != "sd"], desc="pairs", unit="scenario")
    }
    for name in features:
        row: dict[str, Any] = {"images": len(features[name]), key: distance.of(features[name])}
        if name != "sd":
            row |= differences[name, "sd"].as_row(f"{key}_difference")
            row["psnr"], row["ssim"] = map(float, np.median(similar[name], axis=0))
        for (_, method), other in ((pair, other) for pair, other in rivals.items() if pair[0] == name):
            row |= differences[name, other].as_row(f"{key}_difference_{method}")
            nearer = similar[name][:, 0] - similar[other][:, 0]
            row |= _mean(nearer, _members(groups, len(nearer))).as_row(f"psnr_difference_{method}")
            row[f"nearer_than_{method}"] = int((nearer > 0).sum())
        if reference.features is not None:
            row["kid"], row["kid_deviation"] = kernel_distance(features[name], reference.features)
        rows[name] = row
    return rows


class ClipScore:
    """CLIP score (Hessel et al. 2021, arXiv 2104.08718): mean of 100 · max(0, cosine of image and prompt)."""

    def __init__(self, folder: Path, device: Any = "cpu"):
        from transformers import CLIPModel, CLIPProcessor

        try:
            self.processor = CLIPProcessor.from_pretrained(folder, local_files_only=True)
            self.model: Any = CLIPModel.from_pretrained(folder, local_files_only=True).to(device).eval()
        except Exception as error:  # transformers raises many kinds
            raise BenchError(
                f"--clip {folder}: is no CLIP model that transformers can load ({first_line(error)}): give a folder "
                "that CLIPModel and CLIPProcessor were saved to"
            ) from error
        self.device = device

    def of(self, files: Sequence[Path], prompts: Sequence[str]) -> float:
        """The score of image files and their prompts."""
        scores = []
        for i in range(0, len(files), _BATCH):
            images = [read_image(path) for path in files[i : i + _BATCH]]
            inputs = self.processor(
                text=list(prompts[i : i + _BATCH]), images=images, return_tensors="pt", padding=True, truncation=True
            ).to(self.device)
            with torch.no_grad():
                out = self.model(**inputs)
            cosine = nn.functional.cosine_similarity(out.image_embeds, out.text_embeds)
            scores.append(100 * cosine.clamp(min=0).cpu())
        return float(torch.cat(scores).mean())
