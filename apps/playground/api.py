"""/compare, /inspect and /sweep: the app's functions for gradio_client, with defaults for everything but the prompt."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from typing import Any

import gradio as gr

from agentsd.images.generate import GeneratedImage
from agentsd.maps import agent_map, merge_map

from .figures import Figures, verdict
from .jobs import Case, Finished, Loading, Looked, Note, Report, Run, Stepped, Studio, explain, methods_to_compare
from .outputs import Outputs, file_name
from .settings import (
    PATCH_FIELDS,
    ROUNDS,
    SWEEP_RANGES,
    SWEEPABLE,
    Field,
    Limits,
    Settings,
    check,
    check_index,
    patch_values,
    preset_values,
    request_fields,
    sweep_values,
    trained_config,
)
from .sweeps import sweep_cases, sweep_csv, sweep_rows, sweep_settings, sweep_sheet


class Api:
    """The three functions; each is a generator whose last value is the answer, so that a cancelled call stops at once.

    Args:
        studio: what generates.
        outputs: where images are saved.
        limits: bounds on every request.
    """

    def __init__(self, studio: Studio, outputs: Outputs, limits: Limits):
        self.studio = studio
        self.outputs = outputs
        self.limits = limits
        self._request = list(request_fields(studio.models.names, limits).values())
        self._patch = [Field("preset", str, ""), *PATCH_FIELDS.values()]

    def register(self, **event: Any) -> None:
        """Add the endpoints to the gr.Blocks being built; `event` goes to gr.api."""
        look = [Field("layer", str, "0"), Field("call", int, 0), Field("agent", int, 0)]
        sweep = [
            Field("field", str, SWEEPABLE[0]),
            Field("first", float, SWEEP_RANGES[SWEEPABLE[0]][0]),
            Field("last", float, SWEEP_RANGES[SWEEPABLE[0]][1]),
            Field("count", int, 4),
        ]
        for function, fields in (
            (self.compare, [*self._request, ROUNDS, *self._patch]),
            (self.inspect, [*self._request, *look, *self._patch]),
            (self.sweep, [*self._request, *sweep, ROUNDS, *self._patch]),
        ):
            gr.api(_with_parameters(function, fields), api_name=function.__name__, **event)

    def compare(self, values: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Generate one seed by Stable Diffusion, ToMeSD and AgentSD.

        Answers {"sd": …, "tomesd": …, "agentsd": …, "verdict": …}; each method with its picture (a PNG that carries its
        settings), seconds, all_seconds, stable, speed_up, peak_gb, distance (root mean square, of 255) and settings.
        """
        settings = self._check(values)
        cases = methods_to_compare(settings.config)
        done: dict[int, GeneratedImage] = {}
        notes: list[str] = []
        yield from self._generate(settings, cases, done, notes)
        answer: dict[str, Any] = {case.method: self._describe(done[i], done[0]) for i, case in enumerate(cases)}
        yield {**answer, "verdict": " ".join([verdict([done[i] for i in range(len(cases))]), *notes])}

    def sweep(self, values: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Generate one seed unpatched, and patched with a setting at evenly spaced values.

        `field` is ratio, early, alpha or cache_interval; it takes `count` values from `first` to `last`. Answers
        {"drawings": [as /compare's, with "value"; the unpatched one first], "sheet": PNG, "table": CSV}.
        """
        settings = self._check(values)
        try:
            points = sweep_values(values["field"], values["first"], values["last"], values["count"], self.limits)
            cases = sweep_cases(settings.config, values["field"], points)
        except (ValueError, TypeError) as error:
            raise gr.Error(str(error), print_exception=False) from error
        done: dict[int, GeneratedImage] = {}
        yield from self._generate(settings, cases, done, [])
        ordered = [done[i] for i in range(len(cases))]
        rows = sweep_rows([None, *points], ordered)
        name = file_name(settings.request.prompt, values["field"])
        sheet = sweep_sheet(values["field"], rows, ordered)
        about = sweep_settings(values["field"], points, ordered, settings.config)
        table = sweep_csv(values["field"], rows, ordered)
        yield {
            "drawings": [{"value": row.value, **self._describe(one, ordered[0])} for row, one in zip(rows, ordered)],
            "sheet": _file(self.outputs.image(sheet, name, about)),
            "table": _file(self.outputs.text(table, name + ".csv")),
        }

    def inspect(self, values: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Generate with the patch and look inside one layer in one UNet call.

        `layer` is a number or name of a patched layer, `call` counts the UNet calls from 0, `agent` the agents. Answers
        {"picture", "merge_map", "agent_map" (PNG; the last is None in the merge phase), "layer", "call", "timestep",
        "phase", "grid" [height, width], "num_agents", "settings"}.
        """
        settings = self._check(values)
        named = str(values["layer"])
        layer = int(named) if named.isdigit() else named
        try:
            call, agent = (check_index(name, values[name]) for name in ("call", "agent"))
        except ValueError as error:
            raise gr.Error(str(error), print_exception=False) from error
        looked: Looked | None = None
        for report in self._reports(settings, self.studio.look, layer, call):
            if isinstance(report, Looked):
                looked = report
            else:
                yield {"status": _status(report, ["AgentSD"])}
        if looked is None:
            raise gr.Error("stopped before the layer was recorded", print_exception=False)
        view = looked.views[0]
        name = file_name(settings.request.prompt)
        try:
            heat = None if view.agent_attention is None else agent_map(view, agent, looked.image)
        except (ValueError, TypeError) as error:
            raise gr.Error(str(error), print_exception=False) from error
        save = self.outputs.image
        yield {
            "picture": _file(save(looked.image, name, looked.settings)),
            "merge_map": _file(save(merge_map(view, looked.image), name + "-merge-map")),
            "agent_map": heat and _file(save(heat, f"{name}-agent-{agent}")),
            "layer": view.layer,
            "call": view.call,
            "timestep": view.timestep,
            "phase": view.phase.value,
            "grid": list(view.grid),
            "num_agents": 0 if view.agent_attention is None else len(view.agent_attention),
            "settings": looked.settings,
        }

    def _check(self, values: dict[str, Any]) -> Settings:
        """Checked settings; fields of the patch left at their default take the value of the preset, or of the training.

        A model that was trained with agents has its settings in its folder; preset="paper" gives the defaults.
        """
        try:
            start = preset_values(values["preset"]) if values.get("preset") else self._trained_values(values)
            defaults = {field.name: field.default for field in PATCH_FIELDS.values()}
            for name, value in start.items():
                if values.get(name) in (None, defaults[name]):
                    values[name] = value
            return check(values, self.studio.models.names, self.limits)
        except (ValueError, TypeError) as error:
            raise gr.Error(str(error), print_exception=False) from error

    def _trained_values(self, values: dict[str, Any]) -> dict[str, Any]:
        model = values.get("model") or self.studio.models.names[0]
        config = trained_config(model) if model in self.studio.models.names else None
        return patch_values(config) if config else {}

    def _generate(
        self, settings: Settings, cases: list[Case], done: dict[int, GeneratedImage], notes: list[str]
    ) -> Iterator[dict[str, Any]]:
        """Yield what is going on; fill `done` with the images by case, and `notes` with remarks on the prompt."""
        for report in self._reports(settings, self.studio.generate, cases):
            if isinstance(report, Finished):
                done[report.case] = report.generated
            elif isinstance(report, Note):
                notes.append(report.text)
            yield {"status": _status(report, [case.label for case in cases])}

    def _reports(self, settings: Settings, job: Callable[..., Iterator[Report]], *arguments: Any) -> Iterator[Report]:
        try:
            yield from job(Run(), settings, *arguments)
        except Exception as error:
            raise gr.Error(explain(error, settings), print_exception=False) from error

    def _describe(self, one: GeneratedImage, first: GeneratedImage) -> dict[str, Any]:
        figures = Figures.of(one, first)
        name = file_name(one.settings["prompt"], one.method, one.settings["seed"])
        return {
            "picture": _file(self.outputs.image(one.image, name, one.settings)),
            "method": one.method,
            "seconds": figures.seconds,
            "all_seconds": list(one.all_seconds),
            "stable": figures.stable,
            "speed_up": figures.speed_up,
            "peak_gb": figures.peak_gb,
            "distance": figures.distance,
            "settings": one.settings,
        }


def _status(report: Report, labels: list[str]) -> str:
    if isinstance(report, Finished):
        return f"{labels[report.case]}: done"
    if isinstance(report, Stepped):
        what = "warm-up, " if report.round == 0 else f"round {report.round}, " if report.round > 1 else ""
        return f"{labels[report.case]}: {what}step {report.step} of {report.total}"
    if isinstance(report, Note):
        return report.text
    return f"loading {report.model}" if isinstance(report, Loading) else "done"


def _file(path: str) -> dict[str, Any]:
    """A file as Gradio's clients expect it: they download it and return the path of their copy."""
    return gr.FileData(path=path).model_dump()


def _with_parameters(method: Callable[..., Iterator], fields: list[Field]) -> Callable[..., Iterator]:
    """A function with one parameter for each field, as gr.api reads names, types and defaults from the signature."""

    def function(*given: Any) -> Iterator[dict]:
        yield from method({field.name: value for field, value in zip(fields, given)})

    parameters = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.POSITIONAL_OR_KEYWORD,
            default=inspect.Parameter.empty if field.default is ... else field.default,
            annotation=field.kind,
        )
        for field in fields
    ]
    vars(function)["__signature__"] = inspect.Signature(parameters, return_annotation=dict)
    function.__annotations__ = {**{field.name: field.kind for field in fields}, "return": dict}
    function.__name__ = method.__name__
    function.__doc__ = method.__doc__
    return function
