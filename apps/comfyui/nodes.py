"""What the nodes do: "AgentSD" patches a model, "AgentSD report" says what the last run did."""

from __future__ import annotations

from typing import Any

from agentsd.config import PRESETS, SETTINGS, AgentConfig

from . import report
from .layers import find_layers, is_unet
from .schema import CUSTOM, MOST_INTERVAL, NO_LIMIT, TAKES_RATIO
from .skipping import num_pairs
from .wrapper import KEY, KIND, OTHER_KINDS, AgentWrapper, both_caches, other_cache


def patch(
    model: Any,
    preset: str = CUSTOM,
    start_percent: float = 0.0,
    end_percent: float = 1.0,
    **values: Any,
) -> Any:
    """Return a clone of the model that runs with agents and step caching; a second AgentSD replaces the first.

    Args:
        model: ComfyUI's ModelPatcher.
        preset: its settings take the place of `values`, all but the seed.
        start_percent, end_percent: the part of the run in which calls are cached.
        **values: of the widgets. What is missing has the default of AgentConfig, not that of a new node: workflows of
            the first version have no `cache_interval` and stay uncached.

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
    return patched


def describe(model: Any, samples: Any = None) -> str:
    """The text about the last run of a patched model.

    Args:
        model: ComfyUI's ModelPatcher.
        samples: not read; ComfyUI makes the text after what it comes from.

    Raises:
        ValueError: AgentSD is not on the model.
    """
    wrappers = model.get_wrappers(KIND, KEY)
    if not wrappers:
        raise ValueError("AgentSD report: this model has no AgentSD. Connect the MODEL that the sampler got")
    return report.as_text(wrappers[-1])


def _config(preset: str, values: dict[str, Any]) -> AgentConfig:
    if preset != CUSTOM:
        if preset not in PRESETS:
            raise ValueError(f"preset={preset!r}: must be one of {', '.join([CUSTOM, *PRESETS])}")
        return AgentConfig(**PRESETS[preset], seed=values.get("seed", AgentConfig().seed))
    interval = values.get("cache_interval", 1)
    if not 1 <= interval <= MOST_INTERVAL:
        raise ValueError(f"cache_interval={interval}: must be an integer in 1 … {MOST_INTERVAL}; 1 caches nothing")
    return AgentConfig(**{name: _value(name, value) for name, value in values.items()})


def _value(name: str, value: Any) -> Any:
    """What AgentConfig takes for a widget's value."""
    setting = SETTINGS[name]
    if setting.optional and value == (TAKES_RATIO if setting.kind == "number" else NO_LIMIT):
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
