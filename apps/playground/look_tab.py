"""The Look inside tab: what one patched layer merged, and what its agents aggregated, step by step."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import gradio as gr
from PIL import Image

from agentsd.maps import agent_at, agent_map, agents_sheet, merge_map
from agentsd.patch import find_unet
from agentsd.unet.layers import find_layers
from agentsd.visualize import MOST_VIEWS, LayerView

from . import captions
from .context import GENERATES, LOST, QUICK, Context, PastRun, failed, label, tell
from .form import Form
from .jobs import Case, Looked, Note, Run
from .models import Model
from .outputs import file_name
from .settings import Settings, check

_GONE = (
    "This recording is no longer kept: it has made room for others, or the app was restarted. Generate again from the "
    "same settings."
)


@dataclass(frozen=True)
class Look:
    """What was recorded: the image, and one view per recorded UNet call."""

    image: Image.Image
    views: list[LayerView]

    @property
    def num_bytes(self) -> int:
        """Memory that the views take."""
        return sum(view.num_bytes for view in self.views)


class LookTab:
    """The tab; its components are laid out where it is constructed.

    Args:
        context: shared.
        form: the settings column.
    """

    what = "look"

    def __init__(self, context: Context, form: Form):
        self.context = context
        self.form = form
        models = context.studio.models
        with gr.Row(equal_height=True):
            self.layer = gr.Dropdown(
                layer_choices(models.loaded(models.names[0])), value="0", label="Layer", elem_id="layer", scale=3,
                min_width=240,
            )  # fmt: skip
            self.button = gr.Button(
                "Generate and look inside", variant="primary", elem_id="look", scale=1, min_width=180
            )
        self.status = gr.HTML(
            captions.message_html(
                "Generates with AgentSD and records one of the layers that compare the tokens (parts) of the image, at "
                f"every step or at {MOST_VIEWS} of them: which tokens it merges, and what each agent aggregates "
                "(collects)."
            ),
            elem_id="look-status",
        )
        self.run_id = gr.Textbox(visible=False)
        self.look_id = gr.Textbox(visible=False)
        """The key of the recording that is shown, "" before the first one; the page holds it."""
        with gr.Row():
            self.step = gr.Slider(0, 1, value=0, step=1, label="Recorded UNet call", elem_id="step", interactive=False)
            self.agent = gr.Slider(0, 1, value=0, step=1, label="Agent", elem_id="agent", interactive=False)
        self.caption = gr.HTML(elem_id="look-caption")
        with gr.Row():
            self.image = self._image("look-picture", "The image: click it")
            self.merge_map = self._image("merge-map", "Merged tokens")
            self.agent_map = self._image("agent-map", "What the agent aggregates")
        with gr.Accordion("Sixteen agents at once", open=False):
            self.sheet = self._image("agents-sheet", "Agents spread evenly over the image")

    @staticmethod
    def _image(elem_id: str, title: str) -> gr.Image:
        return gr.Image(
            label=title, interactive=False, format="png", elem_id=elem_id, elem_classes=["result"], min_width=180,
            buttons=["download", "fullscreen"],
        )  # fmt: skip

    def wire(self, begun: Any, finished: gr.Textbox) -> Any:
        """Connect the events; `begun` gives a run its key, `finished` takes what the browser keeps of it."""
        self.finished = finished
        maps = [self.merge_map, self.agent_map, self.caption]
        generated = begun.success(
            self.look,
            [self.run_id, self.layer, *self.form.inputs],
            [self.status, self.look_id, self.image, self.step, self.agent, *maps, self.sheet, finished],
            show_progress_on=[self.status],
            **GENERATES,
        )
        chosen = [self.look_id, self.step, self.agent]
        # Unchecked by Gradio, as an app that was restarted no longer knows how far these sliders go.
        latest = {"trigger_mode": "always_last", "preprocess": False, **QUICK}
        self.agent.change(self.show, chosen, maps, **latest)
        self.step.input(self.change_step, chosen, [self.agent, *maps, self.sheet], **latest)
        self.image.select(self.choose, [self.look_id, self.step], [self.agent, self.caption], preprocess=False, **QUICK)
        return generated

    def look(
        self,
        run_id: str,
        layer: str | None,
        *given: Any,
        progress: gr.Progress = gr.Progress(),  # noqa: B008
    ) -> Iterator[dict]:
        """Generate and record; yields the changes of the page."""
        with self.context.running(run_id) as run:
            if run is None:
                yield {self.status: captions.message_html(LOST, "error")}
            else:
                yield from self._look(run, str(layer or "0"), given, progress)

    def _look(self, run: Run, layer: str, given: tuple, progress: gr.Progress) -> Iterator[dict]:
        try:
            settings = check(self.form.values(given), self.context.studio.models.names, self.context.limits)
        except (ValueError, TypeError) as error:
            yield {self.status: captions.message_html(str(error), "error")}
            return
        yield {self.status: captions.message_html("")}
        cases = [Case("AgentSD", "agentsd", settings.config)]
        looked: Looked | None = None
        notes: list[str] = []
        try:
            for report in self.context.studio.look(run, settings, int(layer) if layer.isdigit() else layer):
                tell(progress, report, cases)
                if isinstance(report, Looked):
                    looked = report
                elif isinstance(report, Note):
                    notes.append(report.text)
                else:
                    yield {self.status: gr.skip()}
        except Exception as error:
            yield {self.status: failed(self._with_way_out(error, settings, layer), settings)}
            return
        if looked is None:  # stopped: the page has been told
            return
        look = Look(looked.image, looked.views)
        path = self.context.outputs.image(
            looked.image, file_name(settings.request.prompt, "agentsd", settings.request.seed), looked.settings
        )
        view = look.views[0]
        height, width = view.grid
        text = (
            f"{view.layer}: {height} × {width} tokens, recorded in {len(look.views)} UNet calls. Tokens of one colour "
            "were merged into one; those without colour were not merged. The ring is the agent's own place; the "
            "brighter a place, the more the agent aggregates from it. Move the step and the agent, or click a place in "
            "the image to see its agent."
        )
        text = " ".join([text, *notes])
        past = PastRun("look", path, label("inside", settings), text, looked.settings)
        yield {
            self.status: captions.message_html(text, "done"),
            self.look_id: self.context.keep_look(run, look, look.num_bytes),
            self.image: path,
            self.step: gr.update(maximum=max(1, len(look.views) - 1), value=0, interactive=len(look.views) > 1),
            **self._maps(look, view, 0),
            self.finished: past.keep(self.context.outputs).to_json(),
        }

    def _with_way_out(self, error: Exception, settings: Settings, layer: str) -> Exception:
        """Add the remedy for a layer that is in the list but beyond this patch's max_downsample."""
        model = self.context.studio.models.loaded(settings.model)
        downsample = dict(model.layers).get(layer) if model else None
        if model is None or downsample is None or not isinstance(error, ValueError):
            return error
        reached, _ = find_layers(find_unet(model.pipe), settings.config)
        if layer in [one.name for one in reached]:
            return error
        return ValueError(
            f"{layer} is not patched with these settings: choose max_downsample {downsample} or more under "
            "“Advanced settings of the patch”, or another layer"
        )

    def show(self, look_id: str | None, step: Any, agent: Any) -> dict:
        """The maps of one agent."""
        shown = self._view(look_id, step)
        if shown is None:
            return self._gone(look_id)
        look, view = shown
        changes = self._maps(look, view, int(agent or 0))
        return {key: changes[key] for key in (self.merge_map, self.agent_map, self.caption)}

    def change_step(self, look_id: str | None, step: Any, agent: Any) -> dict:
        """The maps of another step, with the number of agents in it."""
        shown = self._view(look_id, step)
        if shown is None:
            return self._gone(look_id)
        look, view = shown
        return self._maps(look, view, int(agent or 0))

    def choose(self, look_id: str | None, step: Any, event: gr.SelectData) -> dict:
        """The agent nearest to the place that was clicked."""
        shown = self._view(look_id, step)
        if shown is None:
            return self._gone(look_id)
        look, view = shown
        if view.agent_attention is None:
            return {self.agent: gr.skip()}
        x, y = event.index
        return {self.agent: agent_at(view, x / look.image.width, y / look.image.height)}

    def _gone(self, look_id: str | None) -> dict:
        """What is told where there is no recording: that it is gone, or nothing before the first one."""
        return {self.caption: captions.message_html(_GONE, "error") if look_id else ""}

    def _view(self, look_id: str | None, step: Any) -> tuple[Look, LayerView] | None:
        look = self.context.looks.get(look_id)
        if look is None:
            return None
        return look, look.views[min(max(int(step or 0), 0), len(look.views) - 1)]

    def _maps(self, look: Look, view: LayerView, agent: int) -> dict[Any, Any]:
        num_agents = 0 if view.agent_attention is None else len(view.agent_attention)
        agent = min(max(agent, 0), max(0, num_agents - 1))
        height, width = view.grid
        left = int(view.position.unique().numel())
        text = (
            f"UNet call {view.call}, timestep {view.timestep:g}, {view.phase.value} phase: {height * width} tokens "
            f"became {left}"
        )
        if view.agent_tokens is not None and num_agents:
            token = int(view.agent_tokens[agent])
            text += f"; agent {agent} of {num_agents} is in row {token // width}, column {token % width}."
        else:
            text += "; this phase has no agents."
        return {
            self.merge_map: merge_map(view, look.image),
            self.agent_map: agent_map(view, agent, look.image) if num_agents else None,
            self.sheet: agents_sheet(view, look.image) if num_agents else None,
            self.caption: captions.message_html(text),
            self.agent: gr.update(maximum=max(1, num_agents - 1), value=agent, interactive=num_agents > 1),
        }


def layer_choices(model: Model | None) -> list[tuple[str, str]]:
    """(label, value) of each layer; "0" is the first layer that is patched with the settings in use."""
    layers = model.layers if model else ()
    return [("the first patched layer", "0")] + [
        (f"{name.removesuffix('.attn1')} (1/{downsample} of the latent's side)", name) for name, downsample in layers
    ]
