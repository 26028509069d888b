"""The History tab: the runs of this browser, and settings from a saved image."""

from __future__ import annotations

from typing import Any

import gradio as gr
from PIL import Image

from . import browser, captions
from .browser import Entry, read_entries
from .compare_tab import CompareTab
from .context import PRIVATE, QUICK, Context
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
                "a run below does so too, and shows its images under Compare. The list is kept in this browser, also "
                "when the page is loaded again; the images for a day, or until the app ends."
            ),
            elem_id="history-status",
        )
        self.gallery = gr.Gallery(
            label="Your runs: click one", columns=4, fit_columns=False, height="auto", object_fit="contain",
            format="png", elem_id="past", allow_preview=False, interactive=False, buttons=[],
        )  # fmt: skip
        self.clear_button = gr.Button("Forget these runs", size="sm", elem_id="forget")
        self.finished = gr.Textbox(visible=False)
        """The run that has ended last, as the browser keeps it."""
        self.past = gr.Textbox("[]", visible=False)
        """All runs that the list shows; the page holds them, so that no other run is taken for the one clicked."""

    def wire(self, generated: list[Any]) -> None:
        """Connect the events; `generated` are the events that generate, after which a run may have ended."""
        self.dropped.upload(self.restore, self.dropped, [self.status, *self.form.inputs], **QUICK)
        for event in generated:
            # In the browser, which has the runs of all its pages; a list sent along with the request would be old.
            listed = event.then(None, self.finished, self.past, js=browser.ADD, **PRIVATE)
            listed.then(self.listed, self.past, [self.gallery, self.finished], **QUICK)
        self.clear_button.click(None, None, self.past, js=browser.CLEAR, **PRIVATE).then(
            self.listed, self.past, [self.gallery, self.finished], **QUICK
        )
        self.gallery.select(
            self.recall, self.past, [self.status, *self.compare.outputs, *self.form.inputs], preprocess=False, **QUICK
        ).then(self.compare.side_by_side, self.compare.chosen, self.compare.comparison, preprocess=False, **QUICK)

    def listed(self, past: str | None) -> tuple[list[tuple[Any, str]], str]:
        """The images of the list; and nothing in `finished`, which is in the list now."""
        return self.images(read_entries(past)), ""

    def images(self, entries: list[Entry]) -> list[tuple[Any, str]]:
        """What the gallery shows of each run: its image, or a small one where that is gone."""
        return [(self._image(entry), entry.label) for entry in entries]

    def _image(self, entry: Entry) -> Any:
        run = self.context.outputs.recall(entry.id)
        return run["image"] if run else entry.small_image() or Image.new("RGB", (64, 64), "grey")

    def restore(self, path: str) -> dict[Any, Any]:
        """Put the settings of a dropped image into the form."""
        try:
            values, remarks = restore(path, self.context.studio.models.names, self.context.limits)
        except (ValueError, TypeError, OSError) as error:
            return {self.status: captions.message_html(str(error), "error")}
        text = " ".join(["The settings of this image are in the form.", *remarks])
        return {self.status: captions.message_html(text, "done"), **self.form.updates(values)}

    def recall(self, past: str | None, event: gr.SelectData) -> dict[Any, Any]:
        """Show an earlier run again: its settings, and of a comparison the images and figures."""
        entries = read_entries(past)
        if not 0 <= event.index < len(entries):
            text = "This run is no longer in the list; load the page again to see the list as it is."
            return {self.status: captions.message_html(text, "error")}
        entry = entries[event.index]
        try:
            values, remarks = form_values(entry.settings, self.context.studio.models.names, self.context.limits)
        except (ValueError, TypeError) as error:
            text = f"{entry.label}: its settings cannot be used here: {error}"
            return {self.status: captions.message_html(text, "error")}
        run = self.context.outputs.recall(entry.id)
        changes: dict[Any, Any] = {}
        if run is None:
            where = (
                "its settings are in the form. Its images are no longer kept (the app was restarted since, or a day "
                "has passed); the same settings generate them again."
            )
        elif entry.what == "compare":
            where = "shown under Compare, and its settings are in the form."
            changes = self.compare.show_again(entry.id, run)
        else:
            where = "its settings are in the form."
        text = " ".join([f"{entry.label}: {where}", *remarks, entry.message])
        return {self.status: captions.message_html(text, "done"), **changes, **self.form.updates(values)}
