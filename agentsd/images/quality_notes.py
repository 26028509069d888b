"""Remarks on a request: which settings make a poor image by any method. Imports no torch."""

from __future__ import annotations

from .request import Request

ENOUGH_STEPS = dict.fromkeys(
    ("ddim", "ddpm", "euler", "euler-karras", "euler-a", "heun", "dpm++2m", "dpm++2m-karras", "unipc"), 10
)
ENOUGH_STEPS["plms"] = 50
"""Denoising steps from which on a scheduler's images are clean: the demo model's castle at guidance 5 is mottled at 6
and clean at 10, with PLMS frayed at 20. "lcm", and what is not listed, is made for models of few steps."""

_SMALL, _LARGE = 0.75, 1.5  # of a model's own side: beyond, images fall apart or repeat themselves


def quality_notes(request: Request, scheduler: str | None, own_size: tuple[int, int]) -> list[str]:
    """Say which settings make a poor image by any method, with the remedy.

    Args:
        request: what is to be generated.
        scheduler: a key of SCHEDULERS; None for another one, of which nothing is known.
        own_size: (height, width) that the model was trained for, in pixels.

    Returns:
        One sentence for each remark.
    """
    notes = []
    enough = ENOUGH_STEPS.get(scheduler or "", 0)
    if request.steps < enough:
        outcome = "edges may fray into white and black" if 2 * request.steps >= enough else "expect mush"
        notes.append(
            f"{request.steps} steps are few for the scheduler {scheduler}: {outcome}, by every method, unless the "
            f"model was made for few. Take {enough} or more{', or another scheduler' if scheduler == 'plms' else ''}."
        )
    height, width = request.height or own_size[0], request.width or own_size[1]
    sizes = f"{own_size[1]} × {own_size[0]} px"
    if height < _SMALL * own_size[0] or width < _SMALL * own_size[1]:
        notes.append(
            f"{width} × {height} px are far below the {sizes} that this model was trained at: expect mush, by "
            "every method."
        )
    elif height > _LARGE * own_size[0] or width > _LARGE * own_size[1]:
        notes.append(
            f"{width} × {height} px are far above the {sizes} that this model was trained at: it may repeat things, by "
            "every method."
        )
    return notes
