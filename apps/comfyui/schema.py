"""What the two nodes are: inputs, outputs and texts, from the fields of AgentConfig. `v1` and `v3` tell ComfyUI.

One source for ComfyUI's old and current form of nodes, and for locales/en/nodeDefs.json.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from agentsd.config import PRESET_NOTES, PRESETS, SETTINGS, AgentConfig, Phase
from agentsd.fields import written

CUSTOM = "custom"
"""The preset that stands for the node's widgets."""
TAKES_RATIO, NO_LIMIT = -1.0, 0
"""What widgets without a None say in its place: of `early_ratio`, and of the caps."""
MOST_INTERVAL = 10

_DEFAULTS = AgentConfig()
_FIELDS = ("ratio", "early", "late", "max_downsample", "seed", "max_agents", "max_keys", "match_tile")
# Later ones stand behind the first version's, so that its workflows load with their values in their places.
_CACHING_FIELDS = ("cache_interval",)
_ADVANCED_FIELDS = ("cache_order", "cache_depth", "early_ratio", "agents")
_MOST_DEPTH = 3
_MOST = 2**20
# With late = downsample or full the agents' cell alone bounds ratio; 0.93 in steps of 0.01.
_MOST_RATIO = int(100 * (1 - 1 / math.prod(_DEFAULTS.stride(Phase.AGENT)))) / 100


@dataclass(frozen=True)
class Input:
    """An input of a node.

    Attributes:
        name: of it.
        kind: ComfyUI's type: MODEL, LATENT, INT, FLOAT or COMBO.
        tooltip: what it is and when to change it.
        default: of a widget.
        choices: of a COMBO.
        bounds: ComfyUI's options of a number: min, max, step, control_after_generate.
        optional: a prompt may lack it; the node's function has its value then.
        advanced: ComfyUI may hide it at first.
    """

    name: str
    kind: str
    tooltip: str
    default: Any = None
    choices: tuple[str, ...] = ()
    bounds: tuple[tuple[str, Any], ...] = ()
    optional: bool = False
    advanced: bool = False


@dataclass(frozen=True)
class Node:
    """A node.

    Attributes:
        name, title: ComfyUI's name of it, and the one that it shows.
        description: what it is for.
        inputs: of it, the optional ones at the end.
        kind, output, tip: ComfyUI's type of its output, its name ("" is the type), and its tooltip.
        shows: it has something to show, and runs without a node behind it.
    """

    name: str
    title: str
    description: str
    inputs: tuple[Input, ...]
    kind: str
    output: str = ""
    tip: str = ""
    shows: bool = False

    @property
    def required(self) -> list[Input]:
        """The inputs that every prompt has."""
        return [one for one in self.inputs if not one.optional]

    @property
    def optional(self) -> list[Input]:
        """The inputs that a prompt may lack."""
        return [one for one in self.inputs if one.optional]


CATEGORY = "model_patches/unet"


def _widget(name: str, default: Any = None, **more: Any) -> Input:
    """The widget of a field of AgentConfig, by its kind; its default is the field's unless another one is given."""
    setting, own = SETTINGS[name], getattr(_DEFAULTS, name)
    default, tooltip = own if default is None else default, setting.help
    if name == "cache_interval":
        return Input(name, "INT", tooltip, default, (), (("min", 1), ("max", MOST_INTERVAL)), **more)
    if name == "cache_depth":
        choices = (written(default), *map(str, range(1, _MOST_DEPTH + 1)))
        return Input(name, "COMBO", tooltip, written(default), choices, **more)
    if setting.kind == "choice":
        return Input(name, "COMBO", tooltip, written(default), tuple(map(written, setting.choices)), **more)
    if setting.kind == "number":
        low, high = float(setting.low or 0), _MOST_RATIO if name == "ratio" else float(setting.high or 1)
        if setting.optional:
            low, high, default = TAKES_RATIO, _MOST_RATIO, TAKES_RATIO
            tooltip += f" {TAKES_RATIO:g} is None."
        return Input(name, "FLOAT", tooltip, default, (), (("min", low), ("max", high), ("step", 0.01)), **more)
    if setting.optional:
        tooltip += f" {NO_LIMIT} is None, no limit."
        return Input(name, "INT", tooltip, NO_LIMIT, (), (("min", NO_LIMIT), ("max", _MOST)), **more)
    # Without control_after_generate=False ComfyUI gives what is called "seed" a control that changes it.
    bounds = (("min", setting.low), ("max", setting.high), ("control_after_generate", False))
    return Input(name, "INT", tooltip, default, (), bounds, **more)


def _percent_widget(name: str, default: float, tooltip: str) -> Input:
    return Input(name, "FLOAT", tooltip, default, (), (("min", 0.0), ("max", 1.0), ("step", 0.01)), optional=True)


_PRESET_TIP = (
    f"{CUSTOM}: the widgets of this node, which begin as fast. A preset replaces them all but seed, start_percent and "
    "end_percent. " + " ".join(f"{name}: {note.help}" for name, note in PRESET_NOTES.items())
)

PATCH = Node(
    "AgentSD",
    "AgentSD",
    "Faster sampling with no training: step caching (most of the UNet runs in every n-th step only), agent attention "
    "in the early steps, token merging in the others. For step caching alone set ratio and early to 0, or take the "
    'preset "cache".',
    (
        Input("model", "MODEL", "A model with a UNet: SD 1.x, SD 2.x, SDXL."),
        *map(_widget, _FIELDS),
        # Workflows of the first version have none of these: they load as what they were.
        Input("preset", "COMBO", _PRESET_TIP, CUSTOM, (CUSTOM, *PRESETS), optional=True),
        *(_widget(name, PRESETS["fast"][name], optional=True) for name in _CACHING_FIELDS),
        _percent_widget(
            "start_percent",
            0.0,
            "Where in the run step caching begins; all steps before it are whole. Raise it to 0.1–0.3 if the "
            "composition differs too much from that of the unpatched model.",
        ),
        _percent_widget(
            "end_percent",
            1.0,
            "Where in the run step caching ends; all steps after it are whole. Lower it to 0.8 if fine detail suffers.",
        ),
        *(_widget(name, optional=True, advanced=True) for name in _ADVANCED_FIELDS),
    ),
    "MODEL",
    tip="Give it to the sampler, and to AgentSD report.",
)
"""It patches a model."""

REPORT = Node(
    "AgentSDReport",
    "AgentSD report",
    "Layers, tokens, agents and phases of the last run. Connect the sampler's output to `samples`.",
    (
        Input("model", "MODEL", "The model that the sampler got."),
        Input("samples", "LATENT", "The sampler's output, so that the report is made after it."),
    ),
    "STRING",
    "report",
    shows=True,
)
"""It says what the last run did."""
