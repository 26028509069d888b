"""The authors' published weights: read safely, renamed, resized to the model's image size, and saved as safetensors."""

from __future__ import annotations

import argparse
import math
import os
import pickle
import re
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from timm.models import FeatureDictNet, adapt_input_conv
from timm.models._features import FeatureGetterNet
from torch import Tensor, nn

from .common import resized_positions
from .swin import AgentSwin

_BUFFERS = ("relative_position_index", "attn_mask")
"""In the authors' Swin files; computed from the sizes here."""

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)

_GRID_AXIS = {"ah_bias": 3, "aw_bias": 4, "ha_bias": 2, "wa_bias": 3}
"""Which axis of the biases per row or per column runs over the grid."""


@dataclass(frozen=True)
class LoadedCheckpoint:
    """What load_official_checkpoint did.

    Attributes:
        resized: parameters that were interpolated to the model's size or its input channels.
        left: parameters of the model that keep their values: the head, where it has another number of classes.
        unused: tensors of the file that the model has no place for: the head or stages it was built without.
    """

    resized: tuple[str, ...]
    left: tuple[str, ...]
    unused: tuple[str, ...]


def load_official_checkpoint(model: nn.Module, path: str | os.PathLike) -> LoadedCheckpoint:
    """Load a published file of the authors, or one that save_safetensors wrote, into a model of this package.

    Only tensors and settings are read; no code from the file runs. Of a file with averaged weights (CSwin's
    state_dict_ema) those are taken, as in the paper's evaluation.

    Args:
        model: from timm.create_model, with features_only=True or without. Where its image size differs from the file's,
            positions and biases are interpolated as the authors do.
        path: .pth or .safetensors.

    Returns:
        Which parameters were resized, left alone or not used.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file cannot be read safely, holds no weights, holds those of another model, or holds some that
            are no plain tensors of finite floating-point numbers. The model is as before.
    """
    state = _unwrapped(_read(Path(path)), str(path))
    converted, report = _fit(state, model, str(path))
    model.load_state_dict(converted, strict=False)  # _fit has checked every name
    return report


def save_safetensors(model: nn.Module, path: str | os.PathLike) -> None:
    """Save a model's weights under timm's names; timm.create_model(..., checkpoint_path=path) reads them.

    Written beside the target and moved there, so that an interrupted call leaves the old file.
    """
    target = Path(path)
    temporary = target.with_name(f".{target.name}.{os.getpid()}")
    tensors = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    try:
        save_file(tensors, temporary, metadata={"format": "pt"})
        os.replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


def official_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """A model's weights under the names of the authors' files."""
    state = model.state_dict()
    if not isinstance(model, AgentSwin):
        return dict(state)
    shifted = lambda found: f"layers.{int(found[1]) - 1}.downsample."  # noqa: E731
    return {
        re.sub(r"^layers\.(\d+)\.downsample\.", shifted, name).replace("head.fc.", "head."): value
        for name, value in state.items()
    }


def convert_checkpoint(state_dict: dict[str, Any], model: nn.Module) -> dict[str, Tensor]:
    """The authors' weights under the model's names and in its sizes; timm's `pretrained_filter_fn`."""
    converted, _ = _fit(_unwrapped(state_dict, "the checkpoint"), model, "the checkpoint", timm_adapts_head=True)
    return converted


# ---- reading ----


def _read(path: Path) -> Any:
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        # The authors' files also hold their settings, which are plain data: a Namespace, or a dict of yacs's.
        with torch.serialization.safe_globals([argparse.Namespace, (OrderedDict, "yacs.config.CfgNode")]):
            return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise
    except pickle.UnpicklingError as error:
        if _is_web_page(path):
            raise ValueError(
                f"{path}: is a web page, not a checkpoint: a download's page was saved in place of the file. Open the "
                "link in a browser and save the file that it offers"
            ) from error
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        what = f"it names {found[1]}, which would run" if found else "it is damaged, or more than tensors"
        raise ValueError(
            f"{path}: cannot be read as weights only ({what}); nothing of it was run. If you trust its source, "
            "convert it to safetensors where you made or downloaded it"
        ) from error
    except Exception as error:  # what a damaged file makes the readers raise is of any kind
        said = str(error) or "it ends too early"  # an EOFError says nothing
        raise ValueError(f"{path}: is no checkpoint of PyTorch or safetensors ({said})") from error


def _is_web_page(path: Path) -> bool:
    """What a file host that asks for a click first leaves under the file's name."""
    with path.open("rb") as file:
        return file.read(512).lstrip().lower().startswith((b"<!doctype html", b"<html"))


def _unwrapped(content: Any, source: str) -> dict[str, Tensor]:
    """The tensors of a file by name, without the settings and the optimizer beside them."""
    for key in ("state_dict_ema", "model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    tensors = content if isinstance(content, dict) else {}
    tensors = {str(name): v for name, v in tensors.items() if isinstance(v, Tensor)}
    tensors = _renamed(tensors, lambda name: name.removeprefix("module."), source)
    if not tensors:
        raise ValueError(f"{source} holds no weights: expected tensors by name, alone or under 'model' or 'state_dict'")
    return tensors


# ---- names ----


def _renamed(state: dict[str, Tensor], rename: Callable[[str], str], source: str) -> dict[str, Tensor]:
    renamed: dict[str, Tensor] = {}
    for name, value in state.items():
        if rename(name) in renamed:
            raise ValueError(f"{source}: holds {rename(name)} under two names; leave one of them in the file")
        renamed[rename(name)] = value
    return renamed


def _our_names(state: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """Official names to timm's: of Swin, the downsampling after a stage belongs to the next one."""
    state = {name: value for name, value in state.items() if name.rsplit(".", 1)[-1] not in _BUFFERS}
    if not any(name.startswith("layers.0.downsample.") for name in state):
        return state
    shifted = lambda found: f"layers.{int(found[1]) + 1}.downsample."  # noqa: E731

    def ours(name: str) -> str:
        return re.sub(r"^head\.(?!fc\.)", "head.fc.", re.sub(r"^layers\.(\d+)\.downsample\.", shifted, name))

    return _renamed(state, ours, source)


def _plain_name(name: str, model: nn.Module) -> str:
    """A parameter's name in the model that a features_only wrapper holds."""
    if isinstance(model, FeatureGetterNet):
        return name.removeprefix("model.")
    if isinstance(model, FeatureDictNet):
        return re.sub(r"^layers_(\d+)", r"layers.\1", name)
    return name


def _part(name: str) -> str:
    """The stage, block or layer that a name belongs to."""
    found = re.match(r"(layers|blocks)\.\d+|[^.]+", name)
    return found[0] if found else name


# ---- fitting ----


def _fit(
    state: dict[str, Tensor], model: nn.Module, source: str, timm_adapts_head: bool = False
) -> tuple[dict[str, Tensor], LoadedCheckpoint]:
    """The weights that a model takes, by its own names, and the report.

    Args:
        source: the file, for errors.
        timm_adapts_head: leave head and first layer as they are; timm exchanges them itself.

    Raises:
        ValueError: the names or the shapes are those of another model, or a tensor cannot be its weights.
    """
    state = _our_names(state, source)
    target = {_plain_name(name, model): (name, value) for name, value in model.state_dict().items()}
    held: Any = model.model if isinstance(model, FeatureGetterNet) else model
    parts = {_part(name) for name in target}
    is_wrapped = held is not model or isinstance(model, FeatureDictNet)
    others = [name for name in state if name not in target]
    # A model that gives features has no head and may lack whole stages; any other may lack the head.
    unused = [name for name in others if _part(name) not in parts and (is_wrapped or _part(name) == "head")]
    strangers = [name for name in others if name not in unused]
    missing = [name for name in target if name not in state]
    converted, resized, left, wrong = {}, [], [], []
    for name, (own_name, parameter) in target.items():
        value = state.get(name)
        if value is None:
            continue
        if fault := _fault(value, parameter):
            raise ValueError(f"{source}: {name} cannot be weights: {fault}")
        if value.shape != parameter.shape:
            if name.startswith("head") and value.ndim == parameter.ndim and value.shape[1:] == parameter.shape[1:]:
                if timm_adapts_head:
                    converted[own_name] = value
                else:
                    left.append(own_name)
                continue
            module = model.get_submodule(own_name.rpartition(".")[0])
            fitted = _resized(name, value, parameter, module, held, timm_adapts_head)
            if fitted is None:
                wrong.append(f"{name} has {tuple(value.shape)} in the file, {tuple(parameter.shape)} in the model")
                continue
            value = fitted
            resized.append(own_name)
        converted[own_name] = value
    if missing or strangers or wrong:
        raise ValueError(_mismatch(source, held, missing, strangers, wrong))
    return converted, LoadedCheckpoint(tuple(resized), tuple(left), tuple(unused))


def _mismatch(source: str, model: nn.Module, missing: list[str], strangers: list[str], wrong: list[str]) -> str:
    listed = [f"{len(names)} {what}, such as {names[0]}" for names, what in (
        (missing, "of its parameters are not in the file"),
        (strangers, "tensors of the file have no place in it"),
        (wrong, "of other shape"),
    ) if names]  # fmt: skip
    text = f"{source}: these are not the weights of this {type(model).__name__}: {'; '.join(listed)}. "
    agents = [entry for entry in wrong if re.search(r"\.(an|na|a[hwc]|[hwc]a)_bias ", entry)]
    if agents and not missing and not strangers:
        return (
            text + "The number of agents differs: build the model with the published one; agent_grid adds agents later"
        )
    return text + "Build the model under the name of the published file (list: agentsd/vision/README.md)"


def _fault(value: Tensor, parameter: Tensor) -> str | None:
    """Why a tensor of a file cannot be the values of a parameter, its shape apart; None if it can."""
    if value.is_nested or value.layout is not torch.strided:
        return "it is sparse or nested, not a plain tensor"
    if value.dtype not in _DTYPES:
        return f"its numbers are of {value.dtype}, not of floating point with 16 bits or more"
    if value.is_meta:
        return None if parameter.is_meta else "it has a shape and no numbers (it was saved on the meta device)"
    if not value.to(parameter.dtype).isfinite().all():
        return f"not all of its numbers are finite in the model's {parameter.dtype}"
    return None


def _resized(name: str, value: Tensor, like: Tensor, module: Any, model: Any, timm_adapts: bool) -> Tensor | None:
    """A tensor in the shape of the model's, by the authors' interpolation; None where that is impossible.

    Args:
        like: the parameter, of the module in the model.
        timm_adapts: leave the first layer as it is.
    """
    if value.ndim != like.ndim or value.numel() == 0:
        return None
    kind = name.rsplit(".", 1)[-1]
    if kind in _GRID_AXIS:
        return _resized_axis(value, like, _GRID_AXIS[kind])
    if kind == "relative_position_bias_table" and value.shape[1] == like.shape[1]:
        side = math.isqrt(len(value))  # the authors' windows are square; the model's need not be
        if side * side != len(value):
            return None
        image = value.float().T.unflatten(1, (side, side))[None]
        new = [2 * window - 1 for window in module.window_size]
        image = F.interpolate(image, size=new, mode="bicubic", align_corners=False)[0]
        return image.flatten(1).T.to(value.dtype)
    if kind.startswith("pos_embed") and value.shape[0] == 1 and value.shape[2] == like.shape[2]:
        new = model.grids[int(kind[-1]) - 1] if kind != "pos_embed" else model.patch_embed.grid_size
        skipped = like.shape[1] - new[0] * new[1]
        side = math.isqrt(max(0, value.shape[1] - skipped))
        if side > 0 and side * side + skipped == value.shape[1]:
            return resized_positions(value, (side, side), new)
    is_first_layer = value.ndim == 4 and value.shape[1] == 3 != like.shape[1]
    if is_first_layer and value.shape[0] == like.shape[0] and value.shape[2:] == like.shape[2:]:
        return value if timm_adapts else adapt_input_conv(like.shape[1], value)
    return None


def _resized_axis(value: Tensor, like: Tensor, axis: int) -> Tensor | None:
    """Resize a bias per row or column linearly along its only axis of the grid; None where other axes differ too."""
    if any(value.shape[i] != like.shape[i] for i in range(5) if i != axis):
        return None
    lines = value.float().movedim(axis, -1)
    resized = F.interpolate(lines.flatten(0, 2), size=like.shape[axis], mode="linear", align_corners=False)
    return resized.unflatten(0, lines.shape[:3]).movedim(-1, axis).to(value.dtype)
