"""AgentWrapper: what stands around every model call of a patched ComfyUI model; it finds out phase and layers."""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from agentsd.config import AgentConfig, Phase
from agentsd.layer_plan import LayerPlan

from .layers import find_layers
from .unet_call import NOT_REACHED, WARNED, UNetCall

logger = logging.getLogger("agentsd")

KIND, KEY = "apply_model", "agentsd"
"""Kind and key of our wrapper in ComfyUI's ModelPatcher."""

_COMPILED = (
    "this model is compiled (TorchCompileModel), and agentsd chooses its phase outside compiled graphs; remove one of "
    "the two nodes. All layers run unpatched"
)
_MIXED = "this batch has samples of both phases, which run unpatched; sample them apart"


@dataclass
class Run:
    """What happened in one sampling run.

    Attributes:
        schedule: ComfyUI's sigmas of the run; held, so that another run's tensor cannot have the same identity.
        sigma: noise level of the last call.
        calls: number of model calls in each phase.
        sizes: (height, width) of the latents, with the number of calls each; several with area conditioning.
        plans: (phase, what each layer did), by the layer's name.
        reasons: why a layer ran unpatched in the last call where it did.
        told: warnings given.
    """

    schedule: Any = None
    sigma: float = 0.0
    calls: Counter[Phase] = field(default_factory=Counter)
    sizes: Counter[tuple[int, int]] = field(default_factory=Counter)
    plans: dict[str, set[tuple[Phase, LayerPlan]]] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    told: dict[str, None] = field(default_factory=dict)

    def warn(self, text: str) -> None:
        """Log a warning, once in a run."""
        if text not in self.told:
            self.told[text] = None
            logger.warning("AgentSD: %s", text)


class AgentWrapper:
    """Wraps ComfyUI's apply_model: patches the layers, runs the call, and undoes everything.

    Args:
        config: the settings.

    Attributes:
        run: the last sampling run, or None.
    """

    def __init__(self, config: AgentConfig):
        self.config = config
        self.run: Run | None = None
        self._boundary: tuple[Any, Any, float] | None = None

    def __call__(
        self,
        executor: Any,
        x: Tensor,
        t: Tensor,
        c_concat: Any = None,
        c_crossattn: Any = None,
        control: Any = None,
        transformer_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """Run one model call with agents.

        Args:
            executor: the next wrapper or the model's own call.
            x: [B, C, H, W] noisy latent.
            t: [B] noise levels, sigma.
            c_concat, c_crossattn, control, transformer_options, **kwargs: passed on.

        Returns:
            [B, C, H, W] the denoised latent.
        """
        options = transformer_options or {}
        model = executor.class_obj
        sigmas, timesteps = _read(t, model.model_sampling)
        run = self._run_of(options.get("sample_sigmas"), max(sigmas))
        rest = (c_concat, c_crossattn, control)

        if _is_compiled(options, model.diffusion_model):
            run.warn(_COMPILED)
            return executor(x, t, *rest, options, **kwargs)
        boundary = self._first_agent_sigma(model.model_sampling)
        phases = {Phase.AGENT if self.config.early > 0 and s >= boundary else Phase.MERGE for s in sigmas}
        if len(phases) > 1:
            run.warn(_MIXED)
            return executor(x, t, *rest, options, **kwargs)

        layers, skipped = find_layers(model.diffusion_model, self.config.max_downsample)
        timestep = timesteps[0] if len(set(timesteps)) == 1 else tuple(timesteps)
        height, width = int(x.shape[-2]), int(x.shape[-1])
        call = UNetCall(self.config, phases.pop(), timestep, (height, width), layers)
        with call.hooked():
            out = executor(x, t, *rest, call.transformer_options(options), **kwargs)
        self._note(run, call, skipped)
        return out

    def _run_of(self, schedule: Any, sigma: float) -> Run:
        """The run in progress; a new one where ComfyUI's schedule is another tensor, or the noise rises without one."""
        run = self.run
        if run is None or run.schedule is not schedule or (schedule is None and sigma > run.sigma):
            run = self.run = Run(schedule)
        run.sigma = sigma
        return run

    def _first_agent_sigma(self, sampling: Any) -> float:
        """The least noise of the agent phase. Computed once for a schedule, as ComfyUI reads it from the device."""
        sigmas = getattr(sampling, "sigmas", None)
        if self._boundary is None or self._boundary[0] is not sampling or self._boundary[1] is not sigmas:
            self._boundary = (sampling, sigmas, float(sampling.percent_to_sigma(self.config.early)))
        return self._boundary[2]

    def _note(self, run: Run, call: UNetCall, skipped: dict[str, str]) -> None:
        run.calls[call.phase] += 1
        run.sizes[call.size] += 1
        run.reasons.update(skipped)
        for name, plan in call.plans.items():
            run.plans.setdefault(name, set()).add((call.phase, plan))
        for name, reason in call.reasons.items():
            if reason != NOT_REACHED or name not in run.plans:
                run.reasons[name] = reason
        told: dict[str, list[str]] = {}
        for name, reason in call.reasons.items():
            if reason in WARNED or reason.endswith("smaller than a cell"):
                told.setdefault(reason, []).append(name)
        for reason, names in told.items():
            run.warn(f"{names[0]} runs unpatched{_and_more(names)}: {reason}")


def _read(sigma: Tensor, sampling: Any) -> tuple[list[float], list[float]]:
    """Noise levels and timesteps of the samples, in one copy from the device."""
    both = torch.stack([sigma.float().flatten(), sampling.timestep(sigma).float().flatten()])
    sigmas, timesteps = both.tolist()
    return sigmas, timesteps


def _is_compiled(options: dict[str, Any], unet: nn.Module) -> bool:
    return "torch.compile" in options.get("wrappers", {}).get(KIND, {}) or hasattr(unet, "_orig_mod")


def _and_more(names: list[str]) -> str:
    return f", and {len(names) - 1} more" if len(names) > 1 else ""
