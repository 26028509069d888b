"""Screenshots of the app's tabs for README.md: starts the app on the demo model and clicks through it in Chromium."""

from __future__ import annotations

import argparse
import shutil
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

FOLDER = Path(__file__).parent / "screenshots"
TABS = ("compare", "look", "sweep", "history")
_LONG = 1_200_000  # milliseconds: a run on a slow machine


def main(arguments: list[str] | None = None) -> int:
    """Write compare.png, look.png, sweep.png and history.png, as far as they are asked for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER, help="folder of the screenshots")
    parser.add_argument("--tabs", nargs="+", choices=TABS, default=TABS, help="default: all")
    parser.add_argument("--width", type=int, default=1280, help="width of the window in pixels")
    parser.add_argument("--dark", action="store_true", help="in the dark theme")
    parser.add_argument("--steps", type=int, default=25, help="denoising steps")
    parser.add_argument("--rounds", type=int, default=3, help="timed rounds")
    parser.add_argument("--browser", default=shutil.which("chromium"), help="default: chromium")
    parser.add_argument(
        "--example", type=Path, metavar="PNG",
        help="only store this image of `agentsd generate --compare` as the start page's example",
    )  # fmt: skip
    parser.add_argument("--machine", default="2 CPU cores", help="where that image was generated")
    options = parser.parse_args(arguments)
    if options.example:
        from playground.example import EXAMPLE, store_example

        store_example(options.example, options.machine)
        print(EXAMPLE)
        return 0
    if not options.browser:
        print("screenshots: no chromium found: install it, or name one with --browser", file=sys.stderr)
        return 2
    from playground.server import start, stop
    from playwright.sync_api import sync_playwright

    options.out.mkdir(parents=True, exist_ok=True)
    page, address, studio = start(["demo"], block=False)
    try:
        with sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=options.browser, args=["--no-sandbox"])
            window = browser.new_page(viewport={"width": options.width, "height": 900})
            window.goto(address + ("?__theme=dark" if options.dark else "?__theme=light"))
            for name in click_through(window, options.tabs, options.steps, options.rounds):
                save(window, options.out / f"{name}.png")
                print(options.out / f"{name}.png")
            browser.close()
    finally:
        stop(page, studio)
    return 0


def click_through(window: Any, tabs: Sequence[str], steps: int, rounds: int) -> Iterator[str]:
    """Use every tab that is asked for; yields its name once its results are there."""
    window.locator("#prompt textarea").fill("a high quality photograph of a castle.")
    window.locator("#steps input").fill(str(steps))
    window.locator("#seed input").fill("3")
    window.get_by_text("More settings").click()
    window.locator("#rounds input[type=number]").fill(str(rounds))
    window.locator("#rounds input[type=number]").blur()
    window.get_by_text("More settings").click()
    if "compare" in tabs:
        window.locator("#draw").click()
        window.wait_for_selector("#status .message.done", timeout=_LONG)
        window.locator("#difference").scroll_into_view_if_needed()  # images load when they come into view
        window.wait_for_selector("#difference img")
        yield "compare"
    if "look" in tabs:
        window.get_by_role("tab", name="Look inside").click()
        window.locator("#look").click()
        window.wait_for_selector("#look-status .message.done", timeout=_LONG)
        window.locator("#step input[type=number]").fill("2")
        window.locator("#step input[type=number]").blur()
        window.wait_for_function("document.querySelector('#look-caption').innerText.includes('UNet call 2')")
        window.locator("#look-picture img").click()
        window.wait_for_timeout(1500)
        yield "look"
    if "sweep" in tabs:
        window.get_by_role("tab", name="Sweep").click()
        window.locator("#sweep").click()
        window.wait_for_selector("#sweep-status .message.done", timeout=_LONG)
        window.wait_for_timeout(1500)
        yield "sweep"
    if "history" in tabs:
        window.get_by_role("tab", name="History").click()
        window.wait_for_selector("#past img")
        window.wait_for_timeout(500)
        yield "history"


def save(window: Any, path: Path) -> None:
    """Save the whole page in 256 colours: a third of the bytes, with little visible difference."""
    window.evaluate("window.scrollTo(0, 0)")
    window.screenshot(path=path, full_page=True)
    with Image.open(path) as image:
        small = image.convert("RGB").quantize(256, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
    small.save(path, optimize=True)


if __name__ == "__main__":
    sys.exit(main())
