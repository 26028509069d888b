"""What became of each patched layer in a UNet call: an enum with its sentences, and warnings given once."""

from __future__ import annotations

import enum
import warnings
from typing import NamedTuple

ACTIVE = "active"


class Outcome(enum.Enum):
    """What became of a layer; its value is the reason why it did not run as planned."""

    RAN = "it ran as planned"
    NOT_REACHED = "it was not reached"
    REPLACED = "replaced by {}: call apply_patch again"
    BYPASSED = "another tool computes its attention without calling its processor"
    CROSS = "it was called with encoder_hidden_states, and merging is for self-attention"
    MASK = "it was called with an attention mask, and merged tokens have no mask"
    NO_INPUT = "its block's forward was called directly, past the hook that hands over the block's input"
    OTHER_TOKENS = (
        "its tokens are not those of its {0}×{1} grid. Another tool (tomesd, HyperTile, a tiling hook) may change "
        "them: use one of them"
    )


# What the warning of layers with an outcome says happened to them; of replaced ones `warn_where_replaced` tells.
_HAPPENED = {
    Outcome.CROSS: "ran unpatched",
    Outcome.MASK: "ran unpatched",
    Outcome.NO_INPUT: "ran unpatched",
    Outcome.OTHER_TOKENS: "ran unpatched",
    Outcome.BYPASSED: "were bypassed",
    Outcome.NOT_REACHED: "were not reached by a whole UNet call",
}

_OTHER_TOOL = (
    ". The image is what that tool gives without agentsd there. Use one of the two: undo the tool's change and call "
    "agentsd.apply_patch again, or agentsd.remove_patch"
)


class Warnings:
    """Warnings of one patch: each kind is given once.

    Attributes:
        outside: a layer was called outside a UNet call, and a warning has said so. Read inside compiled graphs.
    """

    def __init__(self) -> None:
        self.outside = False
        self._given: set[str] = set()

    def once(self, kind: str, message: str) -> None:
        """Warn, if there was no warning of this kind yet."""
        if kind not in self._given:
            self._given.add(kind)
            warnings.warn(f"agentsd: {message}", stacklevel=3)


class LayerOutcome(NamedTuple):
    """What became of one patched layer: name of the attention, outcome, and ACTIVE or why it did not run as planned."""

    name: str
    outcome: Outcome
    reason: str


def warn_of(outcomes: list[LayerOutcome], kind: Outcome, given: Warnings) -> None:
    """Warn once of the layers with an outcome."""
    found = [one for one in outcomes if one.outcome is kind]
    if not found:
        return
    first = found[0]
    where = first.name if len(found) == 1 else f"{first.name} and {len(found) - 1} more"
    remedy = _OTHER_TOOL if kind in (Outcome.BYPASSED, Outcome.NOT_REACHED) else ""
    given.once(
        kind.name,
        f"{len(found)} of {len(outcomes)} patched layers {_HAPPENED[kind]} ({where}): {first.reason}{remedy}",
    )
