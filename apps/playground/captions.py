"""The small pieces of HTML on the page: captions, progress, messages. All text from outside is escaped."""

from __future__ import annotations

from html import escape

from .pictures import Figures, least_told_apart

CSS = """
.gradio-container { max-width: 1400px !important; margin: 0 auto; }
.agentsd-head h1 { margin: 0 0 2px; font-size: 1.55rem; }
.agentsd-head p { margin: 0; color: var(--body-text-color-subdued); }
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
footer { opacity: .8; }
@media (max-width: 640px) {
  button[role=tab] { padding-inline: 7px; font-size: .85rem; }
  #grid .grid-container, #past .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)) !important; }
}
.picture { min-height: 160px; }
.picture .image-frame, .picture .image-frame img { width: 100%; height: auto; max-height: none; object-fit: contain; }
#grid .grid-wrap, #past .grid-wrap { max-height: none; min-height: 0; }
.message:empty { visibility: hidden; min-height: 2.9em; }
"""


def figures_html(figures: Figures) -> str:
    """What stands under a finished picture."""
    runs = "one run" if figures.runs == 1 else f"median of {figures.runs} runs"
    lines = [f"<b>{figures.seconds:.2f} s</b> <span class='quiet'>{runs}</span>"]
    if figures.speed_up is None:
        lines.append("<span class='quiet'>what the others are compared with</span>")
    else:
        clearly = least_told_apart(figures.rough)
        kind = "faster" if figures.speed_up >= clearly else "slower" if figures.speed_up <= 1 / clearly else "quiet"
        words = {
            "faster": "as fast",
            "slower": "as fast: slower",
            "quiet": "as fast: about the same" if figures.rough else "as fast: the same",
        }[kind]
        lines.append(
            f"<span class='{kind}'>{figures.speed_up:.2f}× {words}</span>"
            + (" <span class='quiet'>(rough)</span>" if figures.rough else "")
        )
    details = []
    if figures.peak_gb is not None:
        details.append(f"peak {figures.peak_gb:.2f} GB {'on the GPU' if figures.on_gpu else 'in the whole process'}")
    if figures.distance is not None:
        details.append(f"distance {figures.distance:.1f} of 255")
    lines.append(f"<span class='quiet'>{', '.join(details)}</span>")
    return f"<div class='caption'>{'<br>'.join(lines)}</div>"


def waiting_html(text: str = "") -> str:
    """What stands under a picture that has not begun."""
    return f"<div class='caption'><span class='quiet'>{escape(text)}</span></div>"


def step_html(round_: int, step: int, total: int) -> str:
    """What stands under a picture while it forms."""
    what = "warming up" if round_ == 0 else "drawing" if round_ == 1 else f"timed round {round_}"
    return (
        f"<div class='caption'>{what}: step {step} of {total}<br>"
        f"<div class='bar' role='progressbar' aria-label='{what}' aria-valuemax='{total}' aria-valuenow='{step}'>"
        f"<div style='width: {step / total:.0%}'></div></div></div>"
    )


def message_html(text: str, kind: str = "info") -> str:
    """A message above the pictures. kind: "info", "done" or "error"; an error is announced to screen readers."""
    role = "alert" if kind == "error" else "status"
    return f"<div class='message {kind}' role='{role}'>{escape(text)}</div>"


def difference_html(left: str, right: str, text: str) -> str:
    """What is said of two pictures beside the slider."""
    return f"<div class='caption'><b>{escape(left)}</b> and <b>{escape(right)}</b><br>{escape(text)}</div>"
