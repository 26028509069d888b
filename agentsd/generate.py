"""Draw pictures by Stable Diffusion, ToMeSD or AgentSD from one seed, time them, and save them with their settings."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import json
import math
import os
import statistics
import struct
import tempfile
import time
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tomesd
import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from .config import AgentConfig
from .measure import PeakMemory
from .patch import find_layers, find_unet, patched, why_none
from .pipelines import DEMO_MODEL

METHODS = {"sd": "Stable Diffusion", "tomesd": "ToMeSD", "agentsd": "AgentSD"}
"""Name on the command line: name in print."""

METADATA_KEY = "agentsd"
"""Text chunk of a saved PNG that holds its settings, as JSON."""

_USUAL_ROUNDS, _SECONDS_ENOUGH = 3, 300.0
STEADY = 1.15
"""Rounds of one method that differ by more than this factor make rough figures, which cannot tell smaller ones."""
_WARM_UP_STEPS = 4  # the fewest that take PLMS through both phases


@dataclass(frozen=True)
class Request:
    """What to draw, checked when made.

    Attributes:
        prompt: what the picture shows.
        negative_prompt: what it should not show.
        steps: denoising steps.
        guidance: scale of classifier-free guidance; 1 and below is none.
        seed: of the initial noise.
        height, width: in pixels, multiples of 8; None takes the model's own.

    Raises:
        TypeError, ValueError: the message names field, value and what is allowed.
    """

    prompt: str
    negative_prompt: str = ""
    steps: int = 50
    guidance: float = 7.5
    seed: int = 0
    height: int | None = None
    width: int | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.prompt, str) or not self.prompt.strip():
            raise ValueError(f"prompt={self.prompt!r}: must be a text that is not empty")
        if not isinstance(self.negative_prompt, str):
            raise TypeError(f"negative_prompt={self.negative_prompt!r}: must be a text")
        _check_integer(
            "steps", self.steps, 1, 999
        )  # at 1,000, SD's steps_offset of 1 points PLMS past its last timestep
        _check_integer("seed", self.seed, 0, 2**63 - 1)
        if isinstance(self.guidance, bool) or not isinstance(self.guidance, (int, float)):
            raise TypeError(f"guidance={self.guidance!r}: must be a number in 0 … 100")
        if not math.isfinite(self.guidance) or not 0 <= self.guidance <= 100:
            raise ValueError(f"guidance={self.guidance}: must be a number in 0 … 100")
        for name in ("height", "width"):
            value = getattr(self, name)
            if value is not None:
                _check_integer(name, value, 8, 8192)
                if value % 8:
                    raise ValueError(f"{name}={value}: must be a multiple of 8 (one latent pixel is 8 × 8 pixels)")


@dataclass(frozen=True)
class Drawing:
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

    def and_again(self, other: Drawing) -> Drawing:
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


@contextlib.contextmanager
def use_method(pipe: Any, method: str, config: AgentConfig) -> Iterator[None]:
    """Make a pipeline draw by a method for the length of a `with` block; afterwards it is unpatched.

    Args:
        pipe: an unpatched pipeline with a UNet.
        method: "sd" (nothing changed), "tomesd" (the tomesd package at config.ratio, on the same layers as ours), or
            "agentsd".
        config: settings of the patch.

    Raises:
        ValueError: unknown method, or one that would change no layer of this model.
    """
    if method not in METHODS:
        raise ValueError(f"method={method!r}: must be one of {', '.join(METHODS)}")
    unet = find_unet(pipe)
    eligible, skipped = find_layers(unet, config)
    if method != "sd" and not eligible:
        raise ValueError(f"{METHODS[method]} would change no layer of this {type(unet).__name__}: {why_none(skipped)}")
    if method == "agentsd":
        with patched(pipe, config):
            yield
    elif method == "tomesd":
        # ToMeSD's default reaches only undownsampled layers: on SDXL it would silently do nothing.
        max_downsample = max(downsample for _, _, downsample in eligible)
        tomesd.apply_patch(pipe, ratio=config.ratio, max_downsample=max_downsample, use_rand=config.use_rand)
        # It forks the global random state, so that two identical calls differ; a generator of its own mends that.
        unet._tome_info["args"]["generator"] = torch.Generator(unet.device).manual_seed(config.seed)
        try:
            yield
        finally:
            tomesd.remove_patch(pipe)
            del unet._tome_info
    else:
        yield


def draw(
    pipe: Any,
    request: Request,
    method: str = "agentsd",
    config: AgentConfig | None = None,
    on_step: Callable[[Step], None] | None = None,
    **extra: Any,
) -> Drawing:
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
    return Drawing(method, image, (seconds,), settings_of(pipe, request, method, config), peak)


def warm_up(
    pipe: Any,
    request: Request,
    method: str = "agentsd",
    config: AgentConfig | None = None,
    on_step: Callable[[Step], None] | None = None,
) -> None:
    """Draw the same in the fewest steps that go through both phases: the first run of a kind is slower than the rest.

    Arguments as `draw`.
    """
    draw(pipe, dataclasses.replace(request, steps=min(request.steps, _WARM_UP_STEPS)), method, config, on_step)


def compare(
    pipe: Any,
    request: Request,
    config: AgentConfig | None = None,
    methods: Iterable[str] = tuple(METHODS),
    rounds: int | None = None,
    on_round: Callable[[str, int], None] | None = None,
) -> list[Drawing]:
    """Draw the same request by several methods and time them fairly.

    Each method is warmed up first; the rounds are interleaved (every method once, then every method again), so that a
    machine whose speed drifts does not favour one. Seconds are medians over the rounds.

    Args:
        rounds: how many times each method is timed; None times three times, or fewer once five minutes have gone by.
        on_round: called with (method, round) before each run; round 0 is the warm-up.

    Returns:
        One Drawing per method, in the order given.
    """
    config = config or AgentConfig()
    methods = list(methods)
    for method in methods:
        if on_round:
            on_round(method, 0)
        warm_up(pipe, request, method, config)
    drawings: dict[str, Drawing] = {}
    for number in itertools.count(1):
        for method in methods:
            if on_round:
                on_round(method, number)
            drawing = draw(pipe, request, method, config)
            drawings[method] = drawings[method].and_again(drawing) if method in drawings else drawing
        total = sum(sum(drawing.all_seconds) for drawing in drawings.values())
        if number >= (rounds or _USUAL_ROUNDS) or (rounds is None and total > _SECONDS_ENOUGH):
            break
    return [drawings[method] for method in methods]


def unread_part(pipe: Any, prompt: str) -> str:
    """The end of a prompt that the pipeline's text encoder does not read, "" where it reads all of it.

    CLIP reads 77 tokens, two of which mark beginning and end; diffusers cuts the rest off.
    """
    tokenizer = getattr(pipe, "tokenizer", None)
    if tokenizer is None:
        return ""
    limit = tokenizer.model_max_length
    tokens = tokenizer(prompt, truncation=False, verbose=False).input_ids
    return tokenizer.decode(tokens[limit - 1 : -1]).strip() if len(tokens) > limit else ""


def are_steady(drawings: list[Drawing]) -> bool:
    """Whether the times can be trusted: every method ran more than once, and its rounds agree."""
    return all(
        len(drawing.all_seconds) > 1 and max(drawing.all_seconds) <= STEADY * min(drawing.all_seconds)
        for drawing in drawings
    )


def comparison_picture(drawings: list[Drawing]) -> Image.Image:
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
        timing = _timing(drawing, drawings[0]) + ("" if are_steady(drawings) else " (rough)")
        pen.text((left, top + size * 1.4), timing, font=small, fill="#555555")
    return canvas


def _title(drawing: Drawing) -> str:
    patch = drawing.settings.get("patch")
    return METHODS[drawing.method] + (f"  ratio {patch['ratio']:g}" if patch else "")


def _timing(drawing: Drawing, base: Drawing) -> str:
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


def save_picture(image: Image.Image, path: str | Path, settings: dict[str, Any] | None = None) -> None:
    """Write a PNG whole or not at all, with its settings inside (`read_settings` gets them back).

    Raises:
        ValueError, OSError: as check_output.
    """
    path = check_output(path)
    info = PngInfo()
    if settings is not None:
        info.add_itxt(METADATA_KEY, json.dumps(settings, ensure_ascii=False))
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".agentsd-", suffix=".tmp")
    try:
        with os.fdopen(handle, "wb") as file:
            image.save(file, format="PNG", pnginfo=info)
        os.chmod(temporary, 0o666 & ~_umask())
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def read_settings(path: str | Path) -> dict[str, Any] | None:
    """The settings that `save_picture` put into a PNG, or None where there are none.

    Raises:
        OSError: it is no picture, or a damaged one.
        ValueError: there is something in their place that is not what `save_picture` writes.
    """
    try:
        with Image.open(path) as image:
            image.load()
            text = image.info.get(METADATA_KEY)
    except (OSError, SyntaxError, ValueError, struct.error, zlib.error, Image.DecompressionBombError) as error:
        raise OSError(f"{Path(path).name}: is no picture that can be read, or a damaged one ({error})") from error
    if not text:
        return None
    try:
        settings = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{Path(path).name}: its {METADATA_KEY} text is not JSON ({error})") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{Path(path).name}: its {METADATA_KEY} text is not a set of settings")
    return settings


def check_output(path: str | Path) -> Path:
    """Make sure, before time is spent, that a PNG can be written to a path.

    Raises:
        ValueError: the name does not end in .png.
        OSError: its folder does not exist or cannot be written to, or the path is a folder.
    """
    path = Path(path)
    if path.suffix.lower() != ".png":
        raise ValueError(f"output={str(path)!r}: must end in .png, the format that carries the settings")
    if path.is_dir():
        raise IsADirectoryError(f"output={str(path)!r}: is a folder; give the name of a file in it")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"output={str(path)!r}: the folder {str(path.parent)!r} does not exist; make it first")
    try:
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise PermissionError(
            f"output={str(path)!r}: the folder {str(path.parent)!r} cannot be written to ({error.strerror})"
        ) from error
    if path.exists() and not os.access(path, os.W_OK):
        raise PermissionError(f"output={str(path)!r}: the file exists and is write-protected")
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


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


def _check_integer(name: str, value: object, low: int, high: int) -> None:
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: must be an integer in {low} … {high}")
    if not low <= value <= high:
        raise ValueError(f"{name}={value}: must be an integer in {low} … {high}")
