"""Step caching on a UNet: gives each run its cache, and says for each call whether most of the UNet is skipped."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..config import AgentConfig
from ..step_cache import MOST_STREAMS, StepCache, plan_whole_calls
from .conditioning import Conditioning, sample_and_timestep
from .controlnet import ControlNetSkip
from .layers import UNet, find_other_cache, stores_attention
from .outcomes import Warnings
from .sampling_run import Run, RunTracker, continues
from .schedule import Schedule
from .skipping import Switch, install_skipping, skippable_forwards
from .unet_call import UNetCall


class Caching:
    """Step caching of one patch.

    Args:
        pipeline: whose ControlNet is skipped where the UNet is; or the UNet.

    Attributes:
        switch: what the skippable parts of the UNet go by.
        controlnet: what is put on the pipeline's ControlNet.
    """

    def __init__(self, config: AgentConfig, schedule: Schedule, warnings: Warnings, runs: RunTracker, pipeline: Any):
        self.switch = Switch()
        self.controlnet = ControlNetSkip(config, schedule, runs, pipeline)
        self._config = config
        self._schedule = schedule
        self._warnings = warnings
        self._runs = runs

    def install(self, unet: UNet) -> None:
        """Make the skippable parts of the UNet and of the ControlNet skippable."""
        install_skipping(unet, self.switch, self._config.cache_depth)
        self.controlnet.install(unet, self._config.cache_depth)

    def uninstall(self, unet: UNet) -> None:
        """Undo `install`."""
        for forward in skippable_forwards(unet):
            forward.remove()
        self.controlnet.uninstall()

    def order(self, steady: bool) -> int:
        """0 where a feature is reused, 1 where it is extrapolated: as set, or by the scheduler with "auto"."""
        order = self._config.cache_order
        return int(steady) if isinstance(order, str) else order

    def begin_call(self, call: UNetCall, unet: UNet, args: tuple, kwargs: dict) -> bool:
        """Decide whether a call is cached, and set the switch; True if it is. Arguments are those of the UNet."""
        run, feature = self._runs.run, None
        if run is not None:
            run.cache = run.cache or self._new_cache(run, unet)
            feature = self._feature(run, run.cache, call, unet, args, kwargs)
        self.switch.set(feature)
        self.controlnet.settle(unet, args, kwargs, feature is not None)
        return feature is not None

    def end_call(self, call: UNetCall, unet: UNet, completed: bool) -> None:
        """Keep what a whole call computed. `completed`: the call returned."""
        run = self._runs.run
        if run is None or run.at_end():
            self.controlnet.forget()
        if run is None or run.cache is None:
            return
        kept, split = self.switch.kept, self.switch.split
        if split:
            run.whole = True
            self._warnings.once(
                "split",
                "step caching is off: a part of the UNet runs several times in a call, on some of the samples each "
                "(enable_free_noise_split_inference). Use a larger split size to cache",
            )
        if split or not completed or (not call.cached and kept is None):
            run.cache.drop(run.stream)
            return
        if kept is not None and call.compiled:  # a later run of the graph may overwrite what it made
            kept = kept.clone()
            for forward in skippable_forwards(unet):
                forward.leave_graph()
        run.cache.end(run.stream, kept)

    def _new_cache(self, run: Run, unet: UNet) -> StepCache:
        """The cache of a run that begins, unless something forbids one. A warning says what does."""
        interval = self._config.cache_interval
        if (reason := self._why_whole(run, unet)) is not None:
            run.whole = True
            self._warnings.once("may not cache", f"step caching is off: {reason}")
        if run.whole or run.loop is None:
            return StepCache(interval, self.order(False))
        length, own = self._schedule.num_train_timesteps, self._schedule.timesteps()
        phases = tuple(self._config.phase_at(timestep, length) for timestep in run.loop.timesteps)
        # A pipeline that shares the UNet may have a scheduler of its own, whose class is not known.
        known = own is not None and run.loop.shares(own)
        order = self.order(known and self._schedule.is_steady())
        return StepCache(interval, order, plan_whole_calls(phases, interval, len(set(run.loop.timesteps))))

    def _why_whole(self, run: Run, unet: UNet) -> str | None:
        """Why no call of a run can be cached, or None."""
        if (other := find_other_cache(unet)) is not None:
            return f"{other} was put on this UNet after the patch and caches too. Use one of the two"
        if stores_attention(unet):
            return "self-attention guidance (SAG) reads the attention of every call. Use sag_scale=0 to cache"
        if run.takes_turns:
            return "two runs take turns on this UNet. Give each a copy of the pipeline (copy.deepcopy) to cache both"
        if run.loop is None and self._schedule.noise_levels:
            return (
                "these timesteps are noise levels, and no tensor of all of them is known. Loop over the scheduler's "
                "own `timesteps` to cache"
            )
        return None

    def _feature(
        self, run: Run, cache: StepCache, call: UNetCall, unet: UNet, args: tuple, kwargs: dict
    ) -> Tensor | None:
        """The feature that a call reuses, None where it is whole."""
        stream = run.stream
        # Without a loop positions are parts of the run, as the spans of the cache are.
        position = run.position if run.loop is not None else 1 - call.timestep / self._schedule.num_train_timesteps
        sample = sample_and_timestep(args, kwargs)[0]
        if not run.whole and not self._continues(run, call, sample, unet):
            cache.drop(stream)  # by hand: what comes may continue this one
        if run.whole or torch.is_grad_enabled():
            cache.keep_none(position, stream)
            return None
        same = (sample.shape, sample.dtype, sample.device, _freeu(unet), Conditioning(unet, args, kwargs))
        changed = run.whole_shape != sample.shape  # stand-ins have the shapes of the last whole call
        feature = cache.begin(position, stream, call.phase, same, whole=changed)
        if feature is None:
            run.whole_shape = sample.shape
        if cache.full and run.loop is not None:
            self._warnings.once(
                "streams",
                f"step caching keeps features of {MOST_STREAMS} calls in a step; the others are whole in every step",
            )
        return feature

    def _continues(self, run: Run, call: UNetCall, sample: Tensor, unet: UNet) -> bool:
        """Whether a latent continues that of the stream's last call; a run of which that is not so is not cached.

        In a known loop the second call tells: after it nothing is read from the device.
        """
        before = run.latents.pop(run.stream, None)
        keeps = (run.loop is None or run.at_begin()) and run.stream < MOST_STREAMS
        if before is None and not keeps:
            return True
        latent = sample[:, : unet.config.out_channels].detach()  # inpainting adds channels that stay
        if keeps:
            run.latents[run.stream] = (call.timestep, latent.clone())  # callers may go on in the same tensor
        if before is None or before[1].shape != latent.shape or before[1].device != latent.device:
            return True  # what else a feature depends on tells whether it may be reused
        if before[0] == call.timestep:
            return True
        levels = (self._schedule.signal_and_noise(before[0]), self._schedule.signal_and_noise(call.timestep))
        goes_on = continues(before[1], latent, levels)
        if goes_on is False:
            run.whole = run.loop is not None
            self._warnings.once(
                "independent",
                "step caching is off where the latent of a call does not continue that of the call before it, as where "
                "each step's latent is noised anew. Use cache_interval=1 there to be rid of this warning; where a new "
                "run begins in a loop by hand, call agentsd.new_run(pipe)",
            )
        return bool(goes_on)


def _freeu(unet: UNet) -> tuple:
    """FreeU's factors, which diffusers sets on the up blocks."""
    return tuple(vars(block).get(name) for block in unet.up_blocks for name in ("s1", "s2", "b1", "b2"))
