"""The Sweep tab: one setting over a range, as a grid of images and two charts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from agentsd.config import SETTINGS
from agentsd.images.compare import are_stable, seconds_text
from agentsd.images.generate import GeneratedImage
from agentsd.images.methods import METHODS

from . import captions
from .charts import line_chart
from .context import GENERATES, LOST, QUICK, Context, PastRun, failed, label, tell
from .form import Form
from .jobs import Finished, Note, Run
from .outputs import file_name
from .settings import SWEEP_RANGES, SWEEPABLE, check, sweep_values
from .sweeps import sweep_cases, sweep_csv, sweep_label, sweep_rows, sweep_settings, sweep_sheet, sweep_verdict


class SweepTab:
    """The tab; its components are laid out where it is constructed.

    Args:
        context: shared.
        form: the settings column.
    """

    what = "sweep"

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
            self.first = gr.Number(
                label="From", value=SWEEP_RANGES[SWEEPABLE[0]][0], step=0.05, min_width=90, elem_id="first"
            )
            self.last = gr.Number(
                label="To", value=SWEEP_RANGES[SWEEPABLE[0]][1], step=0.05, min_width=90, elem_id="last"
            )
            self.count = gr.Number(
                label=f"Values (2 … {context.limits.values})", value=4, precision=0, min_width=90, elem_id="count"
            )
        self.about = gr.HTML(captions.remark_html(SETTINGS[SWEEPABLE[0]].help), elem_id="field-about")
        self.button = gr.Button("Sweep", variant="primary", elem_id="sweep")
        self.status = gr.HTML(
            captions.message_html(
                "Generates the image without AgentSD, and one for each value of one of its settings, all from the same "
                "seed: what does a value gain, and what does it cost?"
            ),
            elem_id="sweep-status",
        )
        self.grid = gr.Gallery(
            label="Images", columns=3, height="auto", object_fit="contain", format="png", elem_id="grid",
            interactive=False, buttons=["download", "fullscreen"],
        )  # fmt: skip
        with gr.Row():
            with gr.Column(min_width=300):
                self.seconds_plot = gr.HTML(elem_id="seconds-plot")
            with gr.Column(min_width=300):
                self.distance_plot = gr.HTML(elem_id="distance-plot")
        with gr.Row():
            self.sheet_file = gr.DownloadButton("All images (PNG)", interactive=False, elem_id="sheet-file")
            self.table_file = gr.DownloadButton("Figures (CSV)", interactive=False, elem_id="table-file")

        self.run_id = gr.Textbox(visible=False)

    def wire(self, begun: Any, finished: gr.Textbox) -> Any:
        """Connect the events; `begun` gives a run its key, `finished` takes what the browser keeps of it."""
        self.finished = finished
        generated = begun.success(
            self.sweep,
            [self.run_id, *self.range, *self.form.inputs],
            [
                *(self.status, self.grid, self.seconds_plot, self.distance_plot, self.sheet_file, self.table_file),
                finished,
            ],
            show_progress_on=[self.status],
            **GENERATES,
        )
        # The remark also where a reload or a saved setting has chosen the field, the range only at a click.
        self.field.input(lambda name: SWEEP_RANGES[name], self.field, [self.first, self.last], **QUICK)
        self.field.change(lambda name: captions.remark_html(SETTINGS[name].help), self.field, self.about, **QUICK)
        return generated

    @property
    def range(self) -> list[Any]:
        """The controls of what is swept."""
        return [self.field, self.first, self.last, self.count]

    def sweep(self, run_id: str, *given: Any, progress: gr.Progress = gr.Progress()) -> Iterator[dict]:  # noqa: B008
        """Generate the images; yields the changes of the page."""
        with self.context.running(run_id) as run:
            if run is None:
                yield {self.status: captions.message_html(LOST, "error")}
            else:
                field, first, last, count = given[: len(self.range)]
                yield from self._sweep(run, field, first, last, count, given[len(self.range) :], progress)

    def _sweep(
        self,
        run: Run,
        field: str,
        first: Any,
        last: Any,
        count: Any,
        given: tuple,
        progress: gr.Progress,
    ) -> Iterator[dict]:
        try:
            settings = check(self.form.values(given), self.context.studio.models.names, self.context.limits)
            points = sweep_values(field, first, last, count, self.context.limits)
            cases = sweep_cases(settings.config, field, points)
        except (ValueError, TypeError) as error:
            yield {self.status: captions.message_html(str(error), "error")}
            return
        values = [None, *points]
        yield {
            self.status: captions.message_html(""),
            self.grid: [],
            self.seconds_plot: "",
            self.distance_plot: "",
            self.sheet_file: gr.update(value=None, interactive=False),
            self.table_file: gr.update(value=None, interactive=False),
        }
        done: dict[int, GeneratedImage] = {}
        paths: dict[int, str] = {}
        notes: list[str] = []
        try:
            for report in self.context.studio.generate(run, settings, cases):
                tell(progress, report, cases)
                change: dict[Any, Any] = {}
                if isinstance(report, Note):
                    notes.append(report.text)
                elif isinstance(report, Finished):
                    one = done[report.case] = report.generated
                    if report.case not in paths:
                        name = file_name(settings.request.prompt, field, f"{values[report.case]}")
                        paths[report.case] = self.context.outputs.image(one.image, name, one.settings)
                    change |= self._results(field, values, done, paths)
                yield change or {self.status: gr.skip()}
        except Exception as error:
            yield {self.status: failed(error, settings)}
            return
        ordered = [done[i] for i in range(len(cases))]
        rows = sweep_rows(values, ordered)
        name = file_name(settings.request.prompt, "sweep", field)
        about = sweep_settings(field, points, ordered, settings.config)
        sheet = self.context.outputs.image(sweep_sheet(field, rows, ordered), name, about)
        table = self.context.outputs.text(sweep_csv(field, rows, ordered), name + ".csv")
        message = " ".join([sweep_verdict(field, rows, ordered), *notes])
        past = PastRun("sweep", sheet, label(f"{field} swept", settings), message, about)
        yield {
            self.status: captions.message_html(message, "done"),
            self.sheet_file: gr.update(value=sheet, interactive=True),
            self.table_file: gr.update(value=table, interactive=True),
            self.finished: past.keep(self.context.outputs).to_json(),
        }

    def _results(
        self, field: str, values: list, done: dict[int, GeneratedImage], paths: dict[int, str]
    ) -> dict[Any, Any]:
        ready = sorted(done)
        rows = sweep_rows([values[i] for i in ready], [done[i] for i in ready])
        stable = are_stable(list(done.values()))
        points = [(row.value, row) for row in rows if row.value is not None]
        return {
            self.grid: [
                (paths[i], f"{sweep_label(field, row.value)}: {seconds_text(row.seconds, stable)}")
                for i, row in zip(ready, rows)
            ],
            self.seconds_plot: line_chart(
                "Seconds an image" + ("" if stable else " (unstable)"),
                field,
                {METHODS["agentsd"]: [(value, row.seconds) for value, row in points]},
                level=(METHODS["sd"], rows[0].seconds),
            ),
            self.distance_plot: line_chart(
                "Distance to unpatched (of 255)",
                field,
                {METHODS["agentsd"]: [(value, row.distance) for value, row in points]},
            ),
        }
