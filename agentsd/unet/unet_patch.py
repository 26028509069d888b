"""UNetPatch: what one apply_patch puts on one UNet, and what happens around each call of it."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock
from diffusers.models.attention_processor import AttnProcessor2_0
from torch import nn

from ..config import AgentConfig
from ..step_cache import CallCounts
from .caching import Caching
from .checkpointing import unwatch_checkpoints, watch_checkpoints
from .compiled import COMPILED_UNSEEN, CompiledEntry, unwatch_compilation, watch_compilation
from .conditioning import sample_and_timestep
from .layers import UNet, find_layers, is_guided, is_ours, register_processor, unwrap_unet
from .merge_around import MergeAround, why_unmerged
from .outcomes import Outcome, Warnings, warn_of
from .processor import LAYER_ATTRIBUTE, AgentAttnProcessor, LayerInCall, LayerState
from .sampling_run import RunTracker
from .schedule import Schedule
from .skipping import skipped_names
from .threads import CallLock, is_inside, refuse_change
from .unet_call import LastCall, UNetCall, check_schedule, outcome_of, plan_layers, warn_where_replaced
from .weak_link import WeakLink

PATCH_ATTRIBUTE = "_agentsd_patch"

_FROZEN = (
    "agentsd: {how} would freeze this call's phase, image size and destinations for every later call. Call "
    "agentsd.remove_patch(unet) before it, or keep the patch and use unet.compile(fullgraph=True) in its place"
)


class UNetPatch:
    """One patch of one UNet.

    Args:
        model: a pipeline or UNet, or what wraps one; references are weak, as the patch hangs on the UNet.
        config: the settings.

    Attributes:
        schedule: length of the diffusion run, from the pipeline's scheduler.
        layers: the patched self-attention layers, in the order of the UNet's modules.
        states: what hangs on each of them, in the same order.
        skipped: every self-attention layer that was left alone.
        runs: the run in progress, with its step cache.
        call: the UNet call in progress; None outside one.
        last_call: what happened in the last call, None before the first.
        lock: which thread is inside the UNet.
        owner: the thread whose `with agentsd.patched` block the patch belongs to, if any.
        prepared: a caller outside a compiled graph has prepared the call, so that the graph need not.
    """

    def __init__(self, model: Any, config: AgentConfig):
        unet, outer = unwrap_unet(model)
        self.config = config
        self.schedule = Schedule(model)
        self.layers, self.skipped = find_layers(unet, config)
        self.warnings = Warnings()
        self.runs = RunTracker()
        self.call: UNetCall | None = None
        self.last_call: LastCall | None = None
        self.lock = CallLock(unet)
        self.owner: int | None = None
        self.prepared = False
        self.caching = None
        if config.cache_interval > 1:
            self.caching = Caching(config, self.schedule, self.warnings, self.runs, model)
        self._unet = WeakLink(unet, pickled=True)
        self._outer = WeakLink(outer, pickled=True)
        self._handles: list[Any] = []
        self._replaced_by = ""
        self._completed_once = False
        keeps_matching = config.merge_crossattn or config.merge_mlp
        self.states = [
            LayerState(one.name, one.downsample, config, self.warnings, one.attn.processor, keeps_matching)
            for one in self.layers
        ]
        names = skipped_names(unet, config.cache_depth) if self.caching else ()
        self._skipped = {state.name for state in self.states if names and state.name.startswith(names)}

    @property
    def unet(self) -> UNet:
        """The UNet that the patch was made for. Raises RuntimeError once it is gone."""
        return self._unet.target()

    @property
    def is_orphan(self) -> bool:
        """Whether the UNet is gone."""
        return self._unet() is None

    @property
    def num_train_timesteps(self) -> int:
        """Length of the diffusion run by the scheduler that the pipeline has now."""
        return self.schedule.refresh().num_train_timesteps

    @property
    def counts(self) -> CallCounts | None:
        """Whole and cached calls of the run in progress, or of the last one; None without step caching."""
        if self.caching is None:
            return None
        return (self.last_call and self.last_call.counts) or CallCounts()

    def cache_order(self) -> int | None:
        """Order of step caching with the scheduler that the pipeline has now; None without step caching."""
        return None if self.caching is None else self.caching.order(self.schedule.refresh().is_steady())

    def skips_controlnet(self) -> bool:
        """Whether cached calls skip the ControlNet that is in use."""
        return self.caching is not None and self.caching.controlnet.skips()

    # --- put on and off -----------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Put the processors and hooks on the UNet."""
        unet, outer = self.unet, self._outer()
        processor = AgentAttnProcessor()  # it has no state, so one serves all layers
        register_processor()
        for layer, state in zip(self.layers, self.states):
            attn, block = layer.attn, layer.block
            state.fallback = attn.processor
            if is_ours(layer):
                # Not a patch: someone put back what they had saved while there was one (unfuse_qkv_projections, PAG).
                state.fallback = AttnProcessor2_0()
            setattr(attn, LAYER_ATTRIBUTE, state)
            attn.set_processor(processor)
            self._handles.append(block.register_forward_pre_hook(BlockHook(state), with_kwargs=True))
            if self.config.merge_crossattn and block.attn2 is not None:
                self._handles += MergeAround(block, state, last=not self.config.merge_mlp).install(block.attn2)
            if self.config.merge_mlp:
                self._handles += MergeAround(block, state, last=True).install(block.ff)

        self._handles.append(unet.register_forward_pre_hook(self._enter, with_kwargs=True))
        self._handles.append(unet.register_forward_hook(self._leave, always_call=True))
        if outer is not None and getattr(outer, "_orig_mod", None) is unet:
            entry = CompiledEntry(self)
            self._handles.append(outer.register_forward_pre_hook(entry.before, with_kwargs=True))
            self._handles.append(outer.register_forward_hook(entry.after, always_call=True))
        if getattr(unet, "conv_out", None) is not None:
            self._handles.append(unet.conv_out.register_state_dict_pre_hook(_warn_where_rebuilt))
        if self.caching is not None:
            self.caching.install(unet)
            if (embedding := getattr(unet, "time_embedding", None)) is not None:
                self._handles.append(embedding.register_forward_pre_hook(self._forget_stale))
        setattr(unet, PATCH_ATTRIBUTE, self)
        watch_compilation(unet, self)

    def uninstall(self) -> None:
        """Restore the original processors and remove every hook. A processor that someone set after the patch stays."""
        unet = self.unet
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        unwatch_checkpoints(unet)
        self.end_call()
        self.runs.new_run()
        if self.caching is not None:
            self.caching.uninstall(unet)
        for layer, state in zip(self.layers, self.states):
            if is_ours(layer):
                layer.attn.set_processor(state.fallback)
            layer.attn.__dict__.pop(LAYER_ATTRIBUTE, None)
        delattr(unet, PATCH_ATTRIBUTE)
        unwatch_compilation(unet)

    def refuse_change(self) -> None:
        """Raise RuntimeError where the patch cannot be changed now (`threads.refuse_change`)."""
        refuse_change(self.unet, self.runs.in_progress, self.owner)

    # --- around a call ------------------------------------------------------------------------------------------------

    def _enter(self, unet: nn.Module, args: tuple, kwargs: dict) -> None:
        """UNet pre-hook."""
        if torch.jit.is_tracing():
            raise RuntimeError(_FROZEN.format(how="torch.jit.trace"))
        # Not asked inside Dynamo: torch 2.8 takes it for true in every graph. Strict export fails in `prepare`.
        if not torch.compiler.is_dynamo_compiling() and torch.compiler.is_exporting():
            raise RuntimeError(_FROZEN.format(how="torch.export"))
        # Outside a graph it is never too much, and after an interrupted call of a compiled one it is needed.
        if not (self.prepared and torch.compiler.is_compiling()):
            self.prepare(args, kwargs)
            if torch.is_grad_enabled():
                watch_checkpoints(unet, self.snapshot)

    def _leave(self, unet: nn.Module, args: tuple, output: Any) -> None:
        """UNet hook, also where the call raised: `output` is None then."""
        if not self.prepared:
            self.finish(output is not None)

    # Choosing the phase reads the timestep on the host, which no graph can do. With unet.compile() and
    # compile_repeated_blocks() it happens before the graph; what gets here inside one was compiled without our wrapper.
    @torch.compiler.disable(reason=COMPILED_UNSEEN)
    def prepare(self, args: tuple, kwargs: dict, compiled: bool = False) -> None:
        """Lock the UNet for this thread and decide what every layer does in this call.

        Args:
            args, kwargs: of the call.
            compiled: it runs in a graph of the whole UNet.

        Raises:
            RuntimeError: another thread is inside.
        """
        self.lock.enter()
        try:
            self._begin(args, kwargs, compiled)
        except BaseException:
            self.end_call()
            raise

    def _begin(self, args: tuple, kwargs: dict, compiled: bool) -> None:
        sample, timestep = sample_and_timestep(args, kwargs)
        before = self.runs.run
        timesteps = self.runs.follow(timestep)
        run = self.runs.run
        begins = run is None or run is not before
        if begins:
            self.schedule.refresh()
        if begins or run is None or run.loop is None:
            check_schedule(self.schedule, timesteps, timestep, begins, self.warnings)
        phases = tuple(self.config.phase_at(one, self.schedule.num_train_timesteps) for one in timesteps)
        call = UNetCall(sample.shape[-2], sample.shape[-1], sample.shape[0], timesteps, phases, compiled=compiled)
        if self.caching is not None:
            call = dataclasses.replace(call, cached=self.caching.begin_call(call, self.unet, args, kwargs))
        self.call = call
        skipped = self._skipped if call.cached else ()
        plan_layers(self.config, call, self.states, skipped, sample.device, self.warnings)
        for layer, state in zip(self.layers, self.states):
            if state.now is not None and is_guided(layer.attn):
                state.now.leave_alone()
        self._replaced_by = warn_where_replaced(self.layers, self._replaced_by)

    @torch.compiler.disable(reason=COMPILED_UNSEEN)
    def finish(self, completed: bool) -> None:
        """End the call: nothing of it may be used later. A thread that was refused ends nothing.

        Args:
            completed: the call returned; one that raised says nothing about layers it did not reach.
        """
        if not self.lock.is_mine():
            return
        try:
            if self.call is not None:
                if self.caching is not None:
                    self.caching.end_call(self.call, self.unet, completed)
                self._note_outcomes(self.call, completed)
        finally:
            self.end_call()

    def end_call(self) -> None:
        """Forget the call in progress and let go of the UNet."""
        self.call = None
        if self.caching is not None:
            self.caching.switch.set(None)
        self._set([None] * len(self.states))
        self.lock.leave()

    def _forget_stale(self, *_: Any) -> None:
        """Pre-hook of the time embedding, which every forward runs first: Ctrl-C leaves the call it ended behind."""
        if self.call is not None and not torch.compiler.is_compiling() and not is_inside(self.unet):
            self.end_call()

    # --- what happened ------------------------------------------------------------------------------------------------

    def _note_outcomes(self, call: UNetCall, completed: bool) -> None:
        outcomes = [outcome_of(layer, state) for layer, state in zip(self.layers, self.states)]
        reasons = {one.name: one.reason for one in outcomes}
        before = self.last_call
        if call.cached and before is not None:  # what was skipped did what it did in the whole call
            skipped = [one.name for one in outcomes if one.outcome is Outcome.NOT_REACHED]
            reasons.update({name: before.outcomes[name] for name in skipped})
        notes = {}
        if self.config.merge_crossattn:
            for layer in self.layers:
                if layer.block.attn2 is not None and (why := why_unmerged(layer.block.attn2)) is not None:
                    notes[layer.name] = why
        cache = None if self.runs.run is None else self.runs.run.cache
        counts = None if cache is None else dataclasses.replace(cache.counts)
        self.last_call = LastCall(**vars(call), outcomes=reasons, notes=notes, counts=counts)
        for kind in (Outcome.CROSS, Outcome.MASK, Outcome.NO_INPUT, Outcome.OTHER_TOKENS):
            warn_of(outcomes, kind, self.warnings)
        for state in self.states:
            if state.now is not None and state.now.plan.num_dst == 0:
                plan = state.now.plan
                self.warnings.once(f"small {plan.grid}", f"{state.name}: {plan.reason}; it runs unpatched")
        if completed:
            warn_of(outcomes, Outcome.BYPASSED, self.warnings)
            if not self._completed_once and not call.cached:
                warn_of(outcomes, Outcome.NOT_REACHED, self.warnings)
            self._completed_once = True
        for note in sorted(set(notes.values())):
            self.warnings.once(note, f"on {len(notes)} layers: {note}")

    # --- gradient checkpointing ---------------------------------------------------------------------------------------

    def snapshot(self) -> Callable[[], AbstractContextManager[None]]:
        """Note what the layers do in the call in progress; entering the result brings it back."""
        return partial(self._bring_back, [state.now for state in self.states])

    @contextlib.contextmanager
    def _bring_back(self, calls: list[LayerInCall | None]) -> Iterator[None]:
        """Have this patch on the UNet, and its layers in a call of before, also where it was removed or replaced."""
        unet = self.unet
        current: UNetPatch | None = getattr(unet, PATCH_ATTRIBUTE, None)
        if current is not self:
            if current is not None:
                current.uninstall()
            self.install()
        before = [state.now for state in self.states]
        self._set(calls)
        try:
            yield
        finally:
            self._set(before)
            if current is not self:
                self.uninstall()
                if current is not None:
                    current.install()

    def _set(self, calls: list[LayerInCall | None]) -> None:
        for state, now in zip(self.states, calls):
            state.now = now

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "call": None, "owner": None, "prepared": False}  # a copy is in no call


class BlockHook:
    """Pre-hook of a transformer block: hands its un-normalised input to the processor of its self-attention."""

    def __init__(self, state: LayerState):
        self.state = state

    def __call__(self, block: BasicTransformerBlock, args: tuple, kwargs: dict) -> None:
        now = self.state.now
        if now is not None:
            now.outcome = Outcome.BYPASSED  # until the processor has run
            if isinstance(getattr(block.attn1, "processor", None), AgentAttnProcessor):  # no other would let it go
                now.block_input = args[0] if args else kwargs["hidden_states"]


def _warn_where_rebuilt(conv_out: nn.Module, prefix: str, keep_vars: bool) -> None:
    """Hook on the copying of weights: UNetMotionModel.from_unet2d takes a UNet's parts without the patch."""
    if prefix == "" and sys._getframe(2).f_code.co_name == "from_unet2d":
        warnings.warn(
            "agentsd: the UNet that is built here from a patched one is not patched. Call agentsd.apply_patch on the "
            "new pipeline too",
            stacklevel=3,
        )
