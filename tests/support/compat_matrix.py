"""The compatibility matrix: what a row is, and the one check that every row of working combinations must pass.

A row is a `Row` (build, prepare, call) given to `check_row`, or any test marked with `compat(...)`, as where the
right answer is an error. `python tests/support/compat_table.py` runs them all and writes COMPATIBILITY.md from the
outcome.
"""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import draw

import agentsd
import agentsd.unet.processor
from agentsd import Phase
from agentsd.patch import find_unet, get_patch

WORKS, WARNS, CLEAR_ERROR = "works", "warns", "clear error"


def compat(group: str, name: str, status: str = WORKS, note: str = "") -> pytest.MarkDecorator:
    """Marks a test as the proof of one row of the table: if it passes, `status` is what a user gets."""
    return pytest.mark.compat(group=group, name=name, status=status, note=note)


@dataclass(frozen=True)
class Row:
    """One combination that works.

    Attributes:
        name: what the table says.
        build: makes the model, with the same weights every time.
        before, after: what a user does to it before and after apply_patch; the unpatched reference gets both.
        call: runs it with a fixed seed and returns a tensor.
        models: what to patch, where `build` returns more than one pipeline.
        settings: of apply_patch.
        status, note: for the table. A row that WARNS must say in its first call that the patch is not active on some
            layers, and be active after `mend`, which is what the warning asks for.
        mend: see status.
        phases: those that the calls pass through.
        every_layer: False where a cache skips layers: then fewer calls than layers × UNet calls are right.
    """

    name: str
    build: Callable[[], Any]
    call: Callable[[Any], torch.Tensor] = draw
    before: Callable[[Any], Any] = lambda pipe: None
    after: Callable[[Any], Any] = lambda pipe: None
    models: Callable[[Any], list] = lambda pipe: [pipe]
    settings: dict = field(default_factory=dict)
    status: str = WORKS
    mend: Callable[[Any], Any] = agentsd.apply_patch
    note: str = ""
    phases: frozenset = frozenset(Phase)
    every_layer: bool = True


def parametrize(group: str, rows: list[Row]) -> pytest.MarkDecorator:
    """Parametrises a test over rows, each marked for the table."""
    return pytest.mark.parametrize(
        "row",
        [pytest.param(row, id=_slug(row.name), marks=compat(group, row.name, row.status, row.note)) for row in rows],
    )


def check_row(row: Row) -> None:
    """The row runs patched and active, differs from the unpatched, repeats bit for bit, is removed without trace."""
    reference = row.build()
    row.before(reference)
    row.after(reference)
    plain = row.call(reference)
    assert torch.isfinite(plain).all(), "the row itself is broken"

    pipe = row.build()
    row.before(pipe)
    for model in row.models(pipe):
        agentsd.apply_patch(model, **row.settings)
    row.after(pipe)
    if row.status == WARNS:
        with pytest.warns(UserWarning, match="agentsd: the patch is not active on"):
            row.call(pipe)
        row.mend(pipe)
    for model in row.models(pipe) if row.every_layer else ():  # describe tells what happened in the last call
        described = {layer.name for layer in agentsd.describe(model).active}
        assert described == {layer.name for layer in get_patch(model).layers}

    with warnings.catch_warnings(), record_attention(*row.models(pipe)) as record:
        warnings.filterwarnings("error", message="agentsd")
        patched = row.call(pipe)
        record.check(row.phases, row.every_layer)
        again = row.call(pipe)
    assert patched.shape == plain.shape and torch.isfinite(patched).all()
    assert not torch.equal(patched, plain), "the patch changes nothing"
    assert torch.equal(again, patched), "the same call twice gives two results"

    for model in row.models(pipe):
        agentsd.remove_patch(model)
    assert torch.equal(row.call(pipe), plain), "remove_patch left something behind"


class AttentionRecord:
    """What the patched layers of some models really computed, beside what the timesteps of their UNet calls ask for."""

    def __init__(self) -> None:
        self.expected: Counter[Phase] = Counter()
        self.found: Counter[Phase] = Counter()

    def check(self, phases: frozenset = frozenset(Phase), every_layer: bool = True) -> None:
        """Agents were used in just the UNet calls whose timestep says so, merging in the others, on every layer."""
        assert set(self.found) == set(phases), f"phases {set(self.found)}"
        if every_layer:
            assert self.found == self.expected
        else:
            assert all(self.found[phase] <= self.expected[phase] for phase in phases)


@contextmanager
def record_attention(*models: Any):
    """Record every attention computed by patched layers of `models`, by spying on the operations they call."""
    record = AttentionRecord()
    processor = agentsd.unet.processor
    agent_attention, softmax_attention = processor.agent_attention, processor.softmax_attention

    def agents(query, agents, key, value, *args, **kwargs):
        assert 0 < agents.shape[-2] < query.shape[-2]
        record.found[Phase.AGENT] += 1
        return agent_attention(query, agents, key, value, *args, **kwargs)

    def softmax(query, key, value, *args, **kwargs):
        record.found[Phase.MERGE] += 1
        return softmax_attention(query, key, value, *args, **kwargs)

    handles = []
    for unet in {id(find_unet(model)): find_unet(model) for model in models}.values():
        patch = get_patch(unet)

        def note(module, args, kwargs, patch=patch):
            timestep = float(torch.as_tensor(args[1] if len(args) > 1 else kwargs["timestep"]).min())
            agent = timestep >= (1 - patch.config.early) * patch.num_train_timesteps
            record.expected[Phase.AGENT if agent else Phase.MERGE] += len(patch.layers)

        handles.append(unet.register_forward_pre_hook(note, with_kwargs=True))
    try:
        with (
            mock.patch.object(agentsd.unet.processor, "agent_attention", agents),
            mock.patch.object(agentsd.unet.processor, "softmax_attention", softmax),
        ):
            yield record
    finally:
        for handle in handles:
            handle.remove()


def _slug(name: str) -> str:
    return "-".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
