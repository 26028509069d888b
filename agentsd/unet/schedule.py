"""The diffusion run's length in timesteps, read from the pipeline's scheduler at each call, as users exchange it."""

from __future__ import annotations

from typing import Any

from ..config import DEFAULT_NUM_TRAIN_TIMESTEPS
from .weak_link import WeakLink


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
        self._read(getattr(model, "scheduler", None))
        self._pipeline = WeakLink(None if self.assumed else model)

    def refresh(self) -> Schedule:
        """Read the scheduler that the pipeline has now; returns itself."""
        self._read(getattr(self._pipeline(), "scheduler", None))
        return self

    def _read(self, scheduler: Any) -> None:
        if scheduler is None:
            return
        config = getattr(scheduler, "config", {})
        self.num_train_timesteps = config.get("num_train_timesteps", DEFAULT_NUM_TRAIN_TIMESTEPS)
        # The EDM schedulers have no timestep_type; what they share is this method.
        self.noise_levels = config.get("timestep_type") == "continuous" or hasattr(scheduler, "precondition_noise")
        self.assumed = False
