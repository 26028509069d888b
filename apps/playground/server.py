"""Start the app: its private folder, its headers, its address."""

from __future__ import annotations

import atexit
import errno
import logging
import os
import shutil
import socket
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

# Gradio reads these when it is imported. Its usual folders are shared with other apps, whose files it would then serve.
_FOLDER = tempfile.mkdtemp(prefix="agentsd-app-")
atexit.register(shutil.rmtree, _FOLDER, ignore_errors=True)
os.environ["GRADIO_TEMP_DIR"] = _FOLDER
os.environ["GRADIO_EXAMPLES_CACHE"] = str(Path(_FOLDER) / "examples")
os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

import gradio as gr  # noqa: E402
from starlette.middleware import Middleware  # noqa: E402
from starlette.types import ASGIApp, Message, Receive, Scope, Send  # noqa: E402

from .captions import CSS  # noqa: E402
from .jobs import Studio  # noqa: E402
from .models import Models  # noqa: E402
from .outputs import Outputs  # noqa: E402
from .page import Page  # noqa: E402
from .settings import Limits  # noqa: E402

_QUEUE = 64  # requests that may wait; further ones are refused
_UPLOAD = "40mb"

# The page needs no font, script or image from another host; these headers make the browser refuse any.
_POLICY = (
    "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:; connect-src 'self' data: blob: ws: wss:; "
    "object-src 'none'; base-uri 'self'"
)


class Guard:
    """Adds the content security policy, and refuses Gradio's fetching of other hosts' files in a visitor's name."""

    def __init__(self, app: ASGIApp):
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        if "/file=http" in scope["path"].lower() or "/proxy=" in scope["path"].lower():
            await send({"type": "http.response.start", "status": 403, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"This app serves its own files only."})
            return

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                extra = [(b"content-security-policy", _POLICY.encode()), (b"x-content-type-options", b"nosniff")]
                message = {**message, "headers": [*message.get("headers", []), *extra]}
            await send(message)

        await self.app(scope, receive, send_with_policy)


def theme() -> gr.themes.Base:
    """Gradio's default colours with the system's own fonts: the usual ones come from the network."""
    sans = ["ui-sans-serif", "system-ui", "sans-serif"]
    mono = ["ui-monospace", "Consolas", "monospace"]
    theme = gr.themes.Default(primary_hue="indigo", neutral_hue="slate", font=sans, font_mono=mono)
    # Explanations are small print: Gradio's own greys have a contrast of 2.6 : 1 on white, these more than 4.5 : 1.
    subdued = {"body_text_color_subdued": "*neutral_600", "body_text_color_subdued_dark": "*neutral_300"}
    infos = {"block_info_text_color": "*neutral_600", "block_info_text_color_dark": "*neutral_300"}
    return theme.set(**subdued, **infos)


def start(
    models: Models | Sequence[str],
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    share: bool = False,
    device: str | None = None,
    dtype: str | None = None,
    limits: Limits | None = None,
    block: bool = True,
) -> tuple[gr.Blocks, str, Studio]:
    """Load the models and serve the page.

    Args:
        models: names for `load_pipeline`, or Models. One that fails to load is named on the page and tried again when
            it is asked for.
        host, port: where to listen; port None takes the first free one from 7860.
        share: make a public address through Gradio's servers.
        device, dtype: as `load_pipeline`.
        limits: bounds on every request.
        block: return only when the server ends, by Ctrl+C; then no run goes on and the private folder is gone.

    Returns:
        (the Blocks, whose `close()` ends the server; its address; the studio that generates).

    Raises:
        OSError: the port is taken, or the host is not an address of this machine.
    """
    if port is not None:
        _check_address(host, port)
    if not isinstance(models, Models):
        models = Models(models, device, dtype)
    for name in models.names:
        try:
            models.get(name)
        except Exception as error:  # the page says so; the other models work
            print(f"agentsd: {error}", file=sys.stderr)
    if not any(map(models.loaded, models.names)):
        print("agentsd: no model could be loaded; the page says so, and tries again when asked", file=sys.stderr)
    limits = limits or Limits()
    studio = Studio(models, limits)
    page = Page(studio, Outputs(Path(_FOLDER) / "outputs"), limits).build()
    page.queue(max_size=_QUEUE, default_concurrency_limit=4)
    _, address, _ = page.launch(
        server_name=host,
        server_port=port,
        share=share,
        prevent_thread_lock=True,
        quiet=True,
        show_error=True,
        max_file_size=_UPLOAD,
        theme=theme(),
        css=CSS,
        footer_links=["api", "settings"],
        ssr_mode=False,
        state_session_capacity=200,
        app_kwargs={"middleware": [Middleware(Guard)]},
    )
    if block:
        try:
            print(f"agentsd: open {page.share_url or address} (Ctrl+C ends it)")
            while page.is_running:  # not page.block_thread: it waits five seconds for open pages, and close() as many
                time.sleep(0.1)
        except KeyboardInterrupt:
            print("agentsd: closing")
        finally:
            try:
                stop(page, studio)
            finally:
                # Not left to atexit: Python first waits for the step that is being done, and may be killed meanwhile.
                shutil.rmtree(_FOLDER, ignore_errors=True)
    return page, address, studio


def _check_address(host: str, port: int) -> None:
    """Refuse an address that cannot be had before the models are loaded, which takes minutes for large ones."""
    try:
        family, kind, _, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as attempt:
            if os.name == "posix":  # on Windows the option would allow a port that is in use
                attempt.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            attempt.bind(where)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise OSError(f"port {port} is taken: give another --port, or none for the first free one") from error
        raise OSError(f"cannot listen on {host}, port {port}: {error.strerror or error}") from error


def stop(page: gr.Blocks, studio: Studio) -> None:
    """End a server that `start` began, and its run at its next step."""
    studio.worker.close()
    log = logging.getLogger("uvicorn.error")
    before, log.disabled = log.disabled, True  # it reports every connection that is cut
    try:
        if page.server:
            page.server.force_exit = True  # without it uvicorn waits for every page that is still open in a browser
        page.close(verbose=False)
    finally:
        log.disabled = before


def folder() -> str:
    """The private folder: all files the app may serve lie below it."""
    return _FOLDER


__all__: list[Any] = ["folder", "start", "stop", "theme"]
