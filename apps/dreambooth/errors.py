"""UsageError: what the user can put right."""

from __future__ import annotations


class UsageError(ValueError):
    """Something the user can put right; its text is the one sentence that the command line prints."""
