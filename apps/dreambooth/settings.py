"""DreamBoothSettings: the options of a training, checked when made."""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass
from numbers import Integral, Real
from pathlib import Path
from typing import Any

from agentsd.config import AgentConfig

from .errors import UsageError
from .schedules import LR_SCHEDULERS, check_schedule

__all__ = ["AGENTS", "LR_SCHEDULERS", "PRECISIONS", "DreamBoothSettings", "UsageError", "default_config", "option"]

AGENTS = ("none", "sampling", "both")
"""What --agents can be: the rows of the paper's figure 8."""

PRECISIONS = ("no", "fp16", "bf16")


def option(name: str) -> str:
    """A field as it is written on the command line: "lora_rank" -> "--lora-rank"."""
    return "--" + name.replace("_", "-")


@dataclass(frozen=True)
class DreamBoothSettings:
    """Options of a training. Names and meanings are those of diffusers' DreamBooth script where it has them.

    Attributes:
        instance_data_dir: folder of the images of the subject.
        instance_prompt: what they show, with the rare word that will mean the subject ("a photo of sks dog").
        output_dir: folder for the model, its checkpoints and validation images; missing, empty or of the same run.
        model: "demo", a folder that `save_pretrained` wrote, or a Hugging Face id: what `agentsd.load_pipeline` takes.
        with_prior_preservation, class_data_dir, class_prompt, num_class_images, prior_loss_weight: train on images of
            the class too, with a loss of this weight. Images that class_data_dir lacks are generated with the model.
        class_inference_steps: denoising steps of each generated class image.
        resolution: side of the training images in pixels.
        train_text_encoder: train the text encoder too.
        train_batch_size: instance images per forward pass and process.
        gradient_accumulation_steps: forward passes per optimizer step.
        gradient_checkpointing: recompute activations in the backward pass: less memory, more time.
        max_train_steps: optimizer steps.
        learning_rate, lr_scheduler, lr_warmup_steps, lr_num_cycles, lr_power, lr_step_rules: as
            diffusers.optimization.get_scheduler.
        use_8bit_adam: bitsandbytes' AdamW8bit in place of torch's AdamW.
        adam_beta1, adam_beta2, adam_weight_decay, adam_epsilon, max_grad_norm: of the optimizer.
        mixed_precision: "no", "fp16", "bf16"; None takes what `accelerate launch` was given, else "no".
        lora_rank: train LoRA matrices of this rank in place of the weights.
        checkpointing_steps: write a checkpoint after every so many steps.
        checkpoints_total_limit: keep only so many of them; None keeps all.
        resume_from_checkpoint: "latest" or the name of a folder in output_dir/checkpoints.
        validation_prompt: generate images with it while training.
        num_validation_images, validation_steps: how many, and after every how many steps.
        validation_inference_steps, guidance_scale: how they are sampled; the scale holds for class images too.
        seed: of every random number of the training.
        agents: "both" uses agent attention in training and sampling, "sampling" in sampling only, "none" not at all.
        config: settings of agent attention; None takes AgentConfig's defaults, with early=1 where agents train.
        device: "cpu" to leave a GPU unused; None takes accelerate's choice.

    Raises:
        UsageError: a field is out of its range. The message names field, value, range and remedy.
    """

    instance_data_dir: str | Path
    instance_prompt: str
    output_dir: str | Path
    model: str | Path = "demo"
    with_prior_preservation: bool = False
    class_data_dir: str | Path | None = None
    class_prompt: str | None = None
    num_class_images: int = 100
    prior_loss_weight: float = 1.0
    class_inference_steps: int = 50
    resolution: int = 512
    train_text_encoder: bool = False
    train_batch_size: int = 1
    gradient_accumulation_steps: int = 1
    gradient_checkpointing: bool = False
    max_train_steps: int = 800
    learning_rate: float = 1e-6
    lr_scheduler: str = "constant"
    lr_warmup_steps: int = 0
    lr_num_cycles: int = 1
    lr_power: float = 1.0
    lr_step_rules: str | None = None
    use_8bit_adam: bool = False
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_weight_decay: float = 1e-2
    adam_epsilon: float = 1e-8
    max_grad_norm: float = 1.0
    mixed_precision: str | None = None
    lora_rank: int | None = None
    checkpointing_steps: int = 500
    checkpoints_total_limit: int | None = 1
    resume_from_checkpoint: str | None = None
    validation_prompt: str | None = None
    num_validation_images: int = 4
    validation_steps: int = 100
    validation_inference_steps: int = 25
    guidance_scale: float = 7.5
    seed: int = 0
    agents: str = "none"
    config: AgentConfig | None = None
    device: str | None = None

    def __post_init__(self) -> None:
        for name in ("instance_data_dir", "output_dir", "class_data_dir"):
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, Path(value))
        for name, low in _INTEGERS.items():
            self._check_number(name, Integral, "an integer", low, math.inf)
        for name, (low, high) in _NUMBERS.items():
            self._check_number(name, Real, "a number", low, high)
        for name, allowed in _WORDS.items():
            value = getattr(self, name)
            if value not in allowed:
                words = ", ".join(str(word) for word in allowed if word is not None)
                raise UsageError(f"{option(name)} {value}: must be one of {words}")
        for name in ("instance_prompt", "class_prompt", "validation_prompt"):
            value = getattr(self, name)
            if value is not None and not value.strip():
                raise UsageError(f"{option(name)} {value!r}: must have at least one word, such as 'a photo of sks dog'")
        self._check_prior()
        self._check_useless()
        check_schedule(self)

    @property
    def agent_config(self) -> AgentConfig | None:
        """What the model is to be sampled with, and trained with where `agents` is "both"; None without agents."""
        if self.agents == "none":
            return None
        return self.config or default_config(self.agents)

    def as_json(self) -> dict[str, Any]:
        """All fields as they are when read back from JSON."""
        config = self.agent_config
        fields = {**dataclasses.asdict(self), "config": None if config is None else dataclasses.asdict(config)}
        return json.loads(json.dumps(fields, default=str))

    def _check_number(self, name: str, kind: type, described: str, low: float, high: float) -> None:
        value = getattr(self, name)
        if value is None and name in _OPTIONAL:
            return
        right = isinstance(value, kind) and not isinstance(value, bool) and low <= value <= high  # type: ignore[operator]
        if not right or (name in _POSITIVE and value == 0):
            bound = f"above {low:g}" if name in _POSITIVE else f"at least {low:g}"
            if high < math.inf:
                bound += f" and at most {high:g}"
            raise UsageError(f"{option(name)} {value}: must be {described}, {bound}")

    def _check_prior(self) -> None:
        given = {name: getattr(self, name) for name in ("class_data_dir", "class_prompt")}
        if self.with_prior_preservation:
            for name, what in (("class_prompt", "'a photo of a dog'"), ("class_data_dir", "a folder")):
                if given[name] is None:
                    raise UsageError(
                        f"--with-prior-preservation needs {option(name)}: add {option(name)} {what}, or leave "
                        "--with-prior-preservation out"
                    )
            if self.class_data_dir.resolve() == self.instance_data_dir.resolve():  # type: ignore[union-attr]
                raise UsageError(
                    f"--class-data-dir {self.class_data_dir}: is --instance-data-dir too; give the images of the class "
                    "a folder of their own"
                )
        else:
            for name, value in given.items():
                if value is not None:
                    raise UsageError(
                        f"{option(name)} {value}: has no effect without --with-prior-preservation; add that, or leave "
                        f"{option(name)} out"
                    )

    def _check_useless(self) -> None:
        if self.config is not None and self.agents == "none":
            raise UsageError(
                "settings of agent attention have no effect with --agents none: give --agents sampling or both, or "
                "leave them out"
            )


_INTEGERS = {
    "num_class_images": 1,
    "class_inference_steps": 1,
    "resolution": 8,
    "train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "max_train_steps": 1,
    "lr_warmup_steps": 0,
    "lr_num_cycles": 1,
    "lora_rank": 1,
    "checkpointing_steps": 1,
    "checkpoints_total_limit": 1,
    "num_validation_images": 1,
    "validation_steps": 1,
    "validation_inference_steps": 1,
    "seed": 0,
}
_NUMBERS = {
    "prior_loss_weight": (0, 1000),
    "learning_rate": (0, 1),
    "lr_power": (0, 100),
    "adam_beta1": (0, 0.9999),
    "adam_beta2": (0, 0.999999),
    "adam_weight_decay": (0, 10),
    "adam_epsilon": (0, 1),
    "max_grad_norm": (0, 1e6),
    "guidance_scale": (0, 100),
}
_POSITIVE = ("learning_rate", "adam_epsilon", "max_grad_norm")
_OPTIONAL = ("lora_rank", "checkpoints_total_limit")
_WORDS: dict[str, tuple] = {
    "lr_scheduler": LR_SCHEDULERS,
    "mixed_precision": (*PRECISIONS, None),
    "agents": AGENTS,
    "device": ("cpu", "cuda", "mps", None),
}


def default_config(agents: str, **fields: Any) -> AgentConfig:
    """The settings of agent attention for a value of --agents; `fields` win over its defaults.

    Agents that are trained are used in every step (appendix B.4 of the paper).

    Raises:
        TypeError, ValueError: as AgentConfig.
    """
    return AgentConfig(**({"early": 1.0} if agents == "both" else {}) | fields)
