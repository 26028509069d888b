"""Compatibility matrix, schedulers: the phase follows the timestep whatever the scheduler does with it."""

from __future__ import annotations

from functools import partial

import diffusers
import pytest
from compat_matrix import WARNS, Row, check_row, compat, parametrize, record_attention
from conftest import SD_BETAS, draw, make_pipeline

import agentsd
from agentsd import Phase

GROUP = "Schedulers"


def with_scheduler(name: str, scheduler: str, steps: int = 5, **options) -> Row:
    return Row(
        name,
        lambda: make_pipeline(scheduler=getattr(diffusers, scheduler)(**{**SD_BETAS, **options})),
        partial(draw, steps=steps),
    )


ROWS = [
    with_scheduler("PNDM / PLMS", "PNDMScheduler", skip_prk_steps=True),
    with_scheduler("PNDM with Runge-Kutta steps", "PNDMScheduler"),
    with_scheduler("DDIM", "DDIMScheduler"),
    with_scheduler("DDPM", "DDPMScheduler"),
    with_scheduler("Euler", "EulerDiscreteScheduler"),
    with_scheduler("Euler a", "EulerAncestralDiscreteScheduler"),
    with_scheduler("DPM++ 2M", "DPMSolverMultistepScheduler"),
    with_scheduler("DPM++ 2M Karras", "DPMSolverMultistepScheduler", use_karras_sigmas=True),
    with_scheduler("DPM++ SDE", "DPMSolverMultistepScheduler", algorithm_type="sde-dpmsolver++"),
    with_scheduler("Heun", "HeunDiscreteScheduler"),
    with_scheduler("KDPM2", "KDPM2DiscreteScheduler"),
    with_scheduler("UniPC", "UniPCMultistepScheduler"),
    with_scheduler("LCM", "LCMScheduler"),
    with_scheduler("TCD", "TCDScheduler"),
    with_scheduler("Timestep spacing leading", "EulerDiscreteScheduler", timestep_spacing="leading", steps_offset=1),
    with_scheduler("Timestep spacing trailing", "DDIMScheduler", timestep_spacing="trailing"),
    with_scheduler("Timestep spacing linspace", "DPMSolverMultistepScheduler", timestep_spacing="linspace"),
    with_scheduler(
        "v-prediction, zero terminal SNR",
        "DDIMScheduler",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
    ),
    with_scheduler("A training run of other length (500 timesteps)", "DDIMScheduler", num_train_timesteps=500),
    Row(
        "Timesteps of one's own",
        lambda: make_pipeline(scheduler=diffusers.EulerDiscreteScheduler(**SD_BETAS)),
        lambda pipe: draw(pipe, steps=None, timesteps=[999, 650, 300, 20]),
    ),
]


@parametrize(GROUP, ROWS)
def test_scheduler(row):
    check_row(row)


CONTINUOUS = {
    "euler": (diffusers.EulerDiscreteScheduler, dict(timestep_type="continuous", prediction_type="v_prediction")),
    "edm": (diffusers.EDMEulerScheduler, {}),
}


@pytest.mark.parametrize("kind", CONTINUOUS)
@pytest.mark.parametrize("when", ["before", "after"])
@compat(
    GROUP,
    "Noise levels in place of timesteps (EDM, continuous Euler)",
    WARNS,
    "merging alone in every step; `early` needs timesteps",
)
def test_noise_levels_in_place_of_timesteps(kind, when):
    scheduler_class, options = CONTINUOUS[kind]
    scheduler = scheduler_class(sigma_min=0.002, sigma_max=80.0, **options)
    pipe = make_pipeline()
    if when == "after":  # the warning then comes with the first noise level that no timestep can be
        agentsd.apply_patch(pipe)
        pipe.scheduler = scheduler
        with pytest.warns(UserWarning, match="noise levels.*discrete timesteps"):
            draw(pipe)
    else:
        pipe.scheduler = scheduler
        with pytest.warns(UserWarning, match="noise levels.*discrete timesteps"):
            agentsd.apply_patch(pipe)
    with record_attention(pipe) as record:
        draw(pipe)
    record.check(frozenset({Phase.MERGE}))
