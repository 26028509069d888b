"""Look inside one patched layer at one step: its merge map, and each agent's attention, as pictures."""

from __future__ import annotations

import colorsys
import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from .config import AgentConfig, Phase
from .images.compare import generate
from .images.request import Request
from .layer_plan import plan_layer
from .merging import merge_tokens, merged_position
from .patch import get_patch, patched
from .unet.processor import LayerState, project_key_value, project_queries

MOST_VIEWS = 24
"""How many UNet calls `look_through` records; of a longer run it takes so many, evenly spaced."""

# What is kept of the agents' attention, half the memory of float32. Not float16: where one token holds most of the
# weight, the others' fall below its range, and a map shows them on their own scale.
_KEPT = torch.bfloat16

# Logits computed at once. It bounds the memory of the recording (64 MiB in float32) beside what is kept.
_LOGITS_PER_BLOCK = 2**24


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
        agent_attention: [num_agents, N] bfloat16, what each agent gathers from each token, averaged over heads: the
            weight of the token's group, shared by its members, so each row sums to 1; None in the merge phase.
    """

    layer: str
    call: int
    timestep: float
    phase: Phase
    grid: tuple[int, int]
    position: Tensor
    agent_tokens: Tensor | None
    agent_attention: Tensor | None

    @property
    def num_bytes(self) -> int:
        """Memory that its tensors take."""
        tensors = (self.position, self.agent_tokens, self.agent_attention)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors if tensor is not None)


def look_inside(
    pipe: Any,
    request: Request,
    config: AgentConfig | None = None,
    layer: int | str = 0,
    call: int = 0,
    *,
    budget: int | None = None,
    **extra: Any,
) -> tuple[Image.Image, LayerView]:
    """Draw a picture with the patch and record one layer in one UNet call on the way.

    Args:
        pipe: a text-to-image pipeline, patched or not.
        request: what to draw.
        config: settings of the patch; None takes the defaults.
        layer: number among the patched layers, or a module name.
        call: number of the UNet call; with the default settings the first ones are in the agent phase.
        budget: most bytes that the agents' attention may take; None for no limit.
        **extra: further arguments of the pipeline call.

    Returns:
        The finished picture and the LayerView.

    Raises:
        ValueError: no such layer or call, the layer merged nothing in that call (ratio 0 in the merge phase), or the
            recording would exceed the budget; that is said at the first UNet call, before anything is recorded.

    Source: Agent Attention, appendix E, shows such agent maps for classifiers.
    """
    config = config or AgentConfig()
    image, views, num_calls = _record(pipe, request, config, layer, lambda _: {call}, budget, **extra)
    if call >= num_calls or call < 0:
        raise ValueError(f"call={call}: this run had {num_calls} UNet calls; choose 0 … {num_calls - 1}")
    view = views.get(call)
    if view is None:
        raise ValueError(
            f"call={call}: layer {layer} merges nothing in this call with these settings; choose an earlier call or a "
            "ratio above 0"
        )
    return image, view


def look_through(
    pipe: Any,
    request: Request,
    config: AgentConfig | None = None,
    layer: int | str = 0,
    *,
    budget: int | None = None,
    **extra: Any,
) -> tuple[Image.Image, list[LayerView]]:
    """As look_inside, but record the layer in all UNet calls of the run in which it merges something.

    Of a run with more than MOST_VIEWS timesteps it records so many calls, evenly spaced, the first and the last among
    them. A view of the agent phase holds num_agents · N numbers (256 · 4,096 for SD 1.5 at 512 px, 2 MB; 16 times as
    many at 1024 px), which is what the budget is for.

    Raises:
        ValueError: no such layer, it merges nothing in any call, or the recording would exceed the budget.
    """
    config = config or AgentConfig()
    image, views, num_calls = _record(pipe, request, config, layer, _evenly_spaced, budget, **extra)
    if not views:
        raise ValueError(f"layer {layer} merges nothing in any of the {num_calls} UNet calls; choose a ratio above 0")
    return image, list(views.values())


def _evenly_spaced(total: int) -> Collection[int]:
    """At most MOST_VIEWS of the numbers 0 … total − 1, with the first and the last."""
    if total <= MOST_VIEWS:
        return range(total)
    return {round(i * (total - 1) / (MOST_VIEWS - 1)) for i in range(MOST_VIEWS)}


def _record(
    pipe: Any,
    request: Request,
    config: AgentConfig,
    layer: int | str,
    choose: Callable[[int], Collection[int]],
    budget: int | None,
    **extra: Any,
) -> tuple[Image.Image, dict[int, LayerView], int]:
    """(picture, views by call, number of UNet calls).

    Args:
        choose: number of timesteps -> numbers of the calls to record. Those in which the layer merges nothing, and
            those that the run does not get to, have no view.
        The others: as look_inside takes them.
    """
    views: dict[int, LayerView] = {}
    num_calls = 0
    chosen: Collection[int] = ()
    with patched(pipe, config):
        state, attn = _choose_layer(pipe, layer)
        num_train_timesteps = get_patch(pipe).num_train_timesteps

        def record(module, args):
            nonlocal num_calls, chosen
            if num_calls == 0:  # not before the first call are the timesteps and the size known
                timesteps = _timesteps(pipe)
                chosen = choose(len(timesteps))
                # Some pipelines call the UNet more than once a timestep: of a later call the phase is not known.
                num_agent_calls = sum(
                    call >= len(timesteps) or config.phase_at(timesteps[call], num_train_timesteps) is Phase.AGENT
                    for call in chosen
                )
                _check_budget(state, num_agent_calls, budget)
            if num_calls in chosen:
                view = _view(pipe, state, attn, args[0], num_calls)
                if view is not None:
                    views[num_calls] = view
            num_calls += 1

        handle = attn.register_forward_pre_hook(record)
        try:
            # "sd" leaves the model as it is: it is patched already, so that the hook above can see inside.
            image = generate(pipe, request, method="sd", **extra).image
        finally:
            handle.remove()
    return image, views, num_calls


def _timesteps(pipe: Any) -> list[float]:
    """The noise levels of the run in progress, first to last."""
    timesteps = pipe.scheduler.timesteps.tolist()
    return timesteps[: getattr(pipe, "num_timesteps", None)]  # SDXL's denoising_end leaves the last ones out


def _check_budget(state: LayerState, num_agent_calls: int, budget: int | None) -> None:
    """Raise ValueError where a layer's agent attention in so many calls would take more bytes than the budget."""
    plan = plan_layer(state.config, Phase.AGENT, state.grid())
    if budget is None or plan.action == "none":
        return
    num_agents, num_tokens = plan.num_agents, plan.num_tokens
    needed = num_agent_calls * num_agents * num_tokens * _KEPT.itemsize
    if needed > budget:
        raise ValueError(
            f"{state.name}: {num_agents:,} agents × {num_tokens:,} tokens in {num_agent_calls} UNet calls would take "
            f"{needed / 1e9:.2f} GB to record, and {budget / 1e9:.2f} GB are allowed; choose a smaller width and "
            "height, a larger agent_ratio and agent_stride, max_agents, or another layer"
        )


def _choose_layer(pipe: Any, layer: int | str) -> tuple[LayerState, Any]:
    layers = get_patch(pipe).layers
    names = [entry.state.name for entry in layers]
    if isinstance(layer, str) and layer in names:
        layer = names.index(layer)
    if isinstance(layer, str) or not 0 <= layer < len(layers):
        listed = "; ".join(f"{i}: {name}" for i, name in enumerate(names))
        raise ValueError(f"layer={layer!r}: must be a number or name of a patched layer ({listed})")
    return layers[layer].state, layers[layer].attn


@torch.no_grad()
def _view(pipe: Any, state: LayerState, attn: Any, hidden_states: Tensor, call: int) -> LayerView | None:
    # With guidance the last sample of the batch is the one with the prompt.
    if state.block_input is None or state.parts[0].action not in ("agents", "merge"):
        return None
    part = state.parts[0]
    matching, r = part.match(state.block_input), part.num_merged
    position = merged_position(matching, r)[-1]
    agent_tokens = attention = None
    if part.action == "agents":
        key, _ = project_key_value(attn, merge_tokens(hidden_states, matching, r))
        agents = project_queries(attn, merge_tokens(hidden_states, matching, part.num_merged_for_agents))
        attention = _weights(agents[-1].float(), key[-1].float(), position)
        agent_tokens = matching.tokens[-1, part.num_merged_for_agents :].cpu()
    patch = get_patch(pipe)
    return LayerView(
        state.name, call, patch.timestep, patch.phase, state.grid(), position.cpu(), agent_tokens, attention
    )


def _weights(agents: Tensor, key: Tensor, position: Tensor) -> Tensor:
    """What each agent gathers from each token, as LayerView keeps it: [num_agents, N] on the CPU.

    Args:
        agents: [heads, num_agents, head_dim].
        key: [heads, M, head_dim] of the merged tokens.
        position: [N] which of them each token went to.
    """
    group_sizes = torch.bincount(position, minlength=key.shape[1]).clamp_min(1)
    out = torch.empty(agents.shape[1], len(position), dtype=_KEPT)
    rows = max(1, _LOGITS_PER_BLOCK // (key.shape[0] * key.shape[1]))
    for block, kept in zip(agents.split(rows, dim=1), out.split(rows)):
        by_group = (block @ key.mT * key.shape[-1] ** -0.5).softmax(dim=-1).mean(dim=0)
        kept.copy_((by_group / group_sizes).to(_KEPT)[:, position])
    return out


def merge_map(view: LayerView, picture: Image.Image) -> Image.Image:
    """The picture with every group of merged tokens in a colour of its own; tokens that stayed alone keep the picture.

    Returns:
        RGB, the size of `picture`.
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
    base = picture.convert("RGB")
    faded = Image.blend(base, Image.new("RGB", base.size, "white"), 0.35)
    enlarge = lambda image: image.resize(base.size, Image.Resampling.NEAREST)  # noqa: E731
    return Image.composite(enlarge(colours), faded, enlarge(mask))


def agent_map(view: LayerView, agent: int, picture: Image.Image) -> Image.Image:
    """What one agent gathers, as heat over the grey picture; a ring marks the agent's own place.

    Full heat is the weight that half a per cent of the tokens exceed.

    Raises:
        ValueError: the view is of the merge phase, or has no such agent.
    """
    _check_has_agents(view)
    if not 0 <= agent < len(view.agent_attention):
        raise ValueError(f"agent={agent}: must lie in 0 … {len(view.agent_attention) - 1}")
    height, width = view.grid
    weights = view.agent_attention[agent].float()
    # A few tokens can hold most of the weight; on their scale all others would be dark.
    full = weights.quantile(_HOTTEST).clamp_min(torch.finfo(weights.dtype).tiny)
    heat = (weights / full).clamp(max=1).view(height, width)
    small = Image.frombytes("L", (width, height), bytes((heat * 255).round().to(torch.uint8).flatten().tolist()))
    level = small.resize(picture.size, Image.Resampling.BICUBIC)
    coloured = Image.merge("RGB", [level.point(channel) for channel in _HEAT])
    base = Image.blend(picture.convert("L").convert("RGB"), Image.new("RGB", picture.size, "black"), 0.25)
    out = Image.composite(coloured, base, level.point([min(255, round(60 + v * 0.75)) for v in range(256)]))
    token = int(view.agent_tokens[agent])
    x, y = ((token % width + 0.5) * picture.width / width, (token // width + 0.5) * picture.height / height)
    radius = max(3, picture.width / width * 0.8)
    ImageDraw.Draw(out).ellipse((x - radius, y - radius, x + radius, y + radius), outline="white", width=2)
    return out


def agent_at(view: LayerView, x: float, y: float) -> int:
    """The agent nearest to a place in the picture, x and y in 0 … 1 from its upper left corner.

    Raises:
        ValueError: the view is of the merge phase.
    """
    _check_has_agents(view)
    height, width = view.grid
    rows, columns = view.agent_tokens // width, view.agent_tokens % width
    # In token widths, so that "nearest" means the same in both directions.
    return int(((rows + 0.5 - y * height) ** 2 + (columns + 0.5 - x * width) ** 2).argmin())


def _check_has_agents(view: LayerView) -> None:
    if view.agent_attention is None:
        raise ValueError(
            f"timestep {view.timestep:g} is in the merge phase, which has no agents: choose an earlier call"
        )


def agents_sheet(view: LayerView, picture: Image.Image, count: int = 16) -> Image.Image:
    """Maps of `count` agents spread evenly over the picture, as one labelled picture."""
    _check_has_agents(view)
    chosen = _agents_spread_over(view, count)
    columns = math.ceil(math.sqrt(len(chosen)))
    tile_width = 192
    tile_height = round(tile_width * picture.height / picture.width)
    gap, label = 6, 18
    rows = math.ceil(len(chosen) / columns)
    sheet = Image.new("RGB", (columns * (tile_width + gap) + gap, rows * (tile_height + label + gap) + gap), "white")
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(13)
    for i, agent in enumerate(chosen):
        left = gap + i % columns * (tile_width + gap)
        top = gap + i // columns * (tile_height + label + gap)
        tile = agent_map(view, agent, picture).resize((tile_width, tile_height), Image.Resampling.LANCZOS)
        sheet.paste(tile, (left, top))
        token = int(view.agent_tokens[agent])
        place = f"row {token // view.grid[1]}, column {token % view.grid[1]}"
        pen.text((left, top + tile_height + 1), f"agent {agent}: {place}", font=font, fill="black")
    return sheet


def _agents_spread_over(view: LayerView, count: int) -> list[int]:
    """Up to `count` agents, each the nearest to one of as many points in even rows and columns, in reading order."""
    height, width = view.grid
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    y, x = view.agent_tokens // width, view.agent_tokens % width
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


# The quantile of an agent's weights that is shown at full heat, with all above it.
_HOTTEST = 0.995

# Dark violet, red, orange, light yellow: dark to light also for the colour-blind.
_HEAT = [
    _heat_channel((20, 140, 230, 252, 252)),
    _heat_channel((10, 30, 85, 170, 253)),
    _heat_channel((60, 105, 40, 20, 190)),
]
