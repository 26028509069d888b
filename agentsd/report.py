"""describe: which layers are patched, how many tokens and agents they work with, and what that saves."""

from __future__ import annotations

import dataclasses
import math
import textwrap
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNetMotionModel
from diffusers.models.attention_processor import Attention
from torch.utils.flop_counter import FlopCounterMode

from .config import AgentConfig, Phase
from .layer_plan import plan_layer, token_grid
from .patch import find_unet, get_patch
from .unet.call import is_ours
from .unet.layers import class_name, own_latent_size

_LATER = {"merge": "token merging", "downsample": "downsampled keys and values", "full": "unpatched"}


@dataclass(frozen=True)
class PhaseCost:
    """One layer in one phase, for one picture (a batch of one).

    Attributes:
        tokens_left: M, what is left of the tokens after merging: the number of queries.
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
    """One self-attention layer.

    Attributes:
        name: module name in the UNet.
        status: "active"; "replaced by …" where another processor has taken the patch's place; "left alone: …" with the
            reason; or "not patched".
        grid: (height, width) of its tokens, None where it was left alone.
        tokens: N = height · width.
        multiply_adds: of its self-attention unpatched: four projections and two products with the attention matrix.
        phases: cost in each phase of the patch, by phase name; empty where it is not patched.
    """

    name: str
    status: str
    grid: tuple[int, int] | None = None
    tokens: int = 0
    multiply_adds: int = 0
    phases: dict[str, PhaseCost] = dataclasses.field(default_factory=dict)


@dataclass(frozen=True)
class Report:
    """What `describe` found; `print` it, or read it as data (`to_dict()`).

    Attributes:
        model: class of the pipeline or UNet.
        height, width: picture size in pixels that the numbers hold for.
        config: the settings of the patch, None where there is none.
        early_timestep: the agent phase is at this timestep and above; None where there is no patch or no such phase.
        layers: every self-attention layer.
        unet_multiply_adds: of one unpatched call of the whole UNet for one picture (twice that with guidance); None for
            a kind of UNet whose extra inputs are not known here.
    """

    model: str
    height: int
    width: int
    config: AgentConfig | None
    early_timestep: float | None
    layers: tuple[LayerReport, ...]
    unet_multiply_adds: int | None

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
        data["unet_fraction"] = {phase.value: self.unet_fraction(phase) for phase in Phase} if self.active else {}
        return data

    def __str__(self) -> str:
        lines = [f"{self.model} at {self.width}×{self.height} px: " + self._headline()]
        if self.config is not None:
            settings = ", ".join(f"{k}={v!r}" for k, v in dataclasses.asdict(self.config).items())
            lines += textwrap.wrap(f"settings: {settings}", width=110, subsequent_indent="  ")
        if self.active:
            lines += ["", *self._table(), "", *self._totals()]
        others: dict[str, list[str]] = {}
        for layer in self.layers:
            if layer.status != "active":
                others.setdefault(layer.status, []).append(layer.name)
        for status, names in others.items():
            lines += ["", f"{len(names)} {status}"] + [f"  {name}" for name in names]
        return "\n".join(lines)

    def _headline(self) -> str:
        if self.config is None:
            return f"not patched; it has {len(self.layers)} self-attention layers"
        later = _LATER[self.config.late]
        if self.early_timestep is None:
            nothing = "ratio=0" if self.config.late == "merge" else f"late={self.config.late!r}"
            changes = self.config.acts_in(Phase.MERGE)
            when = f"{later} in every step" if changes else f"but {nothing} and early=0 change nothing"
        else:
            when = f"agent attention at timesteps ≥ {self.early_timestep:g}, {later} below"
        return f"agentsd is active on {len(self.active)} of {len(self.layers)} self-attention layers, {when}"

    def _table(self) -> list[str]:
        header = ("layer", "tokens", "phase", "left", "keys", "agents", "Mmul-add before", "after")
        rows = []
        for layer in self.active:
            for number, phase in enumerate(self._phases_in_use()):
                cost = layer.phases[phase.value]
                rows.append(
                    (
                        "" if number else layer.name,
                        "" if number else f"{layer.grid[0]}×{layer.grid[1]} = {layer.tokens}",
                        phase.value,
                        str(cost.tokens_left),
                        str(cost.keys),
                        str(cost.agents or "-"),
                        f"{layer.multiply_adds / 1e6:.1f}",
                        f"{cost.multiply_adds / 1e6:.1f}",
                    )
                )
        widths = [max(len(row[i]) for row in (header, *rows)) for i in range(len(header))]
        left = (0, 2)
        return [
            "  ".join(
                cell.ljust(w) if i in left else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths))
            ).rstrip()
            for row in (header, *rows)
        ]

    def _totals(self) -> list[str]:
        before = self.self_attention_multiply_adds()
        if self.unet_multiply_adds is None:
            shares = {phase: self.self_attention_multiply_adds(phase) / before for phase in self._phases_in_use()}
            return [f"{phase.value} phase: their self-attention {part:.1%} of before" for phase, part in shares.items()]
        lines = [
            f"whole UNet: {self.unet_multiply_adds / 1e9:.2f} Gmul-add a call and picture, "
            f"{before / self.unet_multiply_adds:.1%} of it in these layers' self-attention"
        ]
        for phase in self._phases_in_use():
            after = self.self_attention_multiply_adds(phase)
            lines.append(
                f"  {phase.value} phase: their self-attention {after / before:.1%} of before, "
                f"the whole UNet {self.unet_fraction(phase):.1%} of before"
            )
        return [*lines, "(arithmetic only: what it saves in seconds also depends on the attention kernel; measure it)"]

    def _phases_in_use(self) -> list[Phase]:
        phases = [Phase.AGENT] if self.config.early > 0 else []
        return phases + ([Phase.MERGE] if self.config.early < 1 else [])


def describe(model: Any, height: int | None = None, width: int | None = None) -> Report:
    """Tell what is patched and what that saves, for pictures of a size.

    Args:
        model: a pipeline or UNet that `apply_patch` takes, patched or not.
        height, width: picture size in pixels; None takes the model's own.

    Returns:
        A Report. Its numbers come from the layers' shapes; nothing is generated or timed.

    Raises:
        TypeError: the model has no UNet of the supported kind, or a size is no integer.
        ValueError: a size is not a positive multiple of the pixels per latent pixel.
    """
    unet = find_unet(model)
    latent_height, latent_width, scale = _latent_size(model, unet, height, width)
    patch = get_patch(model)
    layers = []
    if patch is None:
        for name, module in unet.named_modules():
            if isinstance(module, Attention) and name.endswith("attn1"):
                layers.append(LayerReport(name, "not patched"))
    else:
        for layer in patch.layers:
            active = is_ours(layer)
            status = "active" if active else f"replaced by {class_name(layer.attn.processor)}: call apply_patch again"
            grid = token_grid(latent_height, latent_width, layer.state.downsample)
            if active and not any(plan_layer(patch.config, phase, grid).num_dst for phase in Phase):
                status = f"left alone: its {grid[0]}×{grid[1]} grid is smaller than a cell"
            layers.append(_layer_report(layer.state.name, status, layer.attn, grid, patch.config))
        layers += [LayerReport(name, f"left alone: {reason}") for name, reason in patch.skipped]
        order = {name: i for i, (name, _) in enumerate(unet.named_modules())}
        layers.sort(key=lambda layer: order[layer.name])
    config = patch.config if patch else None
    return Report(
        model=type(model).__name__,
        height=latent_height * scale,
        width=latent_width * scale,
        config=config,
        early_timestep=config.first_agent_timestep(patch.num_train_timesteps) if config and config.early else None,
        layers=tuple(layers),
        unet_multiply_adds=_unet_multiply_adds(unet, latent_height, latent_width),
    )


def _latent_size(model: Any, unet: UNet2DConditionModel, height: int | None, width: int | None) -> tuple[int, int, int]:
    scale = getattr(model, "vae_scale_factor", 8)
    default = own_latent_size(unet)
    latent = []
    for name, value, own in (("height", height, default[0]), ("width", width, default[1])):
        if value is None:
            latent.append(own)
            continue
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name}={value!r}: must be an integer, the picture's {name} in pixels")
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
