"""other_noise, why_not_ddpm: whether a model's scheduler adds noise as DDPM does, at whole timesteps."""

from __future__ import annotations

from typing import Any

import torch

PREDICTION_TYPES = ("epsilon", "v_prediction")

_TOLERANCE = 1e-6
"""Of ᾱ: with rescale_betas_zero_snr some schedulers put 2⁻²⁴ for the last 0."""


def other_noise(scheduler: Any) -> str | None:
    """In what other way than DDPM's, x_t = √ᾱ_t x + √(1 − ᾱ_t) ε at t = 0, 1, …, noise is added; None where it is that.

    Noise levels (EDM, https://arxiv.org/abs/2206.00364), flow matching (https://arxiv.org/abs/2210.02747) and
    consistency models scale the network's input and output in other ways. Their schedulers have settings in common with
    DDPM's, from which another one made of them would take the wrong ones.

    Args:
        scheduler: the one that the model was saved with.

    Returns:
        What it does in a few words, for a sentence that begins with "its scheduler".
    """
    kind = type(scheduler).__name__
    config = getattr(scheduler, "config", {})
    if hasattr(scheduler, "precondition_noise") or config.get("timestep_type") == "continuous":
        return f"counts noise levels ({kind}, as of an EDM model)"
    if "FlowMatch" in kind or config.get("use_flow_sigmas") or "flow" in str(config.get("prediction_type")):
        return f"is one of flow matching ({kind})"
    betas, alphas = getattr(scheduler, "betas", None), getattr(scheduler, "alphas_cumprod", None)
    if betas is None or alphas is None or "num_train_timesteps" not in config:
        return f"has no schedule of betas ({kind})"
    if len(alphas) != len(betas) or not torch.allclose(torch.cumprod(1 - betas, 0), alphas.to(betas), atol=_TOLERANCE):
        return f"shifts its schedule of betas ({kind})"
    return None


def why_not_ddpm(scheduler: Any) -> str | None:
    """Why a model cannot be trained or judged by ‖ε̂ − ε‖² with DDPM's noise; None where it can. As `other_noise`."""
    if (other := other_noise(scheduler)) is not None:
        return other
    prediction = scheduler.config.get("prediction_type")
    if prediction not in PREDICTION_TYPES:
        allowed = " and ".join(repr(name) for name in PREDICTION_TYPES)
        return f"says prediction_type={prediction!r}, not {allowed}"
    return None
