"""One UNet call: reads size, timestep and phase before it, and finds out afterwards what became of each layer."""

from __future__ import annotations

import dataclasses
import warnings
from typing import TYPE_CHECKING, Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from ..config import Phase
from ..layer_plan import layer_calls, plan_layer
from .checkpointing import watch_checkpoints
from .inputs import read_timesteps, sample_and_timestep
from .layers import (
    RESET_ATTN1,
    UNet,
    class_name,
    find_other_cache,
    is_plain_softmax,
    replaced_forward,
    stores_attention,
)
from .merge_around import knows_places, why_unmerged
from .processor import (
    BYPASSED,
    CROSS,
    MASK,
    NO_INPUT,
    NOT_REACHED,
    OTHER_TOKENS,
    RAN,
    AgentAttnProcessor,
    LayerState,
)

if TYPE_CHECKING:
    from .installation import Installation, PatchedLayer

ACTIVE = "active"

# PAG's and SAG's processors, which stand on the layers they guide by for the length of one call.
_GUIDANCE_PROCESSORS = ("PAG", "CrossAttnStore")

COMPILED_UNSEEN = (
    "agentsd must choose its phase outside the compiled graph: compile with unet.compile(fullgraph=True), or call "
    "agentsd.apply_patch again after torch.compile(unet, fullgraph=True). To export it, call agentsd.remove_patch first"
)

NOISE_LEVELS = (
    "agentsd: this scheduler counts noise levels, not timesteps, so `early` cannot be told from them and every step "
    "uses token merging alone; use a scheduler with discrete timesteps to have agent attention"
)

_FROZEN = (
    "agentsd: {how} would freeze this call's phase, image size and destinations for every later call. Call "
    "agentsd.remove_patch(unet) before it, or keep the patch and use unet.compile(fullgraph=True) in its place"
)

_WHY_UNPATCHED = {
    CROSS: "it was called with encoder_hidden_states, and merging is for self-attention",
    MASK: "it was called with an attention mask, and merged tokens have no mask",
    NO_INPUT: "its block's forward was called directly, past the hook that hands over the block's input",
    OTHER_TOKENS: "its tokens are not those of its {0}×{1} grid. Another tool (tomesd, HyperTile, a tiling hook) may "
    "change them: use one of them",
    NOT_REACHED: "it was not reached",
}


@dataclasses.dataclass(frozen=True)
class LastCall:
    """What happened in the last UNet call.

    Attributes:
        phase: of the call; the later one where the samples of a batch had two.
        timestep: noise level of the least noisy sample.
        height, width: size of the latent, in latent pixels.
        outcomes: "active" for each patched layer that did what the settings say, the reason for each other one.
        notes: what else is to be said of a layer, by its name.
        cached: step caching reused a feature; the layers that were skipped have their outcome of the whole call.
    """

    phase: Phase
    timestep: float
    height: int
    width: int
    outcomes: dict[str, str]
    notes: dict[str, str]
    cached: bool = False


class UNetHook:
    """Hooks around a UNet call: they note size and phase, draw the destinations of every layer, and end the call."""

    def __init__(self, patch: Installation):
        self.patch = patch

    def __call__(self, unet: nn.Module, args: tuple, kwargs: dict) -> None:
        """UNet pre-hook."""
        if torch.jit.is_tracing():
            raise RuntimeError(_FROZEN.format(how="torch.jit.trace"))
        # Not asked inside Dynamo: torch 2.8 takes it for true in every graph. Strict export fails in `prepare`.
        if not torch.compiler.is_dynamo_compiling() and torch.compiler.is_exporting():
            raise RuntimeError(_FROZEN.format(how="torch.export"))
        # Outside a graph it is never too much, and after an interrupted call of a compiled one it is needed.
        if not (self.patch.prepared and torch.compiler.is_compiling()):
            self.prepare(args, kwargs)
            if torch.is_grad_enabled():
                _watch(unet, self.patch)

    def after_call(self, unet: nn.Module, args: tuple, output: Any) -> None:
        """UNet hook, also where the call raised: `output` is None then."""
        if not self.patch.prepared:
            self.finish(output is not None)

    # Choosing the phase reads the timestep on the host, which no graph can do. With unet.compile() and
    # compile_repeated_blocks() it happens before the graph; what gets here inside one was compiled without our wrapper.
    @torch.compiler.disable(reason=COMPILED_UNSEEN)
    def prepare(self, args: tuple, kwargs: dict) -> None:
        """Claim the UNet for this thread and decide what every layer does in this call.

        Raises:
            RuntimeError: another thread is inside.
        """
        self.patch.claim.enter()
        try:
            self._begin(args, kwargs)
        except BaseException:
            self.patch.end_call()
            raise

    def _begin(self, args: tuple, kwargs: dict) -> None:
        patch = self.patch
        call, cache, unet = patch.call, patch.cache, patch.unet
        sample, timestep = sample_and_timestep(args, kwargs)
        call.height, call.width = sample.shape[-2:]
        call.batch = sample.shape[0]
        compared = None if cache is None else cache.similarities(unet, args, kwargs, sample)
        by_sample, similarities = read_timesteps(timestep, compared)
        timesteps = by_sample if isinstance(by_sample, tuple) else (by_sample,)
        patch.schedule.refresh()
        self._check_schedule(timesteps, timestep)
        phases = tuple(patch.config.phase_at(one, patch.schedule.num_train_timesteps) for one in timesteps)
        patch.timestep = min(timesteps)
        patch.phase = Phase.MERGE if Phase.MERGE in phases else Phase.AGENT
        patch.cached = False
        if cache is not None:
            if isinstance(by_sample, tuple) or not self._may_cache(unet):
                cache.pass_by(patch.timestep)
            else:
                state = (patch.timestep, patch.phase, patch.schedule)
                patch.cached = cache.begin(unet, sample, *state, similarities)
            patch.controlnet.settle(patch, args, kwargs, patch.cached)
        self._plan_layers(by_sample, phases, sample.device)
        self._warn_where_replaced()
        call.active = True

    def _may_cache(self, unet: UNet) -> bool:
        """Whether nothing on the UNet forbids step caching; a warning says what does."""
        reason = None
        if (other := find_other_cache(unet)) is not None:
            reason = f"{other} was put on this UNet after the patch and caches too. Use one of the two"
        elif stores_attention(unet):
            reason = "self-attention guidance (SAG) reads the attention of every call. Use sag_scale=0 to cache"
        if reason is not None:
            self.patch.warn_once("may not cache", f"agentsd: step caching is off: {reason}")
        return reason is None

    def _check_schedule(self, timesteps: tuple[float, ...], given: Tensor | float) -> None:
        """Warn once where the timesteps cannot be those of the schedule that phases are computed from."""
        patch = self.patch
        length, last = patch.schedule.num_train_timesteps, max(timesteps)
        begins = patch.timestep is None or last > patch.timestep
        fractional = given.is_floating_point() if isinstance(given, Tensor) else isinstance(given, float)
        if patch.schedule.noise_levels or min(timesteps) < 0:
            patch.warn_once("noise levels", NOISE_LEVELS)
        elif begins and fractional and 0 < last < 2 and length > 100:
            patch.warn_once(
                "schedule",
                f"agentsd: a run begins at timestep {last:g} where the schedule has {length} timesteps, so that no "
                "step is early enough for agent attention. A scheduler whose timesteps lie in 0 … 1 needs them scaled, "
                "or early=1.0 to use agents in all steps",
            )
        elif last > length:
            remedy = "call agentsd.apply_patch on the pipeline whose scheduler is used"
            if patch.schedule.assumed:
                remedy = "no scheduler is known: patch the pipeline and not its UNet"
            patch.warn_once(
                "schedule",
                f"agentsd: timestep {last:g} is beyond the {length} timesteps that phases are computed from; {remedy}",
            )

    def _plan_layers(self, timestep: float | tuple[float, ...], phases: tuple[Phase, ...], device: Any) -> None:
        """Decide for every layer, all layers with the same grid at once: a few small kernels per UNet call."""
        by_grid: dict[tuple[int, int], list[LayerState]] = {}
        for layer in self.patch.layers:
            layer.state.clear()
            by_grid.setdefault(layer.state.grid(), []).append(layer.state)
        # The phases present, with the numbers of their samples; a batch of one phase is not divided.
        samples = {phase: [i for i, one in enumerate(phases) if one is phase] for phase in dict.fromkeys(phases)}
        order = None
        if len(samples) > 1:
            order = torch.tensor([i for one in samples.values() for i in one], device=device).argsort()
        for grid, states in by_grid.items():
            for phase, numbers in samples.items():
                plan = plan_layer(self.patch.config, phase, grid)
                if isinstance(timestep, tuple):
                    timesteps: float | tuple[float, ...] = tuple(timestep[i] for i in numbers)
                else:
                    timesteps = timestep
                index = None if order is None else torch.tensor(numbers, device=device)
                batch = len(numbers) if isinstance(timestep, tuple) else self.patch.call.batch
                calls = layer_calls(plan, self.patch.config, timesteps, len(states), batch, device, index)
                for state, call in zip(states, calls):
                    state.parts += (call,)
                    state.order = order
                    state.plan = state.plan or plan
        if order is not None and (self.patch.config.merge_crossattn or self.patch.config.merge_mlp):
            self.patch.warn_once(
                "mixed",
                "agentsd: this batch has samples of both phases, so merge_crossattn and merge_mlp are left out of such "
                "calls; give samples of one phase at a time to have them",
            )

    def _warn_where_replaced(self) -> None:
        patch = self.patch
        replaced = [layer for layer in patch.layers if not is_ours(layer)]
        processors = {class_name(layer.attn.processor): layer.attn.processor for layer in replaced}
        names = ", ".join(sorted(processors))
        if names == patch.replaced_by:
            return
        patch.replaced_by = names
        if not replaced:
            return
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
            f"agentsd: the patch is not active on {len(replaced)} of its {len(patch.layers)} layers: their attention "
            f"processors were replaced by {names} (by {cause}). {remedy}",
            stacklevel=2,
        )

    @torch.compiler.disable(reason=COMPILED_UNSEEN)
    def finish(self, completed: bool) -> None:
        """End the call: nothing of it may be used later. A thread that was refused ends nothing.

        Args:
            completed: the call returned; one that raised says nothing about layers it did not reach.
        """
        patch = self.patch
        if not patch.claim.is_mine():
            return
        try:
            if patch.call.active:
                self._note_outcomes(completed)
                if patch.cache is not None:
                    patch.cache.end(patch.unet, completed, patch.compiled, patch.schedule.last_timestep())
        finally:
            patch.end_call()

    def _note_outcomes(self, completed: bool) -> None:
        patch, before = self.patch, self.patch.last_call
        assert patch.timestep is not None  # _begin has set it
        outcomes = {layer.state.name: _outcome(layer) for layer in patch.layers}
        if patch.cached and before is not None:  # what was skipped did what it did in the whole call
            skipped = {layer.state.name for layer in patch.layers if layer.state.outcome == NOT_REACHED}
            outcomes.update({name: before.outcomes[name] for name in skipped})
        notes = {}
        for layer in patch.layers:
            attn2 = layer.block.attn2
            if patch.config.merge_crossattn and attn2 is not None and knows_places(attn2):
                notes[layer.state.name] = why_unmerged(attn2)
        size = patch.call.height, patch.call.width
        patch.last_call = LastCall(patch.phase, patch.timestep, *size, outcomes, notes, patch.cached)
        for kind in (CROSS, MASK, NO_INPUT, OTHER_TOKENS):
            self._warn_of(kind, kind, "ran unpatched")
        for layer in patch.layers:
            plan = layer.state.planned()
            if plan.reason.endswith("smaller than a cell"):
                patch.warn_once(f"small {plan.grid}", f"agentsd: {layer.state.name}: {plan.reason}; it runs unpatched")
        if completed:
            self._warn_of(BYPASSED, BYPASSED, "were bypassed")
            if not patch.completed_once and not patch.cached:
                self._warn_of(NOT_REACHED, NOT_REACHED, "were not reached by a whole UNet call")
            patch.completed_once = True
        for note in sorted(set(notes.values())):
            patch.warn_once(note, f"agentsd: on {len(notes)} layers: {note}")

    def _warn_of(self, kind: str, outcome: str, what: str) -> None:
        """Warn once of the layers with an outcome."""
        layers = [layer for layer in self.patch.layers if layer.state.outcome == outcome and is_ours(layer)]
        if not layers:
            return
        first = layers[0]
        where = first.state.name if len(layers) == 1 else f"{first.state.name} and {len(layers) - 1} more"
        remedy = ""
        if kind in (BYPASSED, NOT_REACHED):
            remedy = (
                ". The image is what that tool gives without agentsd there. Use one of the two: undo the tool's change "
                "and call agentsd.apply_patch again, or agentsd.remove_patch"
            )
        self.patch.warn_once(
            kind,
            f"agentsd: {len(layers)} of {len(self.patch.layers)} patched layers {what} ({where}): "
            f"{_outcome(first)}{remedy}",
        )


class BlockHook:
    """Pre-hook of a transformer block: hands its un-normalised input to the processor of its self-attention."""

    def __init__(self, state: LayerState):
        self.state = state

    def __call__(self, block: BasicTransformerBlock, args: tuple, kwargs: dict) -> None:
        self.state.outcome = BYPASSED  # until the processor has run
        if isinstance(getattr(block.attn1, "processor", None), AgentAttnProcessor):  # no other would let it go again
            self.state.block_input = args[0] if args else kwargs["hidden_states"]


def is_ours(layer: PatchedLayer) -> bool:
    """Whether the patch's processor is still on the layer."""
    return isinstance(layer.attn.processor, AgentAttnProcessor)


def _outcome(layer: PatchedLayer) -> str:
    """What became of a layer in the call that ends, in words."""
    state, plan = layer.state, layer.state.planned()
    if not is_ours(layer):
        return f"replaced by {class_name(layer.attn.processor)}: call apply_patch again"
    if state.outcome == BYPASSED:
        return f"bypassed, {_bypassed_by(layer)}"
    if state.outcome != RAN:
        return _WHY_UNPATCHED[state.outcome].format(*plan.grid)
    if plan.action == "none" and len(state.parts) == 1:
        return f"unpatched, {plan.reason}"
    return ACTIVE


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
    return "another tool computes its attention without calling its processor"


@torch.compiler.disable(reason=COMPILED_UNSEEN)
def _watch(unet: nn.Module, patch: Installation) -> None:
    watch_checkpoints(unet, patch)
