"""Form: the settings column of the page."""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import gradio as gr

from agentsd.config import FIELD_NAMES
from agentsd.pipelines import SCHEDULERS

from .context import Context
from .models import Models
from .settings import OWN_SCHEDULER, PATCH_FIELDS, check, patch_help, request_fields, script

_IN_SIGHT = ("ratio", "early")  # the other settings of the patch stand under "Advanced"

_SLIDERS = {
    # field: (low, high, step) that are useful; other values can be typed
    "ratio": (0.0, 0.75, 0.05),
    "early": (0.0, 1.0, 0.05),
    "alpha": (0.0, 1.0, 0.025),
    "broadcast_exponent": (-0.5, 0.0, 0.05),
    "agent_ratio": (0.0, 1.0, 0.05),
}
_CHOICES = {
    "late": ["merge", "downsample"],
    "max_downsample": ["auto", "1", "2", "4", "8"],
    "upcast": ["None", "True", "False"],
}

_EXAMPLES = [
    ["a high quality photograph of a castle.", 3, 0.4],
    ["a high quality photograph of a zebra.", 1, 0.5],
    ["a high quality photograph of a strawberry.", 7, 0.4],
    ["a high quality photograph of a ferris wheel.", 2, 0.7],
]


def _subject(prompt: str) -> str:
    return prompt.removeprefix("a high quality photograph of a ").rstrip(".")


def _open_slider(*arguments: Any, **keywords: Any) -> gr.Slider:
    """A slider whose ends are a suggestion: what is out of bounds is refused where all is checked, by its name."""
    slider = gr.Slider(*arguments, **keywords)
    slider.preprocess = lambda payload: payload
    return slider


class Form:
    """The controls of a request, in `controls` by field name; the column is laid out where it is made.

    Args:
        context: shared.
    """

    def __init__(self, context: Context):
        self.context = context
        self.models: Models = context.studio.models
        self.controls: dict[str, Any] = {}
        self._layout()

    @property
    def inputs(self) -> list[Any]:
        """The controls in the order of `values`."""
        return list(self.controls.values())

    def values(self, given: tuple) -> dict[str, Any]:
        """By field name, what an event got for `inputs`."""
        return dict(zip(self.controls, given))

    def updates(self, values: Mapping[str, Any]) -> dict[Any, Any]:
        """Changes of the page that put values into the form."""
        return {self.controls[name]: value for name, value in values.items() if name in self.controls}

    def _layout(self) -> None:
        limits = self.context.limits
        defaults = {name: field.default for name, field in request_fields(self.models.names, limits).items()}
        form = self.controls
        form["prompt"] = gr.Textbox(
            label="Prompt", lines=2, max_lines=6, elem_id="prompt", placeholder="a high quality photograph of a castle."
        )
        with gr.Row():
            self.draw_button = gr.Button("Compare", variant="primary", elem_id="draw", min_width=120, scale=3)
            self.stop_button = gr.Button("Stop", variant="stop", elem_id="stop", min_width=80, scale=1)
        with gr.Row(equal_height=True):
            form["seed"] = gr.Number(
                label="Seed", value=defaults["seed"], precision=0, min_width=120, elem_id="seed", scale=2
            )
            with gr.Column(scale=1, min_width=100):
                self.random_button = gr.Button("Random", size="sm", elem_id="random")
                self.keep_seed = gr.Checkbox(label="Keep", value=True, elem_id="keep", container=False)
        with gr.Row():
            form["steps"] = gr.Number(
                label=f"Steps (1 … {limits.steps})", value=defaults["steps"], precision=0, min_width=120,
                elem_id="steps",
            )  # fmt: skip
            form["guidance"] = gr.Number(
                label="Guidance", value=defaults["guidance"], step=0.5, min_width=120, elem_id="guidance"
            )
        for name in _IN_SIGHT:
            self._patch_control(name)
        with gr.Accordion("More settings", open=False, elem_id="more"):
            form["negative_prompt"] = gr.Textbox(label="Negative prompt", lines=1, elem_id="negative_prompt")
            form["model"] = gr.Dropdown(
                list(self.models.names), value=self.models.names[0], label="Model", elem_id="model",
                visible=len(self.models.names) > 1,
            )  # fmt: skip
            form["scheduler"] = gr.Dropdown(
                [OWN_SCHEDULER, *SCHEDULERS], value=OWN_SCHEDULER, label="Scheduler", elem_id="scheduler"
            )
            with gr.Row():
                for name in ("width", "height"):
                    form[name] = gr.Number(
                        label=name.capitalize(), value=None, precision=0, step=64, min_width=120, elem_id=name,
                        placeholder=self._own_size(self.models.names[0])[name],
                        info=f"{limits.smallest} … {limits.largest} px, or empty",
                    )  # fmt: skip
            form["rounds"] = _open_slider(
                1, limits.rounds, value=1, step=1, label="Timed rounds", elem_id="rounds",
                info="how often each method is timed, in turns; more is steadier",
            )  # fmt: skip
        with gr.Accordion("Advanced settings of the patch", open=False, elem_id="advanced"):
            for name in FIELD_NAMES:
                if name not in _IN_SIGHT:
                    self._patch_control(name)
        gr.Examples(
            _EXAMPLES, inputs=[form["prompt"], form["seed"], form["ratio"]], label="Examples", api_name="example",
            example_labels=[_subject(prompt) for prompt, *_ in _EXAMPLES],
        )  # fmt: skip
        gr.DeepLinkButton("Copy a link to this page as it is", size="sm")

    def _patch_control(self, name: str) -> None:
        """A control for a field of AgentConfig: chosen by its type, so that a new field gets one by itself."""
        field = PATCH_FIELDS[name]
        common = {
            "label": "seed of the patch" if name == "seed" else name,
            "value": field.default,
            "elem_id": field.name,
            "info": patch_help().get(name),
        }
        if name in _SLIDERS:
            low, high, step = _SLIDERS[name]
            control: Any = _open_slider(low, high, step=step, **common)
        elif field.kind is bool:
            control = gr.Checkbox(**common)
        elif field.kind in (int, float):
            control = gr.Number(precision=0 if field.kind is int else None, **common)
        elif name in _CHOICES:
            control = gr.Dropdown(_CHOICES[name], **common)
        else:
            control = gr.Textbox(max_lines=1, **common)
        self.controls[field.name] = control

    def wire_code(self, page: gr.Blocks, code: gr.Code, **event: Any) -> None:
        """Keep the script up to date with the form."""
        changes = [control.change for control in self.inputs]
        gr.on([page.load, *changes], self._script, self.inputs, code, trigger_mode="always_last", **event)
        self.random_button.click(lambda: random.randrange(2**31), None, self.controls["seed"], **event)

    def _script(self, *given: Any) -> str:
        values = self.values(given)
        if not str(values["prompt"] or "").strip():
            values["prompt"] = "a high quality photograph of a castle."
        try:
            return script(check(values, self.models.names, self.context.limits))
        except (ValueError, TypeError) as error:
            return "# " + str(error).replace("\n", " ")

    def _own_size(self, name: str) -> dict[str, str]:
        model = self.models.loaded(name)
        height, width = model.size if model else ("", "")
        return {"width": str(width), "height": str(height)}

    def size_hints(self, name: str) -> list[Any]:
        """Updates of width and height for another model."""
        own = self._own_size(name)
        return [gr.update(placeholder=own["width"]), gr.update(placeholder=own["height"])]
