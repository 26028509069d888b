"""The models the app was started with: each loaded once, and what the page must know of them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from agentsd import AgentConfig
from agentsd.images.methods import refuse_patched
from agentsd.images.names import scheduler_name
from agentsd.images.pipelines import ModelError, load_pipeline
from agentsd.patch import find_unet
from agentsd.unet.layers import find_layers, own_latent_size

from .previews import Preview
from .settings import OWN_SCHEDULER, RECOMMENDED


@dataclass(frozen=True)
class Model:
    """A loaded model.

    Attributes:
        name: as the app was started with.
        pipe: its pipeline, unpatched between requests.
        size: its own (height, width) in pixels.
        layers: (module name, downsampling of the latent) of every layer that some patch could reach.
        preview: latents -> a small image.
    """

    name: str
    pipe: Any
    size: tuple[int, int]
    layers: tuple[tuple[str, int], ...]
    preview: Preview


class Models:
    """Loads each model when it is first asked for, and keeps it.

    Args:
        names: what `load_pipeline` takes; nothing else is ever loaded.
        device, dtype: as `load_pipeline`.
        load: used in place of `load_pipeline`.
    """

    def __init__(
        self,
        names: Sequence[str],
        device: str | None = None,
        dtype: str | None = None,
        load: Callable[..., Any] = load_pipeline,
    ):
        if not names:
            raise ValueError("model: at least one must be named")
        self.names = tuple(dict.fromkeys(names))
        self.failures: dict[str, str] = {}
        """Why a model could not be loaded the last time it was tried, by name."""
        self._options = {"device": device, "dtype": dtype}
        self._load = load
        self._loaded: dict[str, Model] = {}
        self._lock = threading.Lock()

    def loaded(self, name: str) -> Model | None:
        """The model if it is in memory; loads nothing."""
        return self._loaded.get(name)

    def get(self, name: str) -> Model:
        """The model, loaded now if it was not yet. One that failed is tried again: the cause may have been mended.

        Raises:
            ValueError: the app was not started with it.
            ModelError: it cannot be loaded.
        """
        if name not in self.names:
            raise ValueError(f"model={name!r}: must be one this app was started with: {', '.join(self.names)}")
        with self._lock:
            if name not in self._loaded:
                try:
                    self._loaded[name] = self._make(name)
                    self.failures.pop(name, None)
                except Exception as error:
                    self.failures[name] = str(error)
                    raise
            return self._loaded[name]

    def _make(self, name: str) -> Model:
        pipe = self._load(name, **self._options)
        try:
            unet = find_unet(pipe)
            refuse_patched(pipe)
        except (TypeError, ValueError) as error:
            raise ModelError(f"{name}: {error}") from error
        pipe.set_progress_bar_config(disable=True)
        height, width = own_latent_size(unet)
        layers, _ = find_layers(unet, AgentConfig(max_downsample=8))
        return Model(
            name,
            pipe,
            (height * pipe.vae_scale_factor, width * pipe.vae_scale_factor),
            tuple((layer.name, layer.downsample) for layer in layers),
            Preview(pipe),
        )


def scheduler_to_set(asked: str, own: Any) -> str | None:
    """The name of the scheduler to put in the place of a model's own one; None keeps it.

    Args:
        asked: a key of SCHEDULERS, OWN_SCHEDULER or RECOMMENDED.
        own: the model's own scheduler. Where it is PLMS, which wants 50 steps, DDIM is recommended; others were
            chosen for their model and stay.
    """
    if asked == RECOMMENDED:
        return "ddim" if scheduler_name(own) == "plms" else None
    return None if asked == OWN_SCHEDULER else asked


def free_memory() -> None:
    """Give back what a failed run left in the allocator's cache."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
