"""Figures of a comparison: seconds, speed-up, memory and distance, and the sentence that says what they mean.

Timings are unstable where a method ran once, or where its rounds differ by more than agentsd.images.compare.STABLE
says. Unstable timings are written without decimals, and no speed-up is claimed from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from agentsd.images.compare import STABLE, are_stable
from agentsd.images.generate import GeneratedImage
from agentsd.images.methods import METHODS

from .images import distance

CLEARLY = 1.02
"""Stable times closer than this factor are called equal."""


@dataclass(frozen=True)
class Figures:
    """The figures of one image of a comparison.

    Attributes:
        seconds: median over the rounds.
        rounds: how many.
        speed_up: seconds of the first image over seconds of this one; None for the first itself.
        peak_gb: greatest memory in use, 10⁹ bytes; None where it cannot be measured.
        on_gpu: whether that is the GPU's memory; otherwise it is the memory of the whole process.
        distance: to the first image (`images.distance`); None for the first itself.
        stable: whether both methods ran more than once and their rounds agree.
        calls: (whole, cached) UNet calls of a run with step caching; None for others.
    """

    seconds: float
    rounds: int
    speed_up: float | None
    peak_gb: float | None
    on_gpu: bool
    distance: float | None
    stable: bool
    calls: tuple[int, int] | None = None

    @classmethod
    def of(cls, generated: GeneratedImage, first: GeneratedImage | None) -> Figures:
        """The figures of an image beside the first one of its comparison (None: it is the first)."""
        other = None if first is generated else first
        return cls(
            generated.seconds,
            len(generated.all_seconds),
            None if other is None else other.seconds / generated.seconds,
            None if generated.peak_bytes is None else generated.peak_bytes / 1e9,
            str(generated.settings.get("device", "")).startswith("cuda"),
            None if other is None else distance(other.image, generated.image),
            are_stable([generated] if first is None else [first, generated]),
            unet_calls(generated),
        )


def unet_calls(generated: GeneratedImage) -> tuple[int, int] | None:
    """(whole, cached) UNet calls of a run with step caching; None for others."""
    calls = generated.settings.get("unet_calls")
    return (calls["whole"], calls["cached"]) if calls else None


def calls_text(calls: tuple[int, int]) -> str:
    """UNet calls in print: "8 of 21 UNet calls whole, 13 cached"."""
    whole, cached = calls
    if not cached:
        return f"all {whole} UNet calls whole, none cached"
    return f"{whole} of {whole + cached} UNet calls whole, {cached} cached"


def speed_word(factor: float, stable: bool) -> str:
    """What a speed-up says: "faster", "slower" or "same"; unstable timings have to differ by more to say so."""
    clearly = CLEARLY if stable else STABLE
    return "faster" if factor >= clearly else "slower" if factor <= 1 / clearly else "same"


def verdict(generated: Sequence[GeneratedImage]) -> str:
    """Say in plain sentences what the times say of the last method against the first."""
    first, last = generated[0], generated[-1]
    factor, stable = first.seconds / last.seconds, are_stable(list(generated))
    word = speed_word(factor, stable)
    ours, base = METHODS[last.method], METHODS[first.method]
    if stable:
        text = {
            "faster": f"{ours} was {factor:.2f}× as fast as {base}.",
            "slower": f"{ours} was slower than {base} here ({factor:.2f}×).",
            "same": f"{ours} took as long as {base} ({factor:.2f}×): nothing is gained at this size.",
        }[word]
    else:
        text = {
            "faster": f"{ours} was faster than {base}.",
            "slower": f"{ours} was slower than {base} here.",
            "same": f"{ours} took about as long as {base}.",
        }[word]
    width, height = last.image.size
    if word != "faster" and max(width, height) <= 512:
        text += f" At {width} × {height} px these layers have little to save."
    calls = unet_calls(last)
    if calls:
        text += f" Step caching: {calls_text(calls)}."
    if stable:
        return text + f" Medians of {len(first.all_seconds)} interleaved rounds after a warm-up, which agree."
    return f"{text} {why_unstable(generated)}"


def why_unstable(generated: Sequence[GeneratedImage]) -> str:
    """The reason why timings are unstable, with the remedy."""
    if min(len(one.all_seconds) for one in generated) == 1:
        return "Timings unstable: one round each; more timed rounds give a speed-up in figures."
    return (
        f"Timings unstable: rounds of a method differ by more than {STABLE - 1:.0%}; try again while the machine is "
        "idle, or with more timed rounds."
    )
