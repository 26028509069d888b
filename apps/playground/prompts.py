"""Remarks on a prompt: what of it has no effect, and what the model does not know."""

from __future__ import annotations

from typing import Any

from agentsd.images.demo_prompts import DEMO_NAMES, nearest_names, unknown_subject
from agentsd.images.request import unread_part


def prompt_notes(model: str, pipe: Any, prompt: str) -> list[str]:
    """Say what of a prompt has no effect, or will not be shown.

    Args:
        model: name of the model in the app.
        pipe: its pipeline.
        prompt: as the visitor wrote it.

    Returns:
        One sentence for each remark.
    """
    notes = []
    unread = unread_part(pipe, prompt)
    if unread:
        text = unread if len(unread) <= 120 else unread[:117] + "…"
        notes.append(f"The prompt is longer than the model reads; this part had no effect: “{text}”")
    unknown = unknown_note(model, prompt)
    if unknown:
        notes.append(f"{unknown} The page lists them all under the prompt, as `agentsd prompts` does.")
    return notes


def unknown_note(model: str, prompt: str) -> str | None:
    """Say that the demo model knows nothing of a prompt, with the nearest names; None for another model or prompt."""
    if model != "demo" or not prompt.strip() or unknown_subject(prompt) is None:
        return None
    return (
        f"The demo model knows {len(DEMO_NAMES)} things and none of them is in this prompt, so its image shows "
        f"something else. Nearest in spelling: {', '.join(nearest_names(prompt))}."
    )
