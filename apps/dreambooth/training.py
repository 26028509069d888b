"""Trainer: one DreamBooth training (Ruiz et al., https://arxiv.org/abs/2208.12242), with agents where asked for.

The loss is the mean squared error of the predicted noise, or velocity, on images of the subject; with prior
preservation, plus that on images of the class. With `agents="both"` the UNet has agentsd's patch in every step
(appendix B.4 of https://arxiv.org/abs/2312.08874).
"""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import agentsd

from .accelerators import make_accelerator
from .class_images import check_class_folder, complete_class_images
from .conditioning import check_prompts, encode_ids, encode_prompts, token_ids
from .data import find_instance_images, read_image
from .draws import element_of, generator, number
from .latents import Encoded, encode_files
from .models import (
    Model,
    check_optimizer,
    load_model,
    make_optimizer,
    make_trainable,
    set_checkpointing,
    text_encoders,
    trained_parts,
    trained_tensors,
)
from .schedules import check_rates, make_schedule
from .settings import DreamBoothSettings, UsageError


class Trainer:
    """A training that goes step by step.

    `prepare()`, then `step()` as often as there are steps. Several trainers may take turns in one process.
    Every random number depends on the seed and the number of the sample alone, so that the split of a step's samples
    into batches, accumulation and processes changes nothing but the order of sums.

    Attributes:
        done: optimizer steps done.
        accelerator, files: set by `check`; the image files by "instance" and, with prior preservation, "class".
        left_out: set by `check`; sentences on what else is in the folders, by the same names.
        model: set by `load`.
        images: what is kept of them, set by `encode`.
        digest: of all images, set by `encode`.
    """

    def __init__(self, settings: DreamBoothSettings):
        self.settings = settings
        self.done = 0

    def prepare(self) -> None:
        """`check`, `load`, then `encode`."""
        self.check()
        self.load()
        self.encode()

    def check(self) -> None:
        """Check the device and the learning rates, and read all images once. Writes nothing.

        Raises:
            UsageError: anything that the training could not be done with.
        """
        settings = self.settings
        self.accelerator = make_accelerator(settings)
        check_optimizer(settings, self.accelerator.device)
        check_rates(settings)
        class_dir: Any = settings.class_data_dir
        found = {
            "instance": find_instance_images(Path(settings.instance_data_dir), (class_dir, Path(settings.output_dir)))
        }
        if settings.with_prior_preservation:
            found["class"] = check_class_folder(settings)
        self.files: dict[str, list[Path]] = {name: own.images for name, own in found.items()}
        self.left_out = {name: own.sentences() for name, own in found.items()}
        for name, paths in self.files.items():
            for path in paths:
                read_image(path, settings.resolution, f"{name}_data_dir")

    def load(self) -> None:
        """Load the model, and check that it can be trained with these settings and prompts. Writes nothing.

        Raises:
            UsageError: it cannot.
        """
        self.model: Model = load_model(self.settings)
        check_prompts(self.model.pipe, self.settings)

    def encode(self) -> None:
        """Generate missing class images, encode images and prompts, and build what a step needs.

        Raises:
            UsageError: the class images cannot be written or read.
        """
        settings, pipe, device = self.settings, self.model.pipe, self.accelerator.device
        prompts = [settings.instance_prompt]
        if settings.with_prior_preservation:
            self.files["class"] = complete_class_images(pipe, settings, self.accelerator)
            prompts.append(str(settings.class_prompt))
        pipe.vae.to(device)
        quiet = not self.accelerator.is_main_process
        self.images: dict[str, Encoded] = {
            name: encode_files(pipe.vae, paths, settings.resolution, settings.seed, name, quiet)
            for name, paths in self.files.items()
        }
        self.digest = " ".join(images.digest for images in self.images.values())
        pipe.vae.to("cpu")

        self.ids = None if self.model.is_xl else token_ids(pipe, prompts)
        for encoder in text_encoders(pipe):
            encoder.to(device)
        self.prompts = {} if settings.train_text_encoder else encode_prompts(pipe, prompts, device)
        if not settings.train_text_encoder:
            for encoder in text_encoders(pipe):
                encoder.to("cpu")
        self._build()

    def _build(self) -> None:
        settings, pipe, accelerator = self.settings, self.model.pipe, self.accelerator
        half = {"fp16": torch.float16, "bf16": torch.bfloat16}.get(accelerator.mixed_precision, torch.float32)
        make_trainable(pipe, settings, frozen_dtype=half)
        self.input_dtype = torch.float32 if settings.lora_rank is None else half
        if settings.agents == "both":
            agentsd.apply_patch(pipe, settings.agent_config)
        self.parts = trained_parts(pipe, settings)
        for module in self.parts.values():
            module.to(accelerator.device)  # the optimizer must be given the parameters where they will be
        self.parameters = [tensor for module in self.parts.values() for tensor in trained_tensors(module).values()]
        optimizer = make_optimizer(settings, self.parameters)
        prepared = accelerator.prepare(*self.parts.values(), optimizer)
        self.wrapped: dict[str, nn.Module] = dict(zip(self.parts, prepared))
        self.optimizer = prepared[-1]
        # Not prepared by accelerate, which would step it once for each process.
        self.lr_scheduler = make_schedule(settings, optimizer)

    def states(self) -> dict[str, Any]:
        """What a checkpoint keeps besides the weights: objects with a state_dict, by name."""
        found = {"optimizer": self.optimizer, "lr_scheduler": self.lr_scheduler}
        if self.accelerator.scaler is not None:
            found["scaler"] = self.accelerator.scaler
        return found

    def step(self) -> float:
        """Do one optimizer step; returns the loss, the mean over all its samples in all processes.

        Raises:
            UsageError: the loss is no finite number.
        """
        accelerator, settings = self.accelerator, self.settings
        rounds, batch = settings.gradient_accumulation_steps, settings.train_batch_size
        total = torch.zeros((), device=accelerator.device)
        devices = [accelerator.device] if accelerator.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):  # dropout, in models that have it, uses the global generator
            torch.manual_seed(number(settings.seed, "dropout", self.done, accelerator.process_index))
            for current in range(rounds):
                position = self.done * rounds + current
                first = (position * accelerator.num_processes + accelerator.process_index) * batch
                with self._synchronised(current == rounds - 1):
                    loss = self._loss(range(first, first + batch)) / rounds
                    accelerator.backward(loss)
                total += loss.detach()
        accelerator.clip_grad_norm_(self.parameters, settings.max_grad_norm)
        self.optimizer.step()
        if not accelerator.optimizer_step_was_skipped:  # fp16 skips steps until its scale fits
            self.lr_scheduler.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.done += 1
        mean = accelerator.reduce(total, reduction="mean").item()
        if not math.isfinite(mean):
            raise UsageError(
                f"the loss is {mean} at step {self.done}; --learning-rate {settings.learning_rate:g} may be too "
                f"high, or --mixed-precision {accelerator.mixed_precision} too coarse: lower the one, or "
                "leave the other out"
            )
        return mean

    def finish(self) -> None:
        """Leave the pipeline as an ordinary one on the CPU: no patch, no wrapper, no gradients."""
        agentsd.remove_patch(self.model.pipe)
        for name, module in self.wrapped.items():
            part = self.accelerator.unwrap_model(module, keep_fp32_wrapper=False)
            vars(part).pop("forward", None)  # accelerate puts the class's own back as an attribute of the instance
            if self.settings.gradient_checkpointing:
                set_checkpointing(part, False)
            part.eval().requires_grad_(False).to("cpu")
            setattr(self.model.pipe, name, part)

    @contextlib.contextmanager
    def _synchronised(self, last: bool) -> Any:
        """Let processes exchange gradients in the last pass of a step alone."""
        with contextlib.ExitStack() as stack:
            if not last:
                for module in self.wrapped.values():
                    stack.enter_context(self.accelerator.no_sync(module))
            yield

    def _loss(self, samples: range) -> Tensor:
        """The loss of the samples with these numbers: the subject's, and the weighted one of as many of the class."""
        device, schedule = self.accelerator.device, self.model.noise_scheduler
        chosen = {
            name: [element_of(self.settings.seed, name, n, len(images.latents)) for n in samples]
            for name, images in self.images.items()
        }
        latents = torch.cat([self.images[name].latents[index] for name, index in chosen.items()])
        draws = [generator(self.settings.seed, "noise", name, n) for name in chosen for n in samples]
        noise = torch.stack([torch.randn(latents.shape[1:], generator=draw) for draw in draws]).to(device)
        length = schedule.config.num_train_timesteps
        timesteps = torch.cat([torch.randint(length, (1,), generator=draw) for draw in draws]).to(device)
        noisy = schedule.add_noise(latents, noise, timesteps)
        target = noise
        if schedule.config.prediction_type == "v_prediction":
            target = schedule.get_velocity(latents, noise, timesteps)

        prompts = self.prompts
        if self.ids is not None and not prompts:
            prompts = {"text": encode_ids(self.wrapped["text_encoder"], self.ids, device)}
        told = {name: value.repeat_interleave(len(samples), dim=0) for name, value in prompts.items()}
        added = None
        if self.model.is_xl:
            sizes = torch.cat([self.images[name].sizes[index] for name, index in chosen.items()])
            added = {"text_embeds": told["pooled"].to(self.input_dtype), "time_ids": sizes}
        predicted = self.wrapped["unet"](
            noisy.to(self.input_dtype), timesteps, told["text"].to(self.input_dtype), added_cond_kwargs=added
        ).sample
        errors = (predicted.float() - target.float()).square().mean(dim=(1, 2, 3))
        loss = errors[: len(samples)].mean()
        if "class" in chosen:
            loss = loss + self.settings.prior_loss_weight * errors[len(samples) :].mean()
        return loss
