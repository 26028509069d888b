"""Sentences that several modules say: what was perhaps meant, and how to install what is missing. Standard library."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """Return " (did you mean ratio?)" for a misspelt name, "" where none of the names is near."""
    near = difflib.get_close_matches(name, list(names), n=1, cutoff=0.7)
    return f" (did you mean {near[0]}?)" if near else ""


def install_hint(extra: str) -> str:
    """Say how to install an extra of agentsd: from a clone, as it is on no package index.

    Args:
        extra: as in pyproject.toml: "vision", "app", "eval", "dreambooth", "train", "test".

    Example:
        >>> install_hint("vision")
        'pip install -e ".[vision]" in the folder that agentsd was cloned to'
    """
    return f'pip install -e ".[{extra}]" in the folder that agentsd was cloned to'
