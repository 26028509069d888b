"""The page: the settings column, the tabs, the code, and which click begins what."""

from __future__ import annotations

import random
from typing import Any

import gradio as gr

from . import captions
from .api import Api
from .compare_tab import CompareTab
from .context import IN_LINE, QUICK, Context
from .form import Form
from .history_tab import HistoryTab
from .jobs import Studio
from .look_tab import LookTab, layer_choices
from .outputs import Outputs
from .settings import Limits
from .sweep_tab import SweepTab

_TITLE = "<h1>agentsd</h1><p>The same seed by Stable Diffusion, ToMeSD and AgentSD: how fast, and how alike.</p>"

# On a phone the results are below the settings, out of sight after the click.
_SHOW_RESULTS = """() => { if (window.innerWidth < 768)
    document.querySelector('#status')?.scrollIntoView({behavior: 'smooth', block: 'center'}) }"""


class Page:
    """Builds the page; its methods answer the events that belong to no tab.

    Args:
        studio: what generates.
        outputs: where images are saved.
        limits: bounds on every request.
    """

    def __init__(self, studio: Studio, outputs: Outputs, limits: Limits):
        self.context = Context(studio, outputs, limits)

    def build(self) -> gr.Blocks:
        """The whole app, ready to launch."""
        models = self.context.studio.models
        with gr.Blocks(title="agentsd", analytics_enabled=False, delete_cache=(3600, 86400)) as page:
            gr.HTML(f"<div class='agentsd-head'>{_TITLE}</div>")
            problems = " ".join(models.failures.values())
            gr.HTML(captions.message_html(problems, "error"), visible=bool(problems), elem_id="problems")
            run_id = gr.Textbox(visible=False)
            with gr.Row():
                with gr.Column(scale=1, min_width=300):
                    form = Form(self.context)
                with gr.Column(scale=2, min_width=300):
                    with gr.Tabs(overflow_behavior="wrap"):  # the default hides half of them in a menu on a phone
                        with gr.Tab("Compare"):
                            compare = CompareTab(self.context, form)
                        with gr.Tab("Look inside"):
                            look = LookTab(self.context, form)
                        with gr.Tab("Sweep"):
                            sweep = SweepTab(self.context, form)
                        with gr.Tab("History"):
                            history = HistoryTab(self.context, form, compare)
                    with gr.Accordion("The code for these settings", open=True):
                        code = gr.Code(
                            language="python", interactive=False, show_label=False, elem_id="code", wrap_lines=True,
                            buttons=["copy"], show_line_numbers=False,
                        )  # fmt: skip

            # First of all events: the first function of a name gets it.
            Api(self.context.studio, self.context.outputs, self.context.limits).register(**IN_LINE)
            begin: dict[str, Any] = {
                "fn": self.begin,
                "inputs": form.keep_seed,
                "outputs": [run_id, form.controls["seed"]],
                "preprocess": False,
                **QUICK,
            }
            begun = gr.on([form.compare_button.click, form.controls["prompt"].submit], **begin)
            compare.wire(begun, run_id, history.history)
            look.wire(begin, run_id, history.history)
            sweep.wire(begin, run_id, history.history)
            history.wire()
            form.wire_code(page, code, **QUICK)
            form.wire_link(page, compare.status)
            form.compare_button.click(None, js=_SHOW_RESULTS, **QUICK)
            form.stop_button.click(self.stop, None, None, **QUICK)
            form.controls["model"].change(
                lambda name: [*form.size_hints(name), gr.update(choices=layer_choices(models.loaded(name)), value="0")],
                form.controls["model"],
                [form.controls["width"], form.controls["height"], look.layer],
                **QUICK,
            )
            page.unload(self.leave)
        return page

    def begin(self, keep_seed: bool, request: gr.Request) -> tuple[str, Any]:
        """Begin a run at a click: its key, and a new seed if the old one is not to be kept."""
        return self.context.begin(request.session_hash), gr.skip() if keep_seed else random.randrange(2**31)

    def stop(self, request: gr.Request) -> None:
        """The Stop button; no-op where nothing is being generated."""
        self.context.studio.stop(request.session_hash)

    def leave(self, request: gr.Request) -> None:
        """The page was closed."""
        self.context.leave(request.session_hash)
