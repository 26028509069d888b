"""Plan: what is trained, what is sampled and how often; the rows of the paper's figure 8. Touches no model."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from agentsd import AgentConfig
from eval.common.protocol import BenchError

SUBJECT = Path(__file__).with_name("subject")
"""The shipped subject: a parrot, Fluent Emoji (MIT); apps/render_subject.py made the images."""

TRAININGS = {
    "none": "without agents",
    "both": "with agents in every step",
    "no-prior": "without agents and without prior preservation",
}
"""What is trained: name and how it is said. "no-prior" is the control of prior preservation."""


@dataclass(frozen=True)
class Row:
    """One way to train and sample.

    Attributes:
        name: of its folder of images.
        title: of its column in the grid and its row in the tables.
        training: a key of TRAININGS; None is the model as it was before.
        config: settings of the patch in sampling, None for unpatched.
        prior: its images are of the class prompt.
    """

    name: str
    title: str
    training: str | None
    config: AgentConfig | None = None
    prior: bool = False

    @property
    def method(self) -> tuple[str, AgentConfig]:
        """The arguments `method` and `config` of agentsd.images.generate."""
        return ("sd", AgentConfig()) if self.config is None else ("agentsd", self.config)


BASE, WITHOUT, UNTRAINED, BOTH = "dreambooth", "sampling", "untrained", "both"
"""Names of the rows of figure 8; everything is compared with the first."""


@dataclass(frozen=True)
class Plan:
    """Everything that the results depend on, beside the machine; as the options of dreambooth_bench.py.

    Attributes:
        model: what is fine-tuned.
        subject: folder of the subject's images.
        instance_prompt, class_prompt: of the training.
        prompts: what is sampled to judge the subject; each with every seed.
        images: number of seeds of each prompt.
        prior_images: number of seeds of the class prompt.
        steps, guidance, scheduler, size: of the sampling; size None is the model's own.
        ratio, alpha, early: of the patch; `early` of the row that uses agents in sampling alone.
        train_steps, learning_rate, …: of the training, as apps/dreambooth.py has them.
        prior_preservation: train on images of the class too, which the model generates at class_guidance.
        timed_steps: rounds of the interleaved timing of training steps.
        seed: of the training and, counted upward, of the images.
        device, dtype: dtype is that of the sampling.
    """

    model: str
    subject: str
    instance_prompt: str
    class_prompt: str
    prompts: tuple[str, ...]
    images: int
    prior_images: int
    steps: int
    guidance: float
    scheduler: str
    size: int | None
    ratio: float
    alpha: float
    early: float
    train_steps: int
    learning_rate: float
    train_batch_size: int
    resolution: int
    mixed_precision: str
    use_8bit_adam: bool
    gradient_checkpointing: bool
    train_text_encoder: bool
    lora_rank: int | None
    prior_preservation: bool
    num_class_images: int
    class_inference_steps: int
    class_guidance: float
    timed_steps: int
    seed: int
    device: str | None
    dtype: str | None

    def __post_init__(self) -> None:
        for name, low in (
            ("images", 2), ("prior_images", 0), ("steps", 1), ("train_steps", 1), ("timed_steps", 2), ("seed", 0),
        ):  # fmt: skip
            if getattr(self, name) < low:
                raise BenchError(f"--{name.replace('_', '-')} {getattr(self, name)}: must be at least {low}")
        if self.prior_images == 1:
            raise BenchError("--prior-images 1: has no interval; give at least 2, or 0 for none")
        for prompt in self.prompts:
            if not prompt.strip():
                raise BenchError(f"--prompt {prompt!r}: is empty; say what the image shall show")
        try:
            self.config(1.0), self.config(self.early)
        except (TypeError, ValueError) as error:
            raise BenchError(str(error)) from error

    def config(self, early: float) -> AgentConfig:
        """The patch with that fraction of agent steps."""
        return AgentConfig(ratio=self.ratio, alpha=self.alpha, early=early)

    @property
    def trainings(self) -> tuple[str, ...]:
        """Keys of TRAININGS, in the order of training."""
        return tuple(TRAININGS) if self.prior_preservation and self.prior_images else ("none", "both")

    @property
    def rows(self) -> tuple[Row, ...]:
        """The rows of figure 8, and the model as it was before, which shows what similarity is worth."""
        every = self.config(1.0)
        return (
            Row(BASE, "DreamBooth", "none"),
            Row(WITHOUT, f"agents in sampling, early {100 * self.early:g} %", "none", self.config(self.early)),
            Row(UNTRAINED, "agents in all steps, not trained so", "none", every),
            Row(BOTH, "agents in all steps, trained so", "both", every),
            Row("before", "the model before training", None),
        )

    @property
    def prior_rows(self) -> tuple[Row, ...]:
        """The same class prompt before and after; the last one without prior preservation, as a control."""
        kept = "prior preserved" if self.prior_preservation else "no prior preservation"
        rows: tuple[Row, ...] = (
            Row("prior-before", "the model before training", None, prior=True),
            Row("prior-dreambooth", f"DreamBooth, {kept}", "none", prior=True),
            Row("prior-both", f"agents in all steps, trained so, {kept}", "both", self.config(1.0), prior=True),
        )
        if "no-prior" in self.trainings:
            rows += (Row("prior-lost", "DreamBooth, no prior preservation", "no-prior", prior=True),)
        return rows if self.prior_images else ()

    def training_options(self, name: str, out: Path) -> dict[str, Any]:
        """Options of apps/dreambooth.py for a training, underscored; those left out have its defaults."""
        options: dict[str, Any] = {
            "model": self.model,
            "instance_data_dir": self.subject,
            "instance_prompt": self.instance_prompt,
            "output_dir": str(out / "models" / name),
            "resolution": self.resolution,
            "max_train_steps": self.train_steps,
            "learning_rate": self.learning_rate,
            "train_batch_size": self.train_batch_size,
            "mixed_precision": self.mixed_precision,
            "use_8bit_adam": self.use_8bit_adam,
            "gradient_checkpointing": self.gradient_checkpointing,
            "train_text_encoder": self.train_text_encoder,
            "lora_rank": self.lora_rank,
            "seed": self.seed,
            "device": self.device,
            "checkpointing_steps": 100,
            "agents": "both" if name == "both" else "none",
        }
        if name == "both":
            options |= {"ratio": self.ratio, "alpha": self.alpha}
        if self.prior_preservation and name != "no-prior":
            options |= {
                "with_prior_preservation": True,
                "class_data_dir": str(out / "class"),
                "class_prompt": self.class_prompt,
                "num_class_images": self.num_class_images,
                "class_inference_steps": self.class_inference_steps,
                "guidance_scale": self.class_guidance,
            }
        return {key: value for key, value in options.items() if value not in (None, False)}

    def as_json(self) -> dict[str, Any]:
        """All fields as values that JSON has."""
        fields = dataclasses.asdict(self)
        return {key: list(value) if isinstance(value, tuple) else value for key, value in fields.items()}


def plan_from(fields: dict[str, Any]) -> Plan:
    """The plan that `as_json` wrote."""
    return Plan(**{**fields, "prompts": tuple(fields["prompts"])})
