"""Stage export: the finished parts as a folder that StableDiffusionPipeline loads."""

from __future__ import annotations

import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .autoencoder import load_autoencoder
from .icons import trained_names
from .models import build_pipeline, build_text_encoder, build_unet
from .run import Run, announce, check_folder, origin_of_unet, require, training_settings
from .tokenizer import build_tokenizer
from .training import part_of


def export_stage(run: Run) -> None:
    """Write the finished parts as a StableDiffusionPipeline folder, model/, in float16 safetensors.

    Raises:
        UsageError: the stage unet has not been finished, or was run with other settings; nothing is written then.
    """
    trained = run.out / "unet"
    weights = require(run, trained / "weights.safetensors", "unet")
    require(run, trained / "settings.json", "unet")
    check_folder(trained, training_settings(run, "unet") | origin_of_unet(run))
    tensors = load_file(weights)
    tokenizer = build_tokenizer(run, trained_names(run), trained / "tokenizer")
    unet, text_encoder = build_unet(run.preset), build_text_encoder(run.preset, tokenizer)
    unet.load_state_dict(part_of(tensors, "unet"))
    text_encoder.load_state_dict(part_of(tensors, "text_encoder"))
    pipeline = build_pipeline(load_autoencoder(run), text_encoder, tokenizer, unet).to(torch.float16)

    folder, part = run.out / "model", run.out / "model.part"
    shutil.rmtree(part, ignore_errors=True)
    pipeline.save_pretrained(part, safe_serialization=True)
    for name in ("vocab.json", "merges.txt"):  # newer transformers leave these two to tokenizer.json alone
        shutil.copyfile(trained / "tokenizer" / name, part / "tokenizer" / name)
    name_as_stable_diffusion(part / "text_encoder" / "model.safetensors")
    for path in part.rglob("*.safetensors"):  # safetensors lets only their owner read them
        shutil.copymode(part / "model_index.json", path)
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    announce("export", f"{folder}, {size / 1e6:.1f} MB")


def name_as_stable_diffusion(path: Path) -> None:
    """Give the text encoder's weights the names that Stable Diffusion's have, "text_model." first.

    transformers 5 saves them without it and reads both; transformers 4 would find none and start from random weights.
    """
    tensors = {f"text_model.{name.removeprefix('text_model.')}": tensor for name, tensor in load_file(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})
