"""load_checkpoint: a pipeline from one .safetensors file in the layout of the original Stable Diffusion code."""

from __future__ import annotations

import inspect
import warnings
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline

from .model_files import Checkpoint, ModelError, config_beside, pipeline_class_name, read_checkpoint

_PATTERNS = ["*.json", "*.txt"]
"""Files of a model on the hub that are no weights; a star of the hub's patterns crosses folders."""


def load_checkpoint(
    file: Path, config: str | Path | None, dtype: torch.dtype, options: dict[str, Any]
) -> DiffusionPipeline:
    """Load a single-file checkpoint.

    Args:
        file: a safetensors file with the weights of text encoder, UNet and autoencoder.
        config: folder in diffusers' format, or hub id, that has tokenizer, scheduler and the parts' sizes. None
            takes the folder of the file's name beside it, or that of its
            architecture from the hub (a few MB, kept in the hub's cache).
        dtype: of the weights.
        options: passed to diffusers' `from_single_file`.

    Raises:
        ModelError: it is no such checkpoint, does not fit the configuration, or that cannot be fetched.
    """
    checkpoint = read_checkpoint(file)
    source = config if config is not None else config_beside(file)
    folder = _fetched(checkpoint, source or checkpoint.hub_id) if not _is_folder(source) else Path(str(source))
    name = pipeline_class_name(folder)
    pipeline_class = getattr(diffusers, name, None)
    if pipeline_class is None or not hasattr(pipeline_class, "from_single_file"):
        raise ModelError(f"{folder} is a {name}, which cannot be loaded from a single file: give another configuration")
    # The file has no safety checker, so the pipeline has none; that it is missing would be reported at each load.
    if "requires_safety_checker" in inspect.signature(pipeline_class.__init__).parameters:
        options = {"requires_safety_checker": False, **options}
    if source is None and checkpoint.name.startswith("Stable Diffusion 2"):
        warnings.warn(
            f"agentsd: {file} is loaded as Stable Diffusion 2.1 for 768 px, which predicts the velocity. If it is "
            "a base model for 512 px, give config= a folder of Stable Diffusion 2.1 base",
            stacklevel=4,
        )
    try:
        pipe = pipeline_class.from_single_file(str(file), config=str(folder), torch_dtype=dtype, **options)
    except Exception as error:  # diffusers, transformers and torch raise many kinds here
        line = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ModelError(
            f"{file} cannot be loaded as {checkpoint.name} with the configuration in {folder} ({line.rstrip('.')}): "
            "give the configuration of the model that it was made from"
        ) from error
    if checkpoint.v_prediction:
        changes = {"prediction_type": "v_prediction"} | (
            {"rescale_betas_zero_snr": True} if checkpoint.zero_snr else {}
        )
        pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config, **changes)
    pipe.register_to_config(_name_or_path=str(file))  # what an image says it was generated with
    return pipe


def _is_folder(source: str | Path | None) -> bool:
    return source is not None and Path(source).is_dir()


def _fetched(checkpoint: Checkpoint, hub_id: str | Path) -> Path:
    """The folder of a hub's model without its weights, from the hub's cache or fetched."""
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(str(hub_id), allow_patterns=_PATTERNS))
    except Exception as error:  # no network, offline mode, no such model, no access
        folder = checkpoint.file.with_suffix("")
        raise ModelError(
            f"{checkpoint.file} holds the weights of a {checkpoint.name} alone; its tokenizer and sizes could not be "
            f"fetched from {hub_id} on the Hugging Face hub. Go online once, or run `{_fetching(hub_id, folder.name)}` "
            "where there is a network and put that folder beside the file, or name any folder of such a model by "
            "config= (--model-config)"
        ) from error


def _fetching(hub_id: str | Path, folder: str) -> str:
    """A command that fetches what _fetched does; `hf download` takes several patterns otherwise in each version."""
    call = f"get('{hub_id}', allow_patterns={_PATTERNS}, local_dir='{folder}')"
    return f'python -c "from huggingface_hub import snapshot_download as get; {call}"'
