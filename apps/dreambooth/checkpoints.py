"""save_checkpoint, load_checkpoint: everything that a training needs to go on as if it had not been interrupted.

A checkpoint is a folder `checkpoints/step-N`: `weights-PART.safetensors` with what is trained, `optimizer.pt` with the
states of optimizer, learning rate schedule and gradient scaler, and `state.json`. Random numbers and the position in
the data are functions of seed and step, so the step is all of them that there is to keep.
"""

from __future__ import annotations

import json
import os
import pickle
import secrets
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from .models import trained_tensors
from .output import CHECKPOINTS, list_checkpoints, step_of
from .settings import UsageError


def find_checkpoint(output_dir: Path, wanted: str) -> Path | None:
    """The checkpoint that --resume-from-checkpoint means; None for "latest" where there is none yet.

    Raises:
        UsageError: there is none of that name.
    """
    found = list_checkpoints(output_dir)
    if wanted == "latest":
        return found[-1] if found else None
    for path in found:
        if path.name == Path(wanted).name:
            return path
    names = ", ".join(path.name for path in found) or "none at all"
    raise UsageError(
        f"--resume-from-checkpoint {wanted}: {output_dir / CHECKPOINTS} has no such checkpoint, only {names}; give one "
        "of these, or latest"
    )


def save_checkpoint(
    output_dir: Path, step: int, parts: dict[str, nn.Module], states: dict[str, Any], facts: dict, limit: int | None
) -> Path:
    """Write a checkpoint atomically: all files go to a temporary folder that is renamed when they are complete.

    Args:
        parts: modules by name; what they train is kept.
        states: objects with a state_dict by name.
        facts: what else to keep, as JSON.
        limit: keep only so many checkpoints, the newest; None keeps all.

    Raises:
        OSError: there is no room, or the folder cannot be written to. The checkpoints before stay.
    """
    final = output_dir / CHECKPOINTS / f"step-{step}"
    temporary = final.parent / f".{final.name}-{secrets.token_hex(4)}.tmp"
    temporary.mkdir(parents=True)
    try:
        for name, module in parts.items():
            tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in trained_tensors(module).items()}
            _or_os_error(save_file, tensors, temporary / f"weights-{name}.safetensors")
        _or_os_error(
            torch.save, {name: state.state_dict() for name, state in states.items()}, temporary / "optimizer.pt"
        )
        (temporary / "state.json").write_text(json.dumps({"step": step, **facts}) + "\n", encoding="utf-8")
        if final.exists():  # training went on from an older one: the same step again
            shutil.rmtree(final)
        os.rename(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if limit is not None:
        for old in [path for path in list_checkpoints(output_dir) if step_of(path) < step][: -limit + 1 or None]:
            shutil.rmtree(old)
    return final


def load_checkpoint(
    checkpoint: Path, parts: dict[str, nn.Module], states: dict[str, Any], device: torch.device
) -> dict[str, Any]:
    """Fill what `save_checkpoint` was given; returns its facts, with "step".

    Raises:
        UsageError: the checkpoint is damaged, or of other weights.
    """
    try:
        facts = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        kept = torch.load(checkpoint / "optimizer.pt", map_location=device, weights_only=True)
        weights = {name: load_file(checkpoint / f"weights-{name}.safetensors") for name in parts}
        for name, module in parts.items():
            tensors = trained_tensors(module)
            if tensors.keys() != weights[name].keys():
                raise ValueError(f"{name} has other weights")
            with torch.no_grad():
                for key, tensor in tensors.items():
                    tensor.copy_(weights[name][key])
        for name, state in states.items():
            state.load_state_dict(kept[name])
    except (OSError, ValueError, KeyError, RuntimeError, EOFError, SafetensorError, pickle.UnpicklingError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0][:120]
        raise UsageError(
            f"--resume-from-checkpoint: {checkpoint} cannot be read ({reason}); remove that folder: "
            "--resume-from-checkpoint latest then goes on from an earlier one, or begins anew"
        ) from None
    return facts


def remove_unfinished(output_dir: Path) -> None:
    """Remove what a killed process left of a checkpoint or an export."""
    for path in [*(output_dir / CHECKPOINTS).glob(".step-*.tmp"), *output_dir.glob(".export-*.tmp")]:
        shutil.rmtree(path, ignore_errors=True)


def _or_os_error(save: Any, content: Any, path: Path) -> None:
    """Call save(content, path); a full disk is an OSError here, whatever the library makes of it."""
    try:
        save(content, path)
    except (SafetensorError, RuntimeError) as error:
        raise OSError(f"{path.name} could not be written: {str(error).splitlines()[0][:120]}") from error
