"""The Compare tab: three images from one seed, and any two of them against each other."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr
from PIL import Image

from agentsd.images.generate import GeneratedImage
from agentsd.images.methods import METHODS

from . import captions
from .context import GENERATES, QUICK, Context, History, PastRun, failed, label, tell
from .example import example_images
from .figures import Figures, verdict
from .form import Form
from .images import difference_map, distance, psnr
from .jobs import Finished, Note, Stepped, Stopped, methods_to_compare
from .outputs import file_name
from .settings import check

_GAIN = 4


class CompareTab:
    """The tab; its components are laid out where it is constructed.

    Args:
        context: shared.
        form: the settings column.
    """

    def __init__(self, context: Context, form: Form):
        self.context = context
        self.form = form
        self.status = gr.HTML(
            captions.message_html(
                "Below is a stored example, by the demo model. Write a prompt or click an example, then compare."
            ),
            elem_id="status",
        )
        self.images: list[gr.Image] = []
        self.captions: list[gr.HTML] = []
        example = example_images()
        with gr.Row():
            for method, name in METHODS.items():
                with gr.Column(min_width=180):
                    self.images.append(_image(f"picture-{method}", name, example[method]))
                    self.captions.append(gr.HTML(captions.waiting_html("stored example"), elem_id=f"caption-{method}"))
        names = [(name, method) for method, name in METHODS.items()]
        with gr.Row():
            with gr.Column(min_width=300):
                with gr.Row():
                    self.left = gr.Dropdown(names, value="sd", label="Left", min_width=170, elem_id="left")
                    self.right = gr.Dropdown(names, value="agentsd", label="Right", min_width=170, elem_id="right")
                self.slider = gr.ImageSlider(
                    (example["sd"], example["agentsd"]), label="Move the slider", interactive=False, format="png",
                    elem_id="slider", max_height=480, buttons=["fullscreen"],
                )  # fmt: skip
            with gr.Column(min_width=300):
                amplified, text = _difference(example["sd"], example["agentsd"], "sd", "agentsd")
                self.difference_text = gr.HTML(text, elem_id="difference-text")
                self.difference = _image("difference", f"Where they differ, {_GAIN}× amplified", amplified)
        self.shown = gr.State(None)
        """Paths of the three images that are shown, by method; None while it is the stored example."""

    def wire(self, begin: Any, run_id: gr.Textbox, history: History) -> None:
        """Connect the events; `begin` is the event that gives a run its key."""
        self.history = history
        begin.success(
            self.compare,
            [run_id, history.runs, *self.form.inputs],
            [self.status, *self.images, *self.captions, self.shown, history.runs, history.gallery],
            show_progress_on=[self.status],
            **GENERATES,
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
        """Generate the three; yields the changes of the page after every step."""
        try:
            settings = check(self.form.values(given), self.context.studio.models.names, self.context.limits)
        except (ValueError, TypeError) as error:
            yield {self.status: captions.message_html(str(error), "error")}
            return
        cases = methods_to_compare(settings.config)
        yield {
            self.status: captions.message_html(""),
            self.shown: {},
            **dict.fromkeys(self.images),
            **{caption: captions.waiting_html("waiting") for caption in self.captions},
        }
        done: dict[int, GeneratedImage] = {}
        paths: dict[str, str] = {}
        notes: list[str] = []
        stopped = ""
        try:
            for report in self.context.studio.generate(self.context.run(run_id), settings, cases):
                tell(progress, report, cases)
                change: dict[Any, Any] = {}
                if isinstance(report, Note):
                    notes.append(report.text)
                elif isinstance(report, Stepped):
                    if report.round < 2:
                        change[self.captions[report.case]] = captions.step_html(report.round, report.step, report.total)
                    if report.preview:
                        change[self.images[report.case]] = report.preview
                elif isinstance(report, Finished):
                    one = done[report.case] = report.generated
                    if one.method not in paths:
                        name = file_name(settings.request.prompt, one.method, settings.request.seed)
                        paths[one.method] = self.context.outputs.image(one.image, name, one.settings)
                        change[self.images[report.case]] = paths[one.method]
                    change |= dict(zip(self.captions, self._figures(done)))
                yield change or {self.status: gr.skip()}
        except Exception as error:
            unfinished = [i for i in range(len(cases)) if i not in done]
            if unfinished or not isinstance(error, Stopped):
                yield {
                    self.status: failed(error, settings),
                    **{self.captions[i]: captions.waiting_html("not generated") for i in unfinished},
                    **{self.images[i]: None for i in unfinished},
                }
                return
            stopped = "Stopped."  # while being timed again: the three images are there
        ordered = [done[i] for i in range(len(cases))]
        message = " ".join([stopped, verdict(ordered), *notes]).strip()
        run = PastRun(
            paths["agentsd"],
            label(f"ratio {settings.config.ratio:g}", settings),
            message,
            ordered[-1].settings,
            paths,
            tuple(self._figures(done)),
        )
        yield {
            self.status: captions.message_html(message, "done"),
            self.shown: paths,
            **self.history.with_run(past, run),
        }

    def _figures(self, done: dict[int, GeneratedImage]) -> list[str]:
        return [captions.figures_html(Figures.of(done[i], done[0])) for i in sorted(done)]

    def side_by_side(self, shown: dict[str, str] | None, left: str, right: str) -> tuple:
        """The slider, the difference map and its figures for two of the images."""
        if shown == {}:  # a run is going on
            return None, None, captions.waiting_html()
        if shown is None:
            example = example_images()
            return (example[left], example[right]), *_difference(example[left], example[right], left, right)
        return (shown[left], shown[right]), *_difference(_open(shown[left]), _open(shown[right]), left, right)

    def show_again(self, run: PastRun) -> dict[Any, Any]:
        """Changes of the page that show an earlier comparison."""
        return {
            self.status: captions.message_html("An earlier run. " + run.message, "done"),
            **{image: run.shown[method] for image, method in zip(self.images, METHODS)},
            **dict(zip(self.captions, run.captions)),
            self.shown: run.shown,
        }

    @property
    def outputs(self) -> list[Any]:
        """What `show_again` may change."""
        return [self.status, *self.images, *self.captions, self.shown]


def _difference(first: Image.Image, second: Image.Image, left: str, right: str) -> tuple[Image.Image, str]:
    """(difference map, text) of two images by the methods left and right."""
    rmse = distance(first, second)
    text = f"distance {rmse:.1f} of 255 (root mean square), PSNR {psnr(rmse):.1f} dB"
    return (
        difference_map(first, second, _GAIN),
        captions.difference_html(METHODS[left], METHODS[right], text if rmse else "the same in every pixel"),
    )


def _image(elem_id: str, title: str, value: Image.Image | None = None) -> gr.Image:
    return gr.Image(
        value, label=title, interactive=False, format="png", elem_id=elem_id, elem_classes=["result"],
        buttons=["download", "fullscreen"],
    )  # fmt: skip


def _open(path: str) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
