"""run: a whole training as the command does it, from the checks to the exported model; and where it goes on."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from demo_training.training import noting_interrupts
from tqdm import tqdm

from agentsd.images.measure import PeakMemory

from .checkpoints import find_checkpoint, load_checkpoint, remove_unfinished, save_checkpoint
from .export import export
from .models import written_bytes
from .output import check_output, check_room, claim_output, how_to_go_on, recorded_settings, write_record
from .settings import DreamBoothSettings, UsageError
from .training import Trainer
from .validation import write_validation


def run(settings: DreamBoothSettings) -> None:
    """Train and export, or go on with a run that was stopped.

    All checks come before anything is written.

    Raises:
        UsageError: something that the user can put right.
        KeyboardInterrupt: Ctrl+C or SIGTERM came; a checkpoint of the last finished step was written, if there was one.
    """
    trainer = Trainer(settings)
    trainer.check()
    job = _Job(trainer)
    if job.is_finished():
        return job.say(f"{settings.output_dir} is finished already, after {job.record['steps']} steps")
    trainer.load()
    check_room(job.folder, written_bytes(trainer.model.pipe, settings))
    trainer.accelerator.wait_for_everyone()  # all have checked before one writes
    job.claim()
    trainer.encode()
    try:
        job.resume()
        job.train()
        trainer.finish()
        job.finish()
    except OSError as error:
        raise UsageError(
            f"--output-dir {settings.output_dir}: could not be written to after step {trainer.done} ({error}); make "
            f"room, and {how_to_go_on(job.folder)}"
        ) from error
    trainer.accelerator.end_training()


class _Job:
    """The output folder of a training, and what is recorded of its steps."""

    def __init__(self, trainer: Trainer):
        settings, accelerator = trainer.settings, trainer.accelerator
        self.trainer, self.settings = trainer, settings
        self.folder = Path(settings.output_dir)
        self.main = accelerator.is_main_process
        self.recorded = recorded_settings(settings, accelerator.mixed_precision, accelerator.num_processes)
        self.record: Any = check_output(settings, self.recorded)
        self.checkpoint: Path | None = None
        if settings.resume_from_checkpoint:
            self.checkpoint = find_checkpoint(self.folder, settings.resume_from_checkpoint)
            if self.record and self.record.get("finished") and self.checkpoint is None and not self.is_finished():
                raise UsageError(
                    f"--resume-from-checkpoint {settings.resume_from_checkpoint}: the run in {self.folder} is finished "
                    f"after {self.record['steps']} steps and has no checkpoint to go on from; give another "
                    "--output-dir, with --checkpointing-steps to be able to go on later"
                )
        self.losses: list[float] = []
        self.seconds: list[float] = []
        self.peak = 0

    def say(self, text: str) -> None:
        """Print a line, in one process only."""
        if self.main:
            print(f"dreambooth: {text}", flush=True)

    def is_finished(self) -> bool:
        """Whether there is nothing left to do."""
        record = self.record
        return bool(record and record.get("finished") and record["steps"] == self.settings.max_train_steps)

    def claim(self) -> None:
        """Take the folder for this run, and say what it works with."""
        trainer, settings = self.trainer, self.settings
        if self.main:
            if self.record is None:
                claim_output(self.folder, self.recorded)
            remove_unfinished(self.folder)
        if self.settings.resume_from_checkpoint and self.checkpoint is None:
            self.say(f"there is no checkpoint in {self.folder} yet, so the run begins anew")
        for name, what, folder in (
            ("instance", "subject", settings.instance_data_dir), ("class", "class", settings.class_data_dir)
        ):  # fmt: skip
            if name in trainer.files:
                missing = settings.num_class_images - len(trainer.files[name]) if name == "class" else 0
                more = f"; {missing} more are generated" if missing > 0 else ""
                self.say(f"{len(trainer.files[name])} images of the {what} in {folder}{more}")
                for sentence in trainer.left_out[name]:
                    self.say(f"left out of {folder}, as they are {sentence}")
        config = settings.agent_config
        self.say(
            {
                "none": "no agent attention",
                "sampling": f"agent attention in sampling only: {config}",
                "both": f"agent attention in training and sampling: {config}",
            }[settings.agents]
        )
        trainer.accelerator.wait_for_everyone()

    def resume(self) -> None:
        """Load the checkpoint that there is to go on from."""
        trainer = self.trainer
        if self.checkpoint is None:
            return
        facts = load_checkpoint(self.checkpoint, trainer.parts, trainer.states(), trainer.accelerator.device)
        if facts["images"] != trainer.digest:
            raise UsageError(
                f"--resume-from-checkpoint {self.settings.resume_from_checkpoint}: the run was begun with other "
                "images; give the folders with those images, or another --output-dir"
            )
        if facts["step"] > self.settings.max_train_steps:
            raise UsageError(
                f"--max-train-steps {self.settings.max_train_steps}: {self.checkpoint} has {facts['step']} steps "
                "already; give a higher number, or the name of an earlier checkpoint"
            )
        trainer.done = facts["step"]
        self.losses, self.seconds, self.peak = facts["losses"], facts["seconds"], facts["peak_bytes"] or 0
        self.say(f"going on after step {trainer.done}")

    def train(self) -> None:
        """Do the steps that are left, with checkpoints and validation images between them."""
        trainer, settings, total = self.trainer, self.settings, self.settings.max_train_steps
        memory = PeakMemory(trainer.accelerator.device)
        bar = tqdm(total=total, initial=trainer.done, desc="steps", unit="step", disable=not self.main)
        with noting_interrupts() as interrupts, bar:
            while trainer.done < total:
                before = time.perf_counter()
                self.losses.append(trainer.step())
                self.seconds.append(time.perf_counter() - before)
                self.peak = max(self.peak, memory.peak()[0] or 0)
                bar.set_postfix(loss=f"{self.losses[-1]:.4f}", lr=f"{trainer.lr_scheduler.get_last_lr()[0]:.1e}")
                bar.update()
                stop = trainer.done < total and self._any(bool(interrupts))
                look = trainer.done % settings.validation_steps == 0 or trainer.done == total
                if settings.validation_prompt and look and not stop:
                    self.validate()  # before the checkpoint, so that a run that goes on from it lacks no image
                if stop or trainer.done % settings.checkpointing_steps == 0:
                    self.save()
                if stop:
                    raise KeyboardInterrupt

    def _any(self, mine: bool) -> bool:
        """Whether it is so in any process: all must stop after the same step."""
        accelerator = self.trainer.accelerator
        if accelerator.num_processes == 1:
            return mine
        return bool(accelerator.reduce(torch.tensor(float(mine), device=accelerator.device), reduction="sum").item())

    def save(self) -> None:
        """Write a checkpoint."""
        trainer = self.trainer
        if self.main:
            facts: dict[str, Any] = {"images": trainer.digest, "losses": self.losses, "seconds": self.seconds}
            facts["peak_bytes"] = self.peak or None
            limit = self.settings.checkpoints_total_limit
            save_checkpoint(self.folder, trainer.done, trainer.parts, trainer.states(), facts, limit)
        trainer.accelerator.wait_for_everyone()

    def validate(self) -> None:
        """Write validation images."""
        trainer = self.trainer
        if self.main:
            path = self.folder / "validation" / f"step-{trainer.done}.png"
            write_validation(trainer.model.pipe, self.settings, trainer.accelerator.device, path)
        trainer.accelerator.wait_for_everyone()

    def finish(self) -> None:
        """Export the model and write the record of the whole training."""
        trainer = self.trainer
        if self.main:
            export(trainer.model.pipe, trainer.parts, self.settings)
            device = trainer.accelerator.device
            name = torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)
            write_record(
                self.folder, settings=self.recorded, finished=True, steps=trainer.done, seconds_per_step=self.seconds,
                peak_bytes=self.peak or None, losses=self.losses, device=name,
            )  # fmt: skip
        trainer.accelerator.wait_for_everyone()
        self.say(f"the model is in {self.folder}")
