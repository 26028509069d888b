"""The app in a browser when something is lost or new: its memory, the connection, the page, the visitor's knowledge."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from app_support import CountingLoader
from playground.look_tab import LookTab
from playground.models import Models
from playground.server import folder, start, stop
from test_app_browser import LIMIT, READY, browser, compare, expect, field, fill, holds, rounds, tab, told  # noqa: F401

from agentsd.config import PRESET_NOTES, SETTINGS


class App:
    """The app on the demo model, which a test may restart, or make forget."""

    def __init__(self):
        self.models = Models(["demo"], load=CountingLoader())
        self.start()

    def start(self, **options):
        self.page, self.address, self.studio = start(self.models, block=False, **options)
        self.port = int(self.address.rstrip("/").rsplit(":", 1)[1])

    def stop(self):
        stop(self.page, self.studio)
        self.drop_images()

    def drop_images(self):
        """What the app does when it ends, and after a day."""
        shutil.rmtree(Path(folder()) / "outputs")
        (Path(folder()) / "outputs").mkdir()

    def forget_sessions(self):
        """What 200 other visitors do to Gradio's memory of this one."""
        self.page.state_holder.session_data.clear()

    def forget_recordings(self):
        """What others' looks inside do to this visitor's."""
        tab = next(
            fn.fn.__self__ for fn in self.page.fns.values() if isinstance(getattr(fn.fn, "__self__", 0), LookTab)
        )
        tab.context.looks._values.clear()


@pytest.fixture(scope="module")
def app(browser):  # noqa: F811
    app = App()
    yield app
    app.stop()


@pytest.fixture
def context(browser):  # noqa: F811
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    yield context
    context.close()


@pytest.fixture
def window(context, app):
    return opened(context, app)


def opened(context, app):
    page = context.new_page()
    page.set_default_timeout(LIMIT)
    page.goto(app.address)
    expect(field(page, "prompt")).to_be_visible()
    told(page, "#code", "num_inference_steps")  # its events are connected
    return page


def choose(window, name, option):
    window.locator(f"#{name} input").click()
    window.get_by_role("option", name=option, exact=True).click()


def shown_distance(window):
    """What stands below the slider, once it is there, without the timer that Gradio lays over what it computes."""
    told(window, "#difference-text", "PSNR")
    return re.search("distance .* dB", window.locator("#difference-text").inner_text())[0]


def test_the_first_click_on_a_new_page_works(window):
    """Nothing was typed: what stands in the prompt is a prompt, not a hint that looks like one."""
    holds(window, "prompt", "a high quality photograph of a castle.")
    told(window, "#code", 'scheduler="ddim"')  # not PLMS at half of the steps it wants
    told(window, "#code", "num_inference_steps=25")
    expect(window.locator("#stop")).to_be_disabled()
    window.locator("#draw").click()
    window.wait_for_selector("#caption-sd [aria-label=generating]", timeout=READY)
    expect(window.locator("#status [role=alert]")).to_have_count(0)
    expect(window.locator("#stop")).to_be_enabled()
    window.locator("#stop").click()
    told(window, "#status", "Stopped.")
    expect(window.locator("#stop")).to_be_disabled()


def test_requests_of_several_tabs_wait_in_line_and_stop_is_lit_for_as_long(window):
    rounds(window, 1)
    fill(window, "steps", 2)
    fill(window, "prompt", "")
    window.locator("#draw").click()
    told(window, "#status", "prompt: is empty")
    expect(window.locator("#stop")).to_be_disabled()  # a refused request is not one that is going on
    fill(window, "prompt", "a zebra")
    window.locator("#draw").click()
    tab(window, "Sweep")
    fill(window, "count", 2)
    window.locator("#sweep").click()
    expect(window.locator("#stop")).to_be_enabled()
    window.wait_for_selector("#sweep-status .message.done", timeout=READY)
    expect(window.locator("#stop")).to_be_disabled()
    tab(window, "Compare")
    expect(window.locator("#status .message.done")).to_have_count(1)  # not "Stopped."
    tab(window, "History")
    expect(window.locator("#past button.thumbnail-item")).to_have_count(2)  # neither has written over the other


def test_a_page_whose_session_is_lost_shows_its_own_result_or_says_that_it_is_gone(window, app):
    """The stored example (44 dB between ToMeSD and AgentSD) must never pass for the visitor's own result."""
    rounds(window, 1)
    compare(window, "a zebra", 2)
    told(window, "#difference-text", "Stable Diffusion and AgentSD")
    choose(window, "left", "ToMeSD")
    told(window, "#difference-text", "ToMeSD and AgentSD")
    own = shown_distance(window)
    choose(window, "left", "Stable Diffusion")
    told(window, "#difference-text", "Stable Diffusion and AgentSD")
    app.forget_sessions()
    choose(window, "left", "ToMeSD")
    told(window, "#difference-text", "ToMeSD and AgentSD")
    assert shown_distance(window) == own
    tab(window, "History")
    window.locator("#past button.thumbnail-item").first.click()
    told(window, "#history-status", "shown under Compare")

    app.drop_images()  # a day has passed
    tab(window, "Compare")
    choose(window, "left", "AgentSD")
    told(window, "#difference-text", "no longer kept")
    fill(window, "prompt", "a frog")
    tab(window, "History")
    window.locator("#past button.thumbnail-item").first.click()
    told(window, "#history-status", "Its images are no longer kept")
    holds(window, "prompt", "a zebra")


def test_a_look_inside_whose_recording_is_lost_says_so(window, app):
    fill(window, "steps", 4)
    tab(window, "Look inside")
    window.locator("#look").click()
    window.wait_for_selector("#look-status .message.done", timeout=READY)
    app.forget_sessions()
    fill(window, "agent", 40)
    told(window, "#look-caption", "agent 40 of 64")
    app.forget_recordings()
    app.forget_sessions()
    fill(window, "agent", 50)
    told(window, "#look-caption", "no longer kept")
    fill(window, "agent", 20)
    window.locator("#look-picture img").click()
    told(window, "#look-caption", "no longer kept")


def test_no_state_of_a_page_lives_in_the_app_alone(app):
    import gradio as gr

    assert not [block for block in app.page.blocks.values() if isinstance(block, gr.State)]


def test_a_reload_keeps_the_form_and_the_past_runs(window, context, app):
    rounds(window, 1)
    compare(window, "a zebra", 2)
    own = shown_distance(window)
    window.get_by_role("button", name="Copy a link").click()  # what is typed later is newer than the address
    fill(window, "prompt", "a castle, half typed")
    fill(window, "seed", 77)
    fill(window, "ratio", 0.3)
    tab(window, "Sweep")
    fill(window, "count", 3)
    window.wait_for_timeout(500)
    window.reload()
    for name, text in {"prompt": "a castle, half typed", "seed": 77, "ratio": 0.3, "steps": 2}.items():
        holds(window, name, text)
    told(window, "#code", "manual_seed(77)")
    told(window, "#status", "Your last comparison, from before the page was loaded again.")
    told(window, "#difference-text", own)
    tab(window, "Sweep")
    holds(window, "count", 3)
    tab(window, "History")
    expect(window.locator("#past button.thumbnail-item")).to_have_count(1)

    other = opened(context, app)  # another page of the same browser: an empty form, the same history, none is lost
    holds(other, "prompt", "a high quality photograph of a castle.")
    rounds(other, 1)
    compare(other, "a frog", 1)
    tab(window, "Compare")
    compare(window, "a zebra", 1)
    tab(window, "History")
    expect(window.locator("#past button.thumbnail-item")).to_have_count(3)
    window.locator("#forget").click()
    expect(window.locator("#past button.thumbnail-item")).to_have_count(0)
    window.reload()
    tab(window, "History")
    expect(window.locator("#past button.thumbnail-item")).to_have_count(0)


def test_a_restart_of_the_app_is_told_and_nothing_typed_is_lost(window, app):
    rounds(window, 1)
    compare(window, "a zebra", 1)
    fill(window, "prompt", "a castle, half typed")
    window.wait_for_timeout(500)
    app.stop()
    window.locator("#draw").click()
    told(window, ".toast-body", "Connection to the server was lost")  # Gradio says so, and loads the page again later
    app.start(port=app.port)
    told(window, "#status", "The images of your last comparison are no longer kept")
    holds(window, "prompt", "a castle, half typed")
    expect(window.locator("#stop")).to_be_disabled()
    told(window, "#caption-agentsd", "stored example")
    tab(window, "History")
    expect(window.locator("#past button.thumbnail-item")).to_have_count(1)
    window.locator("#past button.thumbnail-item").first.click()
    told(window, "#history-status", "the same settings generate them again")
    holds(window, "prompt", "a zebra")
    tab(window, "Compare")
    compare(window, "a zebra", 1)


def test_a_browser_that_stores_nothing_is_told_what_a_reload_loses(context, app):
    context.add_init_script(
        "for (const name of ['localStorage', 'sessionStorage'])"
        " Object.defineProperty(window, name, {get() { throw new DOMException('blocked', 'SecurityError'); }});"
    )
    window = opened(context, app)
    told(window, "#status", "This browser stores nothing for this page")
    rounds(window, 1)
    compare(window, "a zebra", 1)
    tab(window, "History")
    expect(window.locator("#past button.thumbnail-item")).to_have_count(1)  # as long as the page is open


def test_every_name_is_explained_where_it_stands(window):
    for method, text in {"sd": "The model as it is", "tomesd": "Token merging", "agentsd": "a few agents"}.items():
        told(window, f"#about-{method}", text)
    for name in ("ratio", "early", "cache_interval"):
        told(window, f"#{name}", SETTINGS[name].help)
    told(window, "#preset-note", PRESET_NOTES["paper"].help)
    choose(window, "preset", "fast")
    told(window, "#preset-note", PRESET_NOTES["fast"].help)
    fill(window, "ratio", 0.3)
    told(window, "#preset-note", "as you have set them")
    for method in ("sd", "tomesd", "agentsd"):  # the stored example says how long it took, and where
        told(window, f"#caption-{method}", " s")
        told(window, f"#caption-{method}", "stored example")
    told(window, "#status", "CPU cores")
    tab(window, "Sweep")
    window.get_by_label("alpha", exact=True).first.check()
    told(window, "#field-about", SETTINGS["alpha"].help)


def test_the_keyboard_alone_is_enough(window):
    field(window, "prompt").focus()
    reached = set()
    for _ in range(60):
        window.keyboard.press("Tab")
        reached.add(window.evaluate(
            "(document.activeElement.closest('#draw, #seed, #steps, #preset, #ratio, #more, #link, [role=tab], #left, "
            "#slider .outer, #code, #picture-sd') ?? {}).id"
        ))  # fmt: skip
    assert {"draw", "seed", "steps", "preset", "ratio", "more", "link", "left"} <= reached
    handle = window.locator("#slider .outer")
    handle.focus()
    before = handle.bounding_box()["x"]
    window.keyboard.press("ArrowRight")
    window.keyboard.press("ArrowRight")
    assert handle.bounding_box()["x"] > before + 20
    assert handle.get_attribute("role") == "slider" and int(handle.get_attribute("aria-valuenow")) > 55
