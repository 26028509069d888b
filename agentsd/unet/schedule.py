"""The diffusion run's length in timesteps, read from the pipeline's scheduler at each call, as users exchange it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..config import DEFAULT_NUM_TRAIN_TIMESTEPS
from .weak_link import WeakLink

# With these, extrapolated features of step caching measured nearer to the unpatched image than reused ones, and the
# last call may be cached. Solvers that extrapolate themselves, as DPM++ 2M, amplify what is wrong with a feature,
# most so in their last step.
_STEADY = ("DDIMScheduler", "PNDMScheduler", "EulerDiscreteScheduler")


class Schedule:
    """What the patch knows of the scheduler.

    Attributes:
        num_train_timesteps: length of the diffusion run as last read.
        steady: step caching may extrapolate features and cache the last call; False where no scheduler is known.
        noise_levels: the scheduler counts noise levels and not timesteps, so that phases cannot be told.
        assumed: no scheduler is known (a UNet was patched without its pipeline); the length is an assumption.
    """

    def __init__(self, model: Any):
        self.num_train_timesteps = DEFAULT_NUM_TRAIN_TIMESTEPS
        self.noise_levels = False
        self.steady = False
        self.assumed = True
        self._read(getattr(model, "scheduler", None))
        self._pipeline = WeakLink(None if self.assumed else model)
        self._scheduler = WeakLink(getattr(model, "scheduler", None))
        self._timesteps: Tensor | None = None
        self._last: tuple[float, int] | None = None

    def refresh(self) -> Schedule:
        """Read the scheduler that the pipeline has now; returns itself."""
        self._read(self._current())
        return self

    def last_timestep(self) -> tuple[float, int] | None:
        """The last timestep of the run that the scheduler is set to, and how many calls it takes; None if unknown.

        Reads the timesteps from the device once per run.
        """
        timesteps = getattr(self._current(), "timesteps", None)
        if not isinstance(timesteps, Tensor) or timesteps.numel() == 0:
            return None
        if self._timesteps is not timesteps:
            values = timesteps.tolist()
            self._timesteps, self._last = timesteps, (float(values[-1]), values.count(values[-1]))
        return self._last

    def _current(self) -> Any:
        """The pipeline's scheduler; the last one it had, if another pipeline was made of its parts and it is gone."""
        pipeline = self._pipeline()
        if pipeline is None:
            return self._scheduler()
        scheduler = getattr(pipeline, "scheduler", None)
        if scheduler is not self._scheduler():
            self._scheduler = WeakLink(scheduler)
        return scheduler

    def _read(self, scheduler: Any) -> None:
        if scheduler is None:
            return
        config = getattr(scheduler, "config", {})
        self.num_train_timesteps = config.get("num_train_timesteps", DEFAULT_NUM_TRAIN_TIMESTEPS)
        # The EDM schedulers have no timestep_type; what they share is this method.
        self.noise_levels = config.get("timestep_type") == "continuous" or hasattr(scheduler, "precondition_noise")
        self.steady = any(kind.__name__ in _STEADY for kind in type(scheduler).__mro__)
        self.assumed = False
