"""The Sweep tab: one setting over a range, as a grid of pictures and two plots."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr
import pandas as pd

from agentsd.images.compare import GeneratedImage
from agentsd.images.methods import METHODS

from . import captions, pictures
from .api import sweep_cases
from .context import DRAWS, QUICK, Context, History, PastRun, failed, label, tell, unread_note
from .form import Form
from .jobs import Drawn, Unread
from .outputs import file_name
from .settings import SWEEPABLE, check, sweep_values

_RANGES = {"ratio": (0.1, 0.7), "early": (0.0, 1.0), "alpha": (0.0, 0.3)}


class SweepTab:
    """Laid out where it is made.

    Args:
        context: shared.
        form: the settings column.
    """

    def __init__(self, context: Context, form: Form):
        self.context = context
        self.form = form
        with gr.Row():
            self.field = gr.Radio(
                list(SWEEPABLE),
                value=SWEEPABLE[0],
                label="Setting that varies",
                elem_id="field",
                min_width=220,
                scale=2,
            )
            self.first = gr.Number(label="From", value=0.1, step=0.05, min_width=90, elem_id="first")
            self.last = gr.Number(label="To", value=0.7, step=0.05, min_width=90, elem_id="last")
            self.count = gr.Number(
                label=f"Values (2 … {context.limits.values})", value=4, precision=0, min_width=90, elem_id="count"
            )
        self.button = gr.Button("Sweep", variant="primary", elem_id="sweep")
        self.status = gr.HTML(
            captions.message_html("Draws the unpatched picture and one for each value, all from the same seed."),
            elem_id="sweep-status",
        )
        self.grid = gr.Gallery(
            label="Pictures", columns=3, height="auto", object_fit="contain", format="png", elem_id="grid",
            interactive=False, buttons=["download", "fullscreen"],
        )  # fmt: skip
        with gr.Row():
            self.seconds_plot = gr.LinePlot(
                x="value", y="seconds", color="method", title="Seconds a picture", elem_id="seconds-plot", height=260,
                min_width=300, buttons=[],
            )  # fmt: skip
            self.distance_plot = gr.LinePlot(
                x="value", y="distance", title="Distance to unpatched (of 255)", elem_id="distance-plot",
                height=260, min_width=300, buttons=[],
            )  # fmt: skip
        with gr.Row():
            self.sheet_file = gr.DownloadButton("All pictures (PNG)", interactive=False, elem_id="sheet-file")
            self.table_file = gr.DownloadButton("Figures (CSV)", interactive=False, elem_id="table-file")

    def wire(self, begin: dict[str, Any], run_id: gr.Textbox, history: History) -> None:
        """Answer to the page; `begin` are the arguments of the event that gives a run its number."""
        self.history = history
        self.button.click(**begin).success(
            self.sweep,
            [run_id, history.runs, self.field, self.first, self.last, self.count, *self.form.inputs],
            [
                *(self.status, self.grid, self.seconds_plot, self.distance_plot, self.sheet_file, self.table_file),
                *(history.runs, history.gallery),
            ],
            show_progress_on=[self.status],
            **DRAWS,
        )
        self.field.input(lambda name: _RANGES[name], self.field, [self.first, self.last], **QUICK)

    def sweep(
        self,
        run_id: str,
        past: list[PastRun],
        field: str,
        first: Any,
        last: Any,
        count: Any,
        *given: Any,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Iterator[dict]:
        """Draw the pictures; yields what has changed on the page."""
        try:
            settings = check(self.form.values(given), self.context.studio.models.names, self.context.limits)
            points = sweep_values(field, first, last, count, self.context.limits)
            cases = sweep_cases(settings, field, points)
        except (ValueError, TypeError) as error:
            yield {self.status: captions.message_html(str(error), "error")}
            return
        values = [None, *points]
        yield {
            self.status: captions.message_html(""),
            self.grid: [],
            self.seconds_plot: None,
            self.distance_plot: None,
            self.sheet_file: gr.update(value=None, interactive=False),
            self.table_file: gr.update(value=None, interactive=False),
        }
        drawings: dict[int, GeneratedImage] = {}
        paths: dict[int, str] = {}
        unread: Unread | None = None
        try:
            for report in self.context.studio.generate(self.context.run(run_id), settings, cases):
                tell(progress, report, cases)
                change: dict[Any, Any] = {}
                if isinstance(report, Unread):
                    unread = report
                elif isinstance(report, Drawn):
                    drawings[report.case] = report.drawing
                    if report.case not in paths:
                        name = file_name(settings.request.prompt, field, f"{values[report.case]}")
                        paths[report.case] = self.context.outputs.picture(
                            report.drawing.image, name, report.drawing.settings
                        )
                    change |= self._results(field, values, drawings, paths)
                yield change or {self.status: gr.skip()}
        except Exception as error:
            yield {self.status: failed(error, settings)}
            return
        ordered = [drawings[i] for i in range(len(cases))]
        rows = pictures.sweep_rows(values, ordered)
        name = file_name(settings.request.prompt, "sweep", field)
        about = pictures.sweep_settings(field, points, ordered, settings.config)
        sheet = self.context.outputs.picture(pictures.sweep_sheet(field, rows, ordered), name, about)
        table = self.context.outputs.text(pictures.sweep_csv(field, rows, ordered), name + ".csv")
        message = f"{pictures.sweep_verdict(field, rows, ordered)} {unread_note(unread)}".strip()
        yield {
            self.status: captions.message_html(message, "done"),
            # Once more: a plot may miss an update that comes right after another.
            **self._results(field, values, drawings, paths),
            self.sheet_file: gr.update(value=sheet, interactive=True),
            self.table_file: gr.update(value=table, interactive=True),
            **self.history.with_run(past, PastRun(sheet, label(f"{field} swept", settings), message, about)),
        }

    def _results(
        self, field: str, values: list, drawings: dict[int, GeneratedImage], paths: dict[int, str]
    ) -> dict[Any, Any]:
        ready = sorted(drawings)
        rows = pictures.sweep_rows([values[i] for i in ready], [drawings[i] for i in ready])
        changes: dict[Any, Any] = {
            self.grid: [
                (paths[i], f"{pictures.sweep_label(field, row.value)}: {row.seconds:.2f} s")
                for i, row in zip(ready, rows)
            ]
        }
        points = [row for row in rows if row.value is not None]
        if points:
            # The unpatched run is one time, drawn as a level line to compare with.
            seconds = [(row.value, row.seconds, METHODS["agentsd"]) for row in points]
            seconds += [(row.value, rows[0].seconds, METHODS["sd"]) for row in points]
            frame = pd.DataFrame(seconds, columns=["value", "seconds", "method"])
            changes[self.seconds_plot] = gr.update(value=frame, x_title=field, y_lim=_from_zero(frame["seconds"]))
            frame = pd.DataFrame([(row.value, row.distance) for row in points], columns=["value", "distance"])
            changes[self.distance_plot] = gr.update(value=frame, x_title=field, y_lim=_from_zero(frame["distance"]))
        return changes


def _from_zero(values: pd.Series) -> list[float]:
    """Limits of an axis on which a difference looks as large as it is."""
    return [0.0, max(1.1 * float(values.max()), 1e-3)]
