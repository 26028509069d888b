"""score: images on disk -> scores of each way to train and sample, compared image by image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from eval.common.protocol import BenchError
from eval.fid.similarity import similarity_of_pairs

from .networks import Judges, cosines, sharpness
from .plan import BASE, BOTH, UNTRAINED, Plan, Row
from .sampling import Shot, shots_of
from .statistics import paired_difference


@dataclass(frozen=True)
class Measured:
    """Scores of one row's images.

    Attributes:
        row: what they are of.
        shots: the images.
        values: score by name -> one number for each image.
        features: network by name -> [N, D].
    """

    row: Row
    shots: list[Shot]
    values: dict[str, list[float]]
    features: dict[str, np.ndarray]

    def summary(self) -> dict[str, Any]:
        """The row of a report: mean of each score."""
        means = {key: float(np.mean(found)) for key, found in self.values.items()}
        return {"row": self.row.name, "title": self.row.title, "images": len(self.shots), **means}

    def compared(self, base: Measured, name: str) -> dict[str, Any]:
        """Paired differences of all scores to another row: score_name and score_name_ci."""
        seeds = [shot.seed for shot in self.shots]
        found: dict[str, Any] = {}
        for key, values in self.values.items():
            if key in base.values:
                found |= paired_difference(values, base.values[key], seeds).as_row(f"{key}_{name}")
        return found


def score(plan: Plan, out: Path, judges: Judges) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Scores of the rows of figure 8, and of those of the prior.

    Similarity to the subject ("features", "dino", "clip_i") is the mean cosine to the subject's images, as DreamBooth's
    DINO and CLIP-I; clip_t is the cosine to the prompt. Each has its difference to the first row as key_difference,
    "both" also to "untrained", with 95 % intervals over seeds under _ci. psnr and ssim are to the first row, where the
    weights are the same. Rows of the prior also have key_kept, the cosine to the image of the model before training
    from the same seed, and key_kept_lost, its difference to the training without prior preservation.
    """
    subject = {key: network.of_files(subject_files(plan)) for key, network in judges.networks.items()}
    measured = {row.name: _measure(plan, out, row, judges, subject) for row in plan.rows}
    rows = []
    for name, own in measured.items():
        found = own.summary()
        if name != BASE:
            found |= own.compared(measured[BASE], "difference")
        if name == BOTH:
            found |= own.compared(measured[UNTRAINED], UNTRAINED)
        if name != BASE and own.row.training == measured[BASE].row.training:
            pair = ([shot.path for shot in one.shots] for one in (own, measured[BASE]))
            found["psnr"], found["ssim"] = map(float, np.median(similarity_of_pairs(*pair), axis=0))
        rows.append(found)
    return rows, _score_prior([_measure(plan, out, row, judges, subject) for row in plan.prior_rows])


def subject_files(plan: Plan) -> list[Path]:
    """The images of the subject: those that the training uses.

    Raises:
        BenchError: there is no such folder, or none in it.
    """
    from dreambooth.data import find_images

    try:
        found = find_images(Path(plan.subject), "subject")
    except ValueError as error:
        raise BenchError(str(error)) from error
    if not found.images:
        besides = f" ({'; '.join(found.sentences())})" if found.left_out else ""
        raise BenchError(
            f"--subject {plan.subject}: is no folder with images{besides}; give one with four to six of the subject"
        )
    return found.images


def _measure(plan: Plan, out: Path, row: Row, judges: Judges, subject: dict[str, np.ndarray]) -> Measured:
    shots = shots_of(plan, row, out)
    files = [shot.path for shot in shots]
    features = {key: network.of_files(files) for key, network in judges.networks.items()}
    values = {key: cosines(found, subject[key]).mean(1).tolist() for key, found in features.items()}
    values["sharpness"] = [sharpness(file) for file in files]
    if judges.clip is not None:
        # The class in place of the identifier, which CLIP does not know.
        prompts = [shot.prompt.replace(plan.instance_prompt, plan.class_prompt) for shot in shots]
        values["clip_t"] = judges.clip.similarities(files, prompts)
    return Measured(row, shots, values, features)


def _score_prior(measured: Sequence[Measured]) -> list[dict[str, Any]]:
    if not measured:
        return []
    before = measured[0]
    for own in measured:
        for key, features in own.features.items():
            own.values[f"{key}_kept"] = np.diag(cosines(features, before.features[key])).tolist()
    rows = [own.summary() for own in measured]
    lost = next((own for own in measured if own.row.training == "no-prior"), None)
    for row, own in zip(rows, measured):
        if own is not before:
            row |= own.compared(before, "difference")
        if lost is not None and own not in (before, lost):
            row |= own.compared(lost, "lost")
    return rows
