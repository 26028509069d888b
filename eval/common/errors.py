"""BenchError: what the user of a benchmark can correct."""

from __future__ import annotations


class BenchError(ValueError):
    """An error the user can correct; its text is the one sentence that the command line prints."""
