"""load_model, make_trainable: the pipeline to be tuned, checked for what can be trained here, and its LoRA matrices."""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DDPMScheduler, DiffusionPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.training_utils import cast_training_params
from torch import nn

from agentsd.images.latents import has_statistics
from agentsd.images.noise import why_not_ddpm
from agentsd.images.pipelines import ModelError, load_pipeline

from .draws import number
from .settings import DreamBoothSettings, UsageError

LORA_TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0", "add_k_proj", "add_v_proj"],
    "text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"],
}
"""The layers that get LoRA matrices: those of diffusers' DreamBooth script."""


@dataclass(frozen=True)
class Model:
    """A pipeline in float32 on the CPU, and the noise schedule that it is trained with."""

    pipe: DiffusionPipeline
    noise_scheduler: DDPMScheduler

    @property
    def is_xl(self) -> bool:
        """SDXL: two text encoders, and sizes as conditions."""
        return isinstance(self.pipe, StableDiffusionXLPipeline)


def load_model(settings: DreamBoothSettings) -> Model:
    """Load the pipeline and check that it can be trained here with these settings.

    Raises:
        UsageError: it cannot be loaded, is of another kind, or was trained with another kind of noise.
    """
    try:
        pipe = load_pipeline(settings.model, device="cpu", dtype="float32")
    except (ModelError, ValueError) as error:
        raise UsageError(f"--model {settings.model}: {error}") from None
    if type(pipe) not in (StableDiffusionPipeline, StableDiffusionXLPipeline):
        raise UsageError(
            f"--model {settings.model}: is a {type(pipe).__name__}; only text-to-image models of the classes "
            "StableDiffusionPipeline and StableDiffusionXLPipeline can be trained"
        )
    if getattr(pipe.unet, "peft_config", None):
        raise UsageError(
            f"--model {settings.model}: has LoRA matrices on it; call pipe.fuse_lora() and pipe.unload_lora_weights(), "
            "and give the folder that pipe.save_pretrained(…) writes then"
        )
    if pipe.unet.config.in_channels != pipe.vae.config.latent_channels:
        raise UsageError(
            f"--model {settings.model}: its UNet takes {pipe.unet.config.in_channels} channels, as for inpainting; "
            f"give a text-to-image model, whose UNet takes the {pipe.vae.config.latent_channels} of a latent"
        )
    model = Model(pipe, _noise_scheduler(settings, pipe))
    if model.is_xl and settings.train_text_encoder:
        raise UsageError(
            "--train-text-encoder: is for models with one text encoder; leave it out for Stable Diffusion XL"
        )
    multiple = pipe.vae_scale_factor
    if settings.resolution % multiple:
        below = max(multiple, settings.resolution // multiple * multiple)
        raise UsageError(
            f"--resolution {settings.resolution}: must be a multiple of {multiple} for this model; use {below}"
        )
    for module in (pipe.vae, pipe.unet, *text_encoders(pipe)):
        module.requires_grad_(False).eval()
    pipe.set_progress_bar_config(disable=True)
    return model


def _noise_scheduler(settings: DreamBoothSettings, pipe: Any) -> DDPMScheduler:
    """The noise schedule of the model's own scheduler. Raises UsageError for a model that has another kind of noise."""
    name = f"--model {settings.model}"
    if (why := why_not_ddpm(pipe.scheduler)) is not None:
        raise UsageError(
            f"{name}: its scheduler {why}; only models that were trained with DDPM's noise to predict the noise or the "
            "velocity, such as Stable Diffusion 1.5, 2.1 and XL, can be trained here"
        )
    if getattr(pipe.unet.config, "time_cond_proj_dim", None) is not None:
        raise UsageError(
            f"{name}: its UNet takes the guidance scale as an input, as distilled for few steps (LCM); give the model "
            "that it was distilled from"
        )
    if pipe.unet.config.out_channels != pipe.unet.config.in_channels:
        raise UsageError(
            f"{name}: its UNet predicts {pipe.unet.config.out_channels} channels and not the "
            f"{pipe.unet.config.in_channels} of the noise, as with a learned variance; give a model without"
        )
    if has_statistics(pipe.vae) and not isinstance(pipe, StableDiffusionXLPipeline):
        raise UsageError(
            f"{name}: its autoencoder has latents_mean and latents_std, which a {type(pipe).__name__} leaves out when "
            "it decodes; give a model with an autoencoder without them"
        )
    config = pipe.scheduler.config
    # The betas themselves: another class takes its own defaults for what a configuration does not say.
    return DDPMScheduler(
        config.num_train_timesteps, trained_betas=pipe.scheduler.betas.tolist(), prediction_type=config.prediction_type
    )


def text_encoders(pipe: DiffusionPipeline) -> list[nn.Module]:
    """The text encoders of a pipeline: one, or SDXL's two."""
    return [part for name in ("text_encoder", "text_encoder_2") if (part := getattr(pipe, name, None)) is not None]


def trained_parts(pipe: DiffusionPipeline, settings: DreamBoothSettings) -> dict[str, nn.Module]:
    """The modules that are trained, by their name in the pipeline."""
    return {name: getattr(pipe, name) for name in ("unet", "text_encoder")[: 1 + settings.train_text_encoder]}


def make_trainable(pipe: DiffusionPipeline, settings: DreamBoothSettings, frozen_dtype: torch.dtype) -> None:
    """Turn gradients on for what is trained: all weights, or new LoRA matrices beside the frozen weights.

    Args:
        frozen_dtype: of the UNet's weights that LoRA leaves as they are. What is trained is float32.
    """
    for name, module in trained_parts(pipe, settings).items():
        if settings.lora_rank is None:
            module.requires_grad_(True)
        else:
            from peft import LoraConfig, inject_adapter_in_model

            if name == "unet":  # the text encoder is small, and pipelines take the type of their latents from it
                for parameter in module.parameters():
                    parameter.data = parameter.data.to(frozen_dtype)
            config = LoraConfig(
                r=settings.lora_rank,
                lora_alpha=settings.lora_rank,
                init_lora_weights="gaussian",
                target_modules=LORA_TARGETS[name],
            )
            with torch.random.fork_rng(devices=[]):  # peft takes its first weights from the global generator
                torch.manual_seed(number(settings.seed, "lora", name))
                inject_adapter_in_model(config, module)
            cast_training_params(module, dtype=torch.float32)
        module.train()
        if settings.gradient_checkpointing:
            set_checkpointing(module, True)


def set_checkpointing(module: Any, on: bool) -> None:
    """Turn gradient checkpointing of a diffusers or transformers model on or off, as its version calls it."""
    if hasattr(module, "enable_gradient_checkpointing"):  # diffusers
        module.enable_gradient_checkpointing() if on else module.disable_gradient_checkpointing()
        return
    name = (
        "activation_checkpointing" if hasattr(module, "activation_checkpointing_enable") else "gradient_checkpointing"
    )
    if on:
        # Older versions are reentrant by default, which gives no gradients to LoRA behind frozen embeddings.
        getattr(module, f"{name}_enable")(**{f"{name}_kwargs": {"use_reentrant": False}})
    else:
        getattr(module, f"{name}_disable")()


def trained_tensors(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters of a module that are trained, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def check_optimizer(settings: DreamBoothSettings, device: torch.device) -> None:
    """Make sure that the optimizer and LoRA's package can be had, before anything is loaded. Raises UsageError."""
    if settings.use_8bit_adam:
        if device.type != "cuda":
            raise UsageError(
                f"--use-8bit-adam: needs a CUDA GPU, and this training runs on {device.type}; leave it out to use "
                "torch's AdamW"
            )
        if importlib.util.find_spec("bitsandbytes") is None:
            raise UsageError("--use-8bit-adam: needs bitsandbytes; pip install bitsandbytes, or leave it out")
    if settings.lora_rank is not None and importlib.util.find_spec("peft") is None:
        raise UsageError(f"--lora-rank {settings.lora_rank}: needs peft; pip install peft, or leave it out")


def make_optimizer(settings: DreamBoothSettings, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """AdamW, or bitsandbytes' in 8 bits."""
    kind: Any = torch.optim.AdamW
    if settings.use_8bit_adam:
        import bitsandbytes

        kind = bitsandbytes.optim.AdamW8bit
    return kind(
        parameters,
        lr=settings.learning_rate,
        betas=(settings.adam_beta1, settings.adam_beta2),
        weight_decay=settings.adam_weight_decay,
        eps=settings.adam_epsilon,
    )


def written_bytes(pipe: DiffusionPipeline, settings: DreamBoothSettings) -> int:
    """The most bytes that a training has on the disk at once: the model, its checkpoints, and one being written."""
    parts = trained_parts(pipe, settings)
    if settings.lora_rank is None:
        trained = sum(parameter.numel() for module in parts.values() for parameter in module.parameters())
        modules = [part for part in pipe.components.values() if isinstance(part, nn.Module)]
        model = sum(parameter.numel() for module in modules for parameter in module.parameters())
    else:
        model = trained = sum(
            settings.lora_rank * (layer.in_features + layer.out_features)
            for part, module in parts.items()
            for name, layer in module.named_modules()
            if isinstance(layer, nn.Linear) and any(name.endswith(f".{target}") for target in LORA_TARGETS[part])
        )
    count = settings.max_train_steps // settings.checkpointing_steps
    kept = min(count, settings.checkpoints_total_limit or count) + 1 if count else 0
    moments = 2 if settings.use_8bit_adam else 8  # bytes per weight of AdamW's two
    return 4 * model + kept * (4 + moments) * trained
