"""apps/dreambooth/schedules.py: every schedule of diffusers is gone through before a training, with its last step."""

from __future__ import annotations

import pytest
import torch
from diffusers.optimization import SchedulerType
from dreambooth.schedules import LR_SCHEDULERS, check_rates, make_schedule, parse_rules
from dreambooth.settings import DreamBoothSettings, UsageError


def settings(**changes) -> DreamBoothSettings:
    return DreamBoothSettings("subject", "a sks", "out", **{"learning_rate": 1e-3, **changes})


def rates(chosen: DreamBoothSettings) -> list[float]:
    """The learning rate of each step, with torch's own loop, and that after the last one."""
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=chosen.learning_rate)
    schedule = make_schedule(chosen, optimizer)
    found = [schedule.get_last_lr()[0]]
    for _ in range(chosen.max_train_steps):
        optimizer.step()
        schedule.step()
        found.append(schedule.get_last_lr()[0])
    return found


def test_every_schedule_of_diffusers_is_known():
    assert sorted(LR_SCHEDULERS) == sorted(kind.value for kind in SchedulerType)


@pytest.mark.parametrize("kind", LR_SCHEDULERS)
def test_what_the_settings_accept_can_be_trained_to_its_end(kind):
    """All small numbers of steps, warm-up and cycles: each combination is refused, or every step has a rate."""
    accepted = refused = 0
    for steps in range(1, 7):
        for warmup in range(8):
            for cycles in (1, 2, 3, 7):
                for power in (1.0, 0.5, 3.0):
                    for rate in (1e-7, 1e-3):
                        options = dict(
                            lr_scheduler=kind, max_train_steps=steps, lr_warmup_steps=warmup, lr_num_cycles=cycles,
                            lr_power=power, learning_rate=rate,
                            lr_step_rules="1:2,0.5:4,0.1" if kind == "piecewise_constant" else None,
                        )  # fmt: skip
                        try:
                            chosen = settings(**options)
                            check_rates(chosen)
                        except UsageError:
                            refused += 1
                            continue
                        found = rates(chosen)
                        assert all(isinstance(one, float) and 0 <= one <= 1.001 * rate for one in found), options
                        assert max(found[:-1]) == pytest.approx(rate), options  # the learning rate is reached
                        accepted += 1
    assert accepted >= 2 and refused


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(lr_scheduler="polynomial", lr_warmup_steps=5, max_train_steps=5), "--lr-warmup-steps 5: must be less"),
        (dict(lr_scheduler="polynomial", learning_rate=1e-7), "above 1e-07 with --lr-scheduler polynomial"),
        (dict(lr_scheduler="polynomial", learning_rate=3e-9), "above 1e-07"),
        (dict(lr_scheduler="linear", lr_warmup_steps=500, max_train_steps=2), "must be less than --max-train-steps 2"),
        (dict(lr_scheduler="cosine", lr_warmup_steps=2, max_train_steps=2), "must be less"),
        (dict(lr_scheduler="cosine_with_restarts", lr_num_cycles=3, max_train_steps=5), "must be at most 2"),
        (dict(lr_scheduler="constant", lr_num_cycles=2), "has no effect"),
        (dict(lr_scheduler="linear", lr_power=2), "has no effect"),
    ],
)
def test_an_impossible_schedule_is_refused_when_it_is_asked_for(changes, message):
    with pytest.raises(UsageError, match=message):
        settings(**changes)


def test_rates_that_no_rule_foresaw_are_found_by_going_through_them(monkeypatch):
    chosen = settings(max_train_steps=200_000)
    check_rates(chosen)  # long ones are looked at in places
    for factor, message in (
        (lambda step: 1 / (200_000 - step), "is not possible with these settings .division by zero"),
        (lambda step: 1.0 - step, "gives the learning rate -"),
        (lambda step: (0.5 - step) ** 0.5, "gives the learning rate .*j"),
        (lambda step: float("nan"), "gives the learning rate nan at step 0"),
        (lambda step: 0.0, "0 at every step, so that nothing is trained"),
    ):
        schedule = type("schedule", (), {"lr_lambdas": [factor]})
        monkeypatch.setattr("dreambooth.schedules.make_schedule", lambda *_, made=schedule: made)
        with pytest.raises(UsageError, match=message):
            check_rates(chosen)


def test_rules_of_pieces_are_those_of_diffusers():
    assert parse_rules("1:500,0.1", 800) == [(1, 500), (0.1, None)]
    chosen = settings(lr_scheduler="piecewise_constant", lr_step_rules="0.5:2,1:3,0.1", max_train_steps=5)
    assert rates(chosen)[:-1] == pytest.approx([5e-4, 5e-4, 1e-3, 1e-4, 1e-4])
