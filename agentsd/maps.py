"""The view of a layer (LayerView), and merge maps and agent maps that show it over the image it belongs to."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .config import Phase


@dataclass(frozen=True)
class LayerView:
    """What one layer did in one UNet call, for one sample (the one with the prompt).

    Attributes:
        layer: module name of the attention.
        call: number of the UNet call in its run, from 0.
        timestep: its noise level.
        phase: what the layer did.
        grid: (height, width) of its tokens.
        position: [N] where each token went: tokens with the same number were merged into one.
        agent_tokens: [num_agents] the token at whose place each agent stands; None in the merge phase.
        agent_attention: [num_agents, N] bfloat16, what each agent aggregates from each token, averaged over heads: the
            weight of the token's group, shared by its members, so each row sums to 1; None in the merge phase.
        calls_with_agents: numbers of the UNet calls of this run in which the layer used agents.
        num_calls: number of UNet calls of the run.
    """

    layer: str
    call: int
    timestep: float
    phase: Phase
    grid: tuple[int, int]
    position: Tensor
    agent_tokens: Tensor | None
    agent_attention: Tensor | None
    calls_with_agents: tuple[int, ...] = ()
    num_calls: int = 0

    @property
    def where_agents_are(self) -> str:
        """Which calls of the run have agents, in words."""
        if not self.calls_with_agents:
            return f"none of the {self.num_calls} calls of this run has agents; raise early"
        which = _ranges(self.calls_with_agents)
        verb = "calls {} have" if len(self.calls_with_agents) > 1 else "only call {} has"
        return f"{verb.format(which)} agents, of 0 … {self.num_calls - 1}"

    @property
    def num_bytes(self) -> int:
        """Memory that its tensors take."""
        tensors = (self.position, self.agent_tokens, self.agent_attention)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def _ranges(numbers: Sequence[int]) -> str:
    """Rising numbers with those in a row as a range: "0 … 3, 6"."""
    groups: list[list[int]] = []
    for number in numbers:
        if groups and number == groups[-1][-1] + 1:
            groups[-1].append(number)
        else:
            groups.append([number])
    return ", ".join(f"{group[0]} … {group[-1]}" if len(group) > 1 else str(group[0]) for group in groups)


def merge_map(view: LayerView, image: Image.Image) -> Image.Image:
    """The image with each group of merged tokens in one colour; tokens that were not merged show the image.

    Returns:
        RGB, the size of `image`.
    """
    height, width = view.grid
    sizes = torch.bincount(view.position, minlength=int(view.position.max()) + 1)
    colours = Image.new("RGB", (width, height))
    mask = Image.new("L", (width, height))
    for token, group in enumerate(view.position.tolist()):
        place = (token % width, token // width)
        if sizes[group] > 1:
            hue, shade = group * 0.61803398875 % 1, 0.75 + 0.25 * (group * 0.7548776662 % 1)
            colours.putpixel(place, tuple(round(255 * c) for c in colorsys.hsv_to_rgb(hue, 0.85, shade)))
            mask.putpixel(place, 190)
    base = image.convert("RGB")
    faded = Image.blend(base, Image.new("RGB", base.size, "white"), 0.35)
    colours, mask = (small.resize(base.size, Image.Resampling.NEAREST) for small in (colours, mask))
    return Image.composite(colours, faded, mask)


def agent_map(view: LayerView, agent: int, image: Image.Image) -> Image.Image:
    """What one agent aggregates, as a heat map over the grey image; a ring marks the agent's own place.

    The top of the colour scale is the weight that half a per cent of the tokens exceed.

    Raises:
        ValueError: the view is of the merge phase, or has no such agent.
    """
    tokens, attention = _agents(view)
    if not 0 <= agent < len(attention):
        raise ValueError(f"agent={agent}: must lie in 0 … {len(attention) - 1}")
    height, width = view.grid
    weights = attention[agent].float()
    # A few tokens can hold most of the weight; on their scale all others would be dark.
    full = weights.quantile(_HOTTEST).clamp_min(torch.finfo(weights.dtype).tiny)
    heat = (weights / full).clamp(max=1).view(height, width)
    small = Image.frombytes("L", (width, height), bytes((heat * 255).round().to(torch.uint8).flatten().tolist()))
    level = small.resize(image.size, Image.Resampling.BICUBIC)
    coloured = Image.merge("RGB", [level.point(channel) for channel in _HEAT])
    base = Image.blend(image.convert("L").convert("RGB"), Image.new("RGB", image.size, "black"), 0.25)
    out = Image.composite(coloured, base, level.point([min(255, round(60 + v * 0.75)) for v in range(256)]))
    token = int(tokens[agent])
    x, y = ((token % width + 0.5) * image.width / width, (token // width + 0.5) * image.height / height)
    radius = max(3, image.width / width * 0.8)
    ImageDraw.Draw(out).ellipse((x - radius, y - radius, x + radius, y + radius), outline="white", width=2)
    return out


def agent_at(view: LayerView, x: float, y: float) -> int:
    """The agent nearest to a place in the image, x and y in 0 … 1 from its upper left corner.

    Raises:
        ValueError: the view is of the merge phase.
    """
    tokens, _ = _agents(view)
    height, width = view.grid
    rows, columns = tokens // width, tokens % width
    # In token widths, so that "nearest" means the same in both directions.
    return int(((rows + 0.5 - y * height) ** 2 + (columns + 0.5 - x * width) ** 2).argmin())


def _agents(view: LayerView) -> tuple[Tensor, Tensor]:
    """Tokens and attention of a view's agents. Raises ValueError where it has none."""
    if view.agent_tokens is None or view.agent_attention is None:
        raise ValueError(
            f"call={view.call}: timestep {view.timestep:g} is in the merge phase, which has no agents; "
            f"{view.where_agents_are}"
        )
    return view.agent_tokens, view.agent_attention


def agents_sheet(view: LayerView, image: Image.Image, count: int = 16) -> Image.Image:
    """Maps of `count` agents spread evenly over the image, on one labelled sheet."""
    tokens, _ = _agents(view)
    chosen = _agents_spread_over(view, count)
    columns = math.ceil(math.sqrt(len(chosen)))
    tile_width = 192
    tile_height = round(tile_width * image.height / image.width)
    gap, label = 6, 18
    rows = math.ceil(len(chosen) / columns)
    sheet = Image.new("RGB", (columns * (tile_width + gap) + gap, rows * (tile_height + label + gap) + gap), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for i, agent in enumerate(chosen):
        left = gap + i % columns * (tile_width + gap)
        top = gap + i // columns * (tile_height + label + gap)
        tile = agent_map(view, agent, image).resize((tile_width, tile_height), Image.Resampling.LANCZOS)
        sheet.paste(tile, (left, top))
        token = int(tokens[agent])
        place = f"row {token // view.grid[1]}, column {token % view.grid[1]}"
        pen.text((left, top + tile_height + 1), f"agent {agent}: {place}", font=font, fill="black")
    return sheet


def _agents_spread_over(view: LayerView, count: int) -> list[int]:
    """Up to `count` agents, each the nearest to one of as many points in even rows and columns, in reading order."""
    tokens, _ = _agents(view)
    height, width = view.grid
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    y, x = tokens // width, tokens % width
    chosen: list[int] = []
    for i in range(count):
        target_y, target_x = (i // columns + 0.5) * height / rows - 0.5, (i % columns + 0.5) * width / columns - 0.5
        agent = int(((y - target_y) ** 2 + (x - target_x) ** 2).argmin())
        if agent not in chosen:
            chosen.append(agent)
    return chosen


def _heat_channel(stops: tuple[int, ...]) -> list[int]:
    scaled = [v / 255 * (len(stops) - 1) for v in range(256)]
    return [
        round(stops[int(v)] + (stops[min(int(v) + 1, len(stops) - 1)] - stops[int(v)]) * (v - int(v))) for v in scaled
    ]


# The quantile of an agent's weights that is the top of the colour scale.
_HOTTEST = 0.995

# Dark violet, red, orange, light yellow: dark to light also for the colour-blind.
_HEAT = [
    _heat_channel((20, 140, 230, 252, 252)),
    _heat_channel((10, 30, 85, 170, 253)),
    _heat_channel((60, 105, 40, 20, 190)),
]
