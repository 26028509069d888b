"""make_schedule: the learning rate over a training; parse_rules, check_rates: what cannot be one is told beforehand."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from .errors import UsageError

LR_SCHEDULERS = (
    "constant", "constant_with_warmup", "piecewise_constant", "linear", "cosine", "cosine_with_restarts", "polynomial",
)  # fmt: skip
"""Every name that diffusers.optimization.get_scheduler takes."""

NO_WARMUP = ("constant", "piecewise_constant")
ENDLESS = ("constant", "constant_with_warmup", "piecewise_constant")
"""Schedules that do not depend on the number of steps, so that a training may be given more of them later."""

POLYNOMIAL_END = 1e-7
"""Where diffusers' polynomial schedule ends; get_scheduler has no argument for it."""

_MOST_RATES = 100_000


def check_schedule(settings: Any) -> None:
    """Make sure that the options of the learning rate belong to its schedule and fit into the steps; no torch needed.

    Args:
        settings: a DreamBoothSettings.

    Raises:
        UsageError: an option that has no effect, or a schedule that does not fit.
    """
    kind, steps, warmup = settings.lr_scheduler, settings.max_train_steps, settings.lr_warmup_steps
    for name, own, usual in (
        ("lr_num_cycles", ("cosine_with_restarts",), 1),
        ("lr_power", ("polynomial",), 1),
        ("lr_step_rules", ("piecewise_constant",), None),
        ("lr_warmup_steps", tuple(name for name in LR_SCHEDULERS if name not in NO_WARMUP), 0),
    ):
        value = getattr(settings, name)
        if value != usual and kind not in own:
            use = own[0] if len(own) < 3 else "constant_with_warmup"
            raise UsageError(
                f"--{name.replace('_', '-')} {value}: has no effect with --lr-scheduler {kind}; use {use}, or leave it "
                "out"
            )
    if kind not in NO_WARMUP and warmup >= steps:
        raise UsageError(
            f"--lr-warmup-steps {warmup}: must be less than --max-train-steps {steps}, as the learning rate is reached "
            "after it; use fewer, or train longer"
        )
    if kind == "polynomial" and settings.learning_rate <= POLYNOMIAL_END:
        raise UsageError(
            f"--learning-rate {settings.learning_rate:g}: must be above {POLYNOMIAL_END:g} with --lr-scheduler "
            "polynomial, which falls to that; use a higher one, or another schedule"
        )
    cycles, left = settings.lr_num_cycles, steps - warmup
    if kind == "cosine_with_restarts" and cycles > 1 and 2 * cycles > left:
        raise UsageError(
            f"--lr-num-cycles {cycles}: must be at most {max(1, left // 2)}, so that each has two of the {left} steps "
            "after the warm-up; use fewer"
        )
    if kind == "piecewise_constant":
        parse_rules(settings.lr_step_rules, steps)


def parse_rules(rules: Any, steps: int) -> list[tuple[float, int | None]]:
    """Step rules as (factor of the learning rate, step where it ends): "1:500,0.1" is [(1, 500), (0.1, None)].

    Args:
        rules: FACTOR:STEP,…,FACTOR, as diffusers.optimization.get_scheduler takes them.
        steps: of the training; a factor that begins later is refused.

    Raises:
        UsageError: they are missing, no such rules, out of order, or never used.
    """
    form = "give FACTOR:STEP,…,FACTOR, as in 1:500,0.1 for a tenth of the learning rate from step 500 on"
    if rules is None:
        raise UsageError(f"--lr-scheduler piecewise_constant needs --lr-step-rules: {form}")

    def refuse(why: str) -> UsageError:
        return UsageError(f"--lr-step-rules {rules}: {why}; {form}")

    found: list[tuple[float, int | None]] = []
    parts = str(rules).split(",")
    for number, part in enumerate(parts, 1):
        factor, colon, step = part.partition(":")
        try:
            found.append((float(factor), int(step) if colon else None))
        except ValueError:
            raise refuse(f"{part!r} is no rule") from None
        if bool(colon) == (number == len(parts)):
            raise refuse("all factors but the last need a step, and the last has none")
        if not (math.isfinite(found[-1][0]) and found[-1][0] >= 0):
            raise refuse(f"the factor {factor} must be at least 0 and finite")
    ends = [end for _, end in found if end is not None]
    if ends != sorted(set(ends)) or (ends and ends[0] < 1):
        raise refuse("its steps must rise from 1 on")
    if ends and ends[-1] >= steps:
        raise refuse(f"step {ends[-1]} does not come in --max-train-steps {steps}")
    return found


def make_schedule(settings: Any, optimizer: Any) -> Any:
    """The schedule of diffusers for these settings, of one step per optimizer step."""
    from diffusers.optimization import get_scheduler

    return get_scheduler(
        settings.lr_scheduler,
        optimizer=optimizer,
        step_rules=settings.lr_step_rules,
        num_warmup_steps=settings.lr_warmup_steps,
        num_training_steps=settings.max_train_steps,
        num_cycles=settings.lr_num_cycles,
        power=settings.lr_power,
    )


def check_rates(settings: Any) -> None:
    """Go through the whole schedule once, with the step after the last update, which diffusers computes too.

    Raises:
        UsageError: the schedule cannot be made, a rate is no number in 0 … 1, or no step trains.
    """
    import torch

    optimizer = torch.optim.SGD([torch.zeros(1)], lr=settings.learning_rate)
    name = f"--lr-scheduler {settings.lr_scheduler}"
    remedy = "use another schedule, or other values of its options"
    highest = 0.0
    try:
        factor_of = make_schedule(settings, optimizer).lr_lambdas[0]
        for step in _steps(settings.max_train_steps):
            rate = settings.learning_rate * factor_of(step)
            if isinstance(rate, complex) or not 0 <= rate <= 1:
                raise UsageError(f"{name}: gives the learning rate {rate} at step {step}, not one in 0 … 1; {remedy}")
            if step < settings.max_train_steps:
                highest = max(highest, rate)
    except (ArithmeticError, ValueError, TypeError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{name}: is not possible with these settings ({error}); {remedy}") from None
    if highest == 0:
        raise UsageError(f"{name}: gives the learning rate 0 at every step, so that nothing is trained; {remedy}")


def _steps(count: int) -> Iterable[int]:
    """All steps from 0 to `count`, both included; of very many an even choice with all of the first and last."""
    if count <= _MOST_RATES:
        return range(count + 1)
    edge = _MOST_RATES // 4
    return [*range(edge), *range(edge, count - edge, count // edge), *range(count - edge, count + 1)]
