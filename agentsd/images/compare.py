"""Generate an image by one method or by several from the same seed, and time them fairly."""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..config import AgentConfig
from ..patch import find_unet
from .measure import PeakMemory
from .methods import METHODS, use_method
from .pipelines import DEMO_MODEL
from .request import Request

_USUAL_ROUNDS, _SECONDS_ENOUGH = 3, 300.0
STABLE = 1.15
"""Rounds of one method that differ by more than this factor make rough figures, which cannot tell smaller ones."""
_WARM_UP_STEPS = 4  # the fewest that take PLMS through both phases


@dataclass(frozen=True)
class GeneratedImage:
    """One picture and how it came to be.

    Attributes:
        method: a key of METHODS.
        image: the picture.
        all_seconds: wall time of each run of the whole pipeline, in order.
        settings: everything needed to draw it again, plain data.
        peak_bytes: greatest memory in use during a run: of the allocator on CUDA, of the whole process on Linux; None
            where it cannot be told.
    """

    method: str
    image: Image.Image
    all_seconds: tuple[float, ...]
    settings: dict[str, Any]
    peak_bytes: int | None = None

    @property
    def seconds(self) -> float:
        """Median over the runs."""
        return statistics.median(self.all_seconds)

    def with_run(self, other: GeneratedImage) -> GeneratedImage:
        """This drawing with the time and the memory of another run of the same."""
        peaks = [peak for peak in (self.peak_bytes, other.peak_bytes) if peak is not None]
        return dataclasses.replace(
            self, all_seconds=self.all_seconds + other.all_seconds, peak_bytes=max(peaks, default=None)
        )


@dataclass(frozen=True)
class Step:
    """One denoising step that has just been done.

    Attributes:
        number: from 1. Some schedulers call the UNet more than once a step: this counts the calls.
        total: number of the last one.
        timestep: its noise level.
        latents: [batch, channels, height / 8, width / 8], what the picture has become.
    """

    number: int
    total: int
    timestep: float
    latents: Tensor


def generate(
    pipe: Any,
    request: Request,
    method: str = "agentsd",
    config: AgentConfig | None = None,
    on_step: Callable[[Step], None] | None = None,
    **extra: Any,
) -> GeneratedImage:
    """Draw one picture.

    Args:
        pipe: an unpatched text-to-image pipeline (see `load_pipeline`).
        request: what to draw.
        method: a key of METHODS.
        config: settings of the patch; None takes the defaults.
        on_step: called after each step; the time it takes is not counted. What it raises ends the drawing, comes out of
            here, and leaves the model as it was.
        **extra: further arguments of the pipeline call.
    """
    config = config or AgentConfig()
    with use_method(pipe, method, config):
        image, seconds, peak = _measured_call(pipe, request, on_step, **extra)
    return GeneratedImage(method, image, (seconds,), settings_of(pipe, request, method, config), peak)


def warm_up(
    pipe: Any,
    request: Request,
    method: str = "agentsd",
    config: AgentConfig | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> None:
    """Draw the same in the fewest steps that go through both phases: the first run of a kind is slower than the rest.

    Arguments as `generate`.
    """
    generate(pipe, dataclasses.replace(request, steps=min(request.steps, _WARM_UP_STEPS)), method, config, on_step)


def compare(
    pipe: Any,
    request: Request,
    config: AgentConfig | None = None,
    methods: Iterable[str] = tuple(METHODS),
    rounds: int | None = None,
    on_round: Callable[[str, int], None] | None = None,
) -> list[GeneratedImage]:
    """Draw the same request by several methods and time them fairly.

    Each method is warmed up first; the rounds are interleaved (every method once, then every method again), so that a
    machine whose speed drifts does not favour one. Seconds are medians over the rounds.

    Args:
        rounds: how many times each method is timed; None times three times, or fewer once five minutes have gone by.
        on_round: called with (method, round) before each run; round 0 is the warm-up.

    Returns:
        One GeneratedImage per method, in the order given.
    """
    config = config or AgentConfig()
    methods = list(methods)
    for method in methods:
        if on_round:
            on_round(method, 0)
        warm_up(pipe, request, method, config)
    drawings: dict[str, GeneratedImage] = {}
    for number in itertools.count(1):
        for method in methods:
            if on_round:
                on_round(method, number)
            drawing = generate(pipe, request, method, config)
            drawings[method] = drawings[method].with_run(drawing) if method in drawings else drawing
        total = sum(sum(drawing.all_seconds) for drawing in drawings.values())
        if number >= (rounds or _USUAL_ROUNDS) or (rounds is None and total > _SECONDS_ENOUGH):
            break
    return [drawings[method] for method in methods]


def are_stable(drawings: list[GeneratedImage]) -> bool:
    """Whether the times can be trusted: every method ran more than once, and its rounds agree."""
    return all(
        len(drawing.all_seconds) > 1 and max(drawing.all_seconds) <= STABLE * min(drawing.all_seconds)
        for drawing in drawings
    )


def comparison_image(drawings: list[GeneratedImage]) -> Image.Image:
    """The pictures side by side; under each its method, seconds (rough if they vary), and speed-up over the first."""
    width, height = drawings[0].image.size
    size = max(13, width // 18)
    margin, caption = max(8, width // 32), int(size * 3.6)
    canvas = Image.new("RGB", ((width + margin) * len(drawings) + margin, height + caption + margin), "white")
    pen = ImageDraw.Draw(canvas)
    large, small = ImageFont.load_default(size), ImageFont.load_default(int(size * 0.85))
    for i, drawing in enumerate(drawings):
        left = margin + i * (width + margin)
        canvas.paste(drawing.image, (left, margin))
        top = margin + height + size // 3
        pen.text((left, top), _title(drawing), font=large, fill="black")
        timing = _timing(drawing, drawings[0]) + ("" if are_stable(drawings) else " (rough)")
        pen.text((left, top + size * 1.4), timing, font=small, fill="#555555")
    return canvas


def _title(drawing: GeneratedImage) -> str:
    patch = drawing.settings.get("patch")
    return METHODS[drawing.method] + (f"  ratio {patch['ratio']:g}" if patch else "")


def _timing(drawing: GeneratedImage, base: GeneratedImage) -> str:
    text = f"{drawing.seconds:.2f} s"  # "x": Pillow's own font has no multiplication sign
    return text if drawing is base else f"{text},  {base.seconds / drawing.seconds:.2f}x as fast"


def settings_of(pipe: Any, request: Request, method: str, config: AgentConfig) -> dict[str, Any]:
    """Everything needed to draw a picture again, as plain data for JSON."""
    patch: dict[str, Any] | None = None
    if method == "agentsd":
        patch = dataclasses.asdict(config)
    elif method == "tomesd":
        patch = {"ratio": config.ratio, "use_rand": config.use_rand, "seed": config.seed}
    unet = find_unet(pipe)
    name = str(getattr(pipe, "name_or_path", "") or type(pipe).__name__)
    return {
        "method": method,
        **dataclasses.asdict(request),
        "model": "demo" if name == str(DEMO_MODEL) else name,
        "scheduler": type(pipe.scheduler).__name__,
        "patch": patch,
        "device": str(unet.device),
        "dtype": str(unet.dtype).removeprefix("torch."),
        "versions": {name: version(name) for name in ("agentsd", "torch", "diffusers", "transformers", "tomesd")},
    }


def _measured_call(
    pipe: Any, request: Request, on_step: Callable[[Step], None] | None = None, **extra: Any
) -> tuple[Image.Image, float, int | None]:
    """(picture, seconds, peak memory in bytes) of one run of the pipeline."""
    # Noise drawn on the CPU: the same seed is the same picture on every device.
    generator = torch.Generator("cpu").manual_seed(request.seed)
    device = find_unet(pipe).device
    steps = _Steps(on_step, device) if on_step else None
    if steps:
        extra["callback_on_step_end"] = steps
    memory = PeakMemory(device)
    _synchronize(device)
    start = time.perf_counter()
    out = pipe(
        request.prompt,
        negative_prompt=request.negative_prompt or None,
        num_inference_steps=request.steps,
        guidance_scale=request.guidance,
        height=request.height,
        width=request.width,
        generator=generator,
        **extra,
    )
    _synchronize(device)
    seconds = time.perf_counter() - start - (steps.seconds if steps else 0)
    return out.images[0], seconds, memory.peak()[0]


class _Steps:
    """A pipeline's `callback_on_step_end` that tells on_step, and how long that took."""

    def __init__(self, on_step: Callable[[Step], None], device: torch.device):
        self.on_step = on_step
        self.device = device
        self.seconds = 0.0

    def __call__(self, pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        _synchronize(self.device)  # or the step's own time would be taken for on_step's
        start = time.perf_counter()
        total = getattr(pipe, "num_timesteps", None) or len(pipe.scheduler.timesteps)
        self.on_step(Step(index + 1, total, float(timestep), values["latents"]))
        self.seconds += time.perf_counter() - start
        return {}


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
