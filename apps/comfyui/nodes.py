"""The nodes: "AgentSD" patches a model, "AgentSD report" says what the last run did."""

from __future__ import annotations

import math
from typing import Any

from agentsd.config import PRESET_NOTES, PRESETS, SETTINGS, AgentConfig, Phase
from agentsd.fields import written

from . import report
from .layers import find_layers, is_unet
from .skipping import num_pairs
from .wrapper import KEY, KIND, OTHER_KINDS, AgentWrapper, both_caches, other_cache

_DEFAULTS = AgentConfig()
_FIELDS = ("ratio", "early", "late", "max_downsample", "seed", "max_agents", "max_keys", "match_tile")
# Later ones stand behind the first version's, so that its workflows load with their values in their places.
_CACHING_FIELDS = ("cache_interval",)
_ADVANCED_FIELDS = ("cache_order", "cache_depth", "early_ratio", "agents")
_MOST_INTERVAL, _MOST_DEPTH = 10, 3
_CUSTOM = "custom"
_TAKES_RATIO = -1.0
_NO_LIMIT = 0
_MOST = 2**20
# With late = downsample or full the agents' cell alone bounds ratio; 0.93 in steps of 0.01.
_MOST_RATIO = int(100 * (1 - 1 / math.prod(_DEFAULTS.stride(Phase.AGENT)))) / 100


def _widget(name: str) -> tuple[Any, dict[str, Any]]:
    """The widget of a field of AgentConfig, by its kind: type, or list of choices, and options."""
    setting, default = SETTINGS[name], getattr(_DEFAULTS, name)
    options: dict[str, Any] = {"tooltip": setting.help}
    if name == "cache_interval":
        return "INT", {"default": default, "min": 1, "max": _MOST_INTERVAL, **options}
    if name == "cache_depth":
        return [written(default), *map(str, range(1, _MOST_DEPTH + 1))], {"default": written(default), **options}
    if setting.kind == "number" and setting.optional:
        options["tooltip"] += f" {_TAKES_RATIO:g} is None."
        return "FLOAT", {"default": _TAKES_RATIO, "min": _TAKES_RATIO, "max": _MOST_RATIO, "step": 0.01, **options}
    if setting.kind == "choice":
        return [written(choice) for choice in setting.choices], {"default": written(default), **options}
    if setting.kind == "number":
        low, high = setting.low or 0.0, _MOST_RATIO if name == "ratio" else setting.high or 1.0
        return "FLOAT", {"default": default, "min": float(low), "max": float(high), "step": 0.01, **options}
    if setting.optional:
        options["tooltip"] += f" {_NO_LIMIT} is None, no limit."
        return "INT", {"default": _NO_LIMIT, "min": _NO_LIMIT, "max": _MOST, **options}
    # Without control_after_generate=False ComfyUI gives what is called "seed" a control that changes it.
    return "INT", {
        "default": default, "min": setting.low, "max": setting.high, "control_after_generate": False, **options,
    }  # fmt: skip


def _preset_widget() -> tuple[list[str], dict[str, Any]]:
    notes = " ".join(f"{name}: {note.help}" for name, note in PRESET_NOTES.items())
    tooltip = (
        f"{_CUSTOM}: the widgets of this node. A preset replaces them all but seed, start_percent and end_percent; "
        f"take one to begin with. {notes}"
    )
    return [_CUSTOM, *PRESETS], {"default": _CUSTOM, "tooltip": tooltip}


def _percent_widget(default: float, what: str) -> tuple[str, dict[str, Any]]:
    return "FLOAT", {"default": default, "min": 0.0, "max": 1.0, "step": 0.01, "tooltip": what}


class AgentSD:
    """Agent attention, token merging and step caching for the UNets of SD 1.x, SD 2.x and SDXL."""

    CATEGORY = "model_patches/unet"
    DESCRIPTION = (
        "Faster sampling with no training: step caching (most of the UNet runs in every n-th step only), agent "
        "attention in the early steps, token merging in the others. For step caching alone set "
        "ratio and early to 0, or "
        'take the preset "cache".'
    )
    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS = ("Give it to the sampler, and to AgentSD report.",)
    FUNCTION = "patch"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "A model with a UNet: SD 1.x, SD 2.x, SDXL."}),
                **{name: _widget(name) for name in _FIELDS},
            },
            # Workflows of the first version have none of these: they load as what they were.
            "optional": {
                "preset": _preset_widget(),
                **{name: _widget(name) for name in _CACHING_FIELDS},
                "start_percent": _percent_widget(
                    0.0,
                    "Where in the run step caching begins; all steps before it are whole. Raise it to 0.1–0.3 if the "
                    "composition differs too much from that of the unpatched model.",
                ),
                "end_percent": _percent_widget(
                    1.0,
                    "Where in the run step caching ends; all steps after it are whole. Lower it to 0.8 if fine detail "
                    "suffers.",
                ),
                **{name: (kind, {**options, "advanced": True}) for name, (kind, options) in _advanced().items()},
            },
        }

    def patch(
        self,
        model: Any,
        preset: str = _CUSTOM,
        start_percent: float = 0.0,
        end_percent: float = 1.0,
        **values: Any,
    ) -> tuple[Any]:
        """Return a clone of the model that runs with agents and step caching; a second AgentSD replaces the first.

        Raises:
            ValueError: a setting is out of its range, the model has no UNet, or ToMe's node or another cache is on it.
        """
        percents = (float(start_percent), float(end_percent))
        if not 0 <= percents[0] <= percents[1] <= 1:
            raise ValueError(
                f"start_percent={start_percent}, end_percent={end_percent}: must be in 0 … 1, the start before the end"
            )
        config = _config(preset, values)
        _check_model(model, config)
        wrapper = AgentWrapper(config, percents)
        patched = model.clone()
        for kind, method in ((KIND, wrapper), *((kind, getattr(wrapper, kind)) for kind in OTHER_KINDS)):
            patched.remove_wrappers_with_key(kind, KEY)
            patched.add_wrapper_with_key(kind, KEY, method)
        return (patched,)


def _advanced() -> dict[str, tuple[Any, dict[str, Any]]]:
    return {name: _widget(name) for name in _ADVANCED_FIELDS}


def _config(preset: str, values: dict[str, Any]) -> AgentConfig:
    if preset != _CUSTOM:
        if preset not in PRESETS:
            raise ValueError(f"preset={preset!r}: must be one of {', '.join([_CUSTOM, *PRESETS])}")
        return AgentConfig(**PRESETS[preset], seed=values.get("seed", _DEFAULTS.seed))
    interval = values.get("cache_interval", 1)
    if not 1 <= interval <= _MOST_INTERVAL:
        raise ValueError(f"cache_interval={interval}: must be an integer in 1 … {_MOST_INTERVAL}; 1 caches nothing")
    return AgentConfig(**{name: _value(name, value) for name, value in values.items()})


class AgentSDReport:
    """Text about the last run of a model that AgentSD patched."""

    CATEGORY = "model_patches/unet"
    DESCRIPTION = "Layers, tokens, agents and phases of the last run. Connect the sampler's output to `samples`."
    RETURN_TYPES = ("STRING",)
    RETURN_NAMES = ("report",)
    FUNCTION = "describe"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The model that the sampler got."}),
                "samples": ("LATENT", {"tooltip": "The sampler's output, so that the report is made after it."}),
            }
        }

    def describe(self, model: Any, samples: Any) -> dict[str, Any]:
        """Return the report as a STRING, also shown in the history.

        Raises:
            ValueError: AgentSD is not on the model.
        """
        wrappers = model.get_wrappers(KIND, KEY)
        if not wrappers:
            raise ValueError("AgentSD report: this model has no AgentSD. Connect the MODEL that the sampler got")
        text = report.as_text(wrappers[-1])
        return {"ui": {"text": (text,)}, "result": (text,)}


def _value(name: str, value: Any) -> Any:
    """What AgentConfig takes for a widget's value."""
    setting = SETTINGS[name]
    if setting.optional and value == (_TAKES_RATIO if setting.kind == "number" else _NO_LIMIT):
        return None
    return setting.read(value) if isinstance(value, str) else value


def _check_model(model: Any, config: AgentConfig) -> None:
    unet = model.model.diffusion_model
    kind = type(unet).__name__
    if not is_unet(unet):
        raise ValueError(
            f"AgentSD: this model is a {kind} and no UNet. AgentSD works on SD 1.x, SD 2.x and SDXL; remove the node"
        )
    if config.cache_interval > 1:
        if (other := other_cache(model.model_options)) is not None:
            raise ValueError(both_caches(other))
        most = num_pairs(unet)
        if not isinstance(config.cache_depth, str) and config.cache_depth > most:
            raise ValueError(
                f"cache_depth={config.cache_depth}: the last level of this {kind} has {most} pairs of resnet and "
                f'transformer that can be recomputed; use "auto" or 1 … {most}'
            )
    layers, skipped = find_layers(unet, "auto")
    if not layers:
        reasons = "; ".join(sorted(set(skipped.values()))) or "it has no self-attention"
        raise ValueError(f"AgentSD: no layer of this {kind} can be patched: {reasons}. Remove the node")
    patches = model.model_options.get("transformer_options", {}).get("patches", {}).get("attn1_patch", ())
    if any(_is_tome(patch) for patch in patches):
        raise ValueError(
            "AgentSD: the node TomePatchModel is on this model and merges its tokens already. Remove TomePatchModel; "
            "AgentSD merges tokens itself, with early = 0 too"
        )


def _is_tome(patch: Any) -> bool:
    return "nodes_tomesd" in getattr(patch, "__module__", "") or "tomesd" in getattr(patch, "__name__", "")


NODE_CLASS_MAPPINGS = {"AgentSD": AgentSD, "AgentSDReport": AgentSDReport}
NODE_DISPLAY_NAME_MAPPINGS = {"AgentSD": "AgentSD", "AgentSDReport": "AgentSD report"}
