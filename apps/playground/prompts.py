"""Remarks on a prompt: the part that the model does not read, and what the demo model does not know."""

from __future__ import annotations

from typing import Any

from agentsd.images.request import unread_part


def prompt_notes(model: str, pipe: Any, prompt: str) -> list[str]:
    """Sentences on what of a prompt has no effect, or will not come out as meant.

    Args:
        model: name of the model in the app.
        pipe: its pipeline.
        prompt: as the visitor wrote it.
    """
    notes = []
    unread = unread_part(pipe, prompt)
    if unread:
        text = unread if len(unread) <= 120 else unread[:117] + "…"
        notes.append(f"The prompt is longer than the model reads; this part had no effect: “{text}”")
    return notes
