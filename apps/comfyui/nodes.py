"""The nodes: "AgentSD" patches a model, "AgentSD report" says what the last run did."""

from __future__ import annotations

import math
from typing import Any

from agentsd.config import LATE, AgentConfig, Phase

from . import report
from .layers import find_layers, is_unet
from .wrapper import KEY, KIND, AgentWrapper

_DEFAULTS = AgentConfig()
_DOWNSAMPLES = ("auto", "1", "2", "4", "8")
_NO_LIMIT = 0
_MOST = 2**20
# With late = downsample or full the agents' cell alone bounds ratio; 0.93 in steps of 0.01.
_MOST_RATIO = int(100 * (1 - 1 / math.prod(_DEFAULTS.stride(Phase.AGENT)))) / 100


def _fraction(default: float, most: float, tooltip: str) -> tuple[str, dict[str, Any]]:
    return "FLOAT", {"default": default, "min": 0.0, "max": most, "step": 0.01, "tooltip": tooltip}


def _cap(tooltip: str) -> tuple[str, dict[str, Any]]:
    return "INT", {"default": _NO_LIMIT, "min": _NO_LIMIT, "max": _MOST, "tooltip": f"{tooltip} 0: no limit."}


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
                "ratio": _fraction(
                    _DEFAULTS.ratio,
                    _MOST_RATIO,
                    "Fraction of the tokens merged away before self-attention. More is faster and coarser. "
                    "At most 0.75 with late = merge.",
                ),
                "early": _fraction(
                    _DEFAULTS.early,
                    1.0,
                    "The noisiest fraction of the run, which uses agent attention. The rest does what `late` says.",
                ),
                "late": (
                    list(LATE),
                    {
                        "default": _DEFAULTS.late,
                        "tooltip": "The later steps: merge tokens, downsample keys and values, or the full attention.",
                    },
                ),
                "max_downsample": (
                    list(_DOWNSAMPLES),
                    {
                        "default": str(_DEFAULTS.max_downsample),
                        "tooltip": "Patch the levels of the UNet down to this downsampling. auto: the largest level "
                        "that has self-attention.",
                    },
                ),
                "seed": (
                    "INT",
                    {
                        "default": _DEFAULTS.seed,
                        "min": 0,
                        "max": 2**63 - 1,
                        "control_after_generate": False,
                        "tooltip": "Seed for choosing destination tokens. The sampler's seed is another one.",
                    },
                ),
                "max_agents": _cap("At most so many agents; 256 is what 512 px have."),
                "max_keys": _cap("With late = downsample, at most so many keys; 1024 is what 512 px have."),
                "match_tile": _cap("Compare tokens within tiles of so many tokens a side; at least 2, 16 is good."),
            }
        }

    def patch(
        self,
        model: Any,
        ratio: float,
        early: float,
        late: str,
        max_downsample: str,
        seed: int,
        max_agents: int,
        max_keys: int,
        match_tile: int,
    ) -> tuple[Any]:
        """Return a clone of the model that runs with agents; a second AgentSD replaces the first.

        Raises:
            ValueError: a setting is out of its range, the model has no UNet, or ToMe's node is on it.
        """
        config = AgentConfig(
            ratio=ratio,
            early=early,
            late=late,
            max_downsample=max_downsample if max_downsample == "auto" else int(max_downsample),
            seed=seed,
            max_agents=max_agents or None,
            max_keys=max_keys or None,
            match_tile=match_tile or None,
        )
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
