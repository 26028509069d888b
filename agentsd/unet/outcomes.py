"""What became of each patched layer in a UNet call: an enum with its sentences, and warnings given once."""

from __future__ import annotations

import dataclasses
import enum
import warnings

from ..config import Phase

ACTIVE = "active"


class Outcome(enum.Enum):
    """What became of a layer; its value is the reason why it did not run as planned."""

    RAN = "it ran as planned"
    NOT_REACHED = "it was not reached"
    BYPASSED = "another tool computes its attention without calling its processor"
    CROSS = "it was called with encoder_hidden_states, and merging is for self-attention"
    MASK = "it was called with an attention mask, and merged tokens have no mask"
    NO_INPUT = "its block's forward was called directly, past the hook that hands over the block's input"
    OTHER_TOKENS = (
        "its tokens are not those of its {0}×{1} grid. Another tool (tomesd, HyperTile, a tiling hook) may change "
        "them: use one of them"
    )


# What the warning of layers with an outcome says happened to them; those that ran are not warned of.
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

    def mark_given(self, kind: str) -> None:
        """Count a kind of warning as given."""
        self._given.add(kind)


@dataclasses.dataclass(frozen=True)
class LayerOutcome:
    """What became of one patched layer.

    Attributes:
        name: module name of the attention.
        outcome: as its processor noted it.
        reason: "active", or why it did not do what the settings say.
        ours: the patch's processor is still there.
    """

    name: str
    outcome: Outcome
    reason: str
    ours: bool = True


@dataclasses.dataclass(frozen=True)
class LastCall:
    """What happened in the last UNet call.

    Attributes:
        phase: of the call; the later one where the samples of a batch had two.
        timestep: noise level of the least noisy sample.
        height, width: size of the latent, in latent pixels.
        outcomes: "active" for each patched layer that did what the settings say, the reason for each other one.
        notes: what else is to be said of a layer, by its name.
        cached: step caching reused a feature; the layers that were skipped have their outcome of the whole call.
        whole_calls, cached_calls: of the run so far; None without step caching.
    """

    phase: Phase
    timestep: float
    height: int
    width: int
    outcomes: dict[str, str]
    notes: dict[str, str]
    cached: bool = False
    whole_calls: int | None = None
    cached_calls: int | None = None


def warn_of(outcomes: list[LayerOutcome], kind: Outcome, given: Warnings) -> None:
    """Warn once of the layers with an outcome, where the patch's processor is still theirs."""
    found = [one for one in outcomes if one.outcome is kind and one.ours]
    if not found:
        return
    first = found[0]
    where = first.name if len(found) == 1 else f"{first.name} and {len(found) - 1} more"
    remedy = _OTHER_TOOL if kind in (Outcome.BYPASSED, Outcome.NOT_REACHED) else ""
    given.once(
        kind.name,
        f"{len(found)} of {len(outcomes)} patched layers {_HAPPENED[kind]} ({where}): {first.reason}{remedy}",
    )
