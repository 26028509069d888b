"""write_report: results.json, results.csv, results.md and the grid, with a sentence on each claim of the paper."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from agentsd.files import write_atomically
from eval.common.environment import environment_line
from eval.common.tables import Column, as_csv, figure, table, write_json
from eval.launch import REPOSITORY

from .grid import grid_image
from .plan import BASE, BOTH, UNTRAINED, WITHOUT, Plan
from .sampling import shots_of
from .statistics import paired_ratio
from .trainings import median_step

_GB = 1e9
_NAMES = {"features": "cosine", "dino": "DINO", "clip_i": "CLIP-I"}

COST = (
    Column("title", "row"),
    Column("step_seconds", "s / training step", "{:.2f}"),
    Column("step_ratio", "× the step without agents [95 %]", "{:.2f}", interval=True),
    Column("train_gb", "training, peak GB", "{:.2f}"),
    Column("seconds", "s / image", "{:.2f}"),
    Column("speedup", "× as fast [95 %]", "{:.2f}", interval=True),
    Column("sample_gb", "sampling, peak GB", "{:.2f}"),
)
QUALITY = (
    Column("title", "row"),
    Column("features", "subject, {label}", "{:.3f}"),
    Column("features_difference", "− DreamBooth [95 %]", "{:+.3f}", interval=True),
    Column("dino", "DINO", "{:.3f}"),
    Column("dino_difference", "DINO − DreamBooth [95 %]", "{:+.3f}", interval=True),
    Column("clip_i", "CLIP-I", "{:.3f}"),
    Column("clip_t", "CLIP-T", "{:.3f}"),
    Column("sharpness", "sharpness", "{:.1f}"),
    Column("sharpness_difference", "− DreamBooth [95 %]", "{:+.1f}", interval=True),
    Column("psnr", "PSNR to DreamBooth, dB", "{:.1f}"),
)
PRIOR = (
    Column("title", "row"),
    Column("features_kept", "to the image before, {label}", "{:.3f}"),
    Column("features_kept_lost", "− without prior preservation [95 %]", "{:+.3f}", interval=True),
    Column("dino_kept", "to the image before, DINO", "{:.3f}"),
    Column("features", "to the subject, {label}", "{:.3f}"),
    Column("features_difference", "− before [95 %]", "{:+.3f}", interval=True),
)


def write_report(
    plan: Plan,
    out: Path,
    about: dict[str, Any],
    scores: tuple[list[dict[str, Any]], list[dict[str, Any]]],
    costs: list[dict[str, Any]],
) -> str:
    """Write all files of the report; returns results.md's text.

    Args:
        about: command, date, environment, label (of the features), notes (sentences).
        scores: what `score` returns.
        costs: what `make_costs` returns.
    """
    by_name = {cost["row"]: cost for cost in costs}
    rows = [row | by_name[row["row"]] for row in scores[0]]
    prior = scores[1]
    verdict = make_verdict(rows, prior, about["label"])
    write_json(
        out / "results.json",
        {"about": about, "plan": _told(plan), "rows": rows, "prior": prior, "verdict": verdict},
    )
    keyed = [{"set": name, **row} for name, found in (("subject", rows), ("prior", prior)) for row in found]
    keys = list(dict.fromkeys(key for row in keyed for key in row))
    write_atomically(
        out / "results.csv", as_csv([{key: row.get(key) for key in keys} for row in keyed], about["environment"])
    )
    footer = f"{about['date']}, {environment_line(about['environment'])}"
    grid_image(plan, out, out / "grid.webp", captions(rows, prior), footer)
    text = as_markdown(plan, about, rows, prior, verdict)
    write_atomically(out / "results.md", text)
    return text


def make_costs(
    plan: Plan,
    out: Path,
    records: dict[str, dict[str, Any]],
    steps: dict[str, list[float]] | None,
    memory: dict[str, int | None],
) -> list[dict[str, Any]]:
    """Times and peak memory of each row.

    Args:
        records: training.json of each training.
        steps: seconds of the interleaved training steps of "none" and "both"; None takes those of the trainings.
        memory: peak bytes of sampling by row.
    """
    base = [shot.seconds for shot in shots_of(plan, plan.rows[0], out)]
    rows = []
    for row in plan.rows:
        seconds = [shot.seconds for shot in shots_of(plan, row, out)]
        found: dict[str, Any] = {
            "row": row.name,
            "seconds": statistics.median(seconds),
            "sample_gb": _gb(memory.get(row.name)),
        }
        if row.name != BASE:
            speedup = paired_ratio(base, seconds)
            found |= speedup.as_row("speedup")
        if row.training is not None:
            found["train_gb"] = _gb(records[row.training].get("peak_bytes"))
            found["step_seconds"] = (
                statistics.median(steps[row.training]) if steps else median_step(records[row.training])
            )
            if row.training == BOTH and steps:
                found |= paired_ratio(steps[BOTH], steps["none"]).as_row("step_ratio")
            elif row.training == BOTH:
                found["step_ratio"] = found["step_seconds"] / median_step(records["none"])
        rows.append(found)
    return rows


def make_verdict(rows: Sequence[dict[str, Any]], prior: Sequence[dict[str, Any]], label: str) -> list[str]:
    """One sentence on each claim of the paper (appendix B.4), from the intervals."""
    by_name = {row["row"]: row for row in rows}
    base, both, untrained = by_name[BASE], by_name[BOTH], by_name[UNTRAINED]
    said = [
        f"Sampling time: with agents in every step an image is generated {_times(both, 'speedup')} as fast as by "
        f"DreamBooth without agents (claimed: 2.2×, over naive attention); with agents in the early steps alone "
        f"{_times(by_name[WITHOUT], 'speedup')} as fast.",
        f"Training time: a step with agents takes {_times(both, 'step_ratio')} the time of one without (claimed: "
        "0.85×).",
    ]
    if both.get("train_gb") and base.get("train_gb"):
        said.append(
            f"Training memory: {both['train_gb']:.2f} GB against {base['train_gb']:.2f} GB, "
            f"{both['train_gb'] / base['train_gb']:.2f}× (claimed: 0.85×)."
        )
    for row, name, what in (
        (untrained, "difference", "Agents in all steps of a model that was not trained so"),
        (both, "difference", "Agents in all steps of a model that was trained so"),
    ):
        said.append(
            f"{what}: similarity to the subject {_signed(row, f'features_{name}')} against DreamBooth without agents: "
            f"{_direction(row, f'features_{name}', 'nearer to the subject', 'less like the subject')}; sharpness "
            f"{_signed(row, f'sharpness_{name}', '{:+.1f}')}: "
            f"{_direction(row, f'sharpness_{name}', 'sharper edges', 'softer edges')}."
        )
    said.append(
        f"Does training with agents mend what agents in all steps cost? Trained so against not trained so: similarity "
        f"{_signed(both, f'features_{UNTRAINED}')}: "
        f"{_direction(both, f'features_{UNTRAINED}', 'nearer to the subject', 'less like the subject')}; sharpness "
        f"{_signed(both, f'sharpness_{UNTRAINED}', '{:+.1f}')}: "
        f"{_direction(both, f'sharpness_{UNTRAINED}', 'sharper edges', 'softer edges')}."
    )
    said.append(
        f"What the similarity is worth ({label}): the model before training has {by_name['before']['features']:.3f}, "
        f"DreamBooth {base['features']:.3f}."
    )
    for row in prior[1:]:
        if row.get("features_kept_lost") is not None:
            said.append(
                f"Prior, {row['title']}: images of the class are {row['features_kept']:.3f} like those before, "
                f"{_signed(row, 'features_kept_lost')} against the training without prior preservation: "
                f"{_direction(row, 'features_kept_lost', 'the prior is kept better', 'the prior is kept worse')}."
            )
    if len(prior) > 1 and prior[-1]["row"] == "prior-lost":
        said.append(
            f"Prior without prior preservation: images of the class are {prior[-1]['features_kept']:.3f} like those "
            f"before, and their similarity to the subject differs by {_signed(prior[-1], 'features_difference')}: what "
            "prior preservation has to mend."
        )
    return said


def captions(rows: Sequence[dict[str, Any]], prior: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The second line of each row's caption in the grid."""
    found = {row["row"]: f"{row['seconds']:.2f} s, similarity {row['features']:.3f}" for row in rows}
    return found | {row["row"]: f"{row['features_kept']:.3f} like the image before" for row in prior}


def as_markdown(
    plan: Plan,
    about: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    prior: Sequence[dict[str, Any]],
    verdict: Sequence[str],
) -> str:
    """The report as text; no table has more than ten columns."""
    label = about["label"]
    prompts = ", ".join(f"“{prompt}”" for prompt in plan.prompts)
    preserved = f", with {plan.num_class_images} images of the class" if plan.prior_preservation else ""
    parts = [
        f"# DreamBooth with agents: {plan.model}",
        f"`{about['command']}`",
        f"{about['date']}. {environment_line(about['environment'])}",
        f"{plan.train_steps} training steps at learning rate {plan.learning_rate:g}, batch size "
        f"{plan.train_batch_size}, {plan.resolution} px, precision {plan.mixed_precision}{preserved}; ratio "
        f"{plan.ratio:g}, α {plan.alpha:g}. {plan.images} images of each of: {prompts}; {plan.steps} "
        f"{plan.scheduler} steps, guidance {plan.guidance:g}.",
        "Every row has the same seeds, and rows take turns. Differences are paired by prompt and seed; in brackets "
        "their 95 % interval over seeds, by Student's t.",
        *about["notes"],
        "## Cost",
        table(rows, COST),
        "## Quality",
        f"Similarity to the subject is the mean cosine of {label} features to the subject's images. Sharpness is the "
        "99th percentile of the brightness gradient, in levels of 255 per pixel; the subject's images, at the size of "
        f"the generated ones, have {about['subject_sharpness']:.1f}.",
        table(rows, QUALITY, label),
    ]
    if prior:
        parts += [
            "## Prior",
            f"Images of “{plan.class_prompt}”, {plan.prior_images} seeds: how like those of the model before training, "
            "and how like the subject, which they should not show.",
            table(prior, PRIOR, label),
        ]
    parts += [
        "## What this says of the paper's claims",
        "\n".join(f"- {sentence}" for sentence in verdict),
        "![grid](grid.webp)",
    ]
    return "\n\n".join(parts) + "\n"


def _told(plan: Plan) -> dict[str, Any]:
    """The plan as JSON; the shipped subject by its place in this repository, not in this machine."""
    subject = Path(plan.subject)
    inside = subject.is_relative_to(REPOSITORY)
    return plan.as_json() | {"subject": subject.relative_to(REPOSITORY).as_posix() if inside else plan.subject}


def _gb(value: int | None) -> float | None:
    return None if value is None else value / _GB


def _times(row: dict[str, Any], key: str) -> str:
    if row.get(key) is None:
        return "an unknown number of times"
    interval = row.get(f"{key}_ci")
    return f"{row[key]:.2f}×" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


def _signed(row: dict[str, Any], key: str, form: str = "{:+.3f}") -> str:
    low, high = row[f"{key}_ci"]
    return figure(row[key], (low, high), form)


def _direction(row: dict[str, Any], key: str, more: str, less: str) -> str:
    low, high = row[f"{key}_ci"]
    if low <= 0 <= high:
        return "no difference that so many images can show"
    return more if row[key] > 0 else less
