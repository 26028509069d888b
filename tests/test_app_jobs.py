"""The app's runs: in order, stoppable, each on a model as it was before, and honest about what came out."""

from __future__ import annotations

import csv
import io
import os
import re
import threading
import time
from types import SimpleNamespace
from xml.etree import ElementTree

import gradio as gr
import numpy as np
import pytest
import tomesd
import torch
from app_support import CountingLoader, tiny_models
from PIL import Image
from playground import captions, charts, figures, images, sweeps
from playground.compare_tab import CompareTab
from playground.context import Context, Recent
from playground.form import Form
from playground.jobs import Finished, Loading, Looked, Note, Run, Stepped, Stopped, Studio, explain, methods_to_compare
from playground.look_tab import LookTab, layer_choices
from playground.models import Models
from playground.outputs import Outputs, file_name
from playground.page import Page
from playground.restore import form_values
from playground.settings import OWN_SCHEDULER, PATCH_FIELDS, Limits, check
from playground.sweep_tab import SweepTab

import agentsd
from agentsd import AgentConfig
from agentsd.config import PRESETS
from agentsd.images.generate import GeneratedImage, generate
from agentsd.images.methods import METHODS
from agentsd.images.pipelines import ModelError, set_scheduler
from agentsd.images.png import read_settings
from agentsd.patch import get_patch


@pytest.fixture(scope="module")
def studio():
    studio = Studio(tiny_models())
    yield studio
    studio.worker.close()


def settings(**values):
    return check(
        {
            "prompt": "a zebra",
            "steps": 4,
            "seed": 3,
            "rounds": 1,
            "model": "tiny",
            "scheduler": OWN_SCHEDULER,
            **values,
        },
        ["tiny"],
        Limits(),
    )


def is_clean(studio):
    pipe = studio.models.get("tiny").pipe
    return (
        get_patch(pipe) is None
        and not hasattr(pipe.unet, "_tome_info")
        and type(pipe.scheduler).__name__ == "PNDMScheduler"
        and not any("ToMe" in type(module).__name__ for module in pipe.unet.modules())
    )


def run_compare(studio, wanted):
    reports = list(studio.generate(Run(), wanted, methods_to_compare(wanted.config)))
    return reports, {report.generated.method: report.generated for report in reports if isinstance(report, Finished)}


def test_each_image_comes_as_soon_as_it_is_ready(studio):
    wanted = settings(ratio=0.3, scheduler="ddim")
    reports, done = run_compare(studio, wanted)
    assert isinstance(reports.pop(0), Loading) and isinstance(reports.pop(0), Note)  # few steps
    seen = [(r.case, r.round) if isinstance(r, Stepped) else r.case for r in reports]
    assert list(dict.fromkeys(seen)) == [(0, 0), (0, 1), 0, (1, 0), (1, 1), 1, (2, 0), (2, 1), 2]
    steps = [(r.step, r.total) for r in reports if isinstance(r, Stepped) and (r.case, r.round) == (2, 1)]
    assert steps == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert any(isinstance(r, Stepped) and r.preview for r in reports)
    assert is_clean(studio)

    pipe = studio.models.get("tiny").pipe
    own = pipe.scheduler
    set_scheduler(pipe, "ddim")
    for method in METHODS:
        alone = generate(pipe, wanted.request, method, wanted.config)
        assert np.array_equal(np.asarray(alone.image), np.asarray(done[method].image)), method
    pipe.scheduler = own
    assert done["agentsd"].settings["scheduler_name"] == "ddim"

    again, _ = run_compare(studio, settings(ratio=0.5))
    assert 0 not in {report.round for report in again if isinstance(report, Stepped)}  # warm already


def test_rounds_are_interleaved_and_their_times_collected(studio):
    reports, done = run_compare(studio, settings(rounds=3))
    assert [report.case for report in reports if isinstance(report, Finished)] == [0, 1, 2, 1, 2, 0, 2, 0, 1]
    assert all(len(one.all_seconds) == 3 for one in done.values())
    assert all(not report.preview for report in reports if isinstance(report, Stepped) and report.round > 1)


@pytest.mark.parametrize("case, round_", [(1, 1), (2, 1)])
def test_stopped_half_way_and_run_again(studio, case, round_):
    wanted = settings(steps=6)
    _, expected = run_compare(studio, wanted)
    run, seen = Run(), []
    with pytest.raises(Stopped):
        for report in studio.generate(run, wanted, methods_to_compare(wanted.config)):
            seen.append(report)
            if isinstance(report, Stepped) and (report.case, report.round, report.step) == (case, round_, 2):
                run.stop()
    last = [report for report in seen if isinstance(report, Stepped)][-1]
    assert (last.case, last.round) == (case, round_) and last.step < last.total
    assert is_clean(studio)
    _, after = run_compare(studio, wanted)
    for method in METHODS:
        assert np.array_equal(np.asarray(after[method].image), np.asarray(expected[method].image))


def test_stopped_before_it_begins_or_abandoned(studio):
    run = Run()
    run.stop()
    with pytest.raises(Stopped):
        list(studio.generate(run, settings(), methods_to_compare(AgentConfig())))
    run = Run()
    reports = studio.generate(run, settings(steps=100), methods_to_compare(AgentConfig()))
    next(reports)
    reports.close()
    assert run.stopped
    run_compare(studio, settings())  # would wait for the hundred steps otherwise
    assert is_clean(studio)


def test_a_second_click_on_a_button_ends_its_first_run_and_no_other_button_s(studio):
    first, sweep = studio.begin("ann", "compare"), studio.begin("ann", "sweep")
    other = studio.begin("bob", "compare")
    second = studio.begin("ann", "compare")
    assert first.stopped and not (second.stopped or sweep.stopped or other.stopped)
    assert studio.has(second) and not studio.has(first)
    studio.finish(first)  # ended, as it was stopped; its button's newer run is not touched
    assert studio.has(second)
    assert studio.stop("ann") and second.stopped and sweep.stopped  # what waits too
    assert not studio.stop("ann") and not studio.stop("carl")
    studio.forget("bob")
    assert other.stopped and not studio.has(other)


def test_a_visitor_is_busy_while_something_of_theirs_goes_or_waits_and_not_longer(studio, tmp_path):
    context = Context(studio, Outputs(tmp_path), Limits())
    assert not studio.busy("ann")
    going, waiting = context.begin("ann", "compare"), context.begin("ann", "sweep")
    with context.running(going):
        assert studio.busy("ann") and not studio.busy("bob")
    assert studio.busy("ann")  # the other one still waits
    with pytest.raises(ValueError), context.running(waiting):
        raise ValueError("it failed")
    assert not studio.busy("ann") and not studio._runs
    with context.running(going) as run:
        assert run is None  # a key is good for one run


@pytest.mark.parametrize("key", [None, "", "of another app"])
@pytest.mark.parametrize("what", ["compare", "look", "sweep"])
def test_a_lost_request_is_told_and_not_run_where_nobody_could_stop_it(studio, tmp_path, what, key):
    context = Context(studio, Outputs(tmp_path), Limits())
    with gr.Blocks():
        form = Form(context)
        tab = {"compare": CompareTab, "look": LookTab, "sweep": SweepTab}[what](context, form)
    given = {name: control.value for name, control in form.controls.items()} | {"prompt": "a zebra"}
    more = {"compare": [], "look": ["0"], "sweep": ["ratio", 0.1, 0.3, 2]}[what]
    (only,) = getattr(tab, what)(key, *more, *given.values())
    assert "no longer knows this request" in only[tab.status] and len(only) == 1


@pytest.mark.parametrize(
    "error, told",
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "Out of memory at 64 × 128 px: choose"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "Out of memory"),
        (MemoryError(), "Out of memory"),
        (KeyError("secret"), "Something went wrong inside the app .KeyError"),
    ],
)
def test_what_fails_is_told_and_the_next_run_works(studio, monkeypatch, error, told):
    wanted = settings(width=64, height=128)
    unet = studio.models.get("tiny").pipe.unet
    calls = []

    def fail(module, args, kwargs):
        calls.append(get_patch(unet))
        if len(calls) == 12:  # in AgentSD's run
            raise error

    handle = unet.register_forward_pre_hook(fail, with_kwargs=True)
    with pytest.raises(type(error)) as raised:
        for _ in range(4):
            run_compare(studio, wanted)
    handle.remove()
    assert re.search(told, explain(raised.value, wanted))
    assert is_clean(studio)
    run_compare(studio, wanted)


def test_looking_inside(studio):
    reports = list(studio.look(Run(), settings(), 1))
    looked = reports[-1]
    assert isinstance(looked, Looked) and [view.call for view in looked.views] == [0, 1, 2, 3, 4]
    assert {view.phase.value for view in looked.views} == {"agent", "merge"}
    (only,) = list(studio.look(Run(), settings(), 1, call=3))[-1].views
    assert torch.equal(only.position, looked.views[3].position)
    with pytest.raises(ValueError, match="layer=9"):
        list(studio.look(Run(), settings(), 9))
    with pytest.raises(ValueError, match="ratio above 0"):
        list(studio.look(Run(), settings(ratio=0, early=0), 1))
    assert is_clean(studio)


def test_step_caching_is_counted_and_shown(studio):
    usual = {"steps": 20, "width": 64, "height": 64, "scheduler": "ddim", "early": 0.0}
    wanted = settings(**usual, cache_interval=3)
    _, done = run_compare(studio, wanted)
    ours = done["agentsd"]
    # Whole are the first call, the last, and six evenly between them.
    assert ours.settings["unet_calls"] == {"whole": 8, "cached": 12} and "unet_calls" not in done["sd"].settings
    assert "8 of 20 UNet calls whole, 12 cached" in captions.figures_html(figures.Figures.of(ours, done["sd"]))
    assert "Step caching: 8 of 20 UNet calls whole" in figures.verdict([done["sd"], ours])
    values, remarks = form_values(ours.settings, ["tiny"], Limits())  # as the history does
    assert values["cache_interval"] == 3 and remarks == []
    assert np.array_equal(np.asarray(ours.image), np.asarray(generate_with(studio, wanted).image))

    _, few = run_compare(studio, settings(**{**usual, "steps": 4}, cache_interval=3))
    assert "all 4 UNet calls whole, none cached" in captions.figures_html(figures.Figures.of(few["agentsd"], few["sd"]))
    _, without = run_compare(studio, settings(**{**usual, "steps": 4}))
    assert "unet_calls" not in without["agentsd"].settings

    cases = sweeps.sweep_cases(wanted.config, "cache_interval", [1, 4])
    reports = studio.generate(Run(), wanted, cases)
    swept = {report.case: report.generated for report in reports if isinstance(report, Finished)}
    ordered = [swept[i] for i in range(3)]
    rows = sweeps.sweep_rows([None, 1, 4], ordered)
    table = list(csv.DictReader(io.StringIO(sweeps.sweep_csv("cache_interval", rows, ordered))))
    assert [row["cache_interval"] for row in table] == ["", "1", "4"]
    # 20 steps: an interval of 4 would reuse features over more than 14 % of the run, so that it works as 3.
    assert [row["unet_calls_cached"] for row in table] == ["", "", "12"]

    looked = list(studio.look(Run(), wanted, 0))[-1]  # a layer that cached calls skip: whole calls, by their numbers
    assert [view.call for view in looked.views] == [0, 3, 5, 8, 11, 14, 16, 19]
    with pytest.raises(ValueError, match="call=1: .*step caching skips it"):
        list(studio.look(Run(), wanted, 0, call=1))
    assert is_clean(studio)


def generate_with(studio, wanted):
    """AgentSD's image of a request, without the app."""
    pipe = studio.models.get("tiny").pipe
    own = pipe.scheduler
    set_scheduler(pipe, wanted.scheduler)
    try:
        return generate(pipe, wanted.request, "agentsd", wanted.config)
    finally:
        pipe.scheduler = own


def test_what_the_model_does_not_read_is_told(studio):
    prompt = " ".join(["zebra"] * 75 + ["castle", "frog"])
    reports, _ = run_compare(studio, settings(prompt=prompt))
    (note,) = [report for report in reports if isinstance(report, Note) and "prompt" in report.text]
    assert "longer than the model reads" in note.text and "“castle frog”" in note.text
    reports, _ = run_compare(studio, settings(prompt=" ".join(["zebra"] * 75)))
    assert not any(isinstance(report, Note) and "prompt" in report.text for report in reports)


def test_a_prompt_the_demo_model_does_not_know_is_told():
    studio = Studio(Models(["demo", "tiny"], load=CountingLoader()))
    asked = {"prompt": "an astronaut riding a hrose", "steps": 1, "rounds": 1, "width": 64, "height": 64}
    for values, told in (({}, True), ({"prompt": "a photograph of a zebra"}, False), ({"model": "tiny"}, False)):
        wanted = check({"model": "demo", **asked, **values}, ["demo", "tiny"], Limits())
        notes = [report.text for report in run_compare(studio, wanted)[0] if isinstance(report, Note)]
        notes = [text for text in notes if "prompt" in text]
        assert len(notes) == told, values
        if told:
            assert "knows 121 things" in notes[0] and "Nearest in spelling: " in notes[0] and "list" in notes[0]
    studio.worker.close()


# --- the models -------------------------------------------------------------------------------------------------------


def test_a_model_is_loaded_once_by_however_many():
    models = tiny_models("tiny", "other")
    loader = models._load
    got = []
    threads = [threading.Thread(target=lambda: got.append(models.get("tiny"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert loader.asked == ["tiny"] and len(set(map(id, got))) == 1 and models.loaded("other") is None
    assert got[0].size == (128, 128)
    assert got[0].layers[0] == ("down_blocks.0.attentions.0.transformer_blocks.0.attn1", 1)


def test_only_named_models_are_loaded_and_failures_tried_again(tmp_path):
    loader = CountingLoader()
    models = Models(["tiny", str(tmp_path / "missing")], load=loader)
    with pytest.raises(ValueError, match="must be one this app was started with"):
        models.get("demo")
    assert loader.asked == []
    for _ in range(2):
        with pytest.raises(ModelError, match="there is no folder"):
            models.get(str(tmp_path / "missing"))
    assert len(loader.asked) == 2 and "there is no folder" in models.failures[str(tmp_path / "missing")]
    assert models.get("tiny").name == "tiny"


def test_a_patched_pipeline_is_refused(studio):
    """Its "unpatched" image would be made with the patch."""
    from conftest import make_pipeline

    patched = agentsd.apply_patch(make_pipeline(), ratio=0.3)
    models = Models(["mine"], load=lambda name, **options: patched)
    with pytest.raises(ModelError, match="mine: .*already patched.*agentsd.remove_patch"):
        models.get("mine")
    assert models.loaded("mine") is None and get_patch(patched) is not None
    agentsd.remove_patch(patched)
    assert models.get("mine").pipe is patched

    tomesd.apply_patch(patched)
    with pytest.raises(ModelError, match="tomesd.remove_patch"):
        Models(["mine"], load=lambda name, **options: patched).get("mine")
    tomesd.remove_patch(patched)
    assert Models(["mine"], load=lambda name, **options: patched).get("mine").pipe is patched

    pipe = studio.models.get("tiny").pipe  # patched by someone after it was loaded
    with agentsd.patched(pipe):
        with pytest.raises(ValueError, match="already patched"):
            run_compare(studio, settings())
        with pytest.raises(ValueError, match="already patched"):
            list(studio.look(Run(), settings(), 0))
        assert get_patch(pipe) is not None
    run_compare(studio, settings())
    assert is_clean(studio)


def test_the_preview_shows_the_image():
    model = Models(["demo"], load=CountingLoader()).get("demo")
    latents = []
    done = generate(
        model.pipe, check({"prompt": "a castle", "steps": 10}, ["demo"], Limits()).request, "sd",
        on_step=lambda step: latents.append(step.latents),
    )  # fmt: skip
    preview = np.asarray(model.preview(latents[-1]), dtype=float)
    image = np.asarray(done.image.resize((32, 32), Image.Resampling.BOX), dtype=float)
    assert preview.shape == (32, 32, 3)
    assert np.corrcoef(preview.ravel(), image.ravel())[0, 1] > 0.6


def test_sdxl_whose_autoencoder_overflows_in_half_precision():
    from test_compat_pipelines import make_sdxl

    pipe = make_sdxl()
    pipe.vae.register_to_config(force_upcast=True)
    pipe.vae.to(torch.bfloat16)
    model = Models(["xl"], load=lambda name, **options: pipe).get("xl")
    assert {parameter.dtype for parameter in pipe.vae.parameters()} == {torch.bfloat16}
    assert model.layers[0][1] == 2 and len(set(model.layers)) == len(model.layers)
    assert np.asarray(model.preview(torch.randn(1, 4, 8, 6))).shape == (8, 6, 3)
    looks = layer_choices(model)
    assert len({label for label, _ in looks}) == len(looks) == len(model.layers) + 1


# --- what is said of the images -------------------------------------------------------------------------------------


def made(method="sd", seconds=(2.0,), shade=0, **about):
    return GeneratedImage(method, Image.new("RGB", (16, 8), (shade, 0, 0)), seconds, about, 1_500_000_000)


def test_distances():
    black, other = Image.new("RGB", (4, 2)), Image.new("RGB", (4, 2))
    other.putpixel((1, 1), (30, 60, 10))
    expected = np.sqrt((30**2 + 60**2 + 10**2) / 24)
    assert images.distance(black, other) == pytest.approx(expected)
    assert images.psnr(expected) == pytest.approx(10 * np.log10(255**2 / expected**2))
    assert images.psnr(images.distance(black, black)) == np.inf
    apart = images.difference_map(black, other, gain=4)
    assert apart.getpixel((1, 1)) == 240 and apart.getpixel((0, 0)) == 0
    with pytest.raises(ValueError, match="cannot be compared"):
        images.difference_map(black, Image.new("RGB", (2, 2)))


@pytest.mark.parametrize(
    "base, ours, words",
    [
        ((2.0, 2.0), (1.0, 1.0), ["AgentSD was 2.00× as fast", "which agree"]),
        ((2.0, 2.0), (2.5, 2.5), ["AgentSD was slower than Stable Diffusion here (0.80×)", "little to save"]),
        ((2.0, 2.0), (2.0, 2.0), ["took as long", "nothing is gained"]),
        ((2.0,), (1.9,), ["took about as long as Stable Diffusion.", "Timings unstable"]),
        ((2.0,), (1.0,), ["AgentSD was faster than", "Timings unstable: one round each; more timed rounds"]),
        ((2.0,), (3.0,), ["AgentSD was slower than", "Timings unstable: one round each; more timed rounds"]),
        ((2.0, 3.0), (1.0, 1.0), ["was faster", "Timings unstable: rounds of a method differ by more than 15%"]),
    ],
)
def test_the_verdict_is_honest(base, ours, words):
    text = figures.verdict([made("sd", base), made("agentsd", ours)])
    assert all(word in text for word in words), text
    assert ("Timings unstable" in text) != bool(re.search(r"\d[.]\d", text)), "no decimals while unstable"


def test_captions():
    first, ours = made("sd", (2.0, 2.0), device="cpu"), made("agentsd", (4.0, 4.0), 30, device="cuda:0")
    found = figures.Figures.of(ours, first)
    assert (found.speed_up, found.peak_gb, found.on_gpu, found.stable) == (0.5, 1.5, True, True)
    html = captions.figures_html(found)
    assert "<b>4.00 s</b>" in html and "0.50× as fast: slower" in html and "1.50 GB on the GPU" in html
    html = captions.figures_html(figures.Figures.of(first, first))
    assert "compared with" in html and "memory of the whole app: at most 1.50 GB" in html
    assert "<script>" not in captions.message_html("<script>alert(1)</script>", "error")


@pytest.mark.parametrize("base, ours", [((2.0,), (0.9,)), ((2.0, 3.0), (1.0, 1.0)), ((21.0,), (18.4,))])
def test_captions_of_unstable_timings_have_no_decimals_and_nothing_bold(base, ours):
    first, second = made("sd", base, device="cpu"), made("agentsd", ours, device="cpu")
    for one in (first, second):
        html = captions.figures_html(figures.Figures.of(one, first))
        timing = html.split("memory")[0]
        assert not re.search(r"\d[.]\d", timing) and "<b>" not in html and "×" not in html, html
        assert not re.search("class='(faster|slower)'", html)


def test_a_sweep_as_table_and_sheet():
    unstable = [made("sd"), made("agentsd", (1.0,), 10), made("agentsd", (4.0,), 20)]
    rows = sweeps.sweep_rows([None, 0.1, 0.5], unstable)
    table = list(csv.DictReader(io.StringIO(sweeps.sweep_csv("ratio", rows, unstable))))
    assert [(row["method"], row["ratio"], row["speed_up"]) for row in table] == [
        ("sd", "", "1.0000"), ("agentsd", "0.1", "2.0000"), ("agentsd", "0.5", "0.5000"),
    ]  # fmt: skip
    assert float(table[1]["rmse_to_unpatched"]) == pytest.approx(10 / np.sqrt(3), abs=1e-3)
    sheet = sweeps.sweep_sheet("ratio", rows, unstable)
    assert sheet.width > 2 * 16 and sheet.height > 2 * 8
    text = sweeps.sweep_verdict("ratio", rows, unstable)
    assert text.startswith("No value can be called the fastest. Timings unstable") and "×" not in text
    stable = [made("sd", (2.0, 2.0)), made("agentsd", (1.0, 1.0)), made("agentsd", (4.0, 4.0))]
    rows = sweeps.sweep_rows([None, 0.1, 0.5], stable)
    assert sweeps.sweep_verdict("ratio", rows, stable) == "Fastest at ratio 0.1: 2.00× as fast as unpatched."


def test_a_chart_has_a_marker_at_every_value_at_its_place():
    svg = charts.line_chart("Seconds", "ratio <", {"A": [(0.5, 1.0), (0.1, 4.0), (0.3, 2.0)]}, level=("base", 3.0))
    root = ElementTree.fromstring(svg)
    places = [(float(c.get("cx")), float(c.get("cy"))) for c in root.iter("circle")]
    assert len(places) == 3 and places == sorted(places)
    (_, y4), (x3, y2), (_, y1) = places
    assert x3 == pytest.approx((places[0][0] + places[2][0]) / 2, abs=0.1)
    zero = 2 * y2 - y4  # heights are proportional to the values: the axis begins at 0
    assert y1 == pytest.approx((y2 + zero) / 2, abs=0.2)
    (level,) = [line for line in root.iter("line") if line.get("class") == "level"]
    assert float(level.get("y1")) == pytest.approx((y4 + y2) / 2, abs=0.2)
    assert [c.find("title").text for c in root.iter("circle")][0] == "A, ratio < 0.1: 4"
    assert charts.line_chart("Seconds", "ratio", {"A": []}) == ""
    for y in (0.0, 1e-9, 0.3, 7.0, 12345.6):  # also where all values are equal, or there is one
        ElementTree.fromstring(charts.line_chart("Seconds", "ratio", {"A": [(0.1, y)]}))


def test_outputs_have_names_nobody_can_guess_and_do_not_stay(tmp_path, monkeypatch):
    outputs = Outputs(tmp_path / "out")
    first = outputs.image(Image.new("RGB", (4, 4)), "a", {"prompt": "a"})
    second = outputs.text("x", "a.csv")
    assert read_settings(first) == {"prompt": "a"} and open(second).read() == "x"
    assert len({path.name for path in (tmp_path / "out").iterdir()}) == 2
    assert all(len(path.name) == 32 for path in (tmp_path / "out").iterdir())
    day = time.time() - 25 * 3600
    os.utime(os.path.dirname(first), (day, day))
    outputs._tidied -= 3600
    outputs.text("y", "b.csv")
    assert not os.path.exists(first) and os.path.exists(second)
    assert file_name("../../etc/passwd <b> 斑马", "agentsd", 3) == "etc-passwd-b-agentsd-3"


def test_recent_keeps_the_last_few():
    recent = Recent(2)
    a, b = recent.add("a"), recent.add("b")
    assert recent.get(a) == "a"
    recent.add("c")
    assert recent.get(a) == "a" and recent.get(b) is None and recent.get(None) is None


def test_recent_keeps_no_more_bytes_than_there_is_room_for():
    recent = Recent(8, room=100)
    a, b = recent.add("a", size=60), recent.add("b", size=40)
    assert (recent.get(a), recent.get(b)) == ("a", "b")
    c = recent.add("c", size=50)  # the one longest unused goes first
    assert recent.get(a) is None and (recent.get(b), recent.get(c)) == ("b", "c")
    d = recent.add("d", size=101)
    assert [recent.get(key) for key in (b, c, d)] == [None, None, "d"]


def test_recent_forgets_an_owner():
    recent = Recent(8)
    of_ann, of_bob, of_nobody = recent.add(1, "ann"), recent.add(2, "bob"), recent.add(3)
    recent.forget("ann")
    assert [recent.get(key) for key in (of_ann, of_bob, of_nobody)] == [None, 2, 3]


def test_a_preset_fills_the_controls_and_is_recognised(tmp_path):
    studio = Studio(tiny_models())
    with gr.Blocks():
        form = Form(Context(studio, Outputs(tmp_path), Limits()))
    assert [name for name, _ in form.preset.choices][:2] == ["paper", "fast"]
    interval = form.controls["cache_interval"]
    assert isinstance(interval, gr.Slider) and (interval.minimum, interval.maximum, interval.value) == (1, 8, 1)

    given = {name: control.value for name, control in form.controls.items()}
    for name in ("fastest", "fast", "paper"):  # each takes back what the one before it has set
        given |= dict(zip([field.name for field in PATCH_FIELDS.values()], form._choose_preset(name)))
        wanted = check({**given, "prompt": "a"}, ["tiny"], Limits())
        assert wanted.config == AgentConfig(**PRESETS[name])
        code, _, shown, _ = form._derived(*given.values())
        assert shown == name and (f'preset="{name}"' in code) == (name != "paper")
    _, _, shown, _ = form._derived(*{**given, "ratio": 0.3}.values())
    assert shown == "own settings"
    _, _, shown, _ = form._derived(*{**given, "ratio": "wrong"}.values())
    assert shown == "own settings"
    studio.worker.close()


# --- the end of the app -----------------------------------------------------------------------------------------------


def test_closing_the_worker_stops_what_is_generated_and_what_waits():
    studio = Studio(tiny_models())
    cases = methods_to_compare(AgentConfig())
    reports = studio.generate(Run(), settings(steps=150, rounds=5), cases)
    while not isinstance(next(reports), Stepped):
        pass
    told = []

    def wait():
        with pytest.raises(Stopped):
            list(studio.generate(Run(), settings(), cases))
        told.append("waiting")

    waiting = threading.Thread(target=wait)
    waiting.start()
    while len(studio.worker._runs) < 2:
        time.sleep(0.01)
    studio.worker.close()
    with pytest.raises(Stopped):
        for report in reports:
            assert report.round < 2, "it went on"
    waiting.join(timeout=60)
    assert told == ["waiting"]
    with pytest.raises(Stopped):
        list(studio.generate(Run(), settings(), cases))
    assert not studio.worker._runs and is_clean(studio)


# --- what looks inside may take ---------------------------------------------------------------------------------------

ONE_CALL = 16 * 256 * 2  # bytes: agents × tokens of the tiny model's first layer, at two bytes each
FIRST_LAYER = "down_blocks.0.attentions.0.transformer_blocks.0.attn1"


def test_a_look_that_would_take_too_much_is_refused():
    studio = Studio(tiny_models(), Limits(recording=ONE_CALL))
    assert len(list(studio.look(Run(), settings(), 0, call=0))[-1].views) == 1
    with pytest.raises(ValueError, match="would take .* choose a smaller width"):
        list(studio.look(Run(), settings(early=1.0), 0))
    with pytest.raises(ValueError, match="256 agents × 256 tokens"):
        list(studio.look(Run(), settings(agent_ratio=0), 0, call=0))
    assert is_clean(studio)
    studio.worker.close()


@pytest.mark.parametrize("early", [0.4, 1.0])
def test_the_usual_limits_have_room_for_the_usual_patch_at_the_largest_size(early):
    """1,024 agents × 16,384 tokens at 1024 px, in as many calls as are ever recorded."""
    from agentsd.config import Phase
    from agentsd.visualize import MOST_VIEWS, _check_budget

    config = AgentConfig(early=early)
    place = "layer", (128, 128)
    assert config.stride(Phase.AGENT) == (4, 4)
    _check_budget(config, *place, MOST_VIEWS, Limits().recording)
    config = AgentConfig(agent_ratio=0)
    with pytest.raises(ValueError, match="16,384 agents × 16,384 tokens in 24 UNet calls would take 12.88 GB"):
        _check_budget(config, *place, MOST_VIEWS, Limits().recording)


@pytest.fixture
def look_tab(tmp_path):
    """The tab, with its history left out; `look(run_id, **values)` gives what it says at last and the look's key."""
    studio = Studio(tiny_models(), Limits(recording=10 * ONE_CALL))
    studio.models.get("tiny")
    context = Context(studio, Outputs(tmp_path), studio.limits)
    with gr.Blocks():
        form = Form(context)
        tab = LookTab(context, form)
    tab.finished = gr.Textbox(render=False)

    def look(run_id, layer="0", **values):
        given = {name: control.value for name, control in form.controls.items()}
        given |= {"prompt": "a zebra", "steps": 3, "scheduler": OWN_SCHEDULER, **values}
        changes = {}
        for change in tab.look(run_id, layer, *given.values()):
            changes |= change
        return changes[tab.status], changes.get(tab.look_id)

    yield SimpleNamespace(context=context, look=look, tab=tab)
    studio.worker.close()


def test_looks_go_when_their_page_is_closed(look_tab):
    context, page = look_tab.context, Page.__new__(Page)
    page.context = context
    keys = {}
    for visitor in ("ann", "bob"):
        told, keys[visitor] = look_tab.look(context.begin(visitor, "look"))
        assert "recorded in 4 UNet calls" in told
    assert all(map(context.looks.get, keys.values()))
    page.leave(SimpleNamespace(session_hash="ann"))
    assert context.looks.get(keys["ann"]) is None and context.looks.get(keys["bob"])
    assert "no longer kept" in look_tab.tab.show(keys["ann"], 0, 0)[look_tab.tab.caption]

    _, newer = look_tab.look(context.begin("bob", "look"))
    assert context.looks.get(keys["bob"]) is None and context.looks.get(newer)  # its page shows the newer one

    run = Run("carl")  # left just when the generating was done
    context.runs.add(run)
    assert context.looks.get(context.keep_look(run, "look", 1)) is None


def test_all_looks_together_are_bounded_in_bytes(look_tab):
    context = look_tab.context
    keys = [look_tab.look(context.begin(f"visitor {i}", "look"), early=1.0)[1] for i in range(4)]
    sizes = [look.num_bytes for look in map(context.looks.get, keys) if look]
    assert sizes and 4 * ONE_CALL < sizes[0] and sum(sizes) <= 10 * ONE_CALL
    assert context.looks.get(keys[-1]) and not context.looks.get(keys[0])


def test_the_page_says_why_a_look_is_refused(look_tab):
    for layer in ("0", FIRST_LAYER):  # a layer chosen by name is not said to be out of the patch's reach
        told, key = look_tab.look(look_tab.context.begin("ann", "look"), layer, agent_ratio=0.0)
        assert "would take" in told and "a larger agent_ratio" in told and key is None
    beyond = [name for name, downsample in look_tab.context.studio.models.loaded("tiny").layers if downsample > 1][0]
    assert "choose max_downsample 2 or more" in look_tab.look(look_tab.context.begin("ann", "look"), beyond)[0]
