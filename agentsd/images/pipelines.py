"""load_pipeline and set_scheduler: a diffusers pipeline by id, folder or "demo", with a scheduler by name."""

from __future__ import annotations

import contextlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers
from diffusers import DiffusionPipeline

from ..trained import Trained, attach_trained
from .model_files import ModelError, check_config, check_model, meant_beside, trained_settings
from .names import SCHEDULERS, check_dtype, check_scheduler
from .noise import other_noise
from .single_file import load_checkpoint

__all__ = [
    "DEMO_MODEL",
    "SCHEDULERS",
    "ModelError",
    "choose_device",
    "choose_dtype",
    "load_pipeline",
    "set_scheduler",
]

DEMO_MODEL = Path(__file__).parents[1] / "demo_model"
"""Folder of the built-in demo model, in Stable Diffusion's format."""

# DDIM and DDPM clip predicted images to ±1 unless told otherwise, which latents exceed; a pipeline turns that off
# only in the scheduler that it is built with. Karras and other sigmas of an earlier choice must not linger.
_ALWAYS = {
    "clip_sample": False,
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
}


_WEIGHTS = re.compile(r"(?:diffusion_pytorch_)?model(?:\.([A-Za-z]\w*))?(?:-\d{5}-of-\d{5})?\.safetensors")
"""Names of weights that diffusers and transformers save, with their variant."""


def load_pipeline(
    model: str | Path = "demo",
    *,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    scheduler: str | None = None,
    config: str | Path | None = None,
    **options: Any,
) -> DiffusionPipeline:
    """Load a text-to-image pipeline with a UNet.

    Weights are read from safetensors files only. Code that comes with a model is not run.

    Args:
        model: "demo" (the built-in model, no network), a folder saved by `save_pretrained`, a Hugging Face id, or a
            single-file checkpoint in the original layout (`v1-5-pruned-emaonly.safetensors`). If a folder has an
            agentsd.json, as `apps/dreambooth.py` writes, `apply_patch` starts from the settings in it; and where it
            names a LoRA, its base model is loaded with that LoRA.
        device: None takes the first available of "cuda", "mps" and "cpu".
        dtype: dtype of the weights, or its name; None takes float16 on CUDA and float32 elsewhere.
        scheduler: a name from SCHEDULERS; None keeps the model's own.
        config: of a single-file checkpoint: a folder in diffusers' format, or a Hugging Face id, that has its
            tokenizer, scheduler and sizes. None takes the folder `model/` beside `model.safetensors`, or else that of
            its architecture from the hub or the hub's cache.
        **options: passed to `DiffusionPipeline.from_pretrained` (`variant="fp16"`, `revision=…`) or to
            `from_single_file`. A folder with the weights of one variant alone needs none.

    Returns:
        The pipeline on its device, unpatched.

    Raises:
        ModelError: the model is missing, cannot be fetched, is damaged (its agentsd.json too), or would run its own
            code.
        ValueError: unknown scheduler, or one that is not for the model's noise; unknown dtype, a device that this
            machine does not have, or a config that belongs to no file.
    """
    check_model(model)
    check_config(config, model)
    device = choose_device(device)
    dtype = choose_dtype(dtype, device)
    if scheduler is not None:
        check_scheduler(scheduler)
    trained = None if model == "demo" else trained_settings(model)
    if trained is None or trained.lora is None:
        pipe = _load(model, dtype, options, config)
    else:
        pipe = _load_with_lora(Path(model), trained, dtype, options)
    if trained is not None and getattr(pipe, "unet", None) is not None:
        attach_trained(pipe.unet, trained)
    if scheduler is not None:
        set_scheduler(pipe, scheduler)
    return pipe.to(device)


def _load(
    model: str | Path, dtype: torch.dtype, options: dict[str, Any], config: str | Path | None = None
) -> DiffusionPipeline:
    if model != "demo" and Path(model).is_file():
        with _quiet():
            return load_checkpoint(Path(model), config, dtype, options)
    check_model(model)
    source = DEMO_MODEL if model == "demo" else model
    if (variant := _variant(Path(source), dtype)) is not None:
        options = {"variant": variant} | options
    quiet = _quiet() if model == "demo" else contextlib.nullcontext()
    try:
        with quiet:
            return DiffusionPipeline.from_pretrained(
                str(source), use_safetensors=True, **{_dtype_argument(): dtype}, **options
            )
    except Exception as error:  # diffusers raises many kinds here; all of them mean that there is no pipeline
        raise ModelError(_why_not_loaded(model, error)) from error


def _variant(folder: Path, dtype: torch.dtype) -> str | None:
    """The variant to load from a folder whose weights have no others, as unet/….fp16.safetensors; None for the usual.

    Of several that all parts have, the one of this dtype, else the first by name.
    """
    found: dict[Path, set[str]] = {}  # of each part, "" for the usual ones
    for file in folder.glob("*/*.safetensors"):
        if named := _WEIGHTS.fullmatch(file.name):
            found.setdefault(file.parent, set()).add(named[1] or "")
    needed = [variants for variants in found.values() if "" not in variants]
    common = sorted(set.intersection(*needed)) if needed else []
    usual = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]
    return usual if usual in common else next(iter(common), None)


def _load_with_lora(folder: Path, trained: Trained, dtype: torch.dtype, options: dict[str, Any]) -> DiffusionPipeline:
    """The base model with the LoRA of a folder. Raises ModelError where either is missing or does not fit."""
    assert trained.lora is not None
    base = trained.base_model
    try:
        pipe = _load(base, dtype, options)
    except ModelError as error:
        raise ModelError(f"{trained.file}: its base_model cannot be loaded: {error}") from error
    try:
        pipe.load_lora_weights(str(folder), weight_name=trained.lora)
    except Exception as error:  # diffusers, peft and safetensors raise many kinds here
        raise ModelError(
            f"{folder / trained.lora} cannot be put on {base} ({_first_line(error)}): pip install peft, or train again"
        ) from error
    pipe.register_to_config(_name_or_path=str(folder))  # what an image says it was generated with
    return pipe


def set_scheduler(pipe: DiffusionPipeline, name: str) -> None:
    """Give a pipeline another scheduler with the same noise schedule.

    Raises:
        ValueError: an unknown name, or a model of another noise (EDM, flow matching), which none of them samples.
    """
    class_name, changes = check_scheduler(name)
    if (why := other_noise(pipe.scheduler)) is not None:
        raise ValueError(f"scheduler={name!r}: is not for this model, as its scheduler {why}: leave it out")
    # Keys of the old class that the new one does not know are dropped by from_config. Those listed as left at their
    # defaults would be dropped too, with what is set here: the list must go, and they with it.
    old = pipe.scheduler.config
    config = {key: old[key] for key in old if key not in old.get("_use_default_values", ())}
    config = {key: value for key, value in config.items() if not key.startswith("_")} | _ALWAYS | changes
    with _quiet():
        pipe.scheduler = getattr(diffusers, class_name).from_config(config)


def choose_device(device: str | torch.device | None) -> torch.device:
    """The device meant; None: the first available of cuda, mps, cpu. Raises ValueError for an unavailable one."""
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if device is None:
        return torch.device(next(kind for kind, there in available.items() if there))
    try:
        chosen = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device={device!r}: unknown to torch, use cuda, mps or cpu") from error
    if not available.get(chosen.type, True):
        there = ", ".join(kind for kind, is_there in available.items() if is_there)
        raise ValueError(f"device={device!r}: not available to torch {torch.__version__} on this machine, only {there}")
    return chosen


def choose_dtype(dtype: str | torch.dtype | None, device: torch.device) -> torch.dtype:
    """The dtype meant; None: float16 on CUDA, float32 elsewhere. Raises ValueError for any but these and bfloat16."""
    if dtype is None:
        return torch.float16 if device.type == "cuda" else torch.float32
    chosen = getattr(torch, check_dtype(dtype)) if isinstance(dtype, str) else dtype
    if chosen not in (torch.float16, torch.bfloat16, torch.float32):
        raise ValueError(f"dtype={dtype!r}: must be float32, float16 or bfloat16")
    return chosen


def _dtype_argument() -> str:
    # diffusers renamed torch_dtype to dtype; a version that knows both warns of the old, an older one ignores the new.
    return "dtype" if 'kwargs.pop("dtype"' in inspect.getsource(DiffusionPipeline.from_pretrained) else "torch_dtype"


def _why_not_loaded(model: str | Path, error: Exception) -> str:
    if model == "demo" or Path(model).is_dir():
        remedy = "save it again as safetensors" if any(Path(model).glob("*/*.bin")) else "download or save it again"
        return f"the pipeline in {model} cannot be loaded ({_first_line(error)}): {remedy}"
    return (
        f"{model} is not a folder here{meant_beside(Path(model))} and could not be fetched from the Hugging Face hub "
        f"({_first_line(_root(error))}): check the id and the network connection, or give demo or a folder in "
        "diffusers' format"
    )


def _root(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return (text[0] if text else type(error).__name__).rstrip(".")[:200]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence the libraries' log messages and bars: the demo model and a new scheduler give no reason for any."""
    libraries = (diffusers.utils.logging, transformers.utils.logging)
    before = [(logging.get_verbosity(), logging.is_progress_bar_enabled()) for logging in libraries]
    for logging in libraries:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    try:
        yield
    finally:
        for logging, (verbosity, bar) in zip(libraries, before):
            logging.set_verbosity(verbosity)
            if bar:
                logging.enable_progress_bar()
