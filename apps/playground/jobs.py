"""Run the requests: one thread generates, in the order asked; a run reports what it has done and can be stopped."""

from __future__ import annotations

import contextlib
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from PIL import Image

from agentsd.config import DEFAULT_NUM_TRAIN_TIMESTEPS, AgentConfig
from agentsd.images.generate import GeneratedImage, Step, generate, settings_of
from agentsd.images.methods import METHODS, refuse_patched
from agentsd.images.names import scheduler_name
from agentsd.images.pipelines import ModelError, set_scheduler
from agentsd.images.quality_notes import quality_notes
from agentsd.images.warm_up import warm_up, warm_up_timesteps
from agentsd.patch import find_unet, get_patch
from agentsd.trained import FILE_NAME, trained_of
from agentsd.visualize import LayerView, look_inside, look_through

from .models import Model, Models, free_memory, scheduler_to_set
from .prompts import prompt_notes
from .settings import Limits, Settings

_PREVIEW_EVERY = 0.25  # seconds; more would only cost time, as each one is sent to the browser

_PREVIEW_SIDE, _SMOOTH = 256, Image.Resampling.BICUBIC

log = logging.getLogger("agentsd.playground")


class Stopped(Exception):
    """The run was stopped by its visitor."""


@dataclass(frozen=True)
class Case:
    """One image of a run.

    Attributes:
        label: its name in print.
        method: a key of METHODS.
        config: the patch.
    """

    label: str
    method: str
    config: AgentConfig


# --- what a run reports -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Loading:
    """The model is being loaded, before anything can be generated."""

    model: str


@dataclass(frozen=True)
class Note:
    """A remark on the prompt: what the model does not read or does not know, as a sentence for the page."""

    text: str


@dataclass(frozen=True)
class Stepped:
    """A step is done.

    Attributes:
        case: number of the image in its run.
        round: 0 is the warm-up, 1 the first timed round.
        step, total: of this round.
        preview: the image so far, in the first round, from time to time.
    """

    case: int
    round: int
    step: int
    total: int
    preview: Image.Image | None = None


@dataclass(frozen=True)
class Finished:
    """An image is ready, or has been timed once more."""

    case: int
    generated: GeneratedImage


@dataclass(frozen=True)
class Looked:
    """A layer has been recorded; one view per recorded UNet call in which it merges."""

    image: Image.Image
    views: list[LayerView]
    settings: dict[str, Any]


Report = Loading | Note | Stepped | Finished | Looked
Emit = Callable[[Report], None]


# --- the one thread that generates ------------------------------------------------------------------------------------


class Run:
    """One request on its way; `stop` may come from any thread, also before it begins.

    Args:
        visitor: whose it is, where a page asked for it.
        what: which button of theirs began it ("compare", "look" or "sweep").
    """

    def __init__(self, visitor: str | None = None, what: str = "") -> None:
        self.visitor = visitor
        self.what = what
        self._stopped = threading.Event()

    def stop(self) -> None:
        """End the run at its next step."""
        self._stopped.set()

    @property
    def stopped(self) -> bool:
        return self._stopped.is_set()

    def check(self) -> None:
        """Raises Stopped once `stop` was called."""
        if self._stopped.is_set():
            raise Stopped("stopped")


class Worker:
    """Does one piece of work at a time, in the order given: two requests never share a model."""

    def __init__(self) -> None:
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="generate")
        self._runs: set[Run] = set()  # in progress or waiting
        self._closed = False
        # Reentrant: an abandoned iterator may be collected, and so closed, while this thread holds the lock.
        self._lock = threading.RLock()

    def reports(self, run: Run, work: Callable[[Emit], None]) -> Iterator[Report]:
        """Start some work and yield what it reports, until it ends. Closing the iterator stops the run.

        Args:
            run: stops the work: `emit` raises Stopped inside it.
            work: called with `emit` in the generating thread.

        Raises:
            Stopped: the run was stopped, or the worker closed.
            Whatever the work raised.
        """
        messages: queue.SimpleQueue = queue.SimpleQueue()

        def emit(report: Report) -> None:
            run.check()
            messages.put(report)

        def whole() -> None:
            run.check()
            work(emit)

        with self._lock:
            if self._closed:
                raise Stopped("stopped")
            self._runs.add(run)
            future = self._thread.submit(whole)
        future.add_done_callback(lambda _: messages.put(None))
        try:
            while (report := messages.get()) is not None:
                yield report
            future.result()
        except Exception:
            free_memory()
            raise
        finally:
            run.stop()
            with self._lock:
                self._runs.discard(run)

    def close(self) -> None:
        """Stop the run in progress and those that wait, and take no more work.

        Python does not end before its threads do: a run that went on would keep the whole app waiting.
        """
        with self._lock:
            self._closed = True
            for run in list(self._runs):
                run.stop()
        self._thread.shutdown(wait=False)


class Studio:
    """Generates everything: the models, the generating thread, and the runs of each visitor.

    Args:
        models: the app's models.
        limits: bounds on every request; those that `check` cannot know beforehand are kept here. None takes the
            default ones.
    """

    def __init__(self, models: Models, limits: Limits | None = None):
        self.models = models
        self.limits = limits or Limits()
        self.worker = Worker()
        self._runs: dict[str, dict[str, Run]] = {}  # by visitor and button: going or waiting, until `finish`
        self._lock = threading.Lock()
        self._warm: set[tuple] = set()

    def begin(self, visitor: str, what: str = "") -> Run:
        """A new run of a visitor. An earlier one of the same button is stopped, others keep their place."""
        run = Run(visitor, what)
        with self._lock:
            runs = self._runs.setdefault(visitor, {})
            before, runs[what] = runs.get(what), run
        if before:
            before.stop()
        return run

    def finish(self, run: Run) -> None:
        """A run has ended, in whatever way: it is no longer its visitor's."""
        with self._lock:
            runs = self._runs.get(run.visitor or "", {})
            if runs.get(run.what) is run:
                del runs[run.what]
            if not runs:
                self._runs.pop(run.visitor or "", None)

    def has(self, run: Run) -> bool:
        """Whether a run that `begin` made has neither ended nor been replaced, and its visitor is still there."""
        with self._lock:
            return self._runs.get(run.visitor or "", {}).get(run.what) is run

    def busy(self, visitor: str) -> bool:
        """Whether something of this visitor is being generated or waits in line."""
        with self._lock:
            return any(not run.stopped for run in self._runs.get(visitor, {}).values())

    def stop(self, visitor: str) -> bool:
        """Stop all that a visitor has going or waiting; False where there is nothing."""
        with self._lock:
            runs = [run for run in self._runs.get(visitor, {}).values() if not run.stopped]
        for run in runs:
            run.stop()
        return bool(runs)

    def forget(self, visitor: str) -> None:
        """Stop a visitor's runs and forget them: they have closed the page."""
        self.stop(visitor)
        with self._lock:
            self._runs.pop(visitor, None)

    # --- the jobs -----------------------------------------------------------------------------------------------------

    def generate(self, run: Run, settings: Settings, cases: Sequence[Case]) -> Iterator[Report]:
        """Generate every case, each as soon as possible; then time them again in interleaved rounds, in rotating order.

        The first run of a kind is slower than the rest, so each method is warmed up before its first image of a size.
        """

        def work(emit: Emit) -> None:
            with self._ready(settings, emit) as model:
                done: dict[int, GeneratedImage] = {}
                for number in range(1, settings.rounds + 1):
                    # Each round begins with another method, so that none always runs after the same one.
                    first = (number - 1) % len(cases)
                    for index in [*range(first, len(cases)), *range(first)]:
                        case = cases[index]
                        if number == 1:
                            self._warm_up(model, settings, index, case, emit)
                        calls: Counter[str] = Counter()
                        report = _step_reporter(model, index, number, emit, calls)
                        one = generate(model.pipe, settings.request, case.method, case.config, report)
                        one = done[index].with_run(one) if index in done else one
                        one.settings.update(_as_asked(settings))
                        if case.method == "agentsd" and case.config.cache_interval > 1:
                            one.settings["unet_calls"] = {kind: calls[kind] for kind in ("whole", "cached")}
                        done[index] = one
                        emit(Finished(index, one))

        return self.worker.reports(run, work)

    def look(self, run: Run, settings: Settings, layer: int | str, call: int | None = None) -> Iterator[Report]:
        """Generate with the patch and record a layer, in one UNet call or (None) in all, as far as `look_through` goes.

        Step caching skips most layers in its cached calls: there is nothing to record in those.

        Raises:
            ValueError: as look_inside and look_through, also where the recording would exceed limits.recording.
        """

        def work(emit: Emit) -> None:
            with self._ready(settings, emit) as model:
                asked = (model.pipe, settings.request, settings.config, layer)
                options: dict[str, Any] = {
                    "budget": self.limits.recording,
                    "on_step": _step_reporter(model, 0, 1, emit),
                }
                if call is None:
                    image, views = look_through(*asked, **options)
                else:
                    image, view = look_inside(*asked, call, **options)
                    views = [view]
                about = settings_of(model.pipe, settings.request, "agentsd", settings.config)
                emit(Looked(image, views, {**about, **_as_asked(settings)}))

        return self.worker.reports(run, work)

    @contextlib.contextmanager
    def _ready(self, settings: Settings, emit: Emit) -> Iterator[Model]:
        """The model with the scheduler asked for; its own scheduler is restored afterwards.

        Raises:
            ValueError: something outside this app has patched the pipeline since it was loaded.
        """
        if self.models.loaded(settings.model) is None:
            emit(Loading(settings.model))
        model = self.models.get(settings.model)
        refuse_patched(model.pipe)
        own = model.pipe.scheduler
        try:
            scheduler = scheduler_to_set(settings.scheduler, own)
            if scheduler is not None:
                set_scheduler(model.pipe, scheduler)
            for text in (
                *prompt_notes(model.name, model.pipe, settings.request.prompt),
                *quality_notes(settings.request, scheduler or scheduler_name(own), model.size),
            ):
                emit(Note(text))
            trained = trained_of(find_unet(model.pipe))
            if trained is not None and settings.config == trained.config:
                emit(Note(f"The patch has the settings that {model.name} was trained for ({FILE_NAME})."))
            yield model
        finally:
            model.pipe.scheduler = own

    def _warm_up(self, model: Model, settings: Settings, index: int, case: Case, emit: Emit) -> None:
        request = settings.request
        calls = tuple(warm_up_timesteps(case.config, DEFAULT_NUM_TRAIN_TIMESTEPS))
        kind = (model.name, case.method, request.height, request.width, request.guidance > 1, calls)
        if kind not in self._warm:
            warm_up(model.pipe, request, case.method, case.config, _step_reporter(model, index, 0, emit))
            self._warm.add(kind)


def _step_reporter(
    model: Model, case: int, number: int, emit: Emit, calls: Counter[str] | None = None
) -> Callable[[Step], None]:
    """An on_step that emits Stepped; `calls` counts the UNet calls of a patched run, "whole" and "cached"."""
    shown = 0.0

    def report(step: Step) -> None:
        nonlocal shown
        patch = get_patch(model.pipe)
        if calls is not None and patch is not None and patch.last_call is not None:
            calls["cached" if patch.last_call.cached else "whole"] += 1
        preview = None
        if number == 1 and step.number < step.total and time.monotonic() - shown >= _PREVIEW_EVERY:
            preview = model.preview(step.latents)
            side = _PREVIEW_SIDE / max(preview.size)
            preview = preview.resize((round(preview.width * side), round(preview.height * side)), _SMOOTH)
            shown = time.monotonic()
        emit(Stepped(case, number, step.number, step.total, preview))

    return report


def _as_asked(settings: Settings) -> dict[str, str]:
    """Model and scheduler by their names in the app, from which an image's settings are restored."""
    return {"model": settings.model, "scheduler_name": settings.scheduler}


def methods_to_compare(config: AgentConfig) -> list[Case]:
    """Stable Diffusion, ToMeSD and AgentSD with the same settings."""
    return [Case(label, method, config) for method, label in METHODS.items()]


def explain(error: BaseException, settings: Settings | None = None) -> str:
    """One sentence for the page: what went wrong and what to do. What is not the visitor's doing goes to the log."""
    if isinstance(error, Stopped):
        return "Stopped."
    if isinstance(error, (ValueError, TypeError, ModelError)) or type(error) is OSError:
        return str(error)
    if _is_out_of_memory(error):
        size = ""
        if settings and settings.request.width and settings.request.height:
            size = f" at {settings.request.width} × {settings.request.height} px"
        return f"Out of memory{size}: choose a smaller width and height. The app goes on."
    log.error("a request failed", exc_info=error)
    first = (str(error).strip().splitlines() or [""])[0][:200]
    return f"Something went wrong inside the app ({type(error).__name__}: {first}). The app goes on."


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    text = str(error).lower()  # PyTorch's CPU allocator raises a plain RuntimeError
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
