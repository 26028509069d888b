"""Time and profile one self-attention layer under each setting, on grids of any size, and make tables of it.

The layer stands in a real transformer block of a patched UNet and gets the input it would get there.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention import BasicTransformerBlock
from torch import Tensor
from torch.utils.benchmark import Measurement, Timer

import agentsd
from agentsd import AgentConfig, Phase
from agentsd.files import write_atomically
from agentsd.images.pipelines import choose_device, choose_dtype
from agentsd.images.rounds import FEWEST, rotated
from agentsd.unet.processor import LAYER_ATTRIBUTE
from eval.common.environment import environment, environment_line
from eval.common.protocol import BenchError, parse_numbers
from eval.common.scenarios import NoMixingProcessor
from eval.common.tables import markdown

_TIMESTEPS = {Phase.AGENT: 900, Phase.MERGE: 100}
_TEXT_TOKENS, _TEXT_WIDTH = 77, 768
_OPERATORS = 12  # rows of a profile


def run(options: argparse.Namespace, command: str) -> None:
    """Do what the arguments of layer_bench.py say. Raises BenchError for wrong input."""
    sides = parse_numbers("sides", options.sides, 4, 1024)
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
            layer = Layer(side, shape, device, dtype)
            found.append(measure(layer, rows, options.rounds))
            if options.profile:
                profiles.append(f"## Operators at {side}×{side}\n\n{profile(layer, rows)}\n")
    text = as_markdown(
        sides, found, "layer_bench: one self-attention layer",
        [
            f"`{command}`",
            environment_line(environment(device, dtype)),
            f"{shape.channels} channels, {shape.heads} heads, batch {shape.batch}, ratio {options.ratio:g}, medians of "
            f"{options.rounds} interleaved rounds after a warm-up.",
        ],
        options.rounds,
    )  # fmt: skip
    text = "\n".join([text, *profiles])
    if target:
        try:
            write_atomically(target, text)
        except OSError as error:
            raise BenchError(f"--out {target}: cannot be written ({error.strerror or error})") from error
    print(text)


@dataclass(frozen=True)
class Variant:
    """One way to compute the layer: a row of the table.

    Attributes:
        name: for people.
        phase: which of the patch's two phases; None is no patch.
        settings: fields of AgentConfig.
        mixes: False replaces attention by the limit: the four projections and no mixing of tokens.
    """

    name: str
    phase: Phase | None = None
    settings: tuple[tuple[str, Any], ...] = ()
    mixes: bool = True


def variants(ratio: float) -> list[Variant]:
    """SDPA, the limit, and each phase of the patch by default and with settings for large grids."""

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
    """The layer and its input: SD 1.5's at full resolution by default. Guidance makes two samples of an image."""

    channels: int = 320
    heads: int = 8
    batch: int = 2


class Layer:
    """A UNet of one level and the block input of its first self-attention layer, on a side × side grid."""

    def __init__(self, side: int, shape: Shape, device: torch.device, dtype: torch.dtype):
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
        self.unet = unet.to(device).to(dtype).eval().requires_grad_(False)
        self.block = next(module for module in unet.modules() if isinstance(module, BasicTransformerBlock))
        self.tokens = _image_like(shape.batch, shape.channels, side).to(device, dtype)
        self.text = torch.zeros(1, _TEXT_TOKENS, _TEXT_WIDTH, device=device, dtype=dtype)
        self.sample = torch.zeros(1, unet.config.in_channels, side, side, device=device, dtype=dtype)

    def run(self, row: Variant, work: Callable[[Callable[[], Any]], Any]) -> Any:
        """Patch the UNet as a row says, and inside a call of it give `work` a function that calls the layer."""
        attn = self.block.attn1
        normed = self.block.norm1(self.tokens)
        found = []

        def inside(*_: Any) -> None:
            state = getattr(attn, LAYER_ATTRIBUTE, None)

            def call() -> Tensor:
                if state is not None:
                    state.now.block_input = self.tokens  # as the block's hook does before each call
                return attn(normed)

            found.append(work(call))
            raise _Stop  # nothing else of the UNet is of interest

        with _computed_as(row, self.unet, self.block):
            handle = self.unet.conv_in.register_forward_pre_hook(inside)
            try:
                self.unet(self.sample, _TIMESTEPS[row.phase or Phase.MERGE], self.text)
            except _Stop:
                pass
            finally:
                handle.remove()
        return found[0]


class _Stop(Exception):
    pass


def measure(layer: Layer, rows: list[Variant], rounds: int) -> dict[str, Measurement]:
    """Time the layer under each variant, once in every round, the rounds' order rotated; by variant name."""
    times: dict[str, list[Measurement]] = {row.name: [] for row in rows}
    for number in range(rounds):
        for row in rotated(rows, number):
            times[row.name].append(layer.run(row, lambda call: _timer(call).blocked_autorange(min_run_time=0.05)))
    return {name: Measurement.merge(found)[0] for name, found in times.items()}


def _timer(call: Callable[[], Any]) -> Timer:
    timer = Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    timer.timeit(1)  # warm-up
    return timer


def profile(layer: Layer, rows: list[Variant]) -> str:
    """PyTorch's own table of the operators that one call of the layer takes longest for, under each variant."""
    on_gpu = layer.sample.device.type == "cuda"

    def work(call: Callable[[], Any]) -> str:
        call()
        with torch.profiler.profile() as profiler:
            call()
        key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
        return profiler.key_averages().table(sort_by=key, row_limit=_OPERATORS, max_name_column_width=40)

    return "\n\n".join(f"### {row.name}\n\n```\n{layer.run(row, work)}\n```" for row in rows)


def _image_like(batch: int, channels: int, side: int) -> Tensor:
    """[B, side², C] random tokens of which neighbours are similar."""
    coarse = torch.randn(batch, channels, -(-side // 4), -(-side // 4))
    smooth = torch.nn.functional.interpolate(coarse, size=(side, side), mode="bilinear")
    return (smooth + 0.3 * torch.randn(smooth.shape)).flatten(2).transpose(1, 2)


@contextlib.contextmanager
def _computed_as(row: Variant, unet: UNet2DConditionModel, block: BasicTransformerBlock) -> Iterator[None]:
    if row.phase is not None:
        with agentsd.patched(unet, **dict(row.settings)):
            yield
        return
    before = block.attn1.processor
    block.attn1.processor = before if row.mixes else NoMixingProcessor()
    try:
        yield
    finally:
        block.attn1.processor = before


def growth(sides: Sequence[int], seconds: list[float]) -> float:
    """Exponent p of seconds ∝ tokens ** p between the first and the last grid."""
    return math.log(seconds[-1] / seconds[0]) / math.log((sides[-1] / sides[0]) ** 2)


def as_markdown(
    sides: Sequence[int], found: list[dict[str, Measurement]], title: str, lines: list[str], rounds: int = FEWEST
) -> str:
    """The table: on each grid milliseconds, speed-up over SDPA, time over the limit; then the growth.

    One round gives milliseconds alone.
    """
    compared = rounds >= FEWEST
    head, align = ["layer"], "l" + ("rrr" if compared else "r") * len(sides) + "l"
    for side in sides:
        head += [f"{side}×{side}: ms", "× sdpa", "over the limit"] if compared else [f"{side}×{side}: ms"]
    if len(sides) > 1:
        head.append("grows with tokens as")
    rows = []
    for name in found[0]:
        cells = [name]
        for times in found:
            own = times[name].median
            cells.append(f"{own * 1000:.1f}")
            if compared:
                cells += [f"{times['sdpa'].median / own:.2f}", f"{own / times['limit'].median:.2f}"]
        if len(sides) > 1:
            cells.append(f"N^{growth(sides, [times[name].median for times in found]):.2f}")
        rows.append(cells)
    return "\n\n".join([f"# {title}", *lines, markdown(head, rows, align)]) + "\n"
