"""What the app reads back from a browser, where anything may stand, and what it says before a click."""

from __future__ import annotations

import json
import shutil

import pytest
from app_support import tiny_models
from PIL import Image
from playground.browser import MOST_RUNS, Entry, read_entries, read_opened, thumbnail
from playground.context import PastRun
from playground.example import read_example
from playground.models import scheduler_to_set
from playground.outputs import Outputs
from playground.settings import OWN_SCHEDULER, RECOMMENDED

from agentsd.images.methods import METHODS
from agentsd.images.names import scheduler_name
from agentsd.images.pipelines import SCHEDULERS, set_scheduler
from agentsd.images.quality_notes import quality_notes
from agentsd.images.request import Request

ENTRY = Entry("0" * 32, "compare", "ratio 0.4", "AgentSD was faster.", {"prompt": "a zebra"}, "")


def remarks(scheduler, own=(512, 512), **values):
    return " ".join(quality_notes(Request("a castle", **{"steps": 25, **values}), scheduler, own))


@pytest.mark.parametrize(
    "values, told",
    [
        ({"scheduler": "ddim"}, ""),
        ({"scheduler": "plms"}, "25 steps are few for the scheduler plms: edges may fray"),
        ({"scheduler": "plms", "steps": 50}, ""),
        ({"scheduler": "plms", "steps": 6}, "expect mush"),
        (
            {"scheduler": "ddim", "steps": 6, "height": 256, "width": 256},
            "steps are few .*256 × 256 px are far below the",
        ),
        (
            {"scheduler": "ddim", "width": 256},
            "256 × 512 px are far below the 512 × 512 px that this model was trained at",
        ),
        ({"scheduler": "ddim", "height": 1024}, "512 × 1024 px are far above"),
        ({"scheduler": "ddim", "height": 1024, "width": 1024, "own": (1024, 1024)}, ""),
        ({"scheduler": "lcm", "steps": 4}, ""),  # made for few steps
        ({"scheduler": None, "steps": 4}, ""),  # of another scheduler nothing is known
    ],
)
def test_what_makes_mush_is_said_and_nothing_else(values, told):
    import re

    text = remarks(**values)
    assert re.search(told, text) if told else text == ""


def test_a_scheduler_that_wants_50_steps_is_not_the_default_and_others_stay():
    pipe = tiny_models().get("tiny").pipe
    assert scheduler_name(pipe.scheduler) == "plms" and scheduler_to_set(RECOMMENDED, pipe.scheduler) == "ddim"
    assert scheduler_to_set(OWN_SCHEDULER, pipe.scheduler) is None
    for name in SCHEDULERS:
        set_scheduler(pipe, name)
        if name != "plms":
            assert scheduler_to_set(RECOMMENDED, pipe.scheduler) is None
        assert scheduler_to_set("euler", pipe.scheduler) == "euler"


@pytest.mark.parametrize(
    "text", [None, "", "null", "[]", "{", "[" * 100_000, '"text"', "7", '{"form": "{", "runs": {}, "search": 3}']
)
def test_whatever_a_browser_holds_opens_a_page(text):
    opened = read_opened(text)
    assert opened.form == {} and json.loads(opened.runs) == []


def test_a_list_of_runs_that_cannot_be_read_is_counted_and_not_taken_for_an_empty_one():
    good = vars(ENTRY)
    bad = [3, {}, {**good, "id": "../../etc/passwd"}, {**good, "settings": "none"}, {**good, "more": 1}]
    assert read_opened(json.dumps({"runs": [good, *bad]})).lost == len(bad)
    assert read_opened(json.dumps({"runs": None})).lost is None
    assert read_opened(json.dumps({"runs": []})).lost == 0
    assert len(read_entries(json.dumps([good] * 100))) == MOST_RUNS


def test_a_thumbnail_comes_back_and_nothing_else_is_decoded():
    small = Entry(**{**vars(ENTRY), "thumbnail": thumbnail(Image.new("RGB", (512, 256), "red"))}).small_image()
    assert small.size == (160, 80)
    png = "data:image/png;base64,iVBORw0KGgo="
    for text in (
        "",
        "http://elsewhere/a.webp",
        png,
        "data:image/webp;base64,!",
        "data:image/webp;base64," + "A" * 50_000,
    ):
        assert Entry(**{**vars(ENTRY), "thumbnail": text}).small_image() is None


def test_a_past_run_is_recalled_whole_or_not_at_all(tmp_path):
    outputs = Outputs(tmp_path / "outputs")
    path = outputs.image(Image.new("RGB", (64, 64)), "a-zebra", {"prompt": "a zebra"})
    run = PastRun(
        "compare", path, "ratio 0.4", "AgentSD was faster.", {"prompt": "a zebra"}, {"sd": path}, ("caption",)
    )
    entry = run.keep(outputs)
    assert outputs.recall(entry.id)["shown"] == {"sd": path} and read_entries(f"[{entry.to_json()}]") == [entry]
    for key in (None, "", "a run in progress", "f" * 32, f"../outputs/{entry.id}", 7):
        assert outputs.recall(key) is None
    shutil.rmtree(tmp_path / "outputs" / path.split("/")[-2])  # its image alone is gone
    assert outputs.recall(entry.id) is None


def test_the_stored_example_has_the_seconds_and_distances_of_every_method():
    example = read_example()
    for method in METHODS:
        figures = example.figures(method)
        assert figures.seconds > 0 and figures.rounds >= 3 and (figures.speed_up is None) == (method == "sd")
        assert example.distance(method, method) == 0 and example.distance("sd", method) == example.distance(
            method, "sd"
        )
    assert "CPU cores" in example.about
