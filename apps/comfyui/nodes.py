"""The nodes: "AgentSD" patches a model, "AgentSD report" says what the last run did."""

from __future__ import annotations

import math
from typing import Any

from agentsd.config import SETTINGS, AgentConfig, Phase
from agentsd.fields import written

from . import report
from .layers import find_layers, is_unet
from .wrapper import KEY, KIND, AgentWrapper

_DEFAULTS = AgentConfig()
_FIELDS = ("ratio", "early", "late", "max_downsample", "seed", "max_agents", "max_keys", "match_tile")
_NO_LIMIT = 0
_MOST = 2**20
# With late = downsample or full the agents' cell alone bounds ratio; 0.93 in steps of 0.01.
_MOST_RATIO = int(100 * (1 - 1 / math.prod(_DEFAULTS.stride(Phase.AGENT)))) / 100


def _widget(name: str) -> tuple[Any, dict[str, Any]]:
    """The widget of a field of AgentConfig, by its kind: type, or list of choices, and options."""
    setting, default = SETTINGS[name], getattr(_DEFAULTS, name)
    options: dict[str, Any] = {"tooltip": setting.help}
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


class AgentSD:
    """Agent attention and token merging for the UNets of SD 1.x, SD 2.x and SDXL."""

    CATEGORY = "model_patches/unet"
    DESCRIPTION = "Faster sampling with no training: agent attention in the early steps, token merging in the others."
    RETURN_TYPES = ("MODEL",)
    FUNCTION = "patch"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "A model with a UNet: SD 1.x, SD 2.x, SDXL."}),
                **{name: _widget(name) for name in _FIELDS},
            }
        }

    def patch(self, model: Any, **values: Any) -> tuple[Any]:
        """Return a clone of the model that runs with agents; a second AgentSD replaces the first.

        Raises:
            ValueError: a setting is out of its range, the model has no UNet, or ToMe's node is on it.
        """
        config = AgentConfig(**{name: _value(name, value) for name, value in values.items()})
        _check_model(model)
        patched = model.clone()
        patched.remove_wrappers_with_key(KIND, KEY)
        patched.add_wrapper_with_key(KIND, KEY, AgentWrapper(config))
        return (patched,)


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
    if SETTINGS[name].optional and value == _NO_LIMIT:
        return None
    return SETTINGS[name].read(value) if isinstance(value, str) else value


def _check_model(model: Any) -> None:
    unet = model.model.diffusion_model
    kind = type(unet).__name__
    if not is_unet(unet):
        raise ValueError(
            f"AgentSD: this model is a {kind} and no UNet. AgentSD works on SD 1.x, SD 2.x and SDXL; remove the node"
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
