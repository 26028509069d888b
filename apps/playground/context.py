"""Context: what all tabs of the page share, and the keys of a visitor's runs and looks."""

from __future__ import annotations

import contextlib
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
from PIL import Image

from . import captions
from .browser import Entry, thumbnail
from .jobs import Case, Finished, Loading, Report, Run, Stepped, Studio, explain
from .outputs import Outputs
from .settings import Limits, Settings

PRIVATE: dict[str, Any] = {"api_visibility": "private"}
QUICK: dict[str, Any] = {**PRIVATE, "queue": False, "show_progress": "hidden"}
"""For events that answer at once."""
IN_LINE: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "generate"}
"""For all that generates: requests wait in one line, and Gradio shows each visitor their place in it."""
GENERATES: dict[str, Any] = {
    **PRIVATE,
    **IN_LINE,
    "show_progress": "full",
    "trigger_mode": "multiple",
    "preprocess": False,
}
"""For events of the page that generate. A second click on the same button ends the first one's run and takes its place;
other buttons' requests wait in line. Values come as they were typed, so that 2.5 steps are refused by name and not
rounded."""
LOST = (
    "The app no longer knows this request: it was restarted after the click. Everything that you typed is still here; "
    "click once more."
)


class Recent:
    """The last few values, each under a key that cannot be guessed.

    Args:
        size: how many are kept.
        room: bound on the sum of their sizes; None for no limit. The newest is kept whatever its size.
    """

    def __init__(self, size: int, room: int | None = None):
        self._values: OrderedDict[str, _Kept] = OrderedDict()
        self._size = size
        self._room = room
        self._lock = threading.Lock()

    def add(self, value: Any, owner: str | None = None, size: int = 0) -> str:
        """Keep a value of that size until its owner is forgotten or others need the room; returns its key."""
        key = secrets.token_hex(16)
        with self._lock:
            self._values[key] = _Kept(value, owner, size)
            while len(self._values) > self._size or (len(self._values) > 1 and self._is_full()):
                self._values.popitem(last=False)
        return key

    def get(self, key: str | None) -> Any:
        """The value, or None where it was never kept or is kept no longer."""
        with self._lock:
            if key is None or key not in self._values:
                return None
            self._values.move_to_end(key)
            return self._values[key].value

    def drop(self, key: str | None) -> None:
        """Keep the value of that key no longer."""
        with self._lock:
            if key is not None:
                self._values.pop(key, None)

    def forget(self, owner: str) -> None:
        """Drop all values of one owner."""
        with self._lock:
            for key in [key for key, kept in self._values.items() if kept.owner == owner]:
                del self._values[key]

    def _is_full(self) -> bool:
        return self._room is not None and sum(kept.size for kept in self._values.values()) > self._room


@dataclass(frozen=True)
class _Kept:
    value: Any
    owner: str | None
    size: int


@dataclass
class Context:
    """What the tabs share.

    Attributes:
        studio: what generates.
        outputs: where images are saved.
        limits: bounds on every request.
        runs: runs begun by a click that have not ended, by the key that the page was given.
        looks: recent recordings of "Look inside", by the same kind of key; bounded in bytes by limits.recording.
    """

    studio: Studio
    outputs: Outputs
    limits: Limits
    runs: Recent = field(default_factory=lambda: Recent(1024))
    looks: Recent = field(init=False)

    def __post_init__(self) -> None:
        self.looks = Recent(8, self.limits.recording)

    def begin(self, visitor: str, what: str) -> str:
        """Begin a run at a click: the visitor's earlier run of the same button ends, and the new one gets a key.

        The page sends the key with the request, which may wait in line for long; so Stop, and a second click, reach
        the run before it has begun.
        """
        return self.runs.add(self.studio.begin(visitor, what))

    @contextlib.contextmanager
    def running(self, key: str | None) -> Iterator[Run | None]:
        """The run of that key, which ends with the block; None for a key that is not known, or no longer.

        None is never taken for a new run: nobody could stop it.
        """
        run = self.runs.get(key)
        try:
            yield run
        finally:
            if run is not None:
                self.studio.finish(run)
                self.runs.drop(key)

    def keep_look(self, run: Run, look: Any, num_bytes: int) -> str:
        """Keep what a run has recorded, until its page is closed or has another look; returns its key."""
        if run.visitor is None:
            return self.looks.add(look, size=num_bytes)
        self.looks.forget(run.visitor)  # the page shows the newest only
        key = self.looks.add(look, run.visitor, num_bytes)
        if not self.studio.has(run):
            self.looks.forget(run.visitor)  # they left while it was being generated
        return key

    def leave(self, visitor: str) -> None:
        """A page was closed: stop its run and forget what it has looked at."""
        self.studio.forget(visitor)
        self.looks.forget(visitor)


@dataclass(frozen=True)
class PastRun:
    """One run, for the list of past ones.

    Attributes:
        what: the button that began it: "compare", "look" or "sweep".
        image: path of its image in the list.
        label: its name there.
        message: the sentence that the page showed.
        settings: what its image carries; they are put back into the form.
        shown, captions: paths of a comparison's images by method, and their captions; empty for other runs.
    """

    what: str
    image: str
    label: str
    message: str
    settings: dict[str, Any]
    shown: dict[str, str] = field(default_factory=dict)
    captions: tuple[str, ...] = ()

    def keep(self, outputs: Outputs) -> Entry:
        """Keep it with its images; returns what the visitor's browser keeps."""
        with Image.open(self.image) as image:
            small = thumbnail(image)
        return Entry(outputs.keep(vars(self)), self.what, self.label, self.message, self.settings, small)


def label(what: str, settings: Settings) -> str:
    """A name for a run; galleries show its beginning only."""
    return f"{what} · seed {settings.request.seed} · {settings.request.prompt[:60]}"


def now(report: Report, cases: Sequence[Case]) -> str:
    """What is being done, in a few words."""
    if isinstance(report, Loading):
        return f"Loading {report.model} …"
    if isinstance(report, Finished):
        return f"{cases[report.case].label} is ready."
    if isinstance(report, Stepped):
        what = "warming up, " if report.round == 0 else f"timed round {report.round}, " if report.round > 1 else ""
        return f"{cases[report.case].label}: {what}step {report.step} of {report.total}"
    return "Ready."


def tell(progress: gr.Progress, report: Report, cases: Sequence[Case]) -> None:
    """Pass a report on to Gradio's progress bar."""
    if isinstance(report, Stepped):
        progress((report.step, report.total), desc=now(report, cases), unit="steps")
    elif isinstance(report, Loading):
        progress(0, desc=now(report, cases))


def failed(error: Exception, settings: Settings | None = None) -> str:
    """The message for the page when a run ended early."""
    text = explain(error, settings)
    return captions.message_html(text, "info" if text == "Stopped." else "error")
