"""generate: one image by one method, with its time, its peak memory and everything needed to generate it again."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from ..config import AgentConfig
from ..patch import find_unet, get_patch
from ..step_cache import FEWEST_STEPS
from .measure import PeakMemory
from .methods import config_for, use_method
from .pipelines import DEMO_MODEL
from .request import Request


@dataclass(frozen=True)
class GeneratedImage:
    """One image and how it was generated.

    Attributes:
        method: a key of METHODS.
        image: the image.
        all_seconds: wall time of each run of the whole pipeline, in order.
        settings: everything needed to generate the image again, plain data.
        peak_bytes: peak memory of a run: of the allocator on CUDA, of the whole process on Linux; None where it is
            unknown.
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
        """This image with the time and the peak memory of another run of the same request added."""
        peaks = [peak for peak in (self.peak_bytes, other.peak_bytes) if peak is not None]
        return dataclasses.replace(
            self, all_seconds=self.all_seconds + other.all_seconds, peak_bytes=max(peaks, default=None)
        )


@dataclass(frozen=True)
class Step:
    """One finished denoising step.

    Attributes:
        number: from 1. Some schedulers call the UNet more than once a step: this counts the calls.
        total: number of the last one.
        timestep: its noise level.
        latents: [batch, channels, height / 8, width / 8], the latent image after the step.
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
    """Generate one image.

    Args:
        pipe: an unpatched text-to-image pipeline (see `load_pipeline`).
        request: what to generate.
        method: a key of METHODS.
        config: settings of the patch; None takes what the model was trained for, or the defaults.
        on_step: called after each step; its own time is not counted. An exception from it ends the run, passes through
            and leaves the model unpatched.
        **extra: further arguments of the pipeline call.

    Raises:
        ValueError: as `use_method`, an already patched pipeline among others.
    """
    config = config_for(pipe, method, config)
    with use_method(pipe, method, config):
        image, seconds, peak = run_pipeline(pipe, request, on_step, **extra)
        calls = cached_calls(pipe)
    settings = settings_of(pipe, request, method, config)
    if calls is not None:
        settings["unet_calls"] = calls
    return GeneratedImage(method, image, (seconds,), settings, peak)


def cached_calls(pipe: Any) -> dict[str, int] | None:
    """How many UNet calls of the last run were whole and how many cached; None without step caching."""
    patch = get_patch(pipe)
    if patch is None or patch.counts is None:
        return None
    return dataclasses.asdict(patch.counts)


def calls_text(settings: dict[str, Any]) -> str:
    """Say how many UNet calls an image's settings count, and why none was cached; "" without step caching."""
    calls = settings.get("unet_calls")
    if not calls:
        return ""
    text = f"{calls['whole']} whole + {calls['cached']} cached UNet calls"
    few = not calls["cached"] and settings["steps"] < FEWEST_STEPS
    return text + f" (runs of fewer than {FEWEST_STEPS} steps are not cached)" * few


def run_pipeline(
    pipe: Any, request: Request, on_step: Callable[[Step], None] | None = None, **extra: Any
) -> tuple[Image.Image, float, int | None]:
    """Run a pipeline as it stands, patched or not.

    Arguments as `generate`.

    Returns:
        The image, seconds without those of on_step, and peak memory in bytes (None where it is unknown).
    """
    # Noise drawn on the CPU: the same seed gives the same image on every device.
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


def settings_of(pipe: Any, request: Request, method: str, config: AgentConfig) -> dict[str, Any]:
    """Everything needed to generate an image again, as plain data for JSON."""
    patch: dict[str, Any] | None = None
    if method == "agentsd":
        patch = dataclasses.asdict(config)
    elif method == "tomesd":
        patch = {"ratio": config.ratio, "use_rand": config.use_rand, "seed": config.seed}
    unet = find_unet(pipe)
    name = str(getattr(pipe, "name_or_path", "") or type(pipe).__name__)
    return _plain(
        {
            "method": method,
            **dataclasses.asdict(request),
            "model": "demo" if name == str(DEMO_MODEL) else name,
            "scheduler": type(pipe.scheduler).__name__,
            "patch": patch,
            "device": str(unet.device),
            "dtype": str(unet.dtype).removeprefix("torch."),
            "versions": {name: version(name) for name in ("agentsd", "torch", "diffusers", "transformers", "tomesd")},
        }
    )


def _plain(value: Any) -> Any:
    """The same with Python's own numbers in place of NumPy's, which json.dumps refuses."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(entry) for entry in value)
    return value.item() if hasattr(value, "item") else value


class _Steps:
    """A pipeline's `callback_on_step_end` that calls on_step and counts the seconds that takes."""

    def __init__(self, on_step: Callable[[Step], None], device: torch.device):
        self.on_step = on_step
        self.device = device
        self.seconds = 0.0

    def __call__(self, pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        _synchronize(self.device)  # or the step's own time would count as on_step's
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
