"""describe: which layers are patched, how many tokens and agents they work with, and what that saves."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from diffusers.models.attention_processor import Attention

from .config import AgentConfig, Phase
from .layer_plan import plan_layer, token_grid
from .multiply_adds import count_multiply_adds
from .patch import find_unet, get_patch
from .report_text import as_html, as_text
from .unet.layers import PatchedLayer, class_name, is_ours, own_latent_size
from .unet.outcomes import ACTIVE
from .unet.outcomes import LastCall as UNetCall
from .unet.skipping import skipped_names
from .unet.unet_patch import UNetPatch


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
        recomputed: a cached call computes it too; True everywhere without step caching.
    """

    name: str
    status: str
    grid: tuple[int, int] | None = None
    tokens: int = 0
    multiply_adds: int = 0
    phases: dict[str, PhaseCost] = dataclasses.field(default_factory=dict)
    self_attention: bool = True
    last_call: str = ""
    recomputed: bool = True


@dataclass(frozen=True)
class LastCall:
    """The last UNet call of the patched model.

    Attributes:
        height, width: image size in pixels.
        timestep: noise level of the least noisy sample.
        phase: of that sample.
        notes: what else happened on a layer, by its name.
        cached: step caching reused a feature of an earlier call.
        whole_calls, cached_calls: numbers of UNet calls of this run so far; None without step caching.
    """

    height: int
    width: int
    timestep: float
    phase: Phase
    notes: dict[str, str]
    cached: bool = False
    whole_calls: int | None = None
    cached_calls: int | None = None

    @classmethod
    def of(cls, patch: UNetPatch, scale: int) -> LastCall | None:
        """From what the patch noted, with the pixels per latent pixel."""
        call = patch.last_call
        if call is None:
            return None
        counts = (call.whole_calls, call.cached_calls)
        size = (call.height * scale, call.width * scale)
        return cls(*size, call.timestep, call.phase, dict(call.notes), call.cached, *counts)


@dataclass(frozen=True, repr=False)
class Report:
    """What `describe` found; `print` it, or read it as data (`to_dict()`).

    Attributes:
        model: class of the pipeline or UNet.
        height, width: image size in pixels that the numbers hold for.
        config: the settings of the patch, None where there is none.
        early_timestep: the agent phase is at this timestep and above; None where there is no patch or no such phase, as
            with a scheduler that counts noise levels.
        layers: every layer in the place of self-attention.
        unet_multiply_adds: of one unpatched call of the whole UNet for one image (twice that with guidance); None for
            a kind of UNet whose extra inputs are not known here.
        assumed_timesteps: length of the diffusion run where it is assumed, as a bare UNet has no scheduler; else None.
        last_call: the last UNet call since the patch, None where there was none.
        cached_multiply_adds: of what a cached call computes, if it were unpatched; None without step caching, or where
            unet_multiply_adds is.
        cache_order: of step caching with the scheduler that the pipeline has now; None without step caching.
        skips_controlnet: cached calls skip the pipeline's ControlNet, too.
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
    cached_multiply_adds: int | None = None
    cache_order: int | None = None
    skips_controlnet: bool = False

    @property
    def active(self) -> tuple[LayerReport, ...]:
        """The layers on which the patch works."""
        return tuple(layer for layer in self.layers if layer.status == "active")

    def self_attention_multiply_adds(self, phase: Phase | None = None, cached: bool = False) -> int:
        """Multiply–adds of the active layers' self-attention in a phase, or unpatched (None).

        Those that a cached call computes too with `cached`, else all.
        """
        layers = [layer for layer in self.active if layer.recomputed or not cached]
        if phase is None:
            return sum(layer.multiply_adds for layer in layers)
        return sum(layer.phases[phase.value].multiply_adds for layer in layers)

    def unet_fraction(self, phase: Phase, cached: bool = False) -> float | None:
        """Multiply–adds of a call in a phase as a fraction of those of an unpatched call; None if that is unknown.

        Of a cached call with `cached`, else of a whole one.
        """
        computed = self.cached_multiply_adds if cached else self.unet_multiply_adds
        if self.unet_multiply_adds is None or computed is None:
            return None
        attention = self.self_attention_multiply_adds
        return (computed - attention(None, cached) + attention(phase, cached)) / self.unet_multiply_adds

    def to_dict(self) -> dict[str, Any]:
        """The same as plain numbers, strings, lists and dicts, ready for JSON."""
        data = dataclasses.asdict(self)
        if self.last_call is not None:
            data["last_call"]["phase"] = self.last_call.phase.value
        for name, cached in (("unet_fraction", False), ("cached_unet_fraction", True)):
            data[name] = {phase.value: self.unet_fraction(phase, cached) for phase in Phase} if self.active else {}
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
    call = patch.last_call if patch else None
    layers = []
    if patch is None:
        for name, module in unet.named_modules():
            if isinstance(module, Attention) and name.endswith("attn1"):
                layers.append(LayerReport(name, "not patched"))
    else:
        for layer in patch.layers:
            grid = token_grid(latent_height, latent_width, layer.downsample)
            outcome = call.outcomes.get(layer.name, "") if call else ""
            report = _layer_report(layer.name, _status(layer, grid, patch.config, call), layer.attn, grid, patch.config)
            layers.append(dataclasses.replace(report, last_call=outcome))
        layers += [LayerReport(layer.name, f"left alone: {layer.reason}") for layer in patch.skipped]
        order = {name: i for i, (name, _) in enumerate(unet.named_modules())}
        layers.sort(key=lambda layer: order[layer.name])
    config = patch.config if patch else None
    depth = config.cache_depth if config and config.cache_interval > 1 else None
    skipped = () if depth is None else skipped_names(unet, depth)
    whole, cached = count_multiply_adds(unet, latent_height, latent_width, depth)
    return Report(
        model=type(model).__name__,
        height=latent_height * scale,
        width=latent_width * scale,
        config=config,
        early_timestep=_early_timestep(patch) if patch else None,
        layers=tuple(
            dataclasses.replace(
                layer,
                self_attention=not _attends_to_text_only(unet, layer.name),
                recomputed=not layer.name.startswith(skipped),
            )
            for layer in layers
        ),
        unet_multiply_adds=whole,
        cached_multiply_adds=cached,
        assumed_timesteps=patch.num_train_timesteps if patch and patch.schedule.refresh().assumed else None,
        last_call=LastCall.of(patch, scale) if patch else None,
        cache_order=patch.cache_order() if patch else None,
        skips_controlnet=patch is not None and patch.skips_controlnet(),
    )


def _early_timestep(patch: UNetPatch) -> float | None:
    """The least noisy timestep of the agent phase, None where no step is in it."""
    if patch.config.early == 0 or patch.schedule.refresh().noise_levels:
        return None
    return patch.config.first_agent_timestep(patch.num_train_timesteps)


def _status(layer: PatchedLayer, grid: tuple[int, int], config: AgentConfig, call: UNetCall | None) -> str:
    """What stands on a patched layer, for tokens on a grid, and whether it ran in the last call."""
    if not is_ours(layer):
        return f"replaced by {class_name(layer.attn.processor)}: call apply_patch again"
    if not any(plan_layer(config, phase, grid).num_dst for phase in Phase):
        return f"left alone: its {grid[0]}×{grid[1]} grid is smaller than a cell"
    outcome = call.outcomes.get(layer.name, ACTIVE) if call else ACTIVE
    if call is None or outcome == ACTIVE:
        return "active"
    # Where the settings have nothing to do at that phase and size, the patch is in order none the less.
    planned = plan_layer(config, call.phase, token_grid(call.height, call.width, layer.downsample))
    return "active" if planned.action == "none" else f"not active in the last call: {outcome}"


def _attends_to_text_only(unet: torch.nn.Module, name: str) -> bool:
    """Whether a block's attn1 is cross-attention, as in blocks with only_cross_attention."""
    block = unet.get_submodule(name.rpartition(".")[0])
    return bool(getattr(block, "only_cross_attention", False))


def _latent_size(model: Any, unet: UNet2DConditionModel, height: int | None, width: int | None) -> tuple[int, int, int]:
    scale = getattr(model, "vae_scale_factor", 8)
    default = own_latent_size(unet)
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
    plan = plan_layer(config, phase, grid)
    tokens, left, keys, agents = plan.num_tokens, plan.num_left, plan.num_keys, plan.num_agents
    if plan.action == "none":
        return PhaseCost(tokens, tokens, 0, unpatched)
    if plan.action == "downsample":
        return PhaseCost(left, keys, 0, 2 * (left + keys) * channels * inner + 2 * left * keys * inner)
    matching = plan.num_src * plan.num_dst * channels * math.prod(plan.tile or grid) // tokens
    projections = 4 * left * channels * inner
    if plan.action == "merge":
        return PhaseCost(left, keys, 0, matching + projections + 2 * left * keys * inner)
    attention = 4 * left * agents * inner + (left * inner if config.alpha else 0)
    return PhaseCost(left, keys, agents, matching + projections + agents * channels * inner + attention)
