"""demo_prompts.py: the names are those of the model card, and a prompt without any of them is noticed."""

from __future__ import annotations

import pytest

from agentsd.images.demo_prompts import DEMO_NAMES, demo_prompts, nearest_names, unknown_subject
from agentsd.images.pipelines import DEMO_MODEL


def test_names_are_those_of_the_model_card():
    card = (DEMO_MODEL / "README.md").read_text(encoding="utf-8")
    listed = card.split("one of these 121 names:")[1].split(".\n")[0]
    assert [" ".join(name.split()) for name in listed.split(",")] == list(DEMO_NAMES)
    assert len(set(DEMO_NAMES)) == 121


def test_what_the_model_knows_is_known_in_every_form():
    for prompt in [*demo_prompts(), *DEMO_NAMES, *(f"A {name.upper()}!" for name in DEMO_NAMES), "a castle on a hill"]:
        assert unknown_subject(prompt) is None, prompt


@pytest.mark.parametrize(
    "prompt", ["an astronaut riding a horse", "two zebras", "a train", "glass", "斑马", "", "polar"]
)
def test_other_prompts_are_told_with_the_nearest_names(prompt):
    told = unknown_subject(prompt)
    assert "knows 121 things" in told and "agentsd prompts" in told and "\n" not in told
    assert all(name in told for name in nearest_names(prompt))


def test_nearest_by_a_shared_word_then_by_spelling():
    assert nearest_names("two zebras", 1) == ["zebra"] and nearest_names("polar", 1) == ["polar bear"]
    assert set(nearest_names("glass of milk", 2)) == {"cocktail glass", "wine glass"}
