"""Draw the README's strip: one seed by setting, with seconds and the distance to the unpatched model.

pip install -e . && python apps/strip_figure.py --out eval/results/readme/strip.webp
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
from PIL import Image, ImageDraw, ImageFont
from playground.images import distance, psnr

import agentsd
from agentsd import AgentConfig
from agentsd.config import PRESETS
from agentsd.images.compare import GeneratedImage, generate, warm_up
from agentsd.images.request import Request
from agentsd.images.rounds import is_stable, rotated, speed_up

STEPS, GUIDANCE, SIDE = 25, 5.0, 256
SUBJECTS = ("castle", "zebra")


@dataclass
class Panel:
    """One column of the strip.

    Attributes:
        title: its name.
        method: of METHODS.
        config: settings of it.
        steps: of the run.
        found: subject to its image, with the seconds of each round.
    """

    title: str
    method: str
    config: AgentConfig | None = None
    steps: int = STEPS
    found: dict[str, GeneratedImage] = field(default_factory=dict)

    def run(self, pipe: Any, subject: str, add: bool = True) -> None:
        """Generate a subject once more and add its time."""
        request = Request(f"a high quality photograph of a {subject}.", "", self.steps, GUIDANCE, 0, None, None)
        if not add:
            warm_up(pipe, request, self.method, self.config)
            return
        result = generate(pipe, request, self.method, self.config)
        self.found[subject] = self.found[subject].with_run(result) if subject in self.found else result

    def seconds(self) -> list[float]:
        """Of each round, mean over the subjects."""
        return [float(np.mean(one)) for one in zip(*(result.all_seconds for result in self.found.values()))]

    def psnr(self, base: Panel, subject: str) -> float:
        """Distance to the same subject's image of another panel, in dB."""
        return psnr(distance(self.found[subject].image, base.found[subject].image))


def panels() -> list[Panel]:
    """All columns but the last, whose steps follow from the time of preset "fast"."""
    presets = {name: AgentConfig(**fields) for name, fields in PRESETS.items()}
    return [
        Panel("Stable Diffusion", "sd"),
        Panel("ToMeSD, ratio 0.4", "tomesd", presets["paper"]),
        Panel("agents (defaults)", "agentsd", presets["paper"]),
        Panel('preset "cache"', "agentsd", presets["cache"]),
        Panel('preset "fast"', "agentsd", presets["fast"]),
    ]


def time_all(pipe: Any, columns: list[Panel], rounds: int) -> None:
    """Warm up, then generate every panel in interleaved rounds."""
    for column in columns:
        column.run(pipe, SUBJECTS[0], add=False)
    for number in range(rounds):
        for column in rotated(columns, number):
            for subject in SUBJECTS:
                column.run(pipe, subject)


def draw(columns: list[Panel]) -> Image.Image:
    """The strip: a row a subject, a column a panel."""
    gap, line = 10, 20
    height = len(SUBJECTS) * (SIDE + line + gap) + 2 * line + 2 * gap
    canvas = Image.new("RGB", ((SIDE + gap) * len(columns) + gap, height), "white")
    pen, base = ImageDraw.Draw(canvas), columns[0]
    for i, column in enumerate(columns):
        left = gap + i * (SIDE + gap)
        factor = speed_up(base.seconds(), column.seconds())
        time = f"{np.median(column.seconds()):.2f} s" + (
            "" if column is base or factor is None else f",  {factor:.2f}x"
        )
        pen.text((left, gap // 2), column.title, "black", ImageFont.load_default(18))
        pen.text((left, gap // 2 + line), time, "#555555", ImageFont.load_default(16))
        for row, subject in enumerate(SUBJECTS):
            top = gap + 2 * line + row * (SIDE + line + gap)
            canvas.paste(column.found[subject].image.resize((SIDE, SIDE), Image.Resampling.LANCZOS), (left, top))
            said = "" if column is base else f"{column.psnr(base, subject):.1f} dB"
            pen.text((left, top + SIDE + 2), said, "#555555", ImageFont.load_default(15))
    return canvas


def main(arguments: list[str] | None = None) -> None:
    """Write the strip, and its figures beside it as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("strip.webp"))
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    pipe = agentsd.load_pipeline("demo", scheduler="ddim")
    # Another number of steps begins at the same noise level: what fewer steps are compared by.
    pipe.scheduler = diffusers.DDIMScheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    pipe.set_progress_bar_config(disable=True)
    columns = panels()
    time_all(pipe, columns, options.rounds)
    share = float(np.median(columns[-1].seconds()) / np.median(columns[0].seconds()))
    fewer = Panel(f"{round(STEPS * share)} steps", "sd", steps=round(STEPS * share))
    time_all(pipe, [fewer], options.rounds)
    columns.append(fewer)
    draw(columns).save(options.out, quality=85)
    rows = [
        {
            "title": one.title,
            "seconds": [round(value, 3) for value in one.seconds()],
            "stable": is_stable(one.seconds()),
            "psnr": {subject: round(one.psnr(columns[0], subject), 2) for subject in SUBJECTS} if i else None,
        }
        for i, one in enumerate(columns)
    ]
    options.out.with_suffix(".json").write_text(json.dumps(rows, indent=1) + "\n", "utf-8")
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
