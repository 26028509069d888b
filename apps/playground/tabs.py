"""The tabs together: what of them the browser keeps, and what a page shows when it is opened."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from . import captions
from .browser import Entry, Opened, read_entries
from .compare_tab import CompareTab
from .form import Form
from .history_tab import HistoryTab
from .look_tab import LookTab
from .sweep_tab import SweepTab

_STOPPED = "What was being generated has ended without a result: the page was loaded again, or the app restarted."


@dataclass(frozen=True)
class Tabs:
    """The form and the four tabs of one page."""

    form: Form
    compare: CompareTab
    look: LookTab
    sweep: SweepTab
    history: HistoryTab

    @property
    def kept(self) -> dict[str, Any]:
        """The controls whose values outlive a reload, by name."""
        swept = dict(zip(("sweep_field", "sweep_first", "sweep_last", "sweep_count"), self.sweep.range))
        return {**self.form.controls, "keep_seed": self.form.keep_seed, "layer": self.look.layer, **swept}

    def open(self, opened: Opened) -> dict[Any, Any]:
        """Changes of a page that was just opened.

        A link's settings win, unless the page is only loaded again: what was typed since is newer than its address.
        """
        said: list[str] = []
        kind, values = "info", dict[str, Any]()
        if not (opened.again and opened.form):
            text, kind, values = self.form.from_link(opened.search)
            said += [text] if text else []
        entries = read_entries(opened.runs)
        changes: dict[Any, Any] = {
            self.history.past: opened.runs,
            self.history.gallery: self.history.images(entries),
            **self.form.updates(values),
        }
        if not said and opened.form:
            changes |= {control: opened.form[name] for name, control in self.kept.items()
                        if name in opened.form and _fits(control, opened.form[name])}  # fmt: skip
        if opened.again:
            last = {entry.what: entry for entry in reversed(entries)}
            said += [_STOPPED] if opened.busy else []
            changes |= self._as_before(last, said)
        if not opened.stored:
            said.append(
                "This browser stores nothing for this page (a private window, or cookies are blocked): when it is "
                "loaded again, the form and History are empty."
            )
        if opened.lost is None:
            said.append("The past runs that this browser had kept could not be read; History begins anew.")
        elif opened.lost:
            said.append(f"{opened.lost} of the past runs that this browser had kept could not be read.")
        if said and self.compare.status not in changes:
            text = " ".join([*said, "" if values or opened.form else "Below is a stored example."]).strip()
            changes[self.compare.status] = captions.message_html(text, kind)
        return changes

    def _as_before(self, last: dict[str, Entry], said: list[str]) -> dict[Any, Any]:
        """What the tabs had shown before the page was loaded again, or that it is gone."""
        changes: dict[Any, Any] = {}
        if "look" in last:
            text = (
                "The maps were dropped when the page was loaded again; a click on the run under History puts its "
                "settings back."
            )
            changes[self.look.status] = captions.message_html(text)
        if "sweep" in last:
            text = "The charts were dropped when the page was loaded again; the run and its images are under History."
            changes[self.sweep.status] = captions.message_html(text)
        if "compare" in last:
            entry = last["compare"]
            run = self.compare.context.outputs.recall(entry.id)
            if run is None:
                said.append(
                    "The images of your last comparison are no longer kept; its settings are under History. Below is a "
                    "stored example."
                )
            else:
                about = " ".join([*said, "Your last comparison, from before the page was loaded again."])
                changes |= self.compare.show_again(entry.id, run, about)
        return changes


def _fits(control: Any, value: Any) -> bool:
    """Whether a control can show a value that a browser has kept. Its range is checked when it is used."""
    if isinstance(control, (gr.Dropdown, gr.Radio)):
        return value in [choice for _, choice in control.choices]
    if isinstance(control, gr.Checkbox):
        return isinstance(value, bool)
    if isinstance(control, (gr.Number, gr.Slider)):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return number or (value is None and isinstance(control, gr.Number))
    return isinstance(value, str)
