"""Step caching: a cached UNet call recomputes the end of the last up block and reuses the feature that enters it.

Neighbouring steps change most of a UNet's features little. A *whole* call runs everything and keeps one feature, the
hidden states that enter the recomputed end (`cache_depth` pairs of resnet and transformer). A *cached* call skips what
leads there. Whether a call may be cached is decided before it, from the timestep and the state alone.

Source: Ma et al., "DeepCache: Accelerating Diffusion Models for Free" (arXiv 2312.00858), section 3, for the reuse;
Liu et al., "From Reusing to Forecasting: Accelerating Diffusion Models with TaylorSeers" (arXiv 2503.06923), section
3.2, for the extrapolation.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..config import AgentConfig, Phase
from .conditioning import Conditioning, find_adapter_layers, model_state
from .layers import UNet
from .schedule import Schedule
from .skipping import install_skipping, skippable_forwards

# Consecutive latents of one run are alike, those of two runs are not: independent noise has a cosine of 0, one step of
# an ancestral sampler in 12 steps of about 0.7.
LEAST_SIMILARITY = 0.5
_OTHER = -2.0  # no cosine

# Steps further apart than this part of the run are all whole: LCM, Turbo and Lightning take 8 steps or fewer.
_WIDEST_STEP = 0.1

# The longest part of the run over which a feature is reused: 12 and 20 steps with a large interval
# would fall to 30 dB of the unpatched image. 50 steps at interval 5 span 0.08 of the run, 30 steps 0.13.
_LONGEST_REUSE = 0.14

# How much of the line through two features an extrapolation follows.
_SLOPE = 0.5

# Guidance in two calls, and what SAG and PAG add, are conditionings of one run.
_MOST_BRANCHES = 4


@dataclasses.dataclass
class CallCounts:
    """UNet calls of the run in progress, or of the last one."""

    whole: int = 0
    cached: int = 0


@dataclasses.dataclass
class _Branch:
    """The kept features of one conditioning in one run.

    Attributes:
        conditioning: what it was computed for.
        signature: batch, size, dtype, device and the model's state.
        phase, timestep, sample: of the last call.
        first_timestep: of the run.
        step: timesteps between the last two calls that had different ones.
        features: (timestep, feature) of the last whole calls, the newest first.
        most_features: how many of them are kept.
        cached_in_a_row: cached calls since the last whole one.
        last_calls: calls at the run's last timestep so far.
    """

    conditioning: Conditioning
    signature: tuple
    phase: Phase
    timestep: float
    first_timestep: float
    sample: Tensor
    step: float = 0.0
    features: list[tuple[float, Tensor]] = dataclasses.field(default_factory=list)
    most_features: int = 1
    cached_in_a_row: int = 0
    last_calls: int = 0

    def goes_on_at(self, timestep: float) -> bool:
        """Whether a call at a timestep can be the run's next one."""
        # The second call at a run's first timestep begins another run: a walk through latents of one-step models.
        return timestep < self.timestep or self.timestep < self.first_timestep and timestep == self.timestep

    def step_to(self, timestep: float) -> float:
        """Width of the step that leads to a call."""
        # The second call at a timestep (PLMS, Heun) has the latent of another step as wide as the one before it.
        return self.timestep - timestep or self.step


class StepCache:
    """The kept features of a patched UNet, and the decision which call is whole.

    Attributes:
        skipping: the call in progress is cached. Read inside compiled graphs.
        feature: [B, C, H, W] what a cached call uses in place of what it skips.
        kept: what the whole call in progress computed there.
        counts: whole and cached calls of this run.
        filler: what stands in for the outputs of skipped layers.
    """

    filler = 0.0

    def __init__(self, config: AgentConfig):
        self.interval = config.cache_interval
        self._order = config.cache_order
        self.depth = config.cache_depth
        self.skipping = False
        self.feature: Tensor | None = None
        self.kept: Tensor | None = None
        self.counts = CallCounts()
        self._branches: list[_Branch] = []
        self._current: _Branch | None = None
        self._timestep: float | None = None  # of the last call
        self._conditioning: Conditioning | None = None
        self._adapters: tuple[tuple[str, ...], list[Any]] = ((), [])

    def install(self, unet: UNet) -> None:
        """Make the skippable parts of the UNet skippable."""
        install_skipping(unet, self, self.depth)

    def uninstall(self, unet: UNet) -> None:
        """Undo `install` and free the features."""
        for forward in skippable_forwards(unet):
            forward.remove()
        self.clear()

    def order_with(self, schedule: Schedule) -> int:
        """0 where a feature is reused, 1 where it is extrapolated: as set, or by the scheduler with "auto"."""
        return int(schedule.steady) if isinstance(self._order, str) else self._order

    def clear(self) -> None:
        """Free the kept features: the next call is whole."""
        self.skipping, self.feature, self.kept, self._current = False, None, None, None
        self._branches.clear()

    def similarities(self, unet: UNet, args: tuple, kwargs: dict, sample: Tensor) -> Tensor | None:
        """Compare this call with the last one of each branch: the cosine of their latents, the least of the batch.

        Returns:
            [branches] on the latent's device, so that it can be read together with the timestep; _OTHER where the
            conditioning or the latent's shape differs. None where there is no branch.
        """
        self._conditioning = Conditioning.of_call(unet, args, kwargs)
        if not self._branches:
            return None
        earlier = ((branch.conditioning, branch.sample) for branch in self._branches)
        return torch.stack([latent_similarity(self._conditioning, sample, *one) for one in earlier])

    def begin(
        self,
        unet: UNet,
        sample: Tensor,
        timestep: float,
        phase: Phase,
        schedule: Schedule,
        similarities: list[float],
    ) -> bool:
        """Decide whether the call that `similarities` was asked for is cached; True if it is.

        Args:
            unet: the UNet.
            sample: the call's latent.
            timestep, phase: of the call.
            schedule: what is known of the scheduler.
            similarities: what `similarities` returned, read.
        """
        self.skipping, self.feature, self.kept = False, None, None
        signature = (sample.shape, sample.dtype, sample.device, *model_state(unet, self._adapters_of(unet)))
        found = next((pair for pair in zip(self._branches, similarities) if pair[1] != _OTHER), None)
        branch, similarity = (None, _OTHER) if found is None else found
        if branch is not None and not (
            branch.signature == signature and branch.goes_on_at(timestep) and similarity >= LEAST_SIMILARITY
        ):
            # Where only the latent is too unlike the last one, as after large steps of small images, the run goes on.
            known = timestep < branch.timestep and branch.signature == signature
            self._branches = [one for one in self._branches if one is not branch]
            branch = None
        else:
            known = branch is not None
        if not known and timestep != self._timestep:  # a new run, and not another conditioning of the same step
            self._branches.clear()
            self.counts = CallCounts()
        if torch.is_grad_enabled():
            self.pass_by(timestep)
            return False
        if branch is None:
            assert self._conditioning is not None  # from `similarities`
            branch = _Branch(self._conditioning.copied(), signature, phase, timestep, timestep, sample)
            self._branches = [branch, *self._branches[: _MOST_BRANCHES - 1]]
        order = self.order_with(schedule)
        branch.features = branch.features[: order + 1]
        branch.most_features = order + 1
        self.skipping = self._may_skip(branch, timestep, phase, schedule)
        branch.step = branch.step_to(timestep)
        if self.skipping:
            branch.cached_in_a_row += 1
            self.feature = _forecast(branch.features, timestep)
            self.counts.cached += 1
        else:
            branch.cached_in_a_row = 0
            self.counts.whole += 1
        branch.phase, branch.timestep = phase, timestep
        branch.sample = sample.detach().clone()  # a copy, as callers may go on in the same tensor
        self._current, self._timestep = branch, timestep
        return self.skipping

    def expects_cached(self, unet: UNet, timestep: float, phase: Phase, schedule: Schedule) -> bool:
        """Whether the next call is cached if the run in progress goes on in it; arguments as those of `begin`."""
        if torch.is_grad_enabled() or len(self._branches) != 1:
            return False
        branch = self._branches[0]
        unchanged = branch.signature[3:] == model_state(unet, self._adapters_of(unet))
        return unchanged and branch.goes_on_at(timestep) and self._may_skip(branch, timestep, phase, schedule)

    def last_timestep(self) -> float | None:
        """Of the run in progress, None without one of a single conditioning."""
        return self._branches[0].timestep if len(self._branches) == 1 else None

    def _may_skip(self, branch: _Branch, timestep: float, phase: Phase, schedule: Schedule) -> bool:
        """Whether a call that goes on with a branch may be cached."""
        return (
            bool(branch.features)
            and branch.phase is phase
            and branch.step_to(timestep) <= _WIDEST_STEP * schedule.num_train_timesteps + 1e-6
            and branch.features[0][0] - timestep <= _LONGEST_REUSE * schedule.num_train_timesteps
            and branch.cached_in_a_row < self.interval - 1
            and (schedule.steady or (schedule.last_timestep() or (None,))[0] != timestep)
        )

    def pass_by(self, timestep: float) -> None:
        """Count a whole call that keeps nothing: one with gradients, or with a timestep per sample."""
        self._branches.clear()
        self.skipping, self.feature, self.kept, self._current = False, None, None, None
        self.counts.whole += 1
        self._timestep = timestep

    def end(self, unet: UNet, completed: bool, compiled: bool, last_timesteps: tuple[float, int] | None) -> None:
        """Keep what a whole call computed; free what the run needs no more.

        Args:
            unet: the UNet.
            completed: the call returned.
            compiled: it ran in a graph, whose outputs the next run of the graph may overwrite.
            last_timesteps: (timestep, how many calls) at the run's end, where the scheduler is known.
        """
        branch, kept, skipped = self._current, self.kept, self.skipping
        self.skipping, self.feature, self.kept, self._current = False, None, None, None
        if branch is None:
            return
        if not completed or (not skipped and kept is None):
            self._branches = [one for one in self._branches if one is not branch]
            return
        if not skipped and kept is not None:
            newest = (branch.timestep, kept.clone() if compiled else kept)
            older = [entry for entry in branch.features if entry[0] != branch.timestep]
            branch.features = [newest, *older][: branch.most_features]
            if compiled:
                for forward in skippable_forwards(unet):
                    forward.leave_graph()
        if last_timesteps is not None and branch.timestep == last_timesteps[0]:
            branch.last_calls += 1
            if branch.last_calls >= last_timesteps[1]:
                self._branches = [one for one in self._branches if one is not branch]

    def _adapters_of(self, unet: UNet) -> list[Any]:
        """The layers with adapters, looked for again when adapters were loaded or unloaded."""
        names = tuple(unet.peft_config) if getattr(unet, "_hf_peft_config_loaded", False) else ()
        if names != self._adapters[0]:
            self._adapters = (names, find_adapter_layers(unet) if names else [])
        return self._adapters[1]

    def __getstate__(self) -> dict[str, Any]:
        # A copy has runs of its own.
        fresh: dict[str, Any] = {"_branches": [], "_current": None, "_conditioning": None, "_adapters": ((), [])}
        return {**self.__dict__, **fresh, "feature": None, "kept": None, "skipping": False}


def latent_similarity(
    conditioning: Conditioning, sample: Tensor, earlier: Conditioning, earlier_sample: Tensor
) -> Tensor:
    """The cosine of the latents of two calls, the least of the batch; _OTHER where conditioning or shape differ.

    Returns:
        [] on the device of `sample`.
    """
    same = conditioning.same_as(earlier)
    if same is False or earlier_sample.shape != sample.shape or earlier_sample.device != sample.device:
        return torch.full((), _OTHER, device=sample.device)
    one, other = (x.detach().flatten(1).float() for x in (sample, earlier_sample))
    cosine = F.cosine_similarity(one, other).amin()
    return cosine if same is True else torch.where(same.to(sample.device), cosine, _OTHER)


def _forecast(features: list[tuple[float, Tensor]], timestep: float) -> Tensor:
    """The feature at a timestep, from the last whole calls: the newest one, or one on the line through the last two.

    It goes half of the line's way from the newest. On the demo model (25 DDIM steps, 10 images) the whole way is 1.2 dB
    nearer to the unpatched image than the newest feature alone, but further away for 4 images; half of it is 1.8 dB
    nearer, and further away for 1.

    A new tensor always: diffusers writes into hidden states in a few places.
    """
    newest_timestep, newest = features[0]
    if len(features) == 1:
        return newest.clone()
    older_timestep, older = features[1]
    ahead = (timestep - newest_timestep) / (newest_timestep - older_timestep)
    return torch.lerp(older, newest, 1 + _SLOPE * ahead)
