"""The small pieces of HTML on the page: captions, progress, messages. All text from outside is escaped."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from agentsd.images.compare import seconds_text

from .figures import Figures, calls_text, speed_word

CSS = """
.gradio-container { max-width: 1400px !important; margin: 0 auto; }
.agentsd-head h1 { margin: 0 0 2px; font-size: 1.55rem; }
.agentsd-head p { margin: 0; max-width: 62em; line-height: 1.5; }
.agentsd-head summary { cursor: pointer; margin-top: 4px; color: var(--body-text-color-subdued); }
.agentsd-head dt { font-weight: 600; margin-top: 6px; } .agentsd-head dd { margin: 0 0 0 1em; max-width: 62em; }
#main { display: grid; align-items: start; gap: var(--layout-gap);
  grid-template: "ask results" auto "settings results" 1fr / minmax(300px, 1fr) minmax(0, 2fr); }
#ask { grid-area: ask; } #settings { grid-area: settings; } #results { grid-area: results; }
#main > * { min-width: 0 !important; }
.about p { margin: 0; min-height: 4.2em; }
:focus-visible { outline: 3px solid var(--color-accent) !important; outline-offset: 2px; }
.caption { min-height: 5.2em; font-variant-numeric: tabular-nums; line-height: 1.4; }
.caption b { font-size: 1.15em; }
.caption .quiet, .quiet { color: var(--body-text-color-subdued); font-size: .92em; }
.bar { height: 8px; margin-top: 6px; border-radius: 4px; overflow: hidden; background: var(--border-color-primary); }
.bar div { height: 100%; background: var(--color-accent); }
.faster { color: #15803d; font-weight: 600; } .dark .faster { color: #4ade80; }
.slower { color: #b45309; font-weight: 600; } .dark .slower { color: #fbbf24; }
.message { padding: 10px 14px; border-radius: 8px; border-left: 4px solid var(--color-accent);
  background: var(--background-fill-secondary); color: var(--body-text-color); overflow-wrap: anywhere; }
.message.error { border-left-color: #dc2626; }
.message.done { border-left-color: #16a34a; }
.message.note { border-left-color: #d97706; font-size: .92em; }
.message details { margin-top: 4px; } .message summary { cursor: pointer; }
.chart { width: 100%; height: auto; font-size: 12px; fill: var(--body-text-color); }
.chart .rule { stroke: var(--border-color-primary); }
footer { opacity: .8; }
@media (max-width: 800px) {
  #main { grid-template: "ask" auto "results" auto "settings" auto / minmax(0, 1fr); }
  .caption, .about p { min-height: 0; }
}
@media (max-width: 640px) {
  button[role=tab] { padding-inline: 7px; font-size: .85rem; }
  #grid .grid-container, #past .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)) !important; }
}
.result { min-height: 160px; }
.result .image-frame, .result .image-frame img { width: 100%; height: auto; max-height: none; object-fit: contain; }
#grid .grid-wrap, #past .grid-wrap { max-height: none; min-height: 0; }
.message:empty { visibility: hidden; min-height: 2.9em; }
"""


def figures_html(figures: Figures, of: str = "") -> str:
    """The figures under a finished image; unstable timings have no decimals, and claim no speed-up."""
    seconds = seconds_text(figures.seconds, figures.stable)
    if figures.stable:
        lines = [f"<b>{seconds}</b> <span class='quiet'>median of {figures.rounds} rounds</span>"]
    else:
        why = "one round" if figures.rounds == 1 else f"{figures.rounds} rounds, unstable"
        lines = [f"<span class='seconds'>{seconds}</span> <span class='quiet'>{why}</span>"]
    if figures.speed_up is None:
        lines.append("<span class='quiet'>what the others are compared with</span>")
    else:
        word = speed_word(figures.speed_up, figures.stable)
        if figures.stable:
            words = {"faster": "as fast", "slower": "as fast: slower", "same": "as fast: the same"}[word]
            kind = "quiet" if word == "same" else word
            lines.append(f"<span class='{kind}'>{figures.speed_up:.2f}× {words}</span>")
        else:
            words = {"faster": "faster", "slower": "slower", "same": "about as fast"}[word]
            lines.append(f"<span class='quiet'>{words}</span>")
    details = []
    if figures.peak_gb is not None and figures.on_gpu:
        details.append(f"at most {figures.peak_gb:.2f} GB on the GPU")
    elif figures.peak_gb is not None:
        details.append(f"memory of the whole app: at most {figures.peak_gb:.2f} GB")
    if figures.distance is not None:
        details.append(f"distance {figures.distance:.1f} of 255")
    if figures.calls is not None:
        details.append(calls_text(figures.calls))
    lines += [f"<span class='quiet'>{detail}</span>" for detail in details]
    lines += [f"<span class='quiet'>{escape(of)}</span>"] if of else []
    return f"<div class='caption'>{'<br>'.join(lines)}</div>"


def waiting_html(text: str = "") -> str:
    """The caption of an image that has not begun."""
    return f"<div class='caption'><span class='quiet'>{escape(text)}</span></div>"


def step_html(round_: int, step: int, total: int) -> str:
    """The caption of an image while it forms."""
    what = "warming up" if round_ == 0 else "generating" if round_ == 1 else f"timed round {round_}"
    return (
        f"<div class='caption'>{what}: step {step} of {total}<br>"
        f"<div class='bar' role='progressbar' aria-label='{what}' aria-valuemax='{total}' aria-valuenow='{step}'>"
        f"<div style='width: {step / total:.0%}'></div></div></div>"
    )


def message_html(text: str, kind: str = "info") -> str:
    """A message above the images. kind: "info", "done", "note" or "error"; screen readers announce an error."""
    role = "alert" if kind == "error" else "status"
    return f"<div class='message {kind}' role='{role}'>{escape(text)}</div>"


def remark_html(text: str) -> str:
    """An explanation in small print, beside what it explains."""
    return f"<p class='quiet'>{escape(text)}</p>" if text else ""


def notes_html(notes: Sequence[str], unknown: str | None, names: Sequence[str]) -> str:
    """The remarks under the prompt, with the list of what is known under that on an unknown thing; "" for none."""
    texts = [escape(note) for note in notes]
    if unknown is not None:
        listed = f"<details><summary>All {len(names)} things</summary>{escape(', '.join(names))}</details>"
        texts.append(escape(unknown) + listed)
    return "".join(f"<div class='message note' role='status'>{text}</div>" for text in texts)


def difference_html(left: str, right: str, text: str) -> str:
    """The text beside the slider, on the two images in it."""
    return f"<div class='caption'><b>{escape(left)}</b> and <b>{escape(right)}</b><br>{escape(text)}</div>"
