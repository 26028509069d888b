"""Run: what happened in one sampling run of a patched model, for the report and the log."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from agentsd.config import Phase
from agentsd.layer_plan import LayerPlan
from agentsd.step_cache import FEWEST_STEPS

from .layers import Layer
from .skipping import SkippedParts
from .step_caching import StepCaching

logger = logging.getLogger("agentsd")


@dataclass(frozen=True)
class Step:
    """One evaluation of the sampler.

    Attributes:
        tensor: ComfyUI's noise levels of the samples; what has the same tensor needs no second copy from the device.
        sigmas, timesteps: of the samples.
    """

    tensor: Tensor
    sigmas: list[float]
    timesteps: list[float]


@dataclass(frozen=True)
class Network:
    """What is known of a run's UNet, found once in a run.

    Attributes:
        layers, skipped: as `find_layers` returns them.
        parts: what a cached call skips; None without step caching.
        compiled: it is, or a block of it, in which no hook is seen.
    """

    layers: list[Layer]
    skipped: dict[str, str]
    parts: SkippedParts | None
    compiled: bool


@dataclass
class Run:
    """What happened in one sampling run.

    Attributes:
        schedule: ComfyUI's sigmas of the run; held, so that another run's tensor cannot have the same identity.
        caching: step caching of the run; None without.
        unpatched: its model calls run as without AgentSD.
        short: step caching is on, and leaves runs of so few steps whole.
        expected: steps that the sampler has to take, where it calls the model once in each; 0 where that is not known.
        network: the UNet, while the run goes on.
        step: the evaluation in progress.
        sigma: noise level of the last call.
        calls: number of model calls in each phase.
        whole, cached: how many of them were.
        begun, stepped: evaluations of the sampler, and those of them that asked for conditionings.
        others: model calls that another node answered, so that the UNet did not run.
        passed_by: evaluations that never reached apply_model.
        sizes: (height, width) of the latents, with the number of calls each; several with area conditioning.
        plans: (phase, what each layer did), by the layer's name.
        reasons: why a layer ran unpatched in the last call where it did.
        told: warnings given.
    """

    schedule: Any = None
    caching: StepCaching | None = None
    unpatched: bool = False
    short: bool = False
    expected: int = 0
    network: Network | None = None
    step: Step | None = None
    sigma: float = 0.0
    calls: Counter[Phase] = field(default_factory=Counter)
    whole: int = 0
    cached: int = 0
    begun: int = 0
    stepped: int = 0
    others: int = 0
    passed_by: int = 0
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    plans: dict[str, set[tuple[Phase, LayerPlan]]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    told: dict[str, None] = field(default_factory=dict)

    def warn(self, text: str) -> None:
        """Log a warning, once in a run."""
        if text not in self.told:
            self.told[text] = None
            logger.warning("AgentSD: %s", text)

    def end(self, completed: bool) -> None:
        """Free what caching keeps, and log one line."""
        if self.caching is not None:
            self.caching.free()
            self.caching = None
        self.step = self.network = None
        # A step without conditionings was answered by another node, as LazyCache does.
        steps = max(self.begun, self.expected) if completed else self.begun
        self.others += steps - self.stepped
        logger.info("AgentSD - %s", self.counts())

    def counts(self) -> str:
        """How many calls there were, and of which kind."""
        agent, later = self.calls[Phase.AGENT], self.calls[Phase.MERGE]
        text = f"{agent + later} model calls, {agent} in the agent phase and {later} later"
        if self.cached:
            text += f"; {self.whole} whole and {self.cached} cached"
        elif self.short:
            text += f"; none cached, as runs of fewer than {FEWEST_STEPS} steps are not"
        if self.others:
            text += f"; {self.others} more were answered by another node"
        return text
