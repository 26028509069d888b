"""sample_all: the images of every row, rows interleaved in a rotating order, each with its seconds inside the PNG."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentsd.images.generate import generate
from agentsd.images.png import read_settings, save_image
from agentsd.images.request import Request
from agentsd.images.rounds import rotated
from agentsd.images.warm_up import warm_up
from eval.common.models import ModelSpec, load_model
from eval.common.progress import progress
from eval.fid.generation import is_whole

from .plan import Plan, Row


@dataclass(frozen=True)
class Shot:
    """One image to generate.

    Attributes:
        row: how.
        prompt, seed: what.
        path: its file.
    """

    row: Row
    prompt: str
    seed: int
    path: Path

    @property
    def seconds(self) -> float:
        """How long it took, from its file."""
        settings = read_settings(self.path)
        assert settings is not None
        return float(settings["seconds"])


def shots_of(plan: Plan, row: Row, out: Path) -> list[Shot]:
    """The images of a row, in the same order for all rows of its kind."""
    folder = out / "images" / row.name
    prompts = (plan.class_prompt,) if row.prior else plan.prompts
    seeds = range(plan.seed, plan.seed + (plan.prior_images if row.prior else plan.images))
    # All prompts of a seed before the next seed, so that a run that was stopped has every prompt.
    return [
        Shot(row, prompt, seed, folder / f"{number:02d}-{seed:04d}.png")
        for seed in seeds
        for number, prompt in enumerate(prompts)
    ]


def request_of(plan: Plan, prompt: str, seed: int) -> Request:
    """What is sampled for a prompt and a seed."""
    return Request(prompt, steps=plan.steps, guidance=plan.guidance, seed=seed, height=plan.size, width=plan.size)


def load_row(plan: Plan, row: Row, out: Path) -> Any:
    """The pipeline of a row, unpatched."""
    model = plan.model if row.training is None else str(out / "models" / row.training)
    return load_model(ModelSpec(model, None, plan.scheduler, plan.device, plan.dtype))


def sample_all(plan: Plan, out: Path, rows: Sequence[Row]) -> None:
    """Generate what is missing: every row's image of a prompt and seed, then the next; each begins with another row.

    The first image of a row in a process is preceded by one UNet call of each phase.
    """
    shots = [shots_of(plan, row, out) for row in rows]
    rounds = list(zip(*shots))
    todo = sum(not is_whole(shot.path) for row in shots for shot in row)
    pipes: dict[str | None, Any] = {}
    warm: set[str] = set()
    with progress(total=todo, desc="images", unit="image", disable=not todo) as bar:
        for number, same in enumerate(rounds):
            for shot in rotated(same, number):
                if is_whole(shot.path):
                    continue
                row = shot.row
                if row.training not in pipes:
                    pipes[row.training] = load_row(plan, row, out)
                pipe, request = pipes[row.training], request_of(plan, shot.prompt, shot.seed)
                if row.name not in warm:
                    warm_up(pipe, request, *row.method)
                    warm.add(row.name)
                bar.set_postfix_str(row.name)
                made = generate(pipe, request, *row.method)
                shot.path.parent.mkdir(parents=True, exist_ok=True)
                save_image(made.image, shot.path, {**made.settings, "seconds": made.seconds})
                bar.update()
