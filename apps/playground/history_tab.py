"""The History tab: the session's runs, and settings from a saved image."""

from __future__ import annotations

from typing import Any

import gradio as gr

from . import captions
from .compare_tab import CompareTab
from .context import QUICK, Context, History, PastRun
from .form import Form
from .restore import form_values, restore


class HistoryTab:
    """The tab; its components are laid out where it is constructed.

    Args:
        context: shared.
        form: the settings column, which settings are put back into.
        compare: the tab that shows an earlier run again.
    """

    def __init__(self, context: Context, form: Form, compare: CompareTab):
        self.context = context
        self.form = form
        self.compare = compare
        self.dropped = gr.File(
            label="Drop a saved image (PNG) here", file_types=[".png"], type="filepath",
            elem_id="dropped", height=140,
        )  # fmt: skip
        self.status = gr.HTML(
            captions.message_html(
                "Every image saved here carries its settings inside the PNG; dropped in, it puts them back. A click on "
                "a run below does so too, and shows its images under Compare."
            ),
            elem_id="history-status",
        )
        past = gr.Gallery(
            label="Runs of this session: click one", columns=4,
            fit_columns=False,
            height="auto", object_fit="contain", format="png", elem_id="past", allow_preview=False, interactive=False,
            buttons=[],
        )  # fmt: skip
        self.history = History(gr.State([]), past)

    def wire(self) -> None:
        """Connect the events."""
        self.dropped.upload(self.restore, self.dropped, [self.status, *self.form.inputs], **QUICK)
        self.history.gallery.select(
            self.recall, self.history.runs, [self.status, *self.compare.outputs, *self.form.inputs], **QUICK
        )

    def restore(self, path: str) -> dict[Any, Any]:
        """Put the settings of a dropped image into the form."""
        try:
            values, remarks = restore(path, self.context.studio.models.names, self.context.limits)
        except (ValueError, TypeError, OSError) as error:
            return {self.status: captions.message_html(str(error), "error")}
        text = " ".join(["The settings of this image are in the form.", *remarks])
        return {self.status: captions.message_html(text, "done"), **self.form.updates(values)}

    def recall(self, runs: list[PastRun], event: gr.SelectData) -> dict[Any, Any]:
        """Show an earlier run again: its settings, and of a comparison the images and figures."""
        run = runs[event.index]
        values, _ = form_values(run.settings, self.context.studio.models.names, self.context.limits)
        where = "shown under Compare, and its" if run.shown else "its"
        return {
            self.status: captions.message_html(f"{run.label}: {where} settings are in the form. {run.message}", "done"),
            **(self.compare.show_again(run) if run.shown else {}),
            **self.form.updates(values),
        }
