"""export: the trained model as an ordinary diffusers folder or LoRA file, and agentsd.json beside it."""

from __future__ import annotations

import dataclasses
import json
import os
import secrets
import shutil
from pathlib import Path
from typing import Any

from diffusers import DiffusionPipeline
from diffusers.utils import convert_state_dict_to_diffusers
from torch import nn

from agentsd.files import write_atomically

from .output import versions
from .settings import DreamBoothSettings

SETTINGS_FILE = "agentsd.json"
LORA_FILE = "pytorch_lora_weights.safetensors"


def export(pipe: DiffusionPipeline, parts: dict[str, nn.Module], settings: DreamBoothSettings) -> None:
    """Write the model in float32 into --output-dir. The pipeline must bear no trace of training or patch.

    Args:
        parts: the trained modules by name.

    Raises:
        OSError: there is no room, or the folder cannot be written to.
    """
    folder: Any = settings.output_dir
    temporary = folder / f".export-{secrets.token_hex(4)}.tmp"
    try:
        if settings.lora_rank is None:
            pipe.save_pretrained(temporary, safe_serialization=True)
            _complete_tokenizers(temporary)
        else:
            _save_lora(pipe, parts, temporary)
        # The index last: without it the folder is not taken for a model.
        for path in sorted(temporary.iterdir(), key=lambda path: path.name == "model_index.json"):
            target = folder / path.name
            if target.is_dir():
                shutil.rmtree(target)
            os.replace(path, target)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    write_atomically(folder / SETTINGS_FILE, json.dumps(_trained_for(settings), indent=1) + "\n")


def _trained_for(settings: DreamBoothSettings) -> dict[str, Any]:
    """What agentsd.json says; its fields are those that `agentsd.load_pipeline` reads."""
    config = settings.agent_config
    model = str(settings.model)
    if Path(model).exists():
        model = str(Path(model).resolve())
    return {
        "format": 1,
        "agents": settings.agents,
        "config": None if config is None else dataclasses.asdict(config),
        "base_model": model,
        "lora": None if settings.lora_rank is None else LORA_FILE,
        "instance_prompt": settings.instance_prompt,
        "versions": versions(),
    }


def _save_lora(pipe: DiffusionPipeline, parts: dict[str, nn.Module], folder: Path) -> None:
    from peft.utils import get_peft_model_state_dict

    layers = {}
    for name, module in parts.items():
        tensors = convert_state_dict_to_diffusers(get_peft_model_state_dict(module))
        if name == "text_encoder":  # as transformers 4 names them; with 5 both names can be loaded
            tensors = {f"text_model.{key.removeprefix('text_model.')}": value for key, value in tensors.items()}
        layers[f"{name}_lora_layers"] = tensors
    pipe.save_lora_weights(folder, weight_name=LORA_FILE, safe_serialization=True, **layers)


def _complete_tokenizers(folder: Path) -> None:
    """Write vocab.json and merges.txt, which transformers 5 leaves to tokenizer.json, and older versions read."""
    for path in folder.glob("tokenizer*/tokenizer.json"):
        model = json.loads(path.read_text(encoding="utf-8")).get("model", {})
        if (path.parent / "vocab.json").exists() or not {"vocab", "merges"} <= model.keys():
            continue
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
        (path.parent / "vocab.json").write_text(json.dumps(model["vocab"], ensure_ascii=False), encoding="utf-8")
        (path.parent / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), encoding="utf-8")
