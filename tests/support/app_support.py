"""What the app's tests share: its package on the path, and tiny models that count how often they are loaded."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from conftest import make_pipeline
from playground.models import Models

from agentsd.images.pipelines import load_pipeline


class CountingLoader:
    """load_pipeline that notes what it was asked for; "tiny" and "other" are tiny models with random weights."""

    def __init__(self) -> None:
        self.asked: list[str] = []

    def __call__(self, name: str, **options: Any) -> Any:
        self.asked.append(name)
        if name in ("tiny", "other"):
            return make_pipeline("sd15" if name == "tiny" else "sd2")
        pipe = load_pipeline(name, **options)
        if name == "demo":
            pipe.unet.register_to_config(sample_size=32)  # 256 px unless told otherwise: a quarter of the time
        return pipe


def tiny_models(*names: str) -> Models:
    """Models with a loader that counts (`models._load.asked`)."""
    return Models(names or ("tiny",), load=CountingLoader())


@contextlib.contextmanager
def serving(models: Models, **options: Any) -> Iterator[tuple[str, Any]]:
    """(address, studio) of the app, for the length of a `with` block."""
    from playground.server import start, stop

    page, address, studio = start(models, block=False, **options)
    try:
        yield address, studio
    finally:
        stop(page, studio)
