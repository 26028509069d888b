"""The page: the settings column, the tabs, the code, and which click begins what."""

from __future__ import annotations

import json
import random
from typing import Any

import gradio as gr

from . import browser, captions
from .api import Api
from .compare_tab import CompareTab
from .context import IN_LINE, PRIVATE, QUICK, Context
from .form import Form
from .history_tab import HistoryTab
from .jobs import Studio
from .look_tab import LookTab, layer_choices
from .outputs import Outputs
from .settings import Limits
from .sweep_tab import SweepTab
from .tabs import Tabs

_TITLE = """<h1>agentsd</h1>
<p>Image models such as Stable Diffusion make an image out of noise, in steps. In each step every part of the image is
compared with every other one, and at large sizes that takes the longest. AgentSD makes it cheaper, with no training.
<b>Compare</b> makes the same image without it, by an older method, and with it: see how fast each is, and how alike
they are.</p>
<details><summary>What do the words mean?</summary><dl>
<dt>token</dt><dd>One small part of the image inside the model: a 512 px image has 64 × 64 of them.</dd>
<dt>self-attention</dt><dd>The layers in which every token is compared with every other one.</dd>
<dt>merge</dt><dd>Tokens that look alike are averaged, so that fewer are left to compare.</dd>
<dt>agents</dt><dd>A few tokens that speak for all: they collect from all tokens, and all tokens read from them.</dd>
<dt>UNet call</dt><dd>One run of the network that takes noise away: one a step with most schedulers.</dd>
<dt>step caching</dt><dd>A UNet call reuses much of the call before, as little changes from step to step.</dd>
<dt>patch</dt><dd>What agentsd puts into a model, and takes out again: its settings are the ones from “Preset” on.</dd>
<dt>distance, PSNR</dt><dd>How far an image is from Stable Diffusion's own. Distance 0 and a high PSNR are near; as a
rule of thumb, hardly anyone sees a difference above 40 dB.</dd>
</dl></details>"""

# On a phone the results are below the settings, out of sight after the click.
_SHOW_RESULTS = """() => { if (window.innerWidth <= 800)
    document.querySelector('#status')?.scrollIntoView({behavior: 'smooth', block: 'center'}) }"""

_FAILED = captions.message_html(
    "There was no answer: the app was stopped or restarted, or too many requests are waiting. Everything that you "
    "typed is still here; try again in a moment.",
    "error",
)
_FAILED = browser.script(f"(kept.busy(false), [{{__type__: 'update', interactive: false}}, {json.dumps(_FAILED)}])", "")


def _visitor(request: gr.Request) -> str:
    """The key of the session: a page has one."""
    return request.session_hash or ""


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
            with gr.Row(elem_id="main"):
                form = Form(self.context)
                with gr.Column(elem_id="results"):
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

            going = gr.Textbox(visible=False)

            # First of all events: the first function of a name gets it.
            Api(self.context.studio, self.context.outputs, self.context.limits).register(**IN_LINE)
            generated = []
            for tab, clicks in (
                (compare, [form.compare_button.click, form.controls["prompt"].submit]),
                (look, [look.button.click]),
                (sweep, [sweep.button.click]),
            ):
                begun = self._begin(form, tab, clicks)
                event = tab.wire(begun, history.finished)
                generated.append(event)
                # No answer at all reaches the page as a failure; what is said of it cannot come from the app.
                for failed in (begun.failure, event.failure):
                    failed(None, None, [form.stop_button, tab.status], js=_FAILED, **PRIVATE)
                for ended in (event.then, event.failure):
                    ended(self.ended, None, [form.stop_button, going], **QUICK).then(
                        None, going, None, js=browser.BUSY, **PRIVATE
                    )
            history.wire(generated)
            form.wire_code(page, code, **QUICK)
            form.wire_link()
            form.compare_button.click(None, js=_SHOW_RESULTS, **QUICK)
            form.stop_button.click(self.stop, None, form.stop_button, **QUICK)
            form.controls["model"].change(
                lambda name: [*form.size_hints(name), gr.update(choices=layer_choices(models.loaded(name)), value="0")],
                form.controls["model"],
                [form.controls["width"], form.controls["height"], look.layer],
                **QUICK,
            )
            self.tabs = Tabs(form, compare, look, sweep, history)
            kept = self.tabs.kept
            opened = gr.Textbox(visible=False)
            page.load(
                self.open, opened,
                [*compare.outputs, look.status, sweep.status, history.past, history.gallery, *kept.values()],
                js=browser.OPENED, **QUICK,
            ).then(compare.side_by_side, compare.chosen, compare.comparison, preprocess=False, **QUICK)  # fmt: skip
            changes = [control.change for control in kept.values()]
            gr.on(changes, None, [*kept.values()], None, js=browser.save([*kept]), **PRIVATE)
            page.load(None, js=browser.KEYBOARD, **PRIVATE)
            page.unload(self.leave)
        return page

    def _begin(self, form: Form, tab: CompareTab | LookTab | SweepTab, clicks: list[Any]) -> Any:
        """The event that begins a run of a tab at once: its key, Stop, and a new seed if the old one is not kept."""

        def begin(keep_seed: bool, request: gr.Request) -> tuple[str, Any, Any]:
            seed = gr.skip() if keep_seed else random.randrange(2**31)
            return self.context.begin(_visitor(request), tab.what), seed, gr.update(interactive=True)

        return gr.on(
            clicks, begin, form.keep_seed, [tab.run_id, form.controls["seed"], form.stop_button],
            preprocess=False, js=browser.BEGUN, **QUICK,
        )  # fmt: skip

    def open(self, text: str | None) -> dict[Any, Any]:
        """What a page shows that was just opened: the settings in its address, or what its browser has kept."""
        return self.tabs.open(browser.read_opened(text))

    def stop(self, request: gr.Request) -> Any:
        """The Stop button: ends all that its visitor has going or waiting."""
        if not self.context.studio.stop(_visitor(request)):
            gr.Info("Nothing of yours is being generated.")
        return gr.update(interactive=False)

    def ended(self, request: gr.Request) -> tuple[Any, str]:
        """A run has ended: Stop stays lit while another one of its visitor is left."""
        busy = self.context.studio.busy(_visitor(request))
        return gr.update(interactive=busy), "1" if busy else ""

    def leave(self, request: gr.Request) -> None:
        """The page was closed."""
        self.context.leave(_visitor(request))
