"""What the visitor's own browser keeps: the form of this tab over a reload, and the list of past runs.

The app's memory may be gone at any time: it was restarted, or others needed the room. So the page itself holds what it
shows and what it ran, under keys that the app looks up, and a key that finds nothing is told. The form is kept for its
browser tab (sessionStorage), the past runs for the browser (localStorage): Gradio's BrowserState would let two open
pages overwrite each other's runs, and would not say where the browser keeps nothing.
"""

from __future__ import annotations

import base64
import binascii
import io
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

MOST_RUNS = 30  # as in the script below
_THUMBNAIL, _THUMBNAIL_BYTES = 160, 40_000  # pixels of the longer side; most bytes that are read back
_KEY = re.compile(r"[0-9a-f]{32}")

_LIBRARY = """
const kept = window.agentsdKept ??= (() => {
    const MOST_RUNS = 30, FORM = "agentsd-form-1", RUNS = "agentsd-runs-1", BUSY = "agentsd-busy-1";
    const read = (store, name) => { try { return window[store].getItem(name); } catch (error) { return null; } };
    const write = (store, name, text) => {
        try { window[store].setItem(name, text); return true; } catch (error) { return false; }
    };
    const stored = write("sessionStorage", "agentsd-test", "1") && write("localStorage", "agentsd-test", "1");
    const before = {
        form: read("sessionStorage", FORM), busy: read("sessionStorage", BUSY) === "1",
        again: ["reload", "back_forward"].includes(performance.getEntriesByType("navigation")[0]?.type),
    };
    write("sessionStorage", BUSY, "0");
    let own = [];  // the runs of this page, where the browser stores nothing
    const runs = () => {
        if (!stored) return own;
        try {
            const list = JSON.parse(read("localStorage", RUNS) ?? "[]");
            return Array.isArray(list) ? list : null;
        } catch (error) { return null; }
    };
    return {
        opened: () => JSON.stringify({...before, stored, search: window.location.search, runs: runs()}),
        save: (names, values) => write("sessionStorage", FORM,
            JSON.stringify(Object.fromEntries(names.map((name, i) => [name, values[i]])))),
        busy: on => write("sessionStorage", BUSY, on ? "1" : "0"),
        add: text => {
            const old = runs() ?? [];
            if (text) {
                const entry = JSON.parse(text);
                own = [entry, ...old.filter(run => run?.id !== entry.id)].slice(0, MOST_RUNS);
                // As many as the browser has room for.
                while (stored && !write("localStorage", RUNS, JSON.stringify(own)) && own.length > 1) own.pop();
            } else own = old;
            return JSON.stringify(own);
        },
        clear: () => { own = []; write("localStorage", RUNS, "[]"); return "[]"; },
    };
})();
"""


def script(expression: str, parameters: str = "...given") -> str:
    """JavaScript of an event: a function of the inputs' values that may use `kept`."""
    return f"async ({parameters}) => {{ {_LIBRARY} return {expression}; }}"


OPENED = script("kept.opened()", "")
"""What the browser has kept, as JSON for `read_opened`."""

ADD = script("kept.add(text)", "text")
"""Adds a run (JSON of `Entry.to_json`; "" adds none) to the browser's; gives all of them as JSON."""

CLEAR = script("kept.clear()", "")

BEGUN = script("(kept.busy(true), given)")
"""Passes the inputs on, and notes that something is going on in this tab."""

BUSY = script('(kept.busy(going === "1"), [])', "going")


def save(names: Sequence[str]) -> str:
    """Keeps the values of these controls for this tab."""
    return script(f"(kept.save({json.dumps(list(names))}, given), [])")


# The handle of the slider answers to the mouse alone: arrow keys move it in the same way.
KEYBOARD = """() => {
    const ready = () => document.querySelectorAll("#slider .outer:not([tabindex])").forEach(handle => {
        handle.tabIndex = 0;
        handle.setAttribute("role", "slider");
        handle.setAttribute("aria-label", "Divides the left image from the right one: arrow keys move it");
        handle.setAttribute("aria-valuemin", "0");
        handle.setAttribute("aria-valuemax", "100");
        handle.setAttribute("aria-valuenow", "50");
        handle.addEventListener("keydown", event => {
            const step = {ArrowLeft: -1, ArrowDown: -1, ArrowRight: 1, ArrowUp: 1}[event.key];
            if (!step) return;
            event.preventDefault();
            const box = handle.getBoundingClientRect(), frame = handle.parentElement.getBoundingClientRect();
            const middle = {clientX: box.left + box.width / 2, clientY: box.top + box.height / 2};
            const at = {...middle, bubbles: true, view: window};
            const to = Math.min(Math.max(at.clientX + step * frame.width / 20, frame.left), frame.right);
            handle.dispatchEvent(new MouseEvent("mousedown", at));
            window.dispatchEvent(new MouseEvent("mousemove", {...at, clientX: to}));
            window.dispatchEvent(new MouseEvent("mouseup", {...at, clientX: to}));
            handle.setAttribute("aria-valuenow", Math.round(100 * (to - frame.left) / frame.width));
        });
    });
    ready();
    new MutationObserver(ready).observe(document.body, {subtree: true, childList: true});
}"""


@dataclass(frozen=True)
class Entry:
    """A past run as the browser keeps it: enough to name it, and to generate it again when its images are gone.

    Attributes:
        id: the key of its images (`Outputs.keep`).
        what: the button that began it: "compare", "look" or "sweep".
        label: its name in the list.
        message: the sentence that the page showed.
        settings: of its image; they are put back into the form.
        thumbnail: a small image as a data URL, "" where there is none.
    """

    id: str
    what: str
    label: str
    message: str
    settings: dict[str, Any]
    thumbnail: str = ""

    def to_json(self) -> str:
        """What `ADD` takes."""
        return json.dumps(vars(self), ensure_ascii=False)

    def small_image(self) -> Image.Image | None:
        """The thumbnail; None where there is none, or none that can be read."""
        head, _, data = self.thumbnail.partition(",")
        if head != "data:image/webp;base64" or len(data) > _THUMBNAIL_BYTES:
            return None
        try:
            with Image.open(io.BytesIO(base64.b64decode(data, validate=True)), formats=("WEBP",)) as image:
                return image.convert("RGB") if max(image.size) <= _THUMBNAIL else None
        except (OSError, ValueError, binascii.Error):
            return None


def thumbnail(image: Image.Image) -> str:
    """An image as a small data URL."""
    small = image.convert("RGB")
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "WEBP", quality=80)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


@dataclass(frozen=True)
class Opened:
    """What the browser had when the page was opened.

    Attributes:
        search: the query string of the page's address.
        form: values of controls by name, as they were typed; empty for a tab that was never here.
        again: the page was loaded again in its tab, rather than opened by a link.
        busy: something was going on in the tab when it was left.
        stored: whether the browser stores anything.
        runs: past runs as JSON, for the page to hold.
        lost: how many past runs could not be read; None for the whole list.
    """

    search: str = ""
    form: Mapping[str, Any] = field(default_factory=dict)
    again: bool = False
    busy: bool = False
    stored: bool = True
    runs: str = "[]"
    lost: int | None = 0


def read_opened(text: str | None) -> Opened:
    """Opened from the JSON of `OPENED`; it is the browser's, so anything may stand in it."""
    given = _loads(text)
    if not isinstance(given, dict):
        return Opened()
    form = _loads(given.get("form"))
    runs = given.get("runs")
    entries = read_entries(json.dumps(runs))
    return Opened(
        str(given.get("search") or ""),
        form if isinstance(form, dict) else {},
        given.get("again") is True,
        given.get("busy") is True,
        given.get("stored") is True,
        json.dumps([vars(entry) for entry in entries], ensure_ascii=False),
        len(runs) - len(entries) if isinstance(runs, list) else None,
    )


def read_entries(text: str | None) -> list[Entry]:
    """The entries in a JSON list, without those that are none."""
    given = _loads(text)
    entries = []
    for one in given[:MOST_RUNS] if isinstance(given, list) else []:
        if not isinstance(one, dict) or set(one) != set(Entry.__dataclass_fields__):
            continue
        texts = [one[name] for name in ("id", "what", "label", "message", "thumbnail")]
        if (
            all(isinstance(text, str) for text in texts)
            and _KEY.fullmatch(one["id"])
            and isinstance(one["settings"], dict)
        ):
            entries.append(Entry(**one))
    return entries


def is_key(text: Any) -> bool:
    """Whether a text can be the key of a run's images."""
    return isinstance(text, str) and _KEY.fullmatch(text) is not None


def _loads(text: Any) -> Any:
    try:
        return json.loads(text) if isinstance(text, str) else None
    except (ValueError, RecursionError):
        return None
