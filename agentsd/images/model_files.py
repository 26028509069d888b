"""check_model: what a model's name and the beginnings of its files say, before torch and diffusers are imported.

A folder is what `save_pretrained` wrote. A file is a checkpoint in the layout of the original Stable Diffusion code
(`v1-5-pruned-emaonly.safetensors`): text encoder, UNet and autoencoder in one. It holds weights alone; tokenizer,
scheduler and sizes come from a folder, or from the hub.
"""

from __future__ import annotations

import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path

from ..messages import did_you_mean
from ..trained import Trained, read_trained

_FORMATS = "give a folder in diffusers' format, a .safetensors checkpoint, a Hugging Face id, or demo"
_PICKLES = (".ckpt", ".pt", ".pth", ".bin", ".pkl")
_HEADER_LIMIT = 100_000_000  # bytes; safetensors' own limit

_UNET = "model.diffusion_model."
_AUTOENCODER = "first_stage_model."
_TEXT_ENCODERS = ("cond_stage_model.", "conditioner.embedders.")


class ModelError(Exception):
    """A model could not be loaded; the message is one sentence: what, why, what to try."""


@dataclass(frozen=True)
class Checkpoint:
    """What the header of a single-file checkpoint says.

    Attributes:
        file: where it is.
        name: of its architecture, in print.
        hub_id: the model on the hub that has tokenizer, scheduler and sizes of that architecture.
        v_prediction, zero_snr: marks of a model that predicts the velocity, and whose noise schedule ends in
            pure noise.
    """

    file: Path
    name: str
    hub_id: str
    v_prediction: bool = False
    zero_snr: bool = False


# (architecture, inpainting): name in print and its model on the hub.
_ARCHITECTURES = {
    ("1", False): ("Stable Diffusion 1.x", "stable-diffusion-v1-5/stable-diffusion-v1-5"),
    ("1", True): ("Stable Diffusion 1.x inpainting", "stable-diffusion-v1-5/stable-diffusion-inpainting"),
    ("2", False): ("Stable Diffusion 2.x", "stabilityai/stable-diffusion-2-1"),
    ("2", True): ("Stable Diffusion 2.x inpainting", "stabilityai/stable-diffusion-2-inpainting"),
    ("xl", False): ("Stable Diffusion XL", "stabilityai/stable-diffusion-xl-base-1.0"),
    ("xl", True): ("Stable Diffusion XL inpainting", "diffusers/stable-diffusion-xl-1.0-inpainting-0.1"),
    ("refiner", False): ("Stable Diffusion XL refiner", "stabilityai/stable-diffusion-xl-refiner-1.0"),
}


def check_model(model: str | Path) -> None:
    """Make sure that a model can be what its name says: a pipeline's folder, a checkpoint's file, or an id of the hub.

    Raises:
        ModelError: it cannot; the message says what to give in its place. What is on the hub, and whether the weights
            fit, shows only when the model is loaded.
    """
    path, name = Path(model), str(model)
    if name == "demo":
        return
    if not name.strip():  # Path("") is the working folder
        raise ModelError(f"there is no folder {name!r}: {_FORMATS}")
    if path.is_dir():
        _check_folder(path)
    elif path.is_file():
        read_checkpoint(path)
    elif path.suffix in (".safetensors", *_PICKLES):
        raise ModelError(f"there is no file {name!r}{meant_beside(path)}: {_FORMATS}")
    elif name.startswith((".", "/", "~")) or not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", name):
        raise ModelError(f"there is no folder {name!r}{meant_beside(path)}: {_FORMATS}")
    elif path.suffix and path.suffix in ".safetensors" and (meant := meant_beside(path)):
        raise ModelError(f"there is no file {name!r}{meant}: {_FORMATS}")


def meant_beside(path: Path) -> str:
    """Return " (did you mean model.safetensors?)" where a file or folder of nearly that name lies there, else ""."""
    try:
        beside = [one for one in path.parent.iterdir() if one.suffix == ".safetensors" or one.is_dir()]
    except OSError:
        return ""
    if (file := path.parent / f"{path.name}.safetensors") in beside:
        return f" (did you mean {file}?)"
    return did_you_mean(str(path), [str(one) for one in beside])


def check_config(config: str | Path | None, model: str | Path) -> None:
    """Make sure that `config` of load_pipeline belongs to a file and exists. Raises ModelError or ValueError."""
    if config is None:
        return
    if not Path(model).is_file():
        raise ValueError(f"config={str(config)!r}: belongs to a single-file checkpoint; {model} has a configuration")
    if not Path(config).is_dir():
        check_model(config)
    if Path(config).is_file() or str(config) == "demo":
        raise ModelError(f"config={str(config)!r}: must be a folder in diffusers' format, or a Hugging Face id")


def config_beside(file: Path) -> Path | None:
    """The folder that goes with a checkpoint: `model/` beside `model.safetensors`, where it is a pipeline's folder."""
    folder = file.with_suffix("")
    return folder if (folder / "model_index.json").is_file() else None


def pipeline_class_name(folder: Path) -> str:
    """The class that a pipeline's folder names. Raises ModelError where it names none."""
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        index = None
    if not isinstance(index, dict) or not isinstance(index.get("_class_name"), (str, list)):
        raise ModelError(
            f"{folder / 'model_index.json'} names no pipeline class (`_class_name`), so it is not what "
            "pipe.save_pretrained(…) wrote: save or download the model again"
        )
    refuse_code(folder)
    return str(index["_class_name"])


def trained_settings(folder: str | Path) -> Trained | None:
    """The agentsd.json of a model's folder; None where there is none. Raises ModelError where it is damaged."""
    if not str(folder).strip() or not Path(folder).is_dir():
        return None
    try:
        return read_trained(folder)
    except ValueError as error:
        raise ModelError(str(error)) from error


def _check_folder(folder: Path) -> None:
    trained = trained_settings(folder)
    if trained is not None and trained.lora is not None:
        return _check_lora(folder, trained)
    if not (folder / "model_index.json").is_file():
        raise ModelError(
            f"{folder} is a folder without model_index.json, so it is not a diffusers pipeline: give the folder "
            "that pipe.save_pretrained(…) wrote"
        )
    pipeline_class_name(folder)


def _check_lora(folder: Path, trained: Trained) -> None:
    """Raise ModelError where a folder's agentsd.json names a LoRA or a base model that is missing."""
    base = trained.base_model
    if not (folder / str(trained.lora)).is_file():
        raise ModelError(f"{trained.file}: names the LoRA {trained.lora}, which is not beside it: train again")
    if base != "demo" and (below := trained_settings(base)) is not None and below.lora is not None:
        raise ModelError(f"{trained.file}: its base_model {base!r} is a LoRA too: give one with whole weights")
    try:
        check_model(base)
    except ModelError as error:
        raise ModelError(f"{trained.file}: its base_model cannot be loaded: {error}") from error


def refuse_code(folder: Path) -> None:
    """Raise ModelError where loading a folder would run code that lies in it.

    diffusers asks before it runs such code only when it comes from the hub; its older releases run a folder's unasked.
    """
    try:
        index = json.loads((folder / "model_index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return  # not a pipeline's folder, or a damaged one: from_pretrained raises
    files = [folder / "None.py"]  # what they make of the name of no custom pipeline
    for part, named in index.items() if isinstance(index, dict) else ():
        if isinstance(named, list) and named:
            files.append((folder if part == "_class_name" else folder / part) / f"{named[0]}.py")
    for file in files:
        if file.is_file():
            raise ModelError(
                f"{file} is the model's own code, which agentsd does not run: give a model whose parts are all "
                "classes of diffusers and transformers"
            )


def read_checkpoint(file: Path) -> Checkpoint:
    """What a single-file checkpoint is, by the names and shapes in its header.

    Raises:
        ModelError: it is no safetensors file, a damaged one, or has not all parts of a Stable Diffusion with a UNet.
    """
    if file.suffix in _PICKLES:
        raise ModelError(
            f"{file} is a pickle, which can run code when it is read, so agentsd does not open it: give the "
            ".safetensors file of the same model"
        )
    if file.suffix != ".safetensors":
        raise ModelError(f"{file} is a file of another kind: {_FORMATS}")
    shapes = _shapes(file)
    conv_in = shapes.get(f"{_UNET}input_blocks.0.0.weight", ())
    if len(conv_in) != 4:
        raise ModelError(f"{file} {_what_else(shapes)}")
    for part, prefixes in (("text encoder", _TEXT_ENCODERS), ("autoencoder", (_AUTOENCODER,))):
        if not any(name.startswith(prefixes) for name in shapes):
            raise ModelError(f"{file} has no {part}: give a checkpoint that holds the whole model")
    if any(name.startswith("conditioner.embedders.1.") for name in shapes):
        kind = "xl"
    elif any(name.startswith("conditioner.") for name in shapes):
        kind = "refiner"
    else:
        kind = "2" if any(name.startswith("cond_stage_model.model.") for name in shapes) else "1"
    name, hub_id = _ARCHITECTURES[kind, kind != "refiner" and conv_in[1] == 9]
    return Checkpoint(file, name, hub_id, "v_pred" in shapes, "ztsnr" in shapes)


def _shapes(file: Path) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the tensors in a safetensors file; reads its header alone."""
    try:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            if length > min(_HEADER_LIMIT, file.stat().st_size):
                raise ValueError(f"its header would have {length:,} bytes")
            header = json.loads(opened.read(length))
        shapes = {name: tuple(about["shape"]) for name, about in header.items() if name != "__metadata__"}
        end = max((about["data_offsets"][1] for name, about in header.items() if name != "__metadata__"), default=0)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError, struct.error) as error:
        raise ModelError(f"{file} cannot be read as safetensors ({error}): download it again") from error
    if 8 + length + end > file.stat().st_size:
        raise ModelError(
            f"{file} is cut short, {file.stat().st_size:,} of {8 + length + end:,} bytes: download it again"
        )
    return shapes


def _what_else(shapes: dict[str, tuple[int, ...]]) -> str:
    """What a file without the original UNet is, and what to give in its place."""
    names = list(shapes)
    if any(name.startswith(("lora_", "unet.", "text_encoder.")) or ".lora" in name for name in names):
        return "is a LoRA: give the model that it belongs to, and put it on with pipe.load_lora_weights(…)"
    if any(name.startswith(("control_model.", "controlnet_cond_embedding.")) for name in names):
        return "is a ControlNet: give a whole model"
    if any(
        "joint_blocks." in name or "double_blocks." in name or "transformer_blocks.0.attn.to_q" in name
        for name in names
    ):
        return "is a model with a transformer; agentsd works on UNets: SD 1.x, SD 2.x and SDXL"
    if any(name.startswith(("down_blocks.", "conv_in.", "encoder.", "text_model.")) for name in names):
        return "is one part of a model in diffusers' layout: give the folder that has all of them"
    return "is no checkpoint of Stable Diffusion with a UNet: " + _FORMATS
