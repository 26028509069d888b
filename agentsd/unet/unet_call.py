"""One UNet call as a value, made anew for each: size, timesteps, phases, what each layer does and what became of it.

Nothing outlives the call but the `LastCall` that `describe` shows.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Collection

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import Tensor

from ..config import AgentConfig, Phase
from ..layer_plan import layer_calls, plan_layer, token_grid
from ..step_cache import CallCounts
from .layers import RESET_ATTN1, PatchedLayer, class_name, is_guided, is_ours, is_plain_softmax, replaced_forward
from .outcomes import ACTIVE, LayerOutcome, Outcome, Warnings
from .processor import LayerInCall, LayerState
from .schedule import Schedule

# PAG's and SAG's processors, which stand on the layers they guide by for the length of one call.
_GUIDANCE_PROCESSORS = ("PAG", "CrossAttnStore")

NOISE_LEVELS = (
    "this scheduler counts noise levels, not timesteps, so `early` cannot be told from them and every step uses token "
    "merging alone; use a scheduler with discrete timesteps to have agent attention"
)


@dataclasses.dataclass(frozen=True)
class UNetCall:
    """One call.

    Attributes:
        height, width: size of the latent, in latent pixels.
        batch: number of samples.
        timesteps: noise levels, one or one for each sample.
        phases: of the timesteps.
        cached: step caching reuses a feature.
        compiled: the call runs in a graph of the whole UNet.
    """

    height: int
    width: int
    batch: int
    timesteps: tuple[float, ...]
    phases: tuple[Phase, ...]
    cached: bool = False
    compiled: bool = False

    @property
    def timestep(self) -> float:
        """Of the least noisy sample."""
        return min(self.timesteps)

    @property
    def phase(self) -> Phase:
        """Of the least noisy sample."""
        return Phase.MERGE if Phase.MERGE in self.phases else Phase.AGENT

    def size(self) -> tuple[int, int]:
        return self.height, self.width


@dataclasses.dataclass(frozen=True, kw_only=True)
class LastCall(UNetCall):
    """The last call, and what happened in it.

    Attributes:
        outcomes: "active" for each patched layer that did what the settings say, the reason for each other one; layers
            that step caching skipped have their outcome of the whole call.
        notes: what else is to be said of a layer, by its name.
        counts: calls of the run so far; None without step caching.
    """

    outcomes: dict[str, str]
    notes: dict[str, str]
    counts: CallCounts | None = None


def plan_layers(
    config: AgentConfig,
    call: UNetCall,
    states: list[LayerState],
    skipped: Collection[str],
    device: torch.device,
    given: Warnings,
) -> None:
    """Say for every layer what it does, all layers with the same grid at once: a few small kernels per UNet call.

    Args:
        states: of all layers; a layer's draws go by its number among those with the same grid.
        skipped: names of those that the call does not reach.
    """
    by_grid: dict[tuple[int, int], list[LayerState]] = {}
    for state in states:
        state.now = None
        by_grid.setdefault(token_grid(call.height, call.width, state.downsample), []).append(state)
    # The phases present, with the numbers of their samples; a batch of one phase is not divided.
    samples = {phase: [i for i, one in enumerate(call.phases) if one is phase] for phase in dict.fromkeys(call.phases)}
    order = None
    if len(samples) > 1:
        order = torch.tensor([i for one in samples.values() for i in one], device=device).argsort()
    for grid, alike in by_grid.items():
        layers = [number for number, state in enumerate(alike) if state.name not in skipped]
        if not layers:
            continue
        parts = []
        for phase, numbers in samples.items():
            plan = plan_layer(config, phase, grid)
            index = None if order is None else torch.tensor(numbers, device=device)
            timestep: float | tuple[float, ...] = call.timesteps[0]
            batch = call.batch
            if len(call.timesteps) > 1:
                timestep, batch = tuple(call.timesteps[i] for i in numbers), len(numbers)
            parts.append((plan, layer_calls(plan, config, timestep, layers, batch, device, index)))
        for i, number in enumerate(layers):
            alike[number].now = LayerInCall(parts[0][0], tuple(calls[i] for _, calls in parts), order, call.batch)
    if order is not None and (config.merge_crossattn or config.merge_mlp):
        given.once(
            "mixed",
            "this batch has samples of both phases, so merge_crossattn and merge_mlp are left out of such calls; give "
            "samples of one phase at a time to have them",
        )


def check_schedule(
    schedule: Schedule, timesteps: tuple[float, ...], given: Tensor | float, begins: bool, told: Warnings
) -> None:
    """Warn once where the timesteps of a call cannot be those of the schedule that phases are computed from."""
    length, last = schedule.num_train_timesteps, max(timesteps)
    fractional = given.is_floating_point() if isinstance(given, Tensor) else isinstance(given, float)
    if schedule.noise_levels or min(timesteps) < 0:
        told.once("noise levels", NOISE_LEVELS)
    elif begins and fractional and 0 < last < 2 and length > 100:
        told.once(
            "schedule",
            f"a run begins at timestep {last:g} where the schedule has {length} timesteps, so that no step is early "
            "enough for agent attention. A scheduler whose timesteps lie in 0 … 1 needs them scaled, or early=1.0 to "
            "use agents in all steps",
        )
    elif last > length:
        remedy = "call agentsd.apply_patch on the pipeline whose scheduler is used"
        if schedule.assumed:
            remedy = "no scheduler is known: patch the pipeline and not its UNet"
        told.once(
            "schedule",
            f"timestep {last:g} is beyond the {length} timesteps that phases are computed from; {remedy}",
        )


def warn_where_replaced(layers: list[PatchedLayer], named: str) -> str:
    """Warn of processors that took the place of ours, unless these are the ones named before; returns their names."""
    replaced = [layer for layer in layers if not is_ours(layer)]
    if not replaced:
        return ""
    processors = {class_name(layer.attn.processor): layer.attn.processor for layer in replaced}
    names = ", ".join(sorted(processors))
    if names == named:
        return names
    if all(type(processor).__name__.startswith(_GUIDANCE_PROCESSORS) for processor in processors.values()):
        cause, remedy = "PAG or SAG, while they guide", "Guide other layers (pag_applied_layers) to have both."
    else:
        cause = "fuse_qkv_projections, attention slicing, xFormers, set_attn_processor or another tool"
        if all(is_plain_softmax(processor) for processor in processors.values()):
            remedy = "Call agentsd.apply_patch again to patch them anew"
        else:
            remedy = f"To patch them anew, {RESET_ATTN1}"
        remedy += ", or agentsd.remove_patch to be rid of this warning."
    warnings.warn(
        f"agentsd: the patch is not active on {len(replaced)} of its {len(layers)} layers: their attention processors "
        f"were replaced by {names} (by {cause}). {remedy}",
        stacklevel=2,
    )
    return names


def outcome_of(layer: PatchedLayer, state: LayerState) -> LayerOutcome:
    """What became of a layer in the call that ends."""
    now = state.now
    outcome, reason = Outcome.NOT_REACHED if now is None else now.outcome, ""
    if not is_ours(layer):
        outcome, reason = Outcome.REPLACED, Outcome.REPLACED.value.format(class_name(layer.attn.processor))
    elif now is None:
        reason = outcome.value
    elif outcome is Outcome.BYPASSED and is_guided(layer.attn):
        outcome, reason = Outcome.RAN, f"unpatched, {now.plan.reason}"
    elif outcome is Outcome.BYPASSED:
        reason = f"bypassed, {_bypassed_by(layer)}"
    elif outcome is not Outcome.RAN:
        reason = outcome.value.format(*now.plan.grid)
    else:
        reason = f"unpatched, {now.plan.reason}" if now.does_nothing() else ACTIVE
    return LayerOutcome(state.name, outcome, reason)


def _bypassed_by(layer: PatchedLayer) -> str:
    """Name what took the place of a layer's attention, as far as it can be seen."""
    attn = layer.block.attn1
    if attn is not layer.attn or type(attn) is not Attention:
        return f"its attention is now a {class_name(attn)}"
    for what, module in (("attention", attn), ("block", layer.block)):
        if (forward := replaced_forward(module)) is not None:
            return f"its {what} has {forward}"
    if not attn.forward.__module__.startswith("diffusers."):
        return f"the class Attention has the forward {attn.forward.__module__}.{attn.forward.__qualname__}"
    if type(layer.block) is not BasicTransformerBlock:
        return f"its block is now a {class_name(layer.block)}"
    return Outcome.BYPASSED.value
