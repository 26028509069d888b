"""describe: which layers are patched, how many tokens and agents they work with, and what that saves."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNetMotionModel
from diffusers.models.attention_processor import Attention
from torch.utils.flop_counter import FlopCounterMode

from .config import AgentConfig, Phase
from .merging import grid_cells, tile_size
from .patch import find_unet, get_patch
from .report_text import as_html, as_text
from .unet.processor import AgentAttnProcessor, token_grid


@dataclass(frozen=True)
class PhaseCost:
    """One layer in one phase, for one image (a batch of one).

    Attributes:
        tokens_left: M, the number of tokens after merging, which is that of the queries.
        keys: number of keys and values; M, or fewer where they are downsampled.
        agents: number of agent tokens; 0 in the merge phase.
        multiply_adds: of the layer's matching, projections and attention.
    """

    tokens_left: int
    keys: int
    agents: int
    multiply_adds: int


@dataclass(frozen=True)
class LayerReport:
    """One layer in the place of self-attention (`attn1` of a block).

    Attributes:
        name: module name in the UNet.
        status: "active"; "not active in the last call: …" with what happened; "replaced by …" where another processor
            has taken the patch's place; "left alone: …" with the reason; or "not patched".
        grid: (height, width) of its tokens, None where it was left alone.
        tokens: N = height · width.
        multiply_adds: of its self-attention unpatched: four projections and two products with the attention matrix.
        phases: cost in each phase of the patch, by phase name; empty where it is not patched.
        self_attention: False where it attends to the text only, whatever its name.
        last_call: "active" or a reason, as the last UNet call went; "" where there was none or it is not patched.
    """

    name: str
    status: str
    grid: tuple[int, int] | None = None
    tokens: int = 0
    multiply_adds: int = 0
    phases: dict[str, PhaseCost] = dataclasses.field(default_factory=dict)
    self_attention: bool = True
    last_call: str = ""


@dataclass(frozen=True)
class LastCall:
    """The last UNet call of the patched model: image size in pixels, noise level and phase."""

    height: int
    width: int
    timestep: float
    phase: Phase


@dataclass(frozen=True, repr=False)
class Report:
    """What `describe` found; `print` it, or read it as data (`to_dict()`).

    Attributes:
        model: class of the pipeline or UNet.
        height, width: image size in pixels that the numbers hold for.
        config: the settings of the patch, None where there is none.
        early_timestep: the agent phase is at this timestep and above; None where there is no patch or no such phase.
        layers: every layer in the place of self-attention.
        unet_multiply_adds: of one unpatched call of the whole UNet for one image (twice that with guidance); None for
            a kind of UNet whose extra inputs are not known here.
        assumed_timesteps: length of the diffusion run where it is assumed, as a bare UNet has no scheduler; else None.
        last_call: the last UNet call since the patch, None where there was none.
    """

    model: str
    height: int
    width: int
    config: AgentConfig | None
    early_timestep: float | None
    layers: tuple[LayerReport, ...]
    unet_multiply_adds: int | None
    assumed_timesteps: int | None = None
    last_call: LastCall | None = None

    @property
    def active(self) -> tuple[LayerReport, ...]:
        """The layers on which the patch works."""
        return tuple(layer for layer in self.layers if layer.status == "active")

    def self_attention_multiply_adds(self, phase: Phase | None = None) -> int:
        """Multiply–adds of the active layers' self-attention in a phase, or unpatched (None)."""
        if phase is None:
            return sum(layer.multiply_adds for layer in self.active)
        return sum(layer.phases[phase.value].multiply_adds for layer in self.active)

    def unet_fraction(self, phase: Phase) -> float | None:
        """Multiply–adds of the whole UNet in a phase, as a fraction of the unpatched one; None if that is unknown."""
        if self.unet_multiply_adds is None:
            return None
        saved = self.self_attention_multiply_adds() - self.self_attention_multiply_adds(phase)
        return 1 - saved / self.unet_multiply_adds

    def to_dict(self) -> dict[str, Any]:
        """The same as plain numbers, strings, lists and dicts, ready for JSON."""
        data = dataclasses.asdict(self)
        if self.last_call is not None:
            data["last_call"]["phase"] = self.last_call.phase.value
        data["unet_fraction"] = {phase.value: self.unet_fraction(phase) for phase in Phase} if self.active else {}
        return data

    def __str__(self) -> str:
        return as_text(self)

    __repr__ = __str__  # shown where a notebook or a prompt shows a value; the data stands in its attributes

    def _repr_html_(self) -> str:
        return as_html(self)


def describe(model: Any, height: int | None = None, width: int | None = None) -> Report:
    """Report what is patched, what it saves, and what happened in the last UNet call.

    Args:
        model: a pipeline or UNet that `apply_patch` takes, patched or not.
        height, width: image size in pixels; None takes the model's own.

    Returns:
        A Report. Its numbers come from the layers' shapes; nothing is generated or timed.

    Raises:
        TypeError: the model has no UNet of the supported kind, or a size is no integer.
        ValueError: a size is not a positive multiple of the pixels per latent pixel.
    """
    unet = find_unet(model)
    latent_height, latent_width, scale = _latent_size(model, unet, height, width)
    patch = get_patch(model)
    call = getattr(patch, "last_call", None)
    layers = []
    if patch is None:
        for name, module in unet.named_modules():
            if isinstance(module, Attention) and name.endswith("attn1"):
                layers.append(LayerReport(name, "not patched"))
    else:
        for layer in patch.layers:
            name = layer.state.name
            grid = token_grid(latent_height, latent_width, layer.state.downsample)
            outcome = call.outcomes.get(name, "") if call else ""
            status = _status(layer, grid, patch.config, call, outcome)
            report = _layer_report(name, status, layer.attn, grid, patch.config)
            layers.append(dataclasses.replace(report, last_call=outcome))
        layers += [LayerReport(name, f"left alone: {reason}") for name, reason in patch.skipped]
        order = {name: i for i, (name, _) in enumerate(unet.named_modules())}
        layers.sort(key=lambda layer: order[layer.name])
    config = patch.config if patch else None
    return Report(
        model=type(model).__name__,
        height=latent_height * scale,
        width=latent_width * scale,
        config=config,
        early_timestep=config.first_agent_timestep(patch.num_train_timesteps)
        if patch and config and config.early
        else None,
        layers=tuple(
            dataclasses.replace(layer, self_attention=not _attends_to_text_only(unet, layer.name)) for layer in layers
        ),
        unet_multiply_adds=_unet_multiply_adds(unet, latent_height, latent_width),
        assumed_timesteps=None if patch is None or hasattr(model, "scheduler") else patch.num_train_timesteps,
        last_call=LastCall(call.height * scale, call.width * scale, call.timestep, call.phase) if call else None,
    )


def _status(layer: Any, grid: tuple[int, int], config: AgentConfig, call: Any, outcome: str) -> str:
    """What stands on a patched layer, for tokens on a grid, and whether it ran in the last call (None: no call yet)."""
    processor = layer.attn.processor
    if not isinstance(processor, AgentAttnProcessor):
        return f"replaced by {type(processor).__name__}: call apply_patch again"
    if not _has_a_cell(grid, config, *Phase):
        return f"left alone: its {grid[0]}×{grid[1]} grid is smaller than a cell"
    # Where the last call had nothing to do, by its phase or its size, the layer is none the less in order.
    if outcome in ("", "active") or not config.acts_in(call.phase):
        return "active"
    if not _has_a_cell(token_grid(call.height, call.width, layer.state.downsample), config, call.phase):
        return "active"
    return f"not active in the last call: {outcome}"


def _has_a_cell(grid: tuple[int, int], config: AgentConfig, *phases: Phase) -> bool:
    return any(grid_cells(*grid, config.stride(phase, grid)) for phase in phases)


def _attends_to_text_only(unet: torch.nn.Module, name: str) -> bool:
    """Whether a block's attn1 is cross-attention, as in blocks with only_cross_attention."""
    block = unet.get_submodule(name.rpartition(".")[0])
    return bool(getattr(block, "only_cross_attention", False))


def _latent_size(model: Any, unet: UNet2DConditionModel, height: int | None, width: int | None) -> tuple[int, int, int]:
    scale = getattr(model, "vae_scale_factor", 8)
    size = unet.config.sample_size or 64
    default = size if isinstance(size, (tuple, list)) else (size, size)
    latent = []
    for name, value, own in (("height", height, default[0]), ("width", width, default[1])):
        if value is None:
            latent.append(own)
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}={value!r}: must be an integer, the image's {name} in pixels")
        if value <= 0 or value % scale:
            raise ValueError(f"{name}={value}: must be a positive multiple of {scale} pixels")
        latent.append(value // scale)
    return latent[0], latent[1], scale


def _layer_report(name: str, status: str, attn: Attention, grid: tuple[int, int], config: AgentConfig) -> LayerReport:
    channels, inner = attn.to_q.in_features, attn.to_q.out_features
    tokens = grid[0] * grid[1]
    before = 4 * tokens * channels * inner + 2 * tokens**2 * inner
    phases = {phase.value: _phase_cost(phase, grid, channels, inner, config, before) for phase in Phase}
    return LayerReport(name, status, grid, tokens, before, phases)


def _phase_cost(
    phase: Phase, grid: tuple[int, int], channels: int, inner: int, config: AgentConfig, unpatched: int
) -> PhaseCost:
    tokens = grid[0] * grid[1]
    stride = config.stride(phase, grid)
    num_dst = grid_cells(*grid, stride)
    if num_dst == 0 or not config.acts_in(phase):
        return PhaseCost(tokens, tokens, 0, unpatched)
    if phase is Phase.MERGE and config.late == "downsample":
        multiply_adds = 2 * (tokens + num_dst) * channels * inner + 2 * tokens * num_dst * inner
        return PhaseCost(tokens, num_dst, 0, multiply_adds)
    num_src = tokens - num_dst
    merged = tokens - min(num_src, config.num_merged(tokens))
    if phase is Phase.MERGE and merged == tokens:
        return PhaseCost(tokens, tokens, 0, unpatched)
    tile = tile_size(*grid, stride, config.match_tile or max(grid))
    matching = num_src * num_dst * channels * math.prod(tile) // tokens
    projections = 4 * merged * channels * inner
    if phase is Phase.MERGE:
        return PhaseCost(merged, merged, 0, matching + projections + 2 * merged**2 * inner)
    agents = tokens - config.num_merged_for_agents(tokens, num_src)
    attention = 4 * merged * agents * inner + (merged * inner if config.alpha else 0)
    return PhaseCost(merged, merged, agents, matching + projections + agents * channels * inner + attention)


def _unet_multiply_adds(unet: UNet2DConditionModel, latent_height: int, latent_width: int) -> int | None:
    """Count one call of the UNet, batch 1, on a twin without weights (the meta device): exact, and takes no memory."""
    config = {**unet.config, "encoder_hid_dim_type": None}  # an IP-Adapter's projection is not part of the UNet proper
    with torch.device("meta"):
        twin = type(unet).from_config(config)
        size = (latent_height, latent_width)
        frames = (1,) if isinstance(twin, UNetMotionModel) else ()
        sample = torch.empty(1, twin.config.in_channels, *frames, *size)
        text_dim = twin.config.cross_attention_dim
        text = torch.empty(1, 77, max(text_dim) if isinstance(text_dim, (tuple, list)) else text_dim)
        extra: dict[str, Any] = {}
        if twin.config.addition_embed_type == "text_time":
            # Only the width of text embedding and size numbers together counts, so the refiner's five sizes may be six.
            pooled = twin.config.projection_class_embeddings_input_dim - 6 * twin.config.addition_time_embed_dim
            extra["added_cond_kwargs"] = {"text_embeds": torch.empty(1, pooled), "time_ids": torch.empty(1, 6)}
        if getattr(twin, "class_embedding", None) is not None:
            vector = twin.config.class_embed_type in ("projection", "simple_projection")
            size = twin.config.projection_class_embeddings_input_dim
            extra["class_labels"] = torch.empty(1, size) if vector else torch.zeros(1, dtype=torch.long)
        try:
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                twin(sample, torch.zeros(()), text, **extra)
        except (RuntimeError, TypeError, ValueError):  # it wants an input of its own kind, as Kandinsky's
            return None
    return math.ceil(counter.get_total_flops() / 2)
