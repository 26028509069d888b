"""The report of `describe` as data, as text and as HTML: like layers are one table, so that SDXL fits on a screen."""

from __future__ import annotations

import dataclasses
import html
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from .config import AgentConfig, Phase
from .step_cache import FEWEST_STEPS

USUAL_WIDTH = 100
_LATER = {"merge": "token merging", "downsample": "downsampled keys and values", "full": "unpatched"}
_HEADER = ("", "tokens", "keys", "agents", "Mmul-add")
_SHARES = (
    "Shares of the multiply-adds are not shares of the seconds: a UNet call of SD 1.5 at 1024 px took 38% of its "
    "unpatched time in the early steps with 67% of its multiply-adds (2 CPU cores). To measure yours: "
    "agentsd generate --compare."
)


@dataclass(frozen=True)
class PhaseCost:
    """One layer in one phase, for one image (a batch of one).

    Attributes:
        tokens_left: M, the number of tokens after merging, which is that of the queries.
        keys: number of keys and values; M, or fewer where they are downsampled.
        agents: number of agent tokens; 0 in the merge phase.
        multiply_adds: of the layer's matching, projections and attention.
    """

    tokens_left: int
    keys: int
    agents: int
    multiply_adds: int


@dataclass(frozen=True)
class LayerReport:
    """One layer in the place of self-attention (`attn1` of a block).

    Attributes:
        name: module name in the UNet.
        status: "active"; "not active in the last call: …" with what happened; "replaced by …" where another processor
            has taken the patch's place; "left alone: …" with the reason; or "not patched".
        grid: (height, width) of its tokens, None where it was left alone.
        tokens: N = height · width.
        multiply_adds: of its self-attention unpatched: four projections and two products with the attention matrix.
        phases: cost in each phase of the patch, by phase name; empty where it is not patched.
        self_attention: False where it attends to the text only, whatever its name.
        last_call: "active" or a reason, as the last UNet call went; "" where there was none or it is not patched.
        recomputed: a cached call computes it too; True everywhere without step caching.
    """

    name: str
    status: str
    grid: tuple[int, int] | None = None
    tokens: int = 0
    multiply_adds: int = 0
    phases: dict[str, PhaseCost] = dataclasses.field(default_factory=dict)
    self_attention: bool = True
    last_call: str = ""
    recomputed: bool = True


@dataclass(frozen=True)
class LastCall:
    """The last UNet call of the patched model.

    Attributes:
        height, width: image size in pixels.
        timestep: noise level of the least noisy sample.
        phase: of that sample.
        notes: what else happened on a layer, by its name.
        cached: step caching reused a feature of an earlier call.
        whole_calls, cached_calls: numbers of UNet calls of this run so far; None without step caching.
    """

    height: int
    width: int
    timestep: float
    phase: Phase
    notes: dict[str, str]
    cached: bool = False
    whole_calls: int | None = None
    cached_calls: int | None = None


@dataclass(frozen=True, repr=False)
class Report:
    """What `describe` found; `print` it, or read it as data (`to_dict()`).

    Attributes:
        model: class of the pipeline or UNet.
        height, width: image size in pixels that the numbers hold for.
        config: the settings of the patch, None where there is none.
        early_timestep: the agent phase is at this timestep and above; None where there is no patch or no such phase, as
            with a scheduler that counts noise levels.
        layers: every layer in the place of self-attention.
        unet_multiply_adds: of one unpatched call of the whole UNet for one image (twice that with guidance); None for
            a kind of UNet whose extra inputs are not known here.
        assumed_timesteps: length of the diffusion run where it is assumed, as a bare UNet has no scheduler; else None.
        last_call: the last UNet call since the patch, None where there was none.
        cached_multiply_adds: of what a cached call computes, if it were unpatched; None without step caching, or where
            unet_multiply_adds is.
        cache_order: of step caching with the scheduler that the pipeline has now; None without step caching.
        skips_controlnet: cached calls skip the pipeline's ControlNet, too.
    """

    model: str
    height: int
    width: int
    config: AgentConfig | None
    early_timestep: float | None
    layers: tuple[LayerReport, ...]
    unet_multiply_adds: int | None
    assumed_timesteps: int | None = None
    last_call: LastCall | None = None
    cached_multiply_adds: int | None = None
    cache_order: int | None = None
    skips_controlnet: bool = False

    @property
    def active(self) -> tuple[LayerReport, ...]:
        """The layers on which the patch works."""
        return tuple(layer for layer in self.layers if layer.status == "active")

    def self_attention_multiply_adds(self, phase: Phase | None = None, cached: bool = False) -> int:
        """Multiply–adds of the active layers' self-attention in a phase, or unpatched (None).

        Those that a cached call computes too with `cached`, else all.
        """
        layers = [layer for layer in self.active if layer.recomputed or not cached]
        if phase is None:
            return sum(layer.multiply_adds for layer in layers)
        return sum(layer.phases[phase.value].multiply_adds for layer in layers)

    def unet_fraction(self, phase: Phase, cached: bool = False) -> float | None:
        """Multiply–adds of a call in a phase as a fraction of those of an unpatched call; None if that is unknown.

        Of a cached call with `cached`, else of a whole one.
        """
        computed = self.cached_multiply_adds if cached else self.unet_multiply_adds
        if self.unet_multiply_adds is None or computed is None:
            return None
        attention = self.self_attention_multiply_adds
        return (computed - attention(None, cached) + attention(phase, cached)) / self.unet_multiply_adds

    def to_dict(self) -> dict[str, Any]:
        """The same as plain numbers, strings, lists and dicts, ready for JSON."""
        data = dataclasses.asdict(self)
        if self.last_call is not None:
            data["last_call"]["phase"] = self.last_call.phase.value
        for name, cached in (("unet_fraction", False), ("cached_unet_fraction", True)):
            data[name] = {phase.value: self.unet_fraction(phase, cached) for phase in Phase} if self.active else {}
        return data

    def __str__(self) -> str:
        return as_text(self)

    __repr__ = __str__  # shown where a notebook or a prompt shows a value; the data stands in its attributes

    def _repr_html_(self) -> str:
        return as_html(self)


def as_text(report: Report, width: int = USUAL_WIDTH) -> str:
    """The report as plain text, at most `width` columns wide where words allow it."""

    def wrapped(parts: list[str]) -> str:
        return "\n".join(
            textwrap.fill(part, width, subsequent_indent="  ", break_on_hyphens=False, break_long_words=False)
            for part in parts
        )

    blocks = [wrapped(_introduction(report))]
    blocks += ["\n".join([wrapped([title]), *_aligned(rows)]) for title, rows in _tables(report)]
    blocks += [wrapped(_closing(report)), wrapped(_others(report))]
    return "\n\n".join(block for block in blocks if block)


def as_html(report: Report) -> str:
    """The report for a notebook: paragraphs and tables."""

    def paragraphs(parts: list[str]) -> list[str]:
        return [f"<p>{html.escape(part)}</p>" for part in parts]

    def row(cells: tuple[str, ...], kind: str) -> str:
        first, *numbers = (html.escape(cell) for cell in cells)
        aligned = "".join(f'<{kind} style="text-align:right">{cell}</{kind}>' for cell in numbers)
        return f"<tr><{kind}>{first}</{kind}>{aligned}</tr>"

    out = paragraphs(_introduction(report))
    for title, (header, *rows) in _tables(report):
        body = row(header, "th") + "".join(row(cells, "td") for cells in rows)
        out += [*paragraphs([title]), f"<table>{body}</table>"]
    return "\n".join([*out, *paragraphs(_closing(report)), *paragraphs(_others(report))])


def every_layer(report: Report) -> str:
    """One line for each layer with its status; the patched ones with the number that `visualize --layer` takes."""
    lines, number = [], 0
    for layer in report.layers:
        label = "-"
        if layer.grid is not None:
            label, number = str(number), number + 1
        lines.append(f"{label:>3}  {layer.name}: {layer.status}")
    return "\n".join(lines)


def _introduction(report: Report) -> list[str]:
    lines = [f"{report.model} at {report.width}×{report.height} px: {_headline(report)}"]
    if report.config is not None:
        lines.append("settings: " + _settings(report.config))
        if report.config.cache_interval > 1:
            lines.append(_step_caching(report))
    if report.last_call is not None:
        lines.append(_last_call(report))
        notes: dict[str, int] = {}
        for note in report.last_call.notes.values():
            notes[note] = notes.get(note, 0) + 1
        lines += [f"  on {count} layers: {note}" for note, count in notes.items()]
    return lines


def _step_caching(report: Report) -> str:
    assert report.config is not None
    kept = "on the line through the last two kept features" if report.cache_order else "on the last kept feature"
    text = (
        f"step caching: up to {report.config.cache_interval} calls in a row share one whole call; the others recompute "
        f"the end of the UNet alone, {kept} (order {report.cache_order})"
    )
    if report.skips_controlnet:
        text += ", and before them the ControlNet computes its first layers alone"
    return text + ". The tables below are those of a whole call"


def _headline(report: Report) -> str:
    layers = [layer for layer in report.layers if layer.self_attention]
    others = len(report.layers) - len(layers)
    beside = f"; {others} others are cross-attention only" if others else ""
    if report.config is None:
        return f"not patched; it has {len(layers)} self-attention layers{beside}"
    later = _LATER[report.config.late]
    if report.early_timestep is None:
        nothing = "ratio=0" if report.config.late == "merge" else f"late={report.config.late!r}"
        changes = report.config.acts_in(Phase.MERGE)
        without = "early=0" if report.config.early == 0 else "a scheduler that counts noise levels, not timesteps,"
        when = f"{later} in every step" if changes else f"but {nothing} and {without} change nothing"
        if changes and report.config.early > 0:
            when += ", as the scheduler counts noise levels, not timesteps"
    else:
        agents = "agent attention" + " (one token of each cell)" * (report.config.agents == "grid")
        when = f"{agents} at timesteps ≥ {report.early_timestep:g}, {later} below"
        if report.config.early == 1:
            when = f"{agents} in every step"
        if report.assumed_timesteps:
            when += f"; a schedule of {report.assumed_timesteps} timesteps is assumed, as a bare UNet has no scheduler"
    return f"agentsd is active on {len(report.active)} of {len(layers)} self-attention layers{beside}; {when}"


def _settings(config: AgentConfig) -> str:
    """ratio and early, and what else is not at its default."""
    values = dataclasses.asdict(config)
    defaults = dataclasses.asdict(AgentConfig())
    shown = [name for name in values if name in ("ratio", "early") or values[name] != defaults[name]]
    text = ", ".join(f"{name}={values[name]!r}" for name in shown)
    return text + ("" if len(shown) == len(values) else "; all others at their defaults")


def _last_call(report: Report) -> str:
    call = report.last_call
    assert call is not None
    installed = [layer for layer in report.layers if layer.last_call]
    active = sum(layer.last_call == "active" for layer in installed)
    phase = f"{call.phase.value} phase" + (", cached" if call.cached else "")
    text = (
        f"last call: {call.width}×{call.height} px, timestep {call.timestep:g}, {phase}: active on {active} of "
        f"{len(installed)} patched layers"
    )
    if call.whole_calls is not None:
        text += f"; this run: {call.whole_calls} whole and {call.cached_calls} cached calls"
        if not call.cached_calls and call.whole_calls < FEWEST_STEPS:
            text += f" (runs of fewer than {FEWEST_STEPS} steps are not cached)"
    return text


def _tables(report: Report) -> list[tuple[str, list[tuple[str, ...]]]]:
    """(title, rows) for each group of active layers with the same figures."""
    groups: dict[tuple, list[LayerReport]] = {}
    for layer in report.active:
        groups.setdefault((layer.grid, layer.multiply_adds, tuple(layer.phases.items())), []).append(layer)
    tables = []
    for layers in groups.values():
        first = layers[0]
        assert first.grid is not None
        each = f"{len(layers)} layers, each" if len(layers) > 1 else "1 layer,"
        title = f"{each} {first.grid[0]}×{first.grid[1]} = {first.tokens} tokens: {_places(layers)}"
        rows = [_HEADER, ("unpatched", *map(str, (first.tokens, first.tokens, "-")), _millions(first.multiply_adds))]
        for phase in phases_in_use(report):
            cost = first.phases[phase.value]
            agents = str(cost.agents or "-")
            rows.append((phase.value, str(cost.tokens_left), str(cost.keys), agents, _millions(cost.multiply_adds)))
        tables.append((title, rows))
    return tables


def _closing(report: Report) -> list[str]:
    """What the layers' self-attention is of the whole UNet, before and after."""
    if not report.active:
        return []
    before = report.self_attention_multiply_adds()
    phases = phases_in_use(report)
    after = {phase: report.self_attention_multiply_adds(phase) / before for phase in phases}
    if report.unet_multiply_adds is None:
        shares = ", ".join(f"{part:.1%} in the {phase.value} phase" for phase, part in after.items())
        return [f"multiply-adds of their self-attention: {shares} of the unpatched ones"]
    lines = [
        f"whole UNet, unpatched: {report.unet_multiply_adds / 1e9:.2f} Gmul-add a call and image, "
        f"{before / report.unet_multiply_adds:.1%} of them in the self-attention of these layers"
    ]
    for phase, part in after.items():
        whole = report.unet_fraction(phase)
        line = f"{phase.value} phase: {part:.1%} of that self-attention is left, {whole:.1%} of the whole UNet"
        cached = report.unet_fraction(phase, cached=True)
        lines.append(line + ("" if cached is None else f"; in a cached call {cached:.1%}"))
    return [*lines, _SHARES]


def _others(report: Report) -> list[str]:
    """One line per status of the layers that are not active: how many, why, where."""
    others: dict[str, list[LayerReport]] = {}
    for layer in report.layers:
        if layer.status != "active":
            others.setdefault(layer.status, []).append(layer)
    return [f"{len(layers)} {status}: {_places(layers)}" for status, layers in others.items()]


def phases_in_use(report: Report) -> list[Phase]:
    """The phases that a run goes through with the report's settings and scheduler."""
    if report.config is None:
        return []
    has_agents = report.early_timestep is not None
    return [Phase.AGENT] * has_agents + [Phase.MERGE] * (report.config.early < 1 or not has_agents)


def _places(layers: Iterable[LayerReport]) -> str:
    """The UNet's stages that the layers stand in, with their number in each."""
    stages: dict[str, int] = {}
    for layer in layers:
        parts = layer.name.split(".")
        stage = ".".join(parts[:2]) if len(parts) > 1 and parts[1].isdigit() else parts[0]
        if ".motion_modules." in layer.name:
            stage += " (motion)"
        stages[stage] = stages.get(stage, 0) + 1
    return ", ".join(f"{stage} ({count})" if count > 1 else stage for stage, count in stages.items())


def _aligned(rows: list[tuple[str, ...]]) -> list[str]:
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return [
        "  " + "  ".join(cell.rjust(w) if i else cell.ljust(w) for i, (cell, w) in enumerate(zip(row, widths)))
        for row in rows
    ]


def _millions(count: int) -> str:
    return f"{count / 1e6:.1f}"
