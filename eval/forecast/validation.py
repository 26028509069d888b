"""Predictions of what others measured, and how far they are off."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from .gpus import GPUS
from .networks import Network, Shape
from .public_figures import RATIOS, TIMES, PublicFigure
from .roofline import call_seconds
from .tracing import CallTrace

_DEEPCACHE_STEPS = 50


@dataclass(frozen=True)
class Prediction:
    """A public figure and the model's."""

    figure: PublicFigure
    predicted: float

    @property
    def error(self) -> float:
        """By which fraction the prediction is too large."""
        return self.predicted / self.figure.measured - 1


@dataclass(frozen=True)
class Errors:
    """The errors of some predictions, as fractions."""

    count: int
    least: float
    largest: float
    median_size: float

    @classmethod
    def of(cls, predictions: Iterable[Prediction]) -> Errors:
        errors = [one.error for one in predictions]
        return cls(len(errors), min(errors), max(errors), statistics.median(map(abs, errors)))


def predict_all(
    figures: Iterable[PublicFigure] = (*TIMES, *RATIOS),
    network_of: Callable[[Shape], Network] = Network,
    say: Callable[[str], None] = lambda text: None,
) -> list[Prediction]:
    """Predict public figures, each UNet traced once.

    Args:
        figures: what to predict.
        network_of: makes the network of a shape.
        say: called with what is traced.
    """
    by_shape: dict[Shape, list[PublicFigure]] = {}
    for figure in figures:
        by_shape.setdefault(figure.shape, []).append(figure)
    found: dict[PublicFigure, float] = {}
    for shape, its in by_shape.items():
        say(f"public figures, {shape}")
        network = network_of(shape)
        unpatched = network.unpatched()
        tomesd = {ratio: network.with_tomesd(ratio) for ratio in sorted({one.tomesd for one in its if one.tomesd})}
        cached = network.with_deepcache()[1] if any(one.deepcache for one in its) else None
        for figure in its:
            found[figure] = _predict(figure, unpatched, tomesd, cached)
    return [Prediction(figure, found[figure]) for figure in figures]


def _predict(
    figure: PublicFigure, unpatched: CallTrace, tomesd: dict[float, CallTrace], cached: CallTrace | None
) -> float:
    def milliseconds(call: CallTrace) -> float:
        time = call_seconds(call, GPUS[figure.gpu], figure.host, figure.mode, efficiencies=figure.efficiencies)
        return 1e3 * time.total

    base = milliseconds(unpatched)
    if figure.tomesd is not None:
        return base / milliseconds(tomesd[figure.tomesd])
    if figure.deepcache is not None:
        assert cached is not None
        whole = -(-_DEEPCACHE_STEPS // figure.deepcache)
        calls = whole * base + (_DEEPCACHE_STEPS - whole) * milliseconds(cached)
        return (_DEEPCACHE_STEPS * base + figure.outside_ms) / (calls + figure.outside_ms)
    return base
