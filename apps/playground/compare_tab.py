"""The Compare tab: three pictures from one seed, and any two of them against each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr
from PIL import Image

from agentsd.images.compare import GeneratedImage
from agentsd.images.methods import METHODS

from . import captions, pictures
from .context import DRAWS, QUICK, Context, History, PastRun, failed, label, tell, unread_note
from .form import Form
from .jobs import Drawn, Stepped, Unread, methods_to_compare
from .outputs import file_name
from .settings import check

_GAIN = 4


class CompareTab:
    """Laid out where it is made.

    Args:
        context: shared.
        form: the settings column.
    """

    def __init__(self, context: Context, form: Form):
        self.context = context
        self.form = form
        self.status = gr.HTML(
            captions.message_html("Write a prompt or click an example, then compare."), elem_id="status"
        )
        self.pictures: list[gr.Image] = []
        self.captions: list[gr.HTML] = []
        with gr.Row():
            for method, name in METHODS.items():
                with gr.Column(min_width=180):
                    self.pictures.append(_image(f"picture-{method}", name))
                    self.captions.append(gr.HTML(captions.waiting_html(), elem_id=f"caption-{method}"))
        names = [(name, method) for method, name in METHODS.items()]
        with gr.Row():
            with gr.Column(min_width=300):
                with gr.Row():
                    self.left = gr.Dropdown(names, value="sd", label="Left", min_width=170, elem_id="left")
                    self.right = gr.Dropdown(names, value="agentsd", label="Right", min_width=170, elem_id="right")
                self.slider = gr.ImageSlider(
                    label="Move the slider", interactive=False, format="png", elem_id="slider", max_height=480,
                    buttons=["fullscreen"],
                )  # fmt: skip
            with gr.Column(min_width=300):
                self.difference_text = gr.HTML(captions.waiting_html(), elem_id="difference-text")
                self.difference = _image("difference", f"Where they differ, {_GAIN}× amplified")
        self.shown = gr.State({})
        """Paths of the three pictures on show, by method."""

    def wire(self, begin: Any, run_id: gr.Textbox, history: History) -> None:
        """Answer to the page; `begin` is the event that gives a run its number."""
        self.history = history
        begin.success(
            self.compare,
            [run_id, history.runs, *self.form.inputs],
            [self.status, *self.pictures, *self.captions, self.shown, history.runs, history.gallery],
            show_progress_on=[self.status],
            **DRAWS,
        )
        gr.on(
            [self.shown.change, self.left.change, self.right.change],
            self.side_by_side,
            [self.shown, self.left, self.right],
            [self.slider, self.difference, self.difference_text],
            **QUICK,
        )

    def compare(
        self,
        run_id: str,
        past: list[PastRun],
        *given: Any,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Iterator[dict]:
        """Draw the three; yields what has changed on the page, after every step."""
        try:
            settings = check(self.form.values(given), self.context.studio.models.names, self.context.limits)
        except (ValueError, TypeError) as error:
            yield {self.status: captions.message_html(str(error), "error")}
            return
        cases = methods_to_compare(settings.config)
        yield {
            self.status: captions.message_html(""),
            self.shown: {},
            **dict.fromkeys(self.pictures),
            **{caption: captions.waiting_html("waiting") for caption in self.captions},
        }
        drawings: dict[int, GeneratedImage] = {}
        paths: dict[str, str] = {}
        unread: Unread | None = None
        try:
            for report in self.context.studio.generate(self.context.run(run_id), settings, cases):
                tell(progress, report, cases)
                change: dict[Any, Any] = {}
                if isinstance(report, Unread):
                    unread = report
                elif isinstance(report, Stepped):
                    if report.round < 2:
                        change[self.captions[report.case]] = captions.step_html(report.round, report.step, report.total)
                    if report.preview:
                        change[self.pictures[report.case]] = report.preview
                elif isinstance(report, Drawn):
                    drawing = drawings[report.case] = report.drawing
                    if drawing.method not in paths:
                        name = file_name(settings.request.prompt, drawing.method, settings.request.seed)
                        paths[drawing.method] = self.context.outputs.picture(drawing.image, name, drawing.settings)
                        change[self.pictures[report.case]] = paths[drawing.method]
                    change |= dict(zip(self.captions, self._figures(drawings)))
                yield change or {self.status: gr.skip()}
        except Exception as error:
            unfinished = [i for i in range(len(cases)) if i not in drawings]
            yield {
                self.status: failed(error, settings),
                **{self.captions[i]: captions.waiting_html("not drawn") for i in unfinished},
                **{self.pictures[i]: None for i in unfinished},
            }
            return
        ordered = [drawings[i] for i in range(len(cases))]
        message = f"{pictures.verdict(ordered)} {unread_note(unread)}".strip()
        run = PastRun(
            paths["agentsd"],
            label(f"ratio {settings.config.ratio:g}", settings),
            message,
            ordered[-1].settings,
            paths,
            tuple(self._figures(drawings)),
        )
        yield {
            self.status: captions.message_html(message, "done"),
            self.shown: paths,
            **self.history.with_run(past, run),
        }

    def _figures(self, drawings: dict[int, GeneratedImage]) -> list[str]:
        first = drawings[0]
        return [captions.figures_html(pictures.Figures.of(drawings[i], first)) for i in sorted(drawings)]

    def side_by_side(self, shown: dict[str, str], left: str, right: str) -> tuple:
        """The slider, the difference map and its figures for two of the pictures."""
        if not shown or left not in shown or right not in shown:
            return None, None, captions.waiting_html()
        first, second = _open(shown[left]), _open(shown[right])
        apart = pictures.distance(first, second)
        text = f"distance {apart:.1f} of 255 (root mean square), PSNR {pictures.psnr(apart):.1f} dB"
        return (
            (shown[left], shown[right]),
            pictures.difference_map(first, second, _GAIN),
            captions.difference_html(METHODS[left], METHODS[right], text if apart else "the same in every pixel"),
        )

    def show_again(self, run: PastRun) -> dict[Any, Any]:
        """Changes of the page that show an earlier comparison."""
        return {
            self.status: captions.message_html("An earlier run. " + run.message, "done"),
            **{picture: run.shown[method] for picture, method in zip(self.pictures, METHODS)},
            **dict(zip(self.captions, run.captions)),
            self.shown: run.shown,
        }

    @property
    def outputs(self) -> list[Any]:
        """What `show_again` may change."""
        return [self.status, *self.pictures, *self.captions, self.shown]


def _image(elem_id: str, title: str) -> gr.Image:
    return gr.Image(
        label=title, interactive=False, format="png", elem_id=elem_id, elem_classes=["picture"],
        buttons=["download", "fullscreen"],
    )  # fmt: skip


def _open(path: str) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
