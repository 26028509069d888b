"""What the patch knows of the pipeline's scheduler, read at the begin of each run, as users exchange it."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from ..config import DEFAULT_NUM_TRAIN_TIMESTEPS
from .weak_link import WeakLink

# With these, extrapolated features of step caching measured nearer to the unpatched image than reused ones. Solvers
# that extrapolate themselves, as DPM++ 2M, amplify what is wrong with a feature.
_STEADY = ("DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler")

# Stable Diffusion's own noise schedule, for UNets without a scheduler.
_FIRST_BETA, _LAST_BETA = 0.00085, 0.012


class Schedule:
    """What the patch knows of the scheduler.

    Attributes:
        num_train_timesteps: length of the diffusion run as last read.
        noise_levels: the scheduler counts noise levels and not timesteps, so that phases cannot be told.
        assumed: no scheduler is known (a UNet was patched without its pipeline); the length is an assumption.
    """

    def __init__(self, model: Any):
        self.num_train_timesteps = DEFAULT_NUM_TRAIN_TIMESTEPS
        self.noise_levels = False
        self.assumed = True
        self._pipeline = WeakLink(model)
        self._scheduler: WeakLink[Any] = WeakLink(None)
        self.refresh()

    def refresh(self) -> Schedule:
        """Read the scheduler that the pipeline has now; returns itself."""
        scheduler = self._current()
        if scheduler is not None:
            config = getattr(scheduler, "config", {})
            self.num_train_timesteps = config.get("num_train_timesteps", DEFAULT_NUM_TRAIN_TIMESTEPS)
            # The EDM schedulers have no timestep_type; what they share is this method.
            continuous = config.get("timestep_type") == "continuous"
            self.noise_levels = continuous or hasattr(scheduler, "precondition_noise")
            self.assumed = False
        return self

    def timesteps(self) -> Tensor | None:
        """The timesteps that the scheduler is set to; None where none are known."""
        timesteps = getattr(self._current(), "timesteps", None)
        return timesteps if isinstance(timesteps, Tensor) and timesteps.numel() else None

    def is_steady(self) -> bool:
        """Whether step caching may extrapolate features with this scheduler; False where none is known."""
        return any(kind.__name__ in _STEADY for kind in type(self._current()).__mro__)

    def signal_and_noise(self, timestep: float) -> tuple[float, float]:
        """a and b of the latent a x0 + b ε that the UNet is given at a timestep, where x0 and ε have variance 1."""
        if self.noise_levels:  # Karras et al., arXiv 2206.00364, table 1: c_in and c_noise
            sigma = math.exp(min(max(4 * timestep, -40), 40))
            sigma_data = getattr(self._current(), "config", {}).get("sigma_data", 1.0)
            scale = (sigma**2 + sigma_data**2) ** -0.5
            return scale, sigma * scale
        own = getattr(self._current(), "alphas_cumprod", None)
        kept: Any = own if isinstance(own, Tensor) and own.ndim == 1 else _stable_diffusion(self.num_train_timesteps)
        power = float(kept[min(max(round(timestep), 0), len(kept) - 1)])
        return power**0.5, (1 - power) ** 0.5

    def _current(self) -> Any:
        """The pipeline's scheduler; the last one it had, if another pipeline was made of its parts and it is gone."""
        if (pipeline := self._pipeline()) is None:
            return self._scheduler()
        scheduler = getattr(pipeline, "scheduler", None)
        self._scheduler = WeakLink(scheduler)
        return scheduler


@lru_cache(maxsize=4)
def _stable_diffusion(length: int) -> list[float]:
    """ᾱ_t of Stable Diffusion's own noise schedule, for t = 0 … length − 1."""
    betas = torch.linspace(_FIRST_BETA**0.5, _LAST_BETA**0.5, length, dtype=torch.float64) ** 2
    return (1 - betas).cumprod(0).tolist()
