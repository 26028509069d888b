"""apply_patch, remove_patch, patched: puts agent attention into a diffusers UNet and takes it out again.

The only file that changes a model. What it adds, all of it removed by `remove_patch`:
- an AgentAttnProcessor on `attn1` of each eligible transformer block, with its LayerState beside it;
- a pre-hook on each of those blocks, which hands the un-normalised block input to the processor;
- a pre-hook on the UNet, which notes latent size and phase of each call, and a hook that marks its end;
- with merge_crossattn / merge_mlp, hooks around `attn2` / `ff`;
- in training with gradient checkpointing, a wrapper that has a block computed again as it was;
- where the UNet is or gets compiled as a whole, a wrapper that chooses the phase before the graph is entered.
"""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from diffusers import UNet2DConditionModel, UNetMotionModel
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import (
    Attention,
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)
from torch import Tensor, nn

from .config import DEFAULT_NUM_TRAIN_TIMESTEPS, FIELD_NAMES, AgentConfig
from .merging import draw_offsets, grid_cells, merge_tokens, split_grid, tile_size, unmerge_tokens
from .unet.processor import LAYER_ATTRIBUTE, AgentAttnProcessor, LayerState, MergePlan, RunState

PATCH_ATTRIBUTE = "_agentsd_patch"

# AnimateDiff's UNet is the first with motion modules between its blocks: its spatial layers are the same.
_UNET_CLASSES = (UNet2DConditionModel, UNetMotionModel)

# Processors that compute plain softmax attention with the layer's own projections: what ours may stand in for.
_SOFTMAX_PROCESSORS = (
    AttnProcessor,
    AttnProcessor2_0,
    FusedAttnProcessor2_0,
    SlicedAttnProcessor,
    XFormersAttnProcessor,
)


_NOT_SOFTMAX = "is not plain softmax attention"


@dataclasses.dataclass
class PatchedLayer:
    """One replaced processor and what is needed to put it back."""

    attn: Attention
    original: Any
    state: LayerState


@dataclasses.dataclass
class Patch:
    """Everything one apply_patch did to one UNet.

    Attributes:
        config: the settings.
        num_train_timesteps: length of the diffusion run, in timesteps.
        run: the UNet call in progress.
        layers: the patched self-attention layers, in the order of the UNet's modules.
        skipped: (layer name, reason) of every self-attention layer that was left alone.
        handles: the hooks.
        replaced_by: the processors found in place of ours in the last call, which a warning has named.
        warned_of_noise_levels: that the scheduler does not count timesteps has been said.
    """

    config: AgentConfig
    num_train_timesteps: int
    run: RunState
    layers: list[PatchedLayer]
    skipped: list[tuple[str, str]]
    handles: list[Any] = dataclasses.field(default_factory=list)
    replaced_by: str = ""
    warned_of_noise_levels: bool = False


def apply_patch(model: Any, config: AgentConfig | None = None, **settings: Any) -> Any:
    """Make a Stable Diffusion UNet use agent attention and token merging, in place.

    Args:
        model: a diffusers pipeline with a UNet2DConditionModel as its `unet` (SD 1.x, 2.x, SDXL, with or without
            ControlNet, img2img, inpainting …) or AnimateDiff's UNetMotionModel, or such a UNet itself.
        config: all settings at once; or
        **settings: fields of AgentConfig by name, `ratio=0.4, early=0.4, …`. Both together: the fields override.

    Returns:
        `model`, patched. Applying again replaces the former patch.

    Raises:
        TypeError: the model has no such UNet, or a setting has the wrong type or an unknown name.
        ValueError: a setting is out of its range, or ToMeSD's patch is on the model.
        Nothing is changed where an error is raised.
    """
    config = _settings_to_config(config, settings)
    unet, outer = _find_unet(model)
    _refuse_tomesd(unet)
    scheduler = getattr(model, "scheduler", None)
    noise_levels = _counts_noise_levels(scheduler)
    if noise_levels:
        warnings.warn(_NOISE_LEVELS, stacklevel=2)
    num_train_timesteps = _config(scheduler).get("num_train_timesteps", DEFAULT_NUM_TRAIN_TIMESTEPS)

    remove_patch(unet)
    eligible, skipped = find_layers(unet, config)
    if not eligible:
        warnings.warn(f"agentsd: no layer of this {type(unet).__name__} was patched: {why_none(skipped)}", stacklevel=2)

    foreign = sorted({reason for _, reason in skipped if reason.endswith(_NOT_SOFTMAX)})
    if eligible and foreign:
        warnings.warn(
            f"agentsd: {len(eligible)} layers were patched, others were left alone: {'; '.join(foreign)}. Set an "
            "AttnProcessor2_0 there (unet.set_attn_processor) and call agentsd.apply_patch again to patch them too",
            stacklevel=2,
        )

    run = RunState()
    patch = Patch(config, num_train_timesteps, run, [], skipped, warned_of_noise_levels=noise_levels)
    processor = AgentAttnProcessor()  # it has no state, so one serves all layers
    for name, block, downsample in eligible:
        attn = block.attn1
        original = attn.processor
        if isinstance(original, AgentAttnProcessor):
            # Not a patch: someone put back what they had saved while there was one (unfuse_qkv_projections, PAG).
            original = AttnProcessor2_0()
        state = LayerState(name, downsample, config, run, fallback=original)
        patch.layers.append(PatchedLayer(attn, original, state))
        setattr(attn, LAYER_ATTRIBUTE, state)
        attn.set_processor(processor)
        patch.handles.append(block.register_forward_pre_hook(_hand_over_block_input, with_kwargs=True))
        if config.merge_crossattn and block.attn2 is not None:
            patch.handles += _merge_around(block.attn2, block)
        if config.merge_mlp:
            patch.handles += _merge_around(block.ff, block)

    hook = _UNetHook(patch)
    patch.handles.append(unet.register_forward_pre_hook(hook, with_kwargs=True))
    patch.handles.append(unet.register_forward_hook(hook.after_call, always_call=True))
    if outer is not unet:
        patch.handles.append(outer.register_forward_pre_hook(_EagerEntry(hook), with_kwargs=True))
        patch.handles.append(outer.register_forward_hook(_EagerExit(hook), always_call=True))
    setattr(unet, PATCH_ATTRIBUTE, patch)
    _watch_compilation(unet, hook)
    return model


def remove_patch(model: Any) -> Any:
    """Undo `apply_patch`: the very processors that stood there are back, and nothing of ours is left.

    A processor that someone set after the patch stays. Harmless on a model that is not patched.

    Args:
        model: what apply_patch takes.

    Returns:
        `model`.

    Raises:
        TypeError: the model has no UNet that could have been patched.
    """
    unet, _ = _find_unet(model)
    patch = get_patch(unet)
    if patch is None:
        return model
    for handle in patch.handles:
        handle.remove()
    _unwatch_checkpoints(unet)
    for layer in patch.layers:
        if isinstance(layer.attn.processor, AgentAttnProcessor):
            layer.attn.set_processor(layer.original)
        delattr(layer.attn, LAYER_ATTRIBUTE)
    delattr(unet, PATCH_ATTRIBUTE)
    _unwatch_compilation(unet)
    return model


@contextlib.contextmanager
def patched(model: Any, config: AgentConfig | None = None, **settings: Any) -> Iterator[Any]:
    """`apply_patch` for the length of a `with` block; afterwards a patch that stood there before is back.

    Arguments and errors as `apply_patch`; yields `model`.
    """
    before = get_patch(_find_unet(model)[0])
    apply_patch(model, config, **settings)
    try:
        yield model
    finally:
        remove_patch(model)
        if before is not None:
            apply_patch(model, before.config)
            # A bare UNet would not know the length of the run that the pipeline's scheduler told.
            get_patch(model).num_train_timesteps = before.num_train_timesteps


def find_unet(model: Any) -> UNet2DConditionModel:
    """The UNet that apply_patch patches in a pipeline or UNet. Raises TypeError as apply_patch does."""
    return _find_unet(model)[0]


def get_patch(model: Any) -> Patch | None:
    """The patch on a pipeline or UNet, or None."""
    return getattr(find_unet(model), PATCH_ATTRIBUTE, None)


def find_layers(
    unet: UNet2DConditionModel | UNetMotionModel, config: AgentConfig
) -> tuple[list[tuple[str, BasicTransformerBlock, int]], list[tuple[str, str]]]:
    """Which self-attention layers the settings reach.

    Returns:
        The eligible ones as (name of the attention, its block, downsampling of the latent), and the others as
        (name, reason).
    """
    candidates: list[tuple[str, BasicTransformerBlock, int]] = []
    skipped: list[tuple[str, str]] = []
    for prefix, stage, downsample in _stages(unet):
        for name, module in stage.named_modules(prefix=prefix):
            if isinstance(module, BasicTransformerBlock):
                reason = "it attends over time, in a motion module" if ".motion_modules." in name else _why_not(module)
                if reason is None:
                    candidates.append((f"{name}.attn1", module, downsample))
                else:
                    skipped.append((f"{name}.attn1", reason))
            elif isinstance(module, Attention) and not _inside_block(stage, name[len(prefix) + 1 :]):
                skipped.append((name, "it is not part of a BasicTransformerBlock"))

    # The levels follow from the model alone, whatever processors stand on it.
    limit = config.max_downsample
    if limit == "auto":
        limit = min((downsample for _, _, downsample in candidates), default=1)
    eligible = []
    for name, block, downsample in candidates:
        if downsample > limit:
            skipped.append((name, f"its level is downsampled {downsample}×, max_downsample is {limit}"))
        elif type(block.attn1.processor) not in (*_SOFTMAX_PROCESSORS, AgentAttnProcessor):
            skipped.append((name, f"its processor {type(block.attn1.processor).__name__} {_NOT_SOFTMAX}"))
        else:
            eligible.append((name, block, downsample))
    return eligible, skipped


def why_none(skipped: list[tuple[str, str]]) -> str:
    """Why no layer is eligible, in words, from the (name, reason) pairs of `find_layers`."""
    return "; ".join(sorted({reason for _, reason in skipped})) or "it has no self-attention"


def _stages(unet: UNet2DConditionModel | UNetMotionModel) -> Iterator[tuple[str, nn.Module, int]]:
    """The UNet's down, middle and up blocks as (name, module, downsampling of the latent inside it)."""
    downsample = 1
    for index, block in enumerate(unet.down_blocks):
        yield f"down_blocks.{index}", block, downsample
        downsample *= 2 if getattr(block, "downsamplers", None) else 1
    if unet.mid_block is not None:
        yield "mid_block", unet.mid_block, downsample
    for index, block in enumerate(unet.up_blocks):
        yield f"up_blocks.{index}", block, downsample
        downsample //= 2 if getattr(block, "upsamplers", None) else 1


def _inside_block(stage: nn.Module, name: str) -> bool:
    parents = name.split(".")[:-1]
    return any(
        isinstance(stage.get_submodule(".".join(parents[: i + 1])), BasicTransformerBlock) for i in range(len(parents))
    )


def _why_not(block: BasicTransformerBlock) -> str | None:
    """The reason why a block of this kind cannot be patched, or None."""
    attn = block.attn1
    if block.only_cross_attention:
        return "it attends to the text only"
    if block.pos_embed is not None:
        return "its block adds positional embeddings before attention"
    if attn.group_norm is not None or attn.spatial_norm is not None or attn.residual_connection:
        return "it has a norm or a residual of its own"
    return None


# PAG's and SAG's processors, which stand on the layers they guide by for the length of one call.
_GUIDANCE_PROCESSORS = ("PAG", "CrossAttnStore")

_COMPILED_UNSEEN = (
    "agentsd must choose its phase outside the compiled graph: compile with unet.compile(fullgraph=True), or call "
    "agentsd.apply_patch again after torch.compile(unet, fullgraph=True)"
)

_NOISE_LEVELS = (
    "agentsd: this scheduler counts noise levels, not timesteps, so `early` cannot be told from them and every step "
    "uses token merging alone; use a scheduler with discrete timesteps to have agent attention"
)

# --- what the hooks do ------------------------------------------------------------------------------------------------


class _UNetHook:
    """UNet pre-hook: notes latent size and phase, and draws the destinations of every layer, before the call."""

    def __init__(self, patch: Patch):
        self.patch = patch

    def __call__(self, unet: nn.Module, args: tuple, kwargs: dict) -> None:
        # Outside a graph it is never too much, and after an interrupted call of a compiled one it is needed.
        if not (self.patch.run.prepared and torch.compiler.is_compiling()):
            self.prepare(*_sample_and_timestep(args, kwargs))
            if torch.is_grad_enabled():
                _watch_checkpoints(unet, self.patch)

    def after_call(self, unet: nn.Module, args: tuple, output: Any) -> None:
        if not self.patch.run.prepared:
            self.finish()

    @torch.compiler.disable(reason=_COMPILED_UNSEEN)
    def finish(self) -> None:
        for layer in self.patch.layers:
            layer.state.block_input = None  # left over where another processor stood
        self.patch.run.leave()

    # Choosing the phase reads the timestep on the host, which no graph can do. With unet.compile() and
    # compile_repeated_blocks() it happens before the graph; what gets here inside one was compiled behind our back.
    @torch.compiler.disable(reason=_COMPILED_UNSEEN)
    def prepare(self, sample: Tensor, timestep: Tensor | float) -> None:
        patch = self.patch
        run, config = patch.run, patch.config
        run.enter()
        # One synchronisation with the device per UNet call. In a batch of mixed timesteps (training) the least noisy
        # sample decides: agent attention is meant for noise.
        run.timestep = float(timestep.min().item()) if isinstance(timestep, Tensor) else float(timestep)
        run.height, run.width = sample.shape[-2:]
        run.phase = config.phase_at(run.timestep, patch.num_train_timesteps)
        if run.timestep < 0 and not patch.warned_of_noise_levels:  # a scheduler set after the patch
            patch.warned_of_noise_levels = True
            warnings.warn(_NOISE_LEVELS, stacklevel=2)
        self._split_grids(sample.device)
        self._warn_where_replaced()

    def _split_grids(self, device: torch.device) -> None:
        """Choose the dsts of every layer, all layers with the same grid at once: a few small kernels per UNet call."""
        patch = self.patch
        run, config = patch.run, patch.config
        by_grid: dict[tuple[int, int], list[LayerState]] = {}
        for layer in patch.layers:
            layer.state.split = layer.state.block_input = layer.state.plan = None
            if config.acts_in(run.phase):
                by_grid.setdefault(layer.state.grid(), []).append(layer.state)
        for grid, states in by_grid.items():
            stride = config.stride(run.phase, grid)
            cells = grid_cells(*grid, stride)
            if cells == 0:
                for state in states:
                    state.warn_once("small", f"its {grid[0]}×{grid[1]} grid is smaller than a cell; it runs unpatched")
                continue
            tile = None if config.match_tile is None else tile_size(*grid, stride, config.match_tile)
            if config.use_rand:
                drawn = draw_offsets(config.seed, run.timestep, len(states), cells, stride[0] * stride[1], device)
                splits = split_grid(*grid, stride, drawn, tile=tile).unbind()
            else:
                splits = [split_grid(*grid, stride, device=device, tile=tile)] * len(states)
            for state, split in zip(states, splits):
                state.split = split

    def _warn_where_replaced(self) -> None:
        patch = self.patch
        replaced = [layer for layer in patch.layers if not isinstance(layer.attn.processor, AgentAttnProcessor)]
        names = ", ".join(sorted({type(layer.attn.processor).__name__ for layer in replaced}))
        if names == patch.replaced_by:
            return
        patch.replaced_by = names
        if not replaced:
            return
        if all(type(layer.attn.processor).__name__.startswith(_GUIDANCE_PROCESSORS) for layer in replaced):
            cause, remedy = "PAG or SAG, while they guide", "Guide other layers (pag_applied_layers) to have both."
        else:
            cause = "fuse_qkv_projections, attention slicing, xFormers, set_attn_processor or another tool"
            remedy = (
                "Call agentsd.apply_patch again to patch them anew, or agentsd.remove_patch to be rid of this warning."
            )
        warnings.warn(
            f"agentsd: the patch is not active on {len(replaced)} of its {len(patch.layers)} layers: their attention "
            f"processors were replaced by {names} (by {cause}). {remedy}",
            stacklevel=2,
        )


def _sample_and_timestep(args: tuple, kwargs: dict) -> tuple[Tensor, Tensor | float]:
    sample = args[0] if args else kwargs["sample"]
    timestep = args[1] if len(args) > 1 else kwargs["timestep"]
    return sample, timestep


def _hand_over_block_input(block: BasicTransformerBlock, args: tuple, kwargs: dict) -> None:
    if isinstance(block.attn1.processor, AgentAttnProcessor):  # no other would take it and let it go
        state = getattr(block.attn1, LAYER_ATTRIBUTE)
        state.block_input = args[0] if args else kwargs["hidden_states"]


def _merge_around(module: nn.Module, block: BasicTransformerBlock) -> list[Any]:
    """Merge a module's input tokens and unmerge its output tokens, with the plan of its block's self-attention."""
    around = _MergeAround(block)
    return [
        module.register_forward_pre_hook(around.merge, with_kwargs=True),
        module.register_forward_hook(around.unmerge),
    ]


class _MergeAround:
    def __init__(self, block: BasicTransformerBlock):
        self.block = block

    def merge(self, module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict] | None:
        plan = self._plan(module)
        if plan is None:
            return None
        if args:
            return (merge_tokens(args[0], plan.matching, plan.r), *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": merge_tokens(kwargs["hidden_states"], plan.matching, plan.r)}

    def unmerge(self, module: nn.Module, args: tuple, output: Tensor) -> Tensor | None:
        plan = self._plan(module)
        return None if plan is None else unmerge_tokens(output, plan.matching, plan.r)

    def _plan(self, module: nn.Module) -> MergePlan | None:
        if module is self.block.ff and self.block._chunk_size is not None:
            return None  # forward chunking hands it slices of the batch or of the tokens, which the plan does not fit
        return getattr(self.block.attn1, LAYER_ATTRIBUTE).plan


# --- gradient checkpointing -------------------------------------------------------------------------------------------


class _Checkpoint:
    """Stands before a module's checkpointing function: what runs again in the backward pass sees its own UNet call.

    By then there may have been later calls, of another phase and with other dsts.
    """

    def __init__(self, function: Any, patch: Patch):
        self.function = function
        self.patch = patch

    def __call__(self, module: Any, *args: Any, **kwargs: Any) -> Any:
        return self.function(_Replayed(module, self.patch), *args, **kwargs)


class _Replayed:
    """A part of the UNet with what the patch knew of the call in progress when this was made."""

    def __init__(self, module: Any, patch: Patch):
        self.module = module
        self.patch = patch
        self.call = self._call()

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        before = self._call()
        self._set(self.call)
        try:
            return self.module(*args, **kwargs)
        finally:
            self._set(before)

    def _call(self) -> tuple:
        run = self.patch.run
        return run.height, run.width, run.phase, run.timestep, [layer.state.split for layer in self.patch.layers]

    def _set(self, call: tuple) -> None:
        run = self.patch.run
        run.height, run.width, run.phase, run.timestep, splits = call
        for layer, split in zip(self.patch.layers, splits):
            layer.state.split = split


@torch.compiler.disable(reason=_COMPILED_UNSEEN)
def _watch_checkpoints(unet: nn.Module, patch: Patch) -> None:
    for module in unet.modules():
        function = vars(module).get("_gradient_checkpointing_func")
        if function is not None and not isinstance(function, _Checkpoint):
            module._gradient_checkpointing_func = _Checkpoint(function, patch)


def _unwatch_checkpoints(unet: nn.Module) -> None:
    for module in unet.modules():
        function = vars(module).get("_gradient_checkpointing_func")
        if isinstance(function, _Checkpoint):
            module._gradient_checkpointing_func = function.function


# --- compiled UNets ---------------------------------------------------------------------------------------------------


class _CompiledEntry:
    """Stands before a UNet's compiled call: chooses the phase outside the graph, then enters it."""

    def __init__(self, compiled: Any, hook: _UNetHook):
        self.compiled = compiled
        self.hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        run = self.hook.patch.run
        self.hook.prepare(*_sample_and_timestep(args, kwargs))
        run.prepared = True
        try:
            return self.compiled(*args, **kwargs)
        finally:
            run.prepared = False
            self.hook.finish()


class _CompileAndWatch:
    """The UNet's `compile` while it is patched: compiles as ever, then puts a _CompiledEntry before the result."""

    def __init__(self, unet: nn.Module, hook: _UNetHook):
        # Weak, as it hangs on the UNet: a circle would keep a dropped UNet in memory until Python looks for circles.
        self.unet = weakref.ref(unet)
        self.hook = hook

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        unet = self.unet()
        type(unet).compile(unet, *args, **kwargs)
        _wrap_compiled_call(unet, self.hook)

    # A copied or pickled UNet's own must know that UNet; a weak reference can be neither copied nor pickled.
    def __getstate__(self) -> dict[str, Any]:
        return {"unet": self.unet(), "hook": self.hook}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.unet, self.hook = weakref.ref(state["unet"]), state["hook"]


def _watch_compilation(unet: nn.Module, hook: _UNetHook) -> None:
    unet.compile = _CompileAndWatch(unet, hook)
    _wrap_compiled_call(unet, hook)


def _wrap_compiled_call(unet: nn.Module, hook: _UNetHook) -> None:
    if unet._compiled_call_impl is not None:
        unet._compiled_call_impl = _CompiledEntry(unet._compiled_call_impl, hook)


def _unwatch_compilation(unet: nn.Module) -> None:
    unet.__dict__.pop("compile", None)
    if isinstance(unet._compiled_call_impl, _CompiledEntry):
        unet._compiled_call_impl = unet._compiled_call_impl.compiled


class _EagerEntry:
    """Pre-hook on a module made by torch.compile(unet): runs outside its graph."""

    def __init__(self, hook: _UNetHook):
        self.hook = hook

    def __call__(self, module: nn.Module, args: tuple, kwargs: dict) -> None:
        self.hook.prepare(*_sample_and_timestep(args, kwargs))
        self.hook.patch.run.prepared = True


class _EagerExit:
    def __init__(self, hook: _UNetHook):
        self.hook = hook

    def __call__(self, module: nn.Module, args: tuple, output: Any) -> None:
        self.hook.patch.run.prepared = False
        self.hook.finish()


# --- what apply_patch is given ----------------------------------------------------------------------------------------


def _settings_to_config(config: AgentConfig | None, settings: dict[str, Any]) -> AgentConfig:
    unknown = sorted(set(settings) - set(FIELD_NAMES))
    if unknown:
        raise TypeError(f"unknown setting {', '.join(unknown)}; the settings are {', '.join(FIELD_NAMES)}")
    if config is None:
        return AgentConfig(**settings)
    if not isinstance(config, AgentConfig):
        raise TypeError(f"config={config!r}: must be an AgentConfig; single settings go by name, as in ratio=0.4")
    return dataclasses.replace(config, **settings)


def _find_unet(model: Any) -> tuple[UNet2DConditionModel | UNetMotionModel, nn.Module]:
    """The UNet of a pipeline or a UNet, and the module that callers call: another one where torch.compile wraps it."""
    outer = model if isinstance(model, nn.Module) else getattr(model, "unet", None)
    unet = getattr(outer, "_orig_mod", outer)
    if isinstance(unet, _UNET_CLASSES):
        return unet, outer
    what = type(model).__name__
    if unet is not None and unet is not model:
        what += f" with a {type(unet).__name__}"
    elif hasattr(model, "transformer"):
        what += f" with a {type(model.transformer).__name__} (a transformer, not a UNet)"
    raise TypeError(
        f"cannot patch a {what}: agentsd patches a UNet2DConditionModel, a UNetMotionModel or a diffusers pipeline "
        "that has one as its `unet`, such as Stable Diffusion 1.x, 2.x, SDXL and AnimateDiff"
    )


def _refuse_tomesd(unet: nn.Module) -> None:
    # Not by `_tome_info`, which tomesd.remove_patch leaves behind; the class it swaps in is what merges tokens.
    if any(type(module).__name__ == "ToMeBlock" for module in unet.modules()):
        raise ValueError("ToMeSD's patch on this model would merge its tokens twice: call tomesd.remove_patch first")


def _counts_noise_levels(scheduler: Any) -> bool:
    # The EDM schedulers have no timestep_type; what they share is this method.
    return _config(scheduler).get("timestep_type") == "continuous" or hasattr(scheduler, "precondition_noise")


def _config(scheduler: Any) -> Any:
    return getattr(scheduler, "config", {})
