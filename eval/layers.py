"""Times and profiles one self-attention layer under each setting, on grids of any size, and makes tables of it.

The layer runs inside a real transformer block of a patched UNet; only its own time counts, between the hooks before and
after it. Rounds are interleaved after a warm-up, times are medians.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import statistics
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor

import agentsd
from agentsd import AgentConfig, Phase
from agentsd.images.measure import PeakMemory
from agentsd.images.pipelines import choose_device, choose_dtype

from .generation import write_whole
from .protocol import BenchError
from .report import environment, environment_line
from .scenarios import NoMixingProcessor

_TIMESTEPS = {Phase.AGENT: 900, Phase.MERGE: 100}
_TEXT_TOKENS, _TEXT_WIDTH = 77, 768


def run(options: argparse.Namespace, command: str) -> None:
    """Do what the arguments of layer_bench.py say. Raises BenchError for wrong input."""
    sides = _sides(options.sides)
    for name, low, high in (("heads", 1, 256), ("batch", 1, 1024), ("rounds", 1, 1000)):
        if not low <= getattr(options, name) <= high:
            raise BenchError(f"--{name} {getattr(options, name)}: must lie in {low} … {high}")
    if options.channels < 32 or options.channels % math.lcm(32, options.heads):
        raise BenchError(f"--channels {options.channels}: must be a multiple of 32 and of --heads {options.heads}")
    target = options.out and Path(options.out)
    if target and not target.absolute().parent.is_dir():
        raise BenchError(f"--out {target}: its folder does not exist; make it first")
    try:
        device = choose_device(options.device)
        dtype = choose_dtype(options.dtype, device)
        rows = variants(AgentConfig(ratio=options.ratio).ratio)
    except ValueError as error:
        raise BenchError(str(error)) from error
    diffusers.utils.logging.set_verbosity_error()  # of casts that make no difference to the time
    shape = Shape(options.channels, options.heads, options.batch)
    found, profiles = [], []
    for side in sides:
        print(f"{side}×{side} …", file=sys.stderr)
        with torch.inference_mode():
            found.append(measure(side, rows, shape, options.rounds, device, dtype))
            if options.profile:
                profiles.append(profile(side, rows, shape, options.rounds, device, dtype))
    text = as_markdown(
        sides, found, "layer_bench: one self-attention layer",
        [
            f"`{command}`",
            environment_line(environment(device, dtype)),
            f"{shape.channels} channels, {shape.heads} heads, batch {shape.batch}, ratio {options.ratio:g}, "
            f"{options.rounds} interleaved rounds after a warm-up. Peak: what the layer took above what was in use.",
        ],
    )  # fmt: skip
    for side, operators in zip(sides, profiles):
        text += "\n" + profile_as_markdown(side, operators)
    if target:
        try:
            write_whole(target, text)
        except OSError as error:
            raise BenchError(f"--out {target}: cannot be written ({error.strerror or error})") from error
    print(text)


def _sides(text: str) -> list[int]:
    try:
        sides = [int(part) for part in text.split(",")]
    except ValueError:
        sides = [0]
    if not all(4 <= side <= 1024 for side in sides):
        raise BenchError(f"--sides {text!r}: must be integers in 4 … 1024 with commas between")
    return sides


@dataclass(frozen=True)
class Variant:
    """One way to compute the layer: a row of the table.

    Attributes:
        name: for people.
        phase: which of the patch's two phases; None is no patch.
        settings: fields of AgentConfig.
        mixes: False puts the limit in place of attention: the four projections and no mixing of tokens.
    """

    name: str
    phase: Phase | None = None
    settings: tuple[tuple[str, Any], ...] = ()
    mixes: bool = True


def variants(ratio: float) -> list[Variant]:
    """SDPA, the limit, and each phase of the patch as it is by default and with what serves large grids."""

    def patch(name: str, phase: Phase, **settings: Any) -> Variant:
        return Variant(name, phase, (("ratio", ratio), *settings.items()))

    return [
        Variant("sdpa"),
        Variant("limit", mixes=False),
        patch("agent", Phase.AGENT),
        patch("agent, max_agents=256", Phase.AGENT, max_agents=256),
        patch("agent, max_agents=256, match_tile=16", Phase.AGENT, max_agents=256, match_tile=16),
        patch("merge", Phase.MERGE),
        patch("merge, match_tile=16", Phase.MERGE, match_tile=16),
        patch("downsample", Phase.MERGE, late="downsample"),
        patch("downsample, merge_stride=4", Phase.MERGE, late="downsample", merge_stride=4),
        patch("downsample, max_keys=1024", Phase.MERGE, late="downsample", max_keys=1024),
    ]


@dataclass(frozen=True)
class Shape:
    """The layer and its input. Stable Diffusion 1.5's full-resolution layers have 320 channels and 8 heads.

    Attributes:
        channels, heads: of the layer.
        batch: samples; guidance doubles the number of pictures.
    """

    channels: int = 320
    heads: int = 8
    batch: int = 2


@dataclass(frozen=True)
class Measured:
    """What one variant took on one grid.

    Attributes:
        seconds: median over the rounds.
        peak_mb: greatest memory above what was in use before, in MB, median over the rounds; None where it cannot be
            told. On a CPU it is the process's, so below some 100 MB it says little.
    """

    seconds: float
    peak_mb: float | None


@dataclass(frozen=True)
class Operator:
    """What one of PyTorch's operators took in one call of the layer.

    Attributes:
        seconds: of its own, without the operators it calls; on a GPU, of its kernels.
        calls: how often it was called.
    """

    seconds: float
    calls: int


def measure(
    side: int, rows: list[Variant], shape: Shape, rounds: int, device: torch.device, dtype: torch.dtype
) -> dict[str, Measured]:
    """Time the layer on a side × side grid; returns what was measured by variant name."""
    unet, block, x, text = _make_layer(side, shape, device, dtype)
    laps: dict[str, list[tuple[float, float | None]]] = {row.name: [] for row in rows}
    for number in range(rounds + 1):
        for row in rows:
            with _computed_as(row, unet, block, side), _stopwatch(block.attn1, device) as found:
                block(x, encoder_hidden_states=text)
            if number:
                laps[row.name] += found
    return {
        name: Measured(
            statistics.median(seconds for seconds, _ in found),
            None if found[0][1] is None else statistics.median(peak for _, peak in found),
        )
        for name, found in laps.items()
    }


def profile(
    side: int, rows: list[Variant], shape: Shape, rounds: int, device: torch.device, dtype: torch.dtype
) -> dict[str, dict[str, Operator]]:
    """Where the layer's time goes, as means over the rounds, in one variant after the other.

    Returns:
        By variant name, the operators that one call of the layer takes, by PyTorch's name.
    """
    unet, block, x, text = _make_layer(side, shape, device, dtype)
    found = {}
    for row in rows:
        with _computed_as(row, unet, block, side):
            block(x, encoder_hidden_states=text)
            with _profiler(block.attn1, device) as totals:
                for _ in range(rounds):
                    block(x, encoder_hidden_states=text)
        found[row.name] = {
            name: Operator(seconds / rounds, calls // rounds) for name, (seconds, calls) in totals.items()
        }
    return found


def _make_layer(
    side: int, shape: Shape, device: torch.device, dtype: torch.dtype
) -> tuple[UNet2DConditionModel, BasicTransformerBlock, Tensor, Tensor]:
    """A UNet of one level, the transformer block that holds the layer, the block's input and its text."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=side,
        block_out_channels=(shape.channels,),
        down_block_types=("CrossAttnDownBlock2D",),
        up_block_types=("CrossAttnUpBlock2D",),
        mid_block_type=None,
        layers_per_block=1,
        attention_head_dim=shape.heads,  # the number of heads, by diffusers' own misnomer
        cross_attention_dim=_TEXT_WIDTH,
    )
    unet = unet.to(device).to(dtype).eval().requires_grad_(False)
    block = next(module for module in unet.modules() if isinstance(module, BasicTransformerBlock))
    text = torch.randn(shape.batch, _TEXT_TOKENS, _TEXT_WIDTH).to(device, dtype)
    return unet, block, _picture_like(shape.batch, shape.channels, side).to(device, dtype), text


def _picture_like(batch: int, channels: int, side: int) -> Tensor:
    """[B, side², C] random tokens of which neighbours are alike."""
    coarse = torch.randn(batch, channels, -(-side // 4), -(-side // 4))
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    return (smooth + 0.3 * torch.randn(smooth.shape)).flatten(2).transpose(1, 2)


@contextlib.contextmanager
def _computed_as(row: Variant, unet: UNet2DConditionModel, block: BasicTransformerBlock, side: int) -> Iterator[None]:
    if not row.mixes:
        before, block.attn1.processor = block.attn1.processor, NoMixingProcessor()
        try:
            yield
        finally:
            block.attn1.processor = before
    elif row.phase is None:
        yield
    else:
        with agentsd.patched(unet, **dict(row.settings)):
            _tell_phase(unet, _TIMESTEPS[row.phase], side)
            yield


def _tell_phase(unet: UNet2DConditionModel, timestep: int, side: int) -> None:
    """Have the patch see a UNet call of this size and timestep, and end the call before the UNet computes anything."""

    def stop(*_: Any) -> None:
        raise _Stop

    handle = unet.conv_in.register_forward_pre_hook(stop)
    weight = unet.conv_in.weight
    sample = torch.zeros(1, unet.config.in_channels, side, side, device=weight.device, dtype=weight.dtype)
    text = torch.zeros(1, 1, _TEXT_WIDTH, device=weight.device, dtype=weight.dtype)
    try:
        unet(sample, timestep, text)
    except _Stop:
        pass
    finally:
        handle.remove()


class _Stop(Exception):
    pass


@contextlib.contextmanager
def _stopwatch(module: torch.nn.Module, device: torch.device) -> Iterator[list[tuple[float, float | None]]]:
    """Collect (seconds, peak memory in MB) of each call of a module."""
    laps: list[tuple[float, float | None]] = []
    begun: list[Any] = []

    def before(*_: Any) -> None:
        begun[:] = [PeakMemory(device), _now()]

    def after(*_: Any) -> None:
        seconds = _now() - begun[1]
        peak, growth = begun[0].peak()
        laps.append((seconds, None if peak is None else growth / 1e6))

    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield laps
    finally:
        for handle in handles:
            handle.remove()


@contextlib.contextmanager
def _profiler(module: torch.nn.Module, device: torch.device) -> Iterator[dict[str, tuple[float, int]]]:
    """Add up (seconds, calls) of PyTorch's operators over the calls of a module."""
    totals: dict[str, tuple[float, int]] = {}
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    running: list[torch.profiler.profile] = []

    def before(*_: Any) -> None:
        running.append(torch.profiler.profile(activities=activities))
        running[-1].start()

    def after(*_: Any) -> None:
        _now()  # waits for the device
        running[-1].stop()
        for event in running.pop().key_averages():
            if event.key.startswith("aten::"):
                own = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
                seconds, calls = totals.get(event.key, (0.0, 0))
                totals[event.key] = (seconds + own / 1e6, calls + event.count)

    handles = [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield totals
    finally:
        for handle in handles:
            handle.remove()


def _now() -> float:
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter()


def growth(sides: list[int], seconds: list[float]) -> float:
    """Exponent p of seconds ∝ tokens ** p between the first and the last grid."""
    return math.log(seconds[-1] / seconds[0]) / math.log((sides[-1] / sides[0]) ** 2)


def as_markdown(sides: list[int], found: list[dict[str, Measured]], title: str, lines: list[str]) -> str:
    """The table: on each grid milliseconds, speed-up over SDPA, time over the limit, peak memory; then the growth."""
    head, ruler = ["layer"], ["---"]
    for side in sides:
        head += [f"{side}×{side}: ms", "× sdpa", "over the limit", "peak MB"]
        ruler += ["---:"] * 4
    if len(sides) > 1:
        head.append("grows with tokens as")
        ruler.append("---")
    rows = [head, ruler]
    for name in found[0]:
        cells = [name]
        for times in found:
            own = times[name]
            cells += [
                f"{own.seconds * 1000:.1f}",
                f"{times['sdpa'].seconds / own.seconds:.2f}",
                f"{own.seconds / times['limit'].seconds:.2f}",
                "" if own.peak_mb is None else f"{own.peak_mb:.0f}",
            ]
        if len(sides) > 1:
            cells.append(f"N^{growth(sides, [times[name].seconds for times in found]):.2f}")
        rows.append(cells)
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    return "\n\n".join([f"# {title}", *lines, table]) + "\n"


def profile_as_markdown(side: int, found: dict[str, dict[str, Operator]], most: int = 12) -> str:
    """The table of the operators that take longest under some variant: milliseconds of their own, and calls."""
    names = {name for operators in found.values() for name in operators}
    none = Operator(0.0, 0)
    by_time = sorted(names, key=lambda name: -max(operators.get(name, none).seconds for operators in found.values()))
    longest = by_time[:most]
    rows = [["operator", *found], ["---", *["---:"] * len(found)]]
    for name in longest:
        own = [operators.get(name) for operators in found.values()]
        rows.append([name, *("" if one is None else f"{one.seconds * 1000:.1f} ({one.calls})" for one in own)])
    others = [[one for name, one in operators.items() if name not in longest] for operators in found.values()]
    rows.append(
        ["others", *(f"{sum(o.seconds for o in own) * 1000:.1f} ({sum(o.calls for o in own)})" for own in others)]
    )
    table = "\n".join("| " + " | ".join(row) + " |" for row in rows)
    title = f"{side}×{side}: milliseconds of each operator's own in one call of the layer, and how often it is called"
    return f"{title}.\n\n{table}\n"
