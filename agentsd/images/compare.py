"""compare: the same image by several methods from the same seed, timed fairly, and the result side by side."""

from __future__ import annotations

import base64
import html
import io
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..config import AgentConfig
from ..patch import choose_config
from .generate import GeneratedImage, Step, calls_text, generate, settings_of
from .image_distance import distance, psnr
from .methods import METHODS, check_method, refuse_patched
from .png import save_image
from .request import Request
from .rounds import STABLE, is_stable, rotated
from .warm_up import warm_up

__all__ = [
    "STABLE",
    "Comparison",
    "GeneratedImage",
    "Step",
    "are_stable",
    "compare",
    "compare_methods",
    "comparison_image",
    "generate",
    "settings_of",
    "warm_up",
]

USUAL_ROUNDS, SECONDS_ENOUGH = 3, 300.0
"""Rounds where none are asked for: so many, or fewer once so many seconds have passed."""


@dataclass(frozen=True)
class Comparison:
    """What `compare` found: one GeneratedImage per method, in the order asked; `print` shows the timings.

    Attributes:
        results: the images with their times and settings.
    """

    results: tuple[GeneratedImage, ...]

    def __len__(self) -> int:
        return len(self.results)

    def __iter__(self) -> Iterator[GeneratedImage]:
        return iter(self.results)

    def __getitem__(self, key: int | str) -> GeneratedImage:
        """By position, or by the method's name: `comparison["agentsd"].image`."""
        if isinstance(key, str):
            for result in self.results:
                if result.method == key:
                    return result
            raise KeyError(f"{key!r}: compared were {', '.join(result.method for result in self.results)}")
        return self.results[key]

    @property
    def stable(self) -> bool:
        """Whether every method ran more than once and its rounds differ by at most 15 %."""
        return are_stable(self.results)

    def speed_up(self, method: str) -> float:
        """Seconds of the first method over those of this one."""
        return self.results[0].seconds / self[method].seconds

    def psnr(self, method: str) -> float:
        """PSNR in dB of this method's image to the first one's: higher is nearer, infinite where they are equal."""
        return psnr(distance(self.results[0].image, self[method].image))

    def figure(self) -> Image.Image:
        """The images side by side, each with its method, seconds and (if they are stable) speed-up over the first."""
        return comparison_image(self.results)

    def save(self, path: str | Path) -> None:
        """Write `figure()` as a PNG that carries all settings and times. Raises as `save_image`."""
        save_image(self.figure(), path, self.to_dict())

    def to_dict(self) -> dict[str, Any]:
        """Settings and seconds of every method, ready for JSON."""
        return {"compare": [{**result.settings, "seconds": list(result.all_seconds)} for result in self.results]}

    def __str__(self) -> str:
        lines = []
        for result in self.results:
            line = f"{METHODS[result.method]:<17}{seconds_text(result.seconds, self.stable):>10}"
            line += f"  {self.speed_up(result.method):5.2f}x" if self.stable else ""
            lines.append("  ".join(filter(None, (line, calls_text(result.settings)))))
        return "\n".join([*lines, self._how_timed(), *self._how_near()])

    __repr__ = __str__  # shown where a notebook or a prompt shows a value; the data stands in its attributes

    def _repr_html_(self) -> str:
        buffer = io.BytesIO()
        self.figure().save(buffer, format="PNG")
        picture = base64.b64encode(buffer.getvalue()).decode("ascii")
        return (
            f'<img style="max-width:100%" src="data:image/png;base64,{picture}" alt="{html.escape(str(self))}">'
            + "".join(f"<p>{html.escape(line)}</p>" for line in (self._how_timed(), *self._how_near()))
        )

    def _how_near(self) -> list[str]:
        """One line with every method's distance to the first; none for a single method."""
        first, *others = self.results
        near = [(METHODS[result.method], self.psnr(result.method)) for result in others]
        said = ", ".join(f"{name} {'equal' if math.isinf(db) else f'{db:.1f} dB'}" for name, db in near)
        return [f"PSNR to the image of {METHODS[first.method]}, higher is nearer: {said}"] if near else []

    def _how_timed(self) -> str:
        rounds = len(self.results[0].all_seconds)
        if rounds == 1:
            return "one run each after a warm-up: 3 rounds give a speed-up in figures"
        text = f"median of {rounds} interleaved rounds after a warm-up"
        if self.stable:
            return text
        return f"{text}; unstable: rounds differ by more than {STABLE - 1:.0%}, so no speed-up is given"


def compare(
    pipe: Any,
    prompt: str,
    *,
    config: AgentConfig | None = None,
    preset: str | None = None,
    negative_prompt: str = "",
    steps: int = 50,
    guidance: float = 7.5,
    seed: int = 0,
    height: int | None = None,
    width: int | None = None,
    methods: Iterable[str] = ("sd", "tomesd", "agentsd"),
    rounds: int | None = None,
    on_round: Callable[[str, int], None] | None = None,
    **settings: Any,
) -> Comparison:
    """Generate the same image by several methods from the same seed and time them fairly.

    Each method is warmed up first. The rounds are interleaved (every method once, then every method again) and begin
    with another method each time, so that a machine whose speed drifts favours none.

    Args:
        pipe: an unpatched text-to-image pipeline with a UNet; unpatched again afterwards.
        prompt: what the image shows.
        config: settings of the patch; None takes what the model was trained for, or the defaults.
        preset: a name from `agentsd.config.PRESETS`, in place of a config.
        negative_prompt, steps, guidance, seed, height, width: as in `Request`; `seed` is that of the initial noise.
        methods: keys of METHODS: "sd" (the model as it is), "tomesd" (ToMeSD), "agentsd". Speed-ups are over the first.
        rounds: how many times each method is timed; None times three times, or fewer once five minutes have passed.
        on_round: called with (method, round) before each run; round 0 is the warm-up.
        **settings: fields of AgentConfig by name (`ratio=0.5`); they win over config or preset. The seed of the patch
            is set by `config`.

    Returns:
        A Comparison: print it, index it by method, or show its `figure()`.

    Raises:
        TypeError, ValueError: a wrong argument; a pipeline that is already patched, or whose UNet is compiled (every
            method would compile it anew in every round).

    Example:
        >>> comparison = agentsd.compare(pipe, "a zebra", steps=25, ratio=0.5)
        >>> comparison.speed_up("agentsd"), comparison["agentsd"].image
    """
    request = Request(prompt, negative_prompt, steps, guidance, seed, height, width)
    return compare_methods(pipe, request, choose_config(pipe, config, preset, **settings), methods, rounds, on_round)


def compare_methods(
    pipe: Any,
    request: Request,
    config: AgentConfig | None = None,
    methods: Iterable[str] = tuple(METHODS),
    rounds: int | None = None,
    on_round: Callable[[str, int], None] | None = None,
) -> Comparison:
    """As `compare`, with the request and all settings as objects."""
    config = choose_config(pipe, config)
    methods = list(methods)
    _check(pipe, config, methods, rounds)
    for method in methods:
        if on_round:
            on_round(method, 0)
        warm_up(pipe, request, method, config)
    results: dict[str, GeneratedImage] = {}
    for number in itertools.count(1):
        for method in rotated(methods, number):
            if on_round:
                on_round(method, number)
            result = generate(pipe, request, method, config)
            results[method] = results[method].with_run(result) if method in results else result
        total = sum(sum(result.all_seconds) for result in results.values())
        if number >= (rounds or USUAL_ROUNDS) or (rounds is None and total > SECONDS_ENOUGH):
            break
    return Comparison(tuple(results[method] for method in methods))


def are_stable(results: Iterable[GeneratedImage]) -> bool:
    """Whether every method ran more than once and its rounds differ by at most 15 %."""
    return all(is_stable(result.all_seconds) for result in results)


def comparison_image(results: Iterable[GeneratedImage]) -> Image.Image:
    """The images side by side; under each its method, seconds and speed-up over the first.

    Where the timings are not stable, the reason stands in place of the speed-up.
    """
    results = list(results)
    stable, rounds = are_stable(results), len(results[0].all_seconds)
    width, height = results[0].image.size
    size = max(13, width // 18)
    margin, line = max(8, width // 32), int(size * 1.3)
    lines = 2 if stable else 3
    canvas = Image.new("RGB", ((width + margin) * len(results) + margin, height + 2 * margin + line * lines), "white")
    pen = ImageDraw.Draw(canvas)
    for i, result in enumerate(results):
        left, top = margin + i * (width + margin), 2 * margin + height - size // 3
        canvas.paste(result.image, (left, margin))
        caption = [(_title(result), 1.0, "black"), (_timing(result, results[0], stable), 0.85, "#555555")]
        caption += [("one run" if rounds == 1 else "unstable timing", 0.85, "#555555")] * (lines - 2)
        for row, (text, scale, colour) in enumerate(caption):
            pen.text((left, top + row * line), text, font=_fitting_font(text, int(size * scale), width), fill=colour)
    return canvas


def _fitting_font(text: str, size: int, width: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """The font of a size, or of the largest below it that keeps a text within a width."""
    font = ImageFont.load_default(size)
    while size > 6 and font.getlength(text) > width:
        size -= 1
        font = ImageFont.load_default(size)
    return font


def _title(result: GeneratedImage) -> str:
    patch = result.settings.get("patch")
    if not patch:
        return METHODS[result.method]
    interval, calls = patch.get("cache_interval", 1), result.settings.get("unet_calls")
    caching = "nothing cached" if calls and not calls["cached"] else f"caching {interval}"
    return f"{METHODS[result.method]}  ratio {patch['ratio']:g}" + (f", {caching}" if interval > 1 else "")


def seconds_text(seconds: float, stable: bool) -> str:
    """Seconds in print: "2.53 s", or of unstable timings "about 3 s"."""
    if stable:
        return f"{seconds:.2f} s"
    return f"about {seconds:.0f} s" if seconds >= 1 else "under 1 s"


def _timing(result: GeneratedImage, base: GeneratedImage, stable: bool) -> str:
    text = seconds_text(result.seconds, stable)  # "x": Pillow's own font has no multiplication sign
    return text if result is base or not stable else f"{text},  {base.seconds / result.seconds:.2f}x as fast"


def _check(pipe: Any, config: AgentConfig, methods: list[str], rounds: int | None) -> None:
    """Raise before time is spent on a comparison that would fail or mislead."""
    if not methods or len(set(methods)) < len(methods):
        raise ValueError(f"methods={methods!r}: must be one or more of {', '.join(METHODS)}, each once")
    if rounds is not None and (not isinstance(rounds, int) or isinstance(rounds, bool)):
        raise TypeError(f"rounds={rounds!r}: must be an integer in 1 … 100, or None")
    if rounds is not None and not 1 <= rounds <= 100:
        raise ValueError(f"rounds={rounds}: must lie in 1 … 100")
    refuse_patched(pipe)
    for method in methods:
        check_method(pipe, method, config)
    refuse_compiled(pipe)


def refuse_compiled(pipe: Any) -> None:
    """Raise ValueError where each method would compile the UNet anew."""
    unet = pipe.unet
    if hasattr(unet, "_orig_mod") or getattr(unet, "_compiled_call_impl", None) is not None:
        raise ValueError(
            "this pipeline's UNet is compiled: each method would compile it anew in every round, and the seconds would "
            "be the compiler's. Compare before compiling; eval/fid_bench.py times compiled UNets"
        )
