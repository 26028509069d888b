"""The Compare tab: three images from one seed, and any two of them against each other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import gradio as gr
from PIL import Image

from agentsd.images.generate import GeneratedImage
from agentsd.images.methods import METHODS

from . import captions
from .context import GENERATES, LOST, QUICK, Context, PastRun, failed, label, tell
from .example import Example, read_example
from .figures import Figures, verdict
from .form import Form
from .images import difference_map, distance, psnr
from .jobs import Finished, Note, Run, Stepped, Stopped, methods_to_compare
from .outputs import file_name
from .settings import check

_GAIN = 4
EXAMPLE_SHOWN, IN_PROGRESS, NOTHING_SHOWN = "the stored example", "a run in progress", "a run that ended early"
_ABOUT = {
    "sd": "The model as it is: every part of the image is compared with every other one in each step.",
    "tomesd": "Token merging, the older method: parts that look alike are merged first, so fewer are compared.",
    "agentsd": "Merges too; and in the early steps a few agents speak for all parts, so still fewer are compared.",
}
_IMAGES_GONE = (
    "These images are no longer kept: the app was restarted since, or a day has passed. Compare generates them again "
    "from the same settings."
)


class CompareTab:
    """The tab; its components are laid out where it is constructed.

    Args:
        context: shared.
        form: the settings column.
    """

    what = "compare"

    def __init__(self, context: Context, form: Form):
        self.context = context
        self.form = form
        self.example: Example = read_example()
        self.status = gr.HTML(
            captions.message_html(
                f"Below is a stored example: {self.example.about}. Compare generates the images anew from your "
                "settings, and times them here."
            ),
            elem_id="status",
        )
        self.images: list[gr.Image] = []
        self.captions: list[gr.HTML] = []
        with gr.Row():
            for method, name in METHODS.items():
                with gr.Column(min_width=180):
                    self.images.append(_image(f"picture-{method}", name, self.example.images[method]))
                    gr.HTML(captions.remark_html(_ABOUT[method]), elem_id=f"about-{method}", elem_classes=["about"])
                    self.captions.append(
                        gr.HTML(
                            captions.figures_html(self.example.figures(method), "stored example"),
                            elem_id=f"caption-{method}",
                        )
                    )
        names = [(name, method) for method, name in METHODS.items()]
        slider, amplified, text = self._example_side_by_side("sd", "agentsd")
        with gr.Row():
            with gr.Column(min_width=300):
                with gr.Row():
                    self.left = gr.Dropdown(names, value="sd", label="Left image", min_width=170, elem_id="left")
                    self.right = gr.Dropdown(
                        names, value="agentsd", label="Right image", min_width=170, elem_id="right"
                    )
                self.slider = gr.ImageSlider(
                    slider, label="Move the slider", interactive=False, format="png",
                    elem_id="slider", max_height=480, buttons=["fullscreen"],
                )  # fmt: skip
            with gr.Column(min_width=300):
                self.difference_text = gr.HTML(text, elem_id="difference-text")
                self.difference = _image("difference", f"Where they differ, {_GAIN}× amplified", amplified)
        self.run_id = gr.Textbox(visible=False)
        self.shown = gr.Textbox(EXAMPLE_SHOWN, visible=False)
        """Whose three images are shown: the key of a past run, EXAMPLE_SHOWN or IN_PROGRESS. The page holds it, so that
        an app that was restarted never takes another one's images for them."""

    def wire(self, begun: Any, finished: gr.Textbox) -> Any:
        """Connect the events; `begun` gives a run its key, `finished` takes what the browser keeps of it."""
        self.finished = finished
        generated = begun.success(
            self.compare,
            [self.run_id, *self.form.inputs],
            [*self.outputs, *self.comparison, finished],
            show_progress_on=[self.status],
            **GENERATES,
        )
        for event in (generated.then, self.left.change, self.right.change):
            event(self.side_by_side, self.chosen, self.comparison, preprocess=False, **QUICK)
        return generated

    @property
    def chosen(self) -> list[Any]:
        """What `side_by_side` is given."""
        return [self.shown, self.left, self.right]

    @property
    def comparison(self) -> list[Any]:
        """What `side_by_side` changes."""
        return [self.slider, self.difference, self.difference_text]

    def compare(self, run_id: str, *given: Any, progress: gr.Progress = gr.Progress()) -> Iterator[dict]:  # noqa: B008
        """Generate the three; yields the changes of the page after every step."""
        with self.context.running(run_id) as run:
            if run is None:
                yield {self.status: captions.message_html(LOST, "error")}
            else:
                yield from self._compare(run, given, progress)

    def _compare(self, run: Run, given: tuple, progress: gr.Progress) -> Iterator[dict]:
        try:
            settings = check(self.form.values(given), self.context.studio.models.names, self.context.limits)
        except (ValueError, TypeError) as error:
            yield {self.status: captions.message_html(str(error), "error")}
            return
        cases = methods_to_compare(settings.config)
        yield {
            self.status: captions.message_html(""),
            self.shown: IN_PROGRESS,
            **dict.fromkeys(self.images),
            **dict(zip(self.comparison, (None, None, captions.waiting_html()))),
            **{caption: captions.waiting_html("waiting") for caption in self.captions},
        }
        done: dict[int, GeneratedImage] = {}
        paths: dict[str, str] = {}
        notes: list[str] = []
        stopped = ""
        try:
            for report in self.context.studio.generate(run, settings, cases):
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
                    self.shown: NOTHING_SHOWN,
                    **{self.captions[i]: captions.waiting_html("not generated") for i in unfinished},
                    **{self.images[i]: None for i in unfinished},
                }
                return
            stopped = "Stopped."  # while being timed again: the three images are there
        ordered = [done[i] for i in range(len(cases))]
        message = " ".join([stopped, verdict(ordered), *notes]).strip()
        past = PastRun(
            "compare",
            paths["agentsd"],
            label(f"ratio {settings.config.ratio:g}", settings),
            message,
            ordered[-1].settings,
            paths,
            tuple(self._figures(done)),
        )
        entry = past.keep(self.context.outputs)
        yield {
            self.status: captions.message_html(message, "done"),
            self.shown: entry.id,
            self.finished: entry.to_json(),
        }

    def _figures(self, done: dict[int, GeneratedImage]) -> list[str]:
        return [captions.figures_html(Figures.of(done[i], done[0])) for i in sorted(done)]

    def side_by_side(self, shown: str | None, left: str, right: str) -> tuple:
        """The slider, the difference map and its figures for two of the images."""
        if shown in (IN_PROGRESS, NOTHING_SHOWN):
            return None, None, captions.waiting_html()
        if shown == EXAMPLE_SHOWN:
            return self._example_side_by_side(left, right)
        run = self.context.outputs.recall(shown)
        if run is None:
            return None, None, captions.message_html(_IMAGES_GONE, "error")
        paths = run["shown"]
        return (paths[left], paths[right]), *_difference(_open(paths[left]), _open(paths[right]), left, right)

    def _example_side_by_side(self, left: str, right: str) -> tuple:
        images = self.example.images[left], self.example.images[right]
        return images, *_difference(*images, left, right, self.example.distance(left, right))

    def show_again(self, key: str, run: Mapping[str, Any], about: str = "An earlier run.") -> dict[Any, Any]:
        """Changes of the page that show an earlier comparison, as `Outputs.recall` gives it."""
        return {
            self.status: captions.message_html(f"{about} {run['message']}", "done"),
            **{image: run["shown"][method] for image, method in zip(self.images, METHODS)},
            **dict(zip(self.captions, run["captions"])),
            self.shown: key,
        }

    @property
    def outputs(self) -> list[Any]:
        """What `show_again` may change."""
        return [self.status, *self.images, *self.captions, self.shown]


def _difference(
    first: Image.Image, second: Image.Image, left: str, right: str, rmse: float | None = None
) -> tuple[Image.Image, str]:
    """(difference map, text) of two images by the methods left and right; their distance where it is not given."""
    rmse = distance(first, second) if rmse is None else rmse
    text = f"distance {rmse:.1f} of 255 (root mean square), PSNR {psnr(rmse):.1f} dB: {_seen(psnr(rmse))}"
    return (
        difference_map(first, second, _GAIN),
        captions.difference_html(METHODS[left], METHODS[right], text if rmse else "the same in every pixel"),
    )


def _seen(decibels: float) -> str:
    """What a PSNR means to the eye, as a rule of thumb."""
    if decibels >= 40:
        return "hardly anyone would see it"
    return "to be seen side by side" if decibels >= 30 else "plainly different"


def _image(elem_id: str, title: str, value: Image.Image | None = None) -> gr.Image:
    return gr.Image(
        value, label=title, interactive=False, format="png", elem_id=elem_id, elem_classes=["result"],
        buttons=["download", "fullscreen"],
    )  # fmt: skip


def _open(path: str) -> Image.Image:
    with Image.open(path) as image:
        return image.convert("RGB")
