"""Form: the settings column of the page."""

from __future__ import annotations

import json
import random
from collections.abc import Mapping
from typing import Any

import gradio as gr

from agentsd import AgentConfig
from agentsd.config import SETTINGS
from agentsd.fields import written
from agentsd.images.demo_prompts import DEMO_NAMES
from agentsd.images.names import scheduler_name
from agentsd.images.quality_notes import quality_notes

from . import captions
from .context import PRIVATE, Context
from .models import Models, scheduler_to_set
from .prompts import unknown_note
from .restore import link_values
from .script import script
from .settings import (
    PATCH_FIELDS,
    PRESETS,
    RECOMMENDED,
    ROUNDS,
    SCHEDULER_CHOICES,
    check,
    check_patch,
    patch_values,
    preset_help,
    preset_of,
    preset_values,
    request_fields,
    trained_config,
)

_EXAMPLES = ["castle", "zebra", "strawberry", "ferris wheel"]
_PROMPT = "a high quality photograph of a {}."

_NO_PRESET = "own settings"
_AS_TRAINED = "as trained"

_LINK = "Copy a link to these settings"

# In the browser, at the click itself: later it no longer lets a page write to the clipboard. The address changes too,
# for browsers that never do (on a plain http address that is not this machine).
_COPY_LINK = """async (...given) => {
    const names = %s, usual = %s, values = {};
    names.forEach((name, i) => {
        if (name === "prompt" || given[i] !== null && (given[i] || 0) !== (usual[i] || 0)) values[name] = given[i];
    });
    const url = new URL(window.location.href);
    names.forEach(name => url.searchParams.delete(name));
    url.searchParams.set("settings", JSON.stringify(values));
    window.history.replaceState(null, "", url);
    try { await navigator.clipboard.writeText(url.toString()); return "Link copied"; }
    catch (error) { return "The link is in the address bar"; }
}"""
_NAME_AGAIN = f"() => new Promise(done => setTimeout(() => done({_LINK!r}), 1500))"


class Form:
    """The controls of a request, in `controls` by field name; the column is laid out where it is constructed.

    Args:
        context: shared.
    """

    def __init__(self, context: Context):
        self.context = context
        self.models: Models = context.studio.models
        self.controls: dict[str, Any] = {}
        self.trained = {name: config for name in self.models.names if (config := _trained(name)) is not None}
        """The settings that models were trained for, by the model's name; most have none."""
        self._layout()

    @property
    def inputs(self) -> list[Any]:
        """The controls in the order of `values`."""
        return list(self.controls.values())

    def values(self, given: tuple) -> dict[str, Any]:
        """Values by field name, of what an event got for `inputs`."""
        return dict(zip(self.controls, given))

    def updates(self, values: Mapping[str, Any]) -> dict[Any, Any]:
        """Changes of the page that put values into the form."""
        return {self.controls[name]: value for name, value in values.items() if name in self.controls}

    def _layout(self) -> None:
        limits = self.context.limits
        defaults = {name: field.default for name, field in request_fields(self.models.names, limits).items()}
        form = self.controls
        # Two columns, so that on a phone the results stand between them.
        with gr.Column(elem_id="ask"):
            form["prompt"] = gr.Textbox(
                _PROMPT.format(_EXAMPLES[0]),
                label="Prompt: what the image shows",
                lines=2,
                max_lines=6,
                elem_id="prompt",
            )
            gr.Examples(
                [[_PROMPT.format(subject)] for subject in _EXAMPLES], inputs=[form["prompt"]],
                label="Examples: the prompt", api_name="example", example_labels=_EXAMPLES,
            )  # fmt: skip
            with gr.Row():
                self.compare_button = gr.Button("Compare", variant="primary", elem_id="draw", min_width=120, scale=3)
                self.stop_button = gr.Button(
                    "Stop", variant="stop", elem_id="stop", min_width=80, scale=1, interactive=False
                )
            self.prompt_note = gr.HTML(visible=False, elem_id="prompt-note")
        with gr.Column(elem_id="settings"):
            self._layout_settings(defaults)

    def _layout_settings(self, defaults: dict[str, Any]) -> None:
        limits, form = self.context.limits, self.controls
        with gr.Row(equal_height=True):
            form["seed"] = gr.Number(
                label="Seed", value=defaults["seed"], precision=0, min_width=120, elem_id="seed", scale=2,
                info="number of the noise that an image begins as: the same seed, the same image",
            )  # fmt: skip
            with gr.Column(scale=1, min_width=100):
                self.random_button = gr.Button("New seed", size="sm", elem_id="random")
                self.keep_seed = gr.Checkbox(label="Keep it", value=True, elem_id="keep", container=False)
        with gr.Row():
            form["steps"] = gr.Number(
                label=f"Steps (1 … {limits.steps})", value=defaults["steps"], precision=0, min_width=120,
                elem_id="steps", info="the noise is taken away in so many steps; more are cleaner and slower",
            )  # fmt: skip
            form["guidance"] = gr.Number(
                label="Guidance", value=defaults["guidance"], step=0.5, min_width=120, elem_id="guidance",
                info="how closely the prompt is followed; 5 to 8 is usual",
            )  # fmt: skip
        first = self.models.names[0]
        self.preset = gr.Dropdown(
            [*PRESETS, *([_AS_TRAINED] if self.trained else []), _NO_PRESET],
            value=_AS_TRAINED if first in self.trained else "paper", label="Preset of AgentSD", elem_id="preset",
            info="a set of the settings below",
        )  # fmt: skip
        self.preset_note = gr.HTML(captions.remark_html(self._preset_help(self.preset.value)), elem_id="preset-note")
        for name, setting in SETTINGS.items():
            if not setting.advanced:
                self._patch_control(name)
        with gr.Accordion("More settings", open=False, elem_id="more"):
            form["negative_prompt"] = gr.Textbox(label="Negative prompt", lines=1, elem_id="negative_prompt")
            form["model"] = gr.Dropdown(
                list(self.models.names), value=self.models.names[0], label="Model", elem_id="model",
                visible=len(self.models.names) > 1,
            )  # fmt: skip
            form["scheduler"] = gr.Dropdown(
                list(SCHEDULER_CHOICES), value=RECOMMENDED, label="Scheduler", elem_id="scheduler",
                info="how the noise is taken away; recommended: the model's own, or DDIM where that is PLMS (which "
                "wants 50 steps)",
            )  # fmt: skip
            with gr.Row():
                for name in ("width", "height"):
                    form[name] = gr.Number(
                        label=name.capitalize(), value=None, precision=0, step=64, min_width=120, elem_id=name,
                        info=self._size_hint(self.models.names[0], name),
                    )  # fmt: skip
            form["rounds"] = gr.Slider(
                1, limits.rounds, value=ROUNDS.default, step=1, label="Timed rounds", elem_id="rounds",
                info="how often each method is timed, in turns; one round gives no speed-up in figures",
            )  # fmt: skip
        with gr.Accordion("Advanced settings of the patch", open=False, elem_id="advanced"):
            for name, setting in SETTINGS.items():
                if setting.advanced:
                    self._patch_control(name)
        self.link_button = gr.Button(_LINK, size="sm", elem_id="link")

    def _patch_control(self, name: str) -> None:
        """A control for a field of AgentConfig: chosen by its kind, so that a new field gets one by itself."""
        field, setting = PATCH_FIELDS[name], SETTINGS[name]
        common = {
            "label": "seed of the patch" if name == "seed" else name,
            "value": patch_values(self.trained.get(self.models.names[0]) or AgentConfig())[field.name],
            "elem_id": field.name,
            "info": setting.help,
        }
        if setting.slider:
            low, high, step = setting.slider  # the useful values; a saved image or a link may have others
            control: Any = gr.Slider(low, high, step=step, **common)
        elif field.kind is bool:
            control = gr.Checkbox(**common)
        elif field.kind in (int, float):
            control = gr.Number(precision=0 if field.kind is int else None, **common)
        elif setting.kind == "choice":
            control = gr.Dropdown([written(choice) for choice in setting.choices], **common)
        elif setting.kind == "flag":
            control = gr.Dropdown(["None", "True", "False"], **common)
        else:
            control = gr.Textbox(max_lines=1, **common)
        self.controls[field.name] = control

    def wire_code(self, page: gr.Blocks, code: gr.Code, **event: Any) -> None:
        """Keep the script, and the remark on the prompt, up to date with the form."""
        changes = [control.change for control in self.inputs]
        event |= {"trigger_mode": "always_last"}
        outputs = [code, self.prompt_note, self.preset, self.preset_note]
        gr.on([page.load, *changes], self._derived, self.inputs, outputs, preprocess=False, **event)
        patch = [self.controls[field.name] for field in PATCH_FIELDS.values()]
        model = self.controls["model"]
        self.preset.input(self._choose_preset, [self.preset, model], patch, **event)
        # Not `change`, which a restored image fires too: its own settings would be overwritten.
        model.input(self._choose_model, self.inputs, patch, preprocess=False, **event)
        self.random_button.click(lambda: random.randrange(2**31), None, self.controls["seed"], **event)

    def _derived(self, *given: Any) -> tuple[str, Any, str, str]:
        """What follows from the form: the script, the remarks under the prompt, the preset with its remark."""
        values = self.values(given)
        unknown = unknown_note(values["model"], str(values["prompt"] or ""))
        html = captions.notes_html(self._quality_notes(values), unknown, DEMO_NAMES)
        remark = gr.update(value=html, visible=bool(html))
        try:
            config = check_patch(values)
            preset = _AS_TRAINED if config == self.trained.get(values["model"]) else preset_of(config)
        except (ValueError, TypeError):
            preset = None  # the script says what is wrong
        preset = preset or _NO_PRESET
        return self._script(values), remark, preset, captions.remark_html(self._preset_help(preset))

    @staticmethod
    def _preset_help(name: str) -> str:
        own = {
            _NO_PRESET: "The settings below as you have set them.",
            _AS_TRAINED: "What this model was trained for, from the agentsd.json in its folder.",
        }
        return own.get(name) or preset_help(name)

    def _quality_notes(self, values: dict[str, Any]) -> list[str]:
        try:
            settings = check({**values, "prompt": values["prompt"] or "any"}, self.models.names, self.context.limits)
        except (ValueError, TypeError):
            return []  # the script says what is wrong
        model = self.models.loaded(settings.model)
        if model is None:
            return []
        own = model.pipe.scheduler
        scheduler = scheduler_to_set(settings.scheduler, own) or scheduler_name(own)
        return quality_notes(settings.request, scheduler, model.size)

    def _choose_model(self, *given: Any) -> list[Any]:
        """The values of the patch's controls for another model: those it was trained for.

        For a model without any they are the defaults if they were those of another model's training, else as they are.
        """
        values = self.values(given)
        config = self.trained.get(values["model"])
        if config is None and not self._are_trained(values):
            return [gr.skip() for _ in PATCH_FIELDS]
        return list(patch_values(config or AgentConfig()).values())

    def _are_trained(self, values: dict[str, Any]) -> bool:
        try:
            return check_patch(values) in self.trained.values()
        except (ValueError, TypeError):
            return False

    def _choose_preset(self, name: str, model: str = "") -> list[Any]:
        """The values of the patch's controls under a preset."""
        if name == _AS_TRAINED and model in self.trained:
            return list(patch_values(self.trained[model]).values())
        if name in (_NO_PRESET, _AS_TRAINED):
            return [gr.skip() for _ in PATCH_FIELDS]
        values = preset_values(name)
        return [values.get(field.name, field.default) for field in PATCH_FIELDS.values()]

    def _script(self, values: dict[str, Any]) -> str:
        if not str(values["prompt"] or "").strip():
            values["prompt"] = _PROMPT.format("castle")
        try:
            settings = check(values, self.models.names, self.context.limits)
            model = self.models.loaded(settings.model)
            return script(settings, scheduler_to_set(settings.scheduler, model.pipe.scheduler if model else None))
        except (ValueError, TypeError) as error:
            return "# " + str(error).replace("\n", " ")

    def wire_link(self) -> None:
        """A link carries the settings in its address, so that it also works after a restart of the app.

        Gradio's own DeepLinkButton is not used: once an example or a saved image has filled a field, its links keep the
        field's value of that time.
        """
        names = [*self.controls]
        defaults = [control.value for control in self.inputs]
        copy = _COPY_LINK % (json.dumps(names), json.dumps(defaults))
        self.link_button.click(None, self.inputs, self.link_button, js=copy, **PRIVATE)
        self.link_button.click(None, None, self.link_button, js=_NAME_AGAIN, **PRIVATE)

    def from_link(self, query: str) -> tuple[str, str, dict[str, Any]]:
        """(message or "", its kind, form values) of the settings in the page's address; what cannot be used is told."""
        try:
            values, remarks = link_values(query, self.models.names, self.context.limits)
        except (ValueError, TypeError) as error:
            return f"The settings in the link could not be used: {error}", "error", {}
        message = " ".join((["The settings of this link are in the form."] if values else []) + remarks)
        return message, "error" if remarks else "info", values

    def _size_hint(self, model_name: str, side: str) -> str:
        limits, model = self.context.limits, self.models.loaded(model_name)
        own = f", {dict(zip(('height', 'width'), model.size))[side]}" if model else ""
        return f"{limits.smallest} … {limits.largest} px; 0 or empty: the model's own{own}"

    def size_hints(self, name: str) -> list[Any]:
        """Updates of width and height for another model."""
        return [gr.update(info=self._size_hint(name, side)) for side in ("width", "height")]


def _trained(model: str) -> AgentConfig | None:
    try:
        return trained_config(model)
    except ValueError:
        return None  # loading the model says what is wrong with its file
