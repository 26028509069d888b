"""The settings of a patch (AgentConfig) and the two phases of a diffusion run (Phase); standard library only."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field, fields, replace
from typing import Any

from .fields import Setting, cell, choice, flag, integer, number
from .messages import did_you_mean

DEFAULT_NUM_TRAIN_TIMESTEPS = 1000


class Phase(enum.Enum):
    """What the patched layers do in one UNet call; a function of the timestep alone."""

    AGENT = "agent"
    """Agent attention on merged tokens: the early, noisy steps."""
    MERGE = "merge"
    """The later steps: softmax attention on merged tokens, as ToMeSD does, or what else AgentConfig.late says."""


@dataclass(frozen=True)
class AgentConfig:
    """Settings of `agentsd.apply_patch`, checked when made.

    Attributes:
        {attributes}

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of its range. The message names field, value, range and remedy.
    """

    ratio: float = field(
        default=0.4,
        metadata=number(
            0, 1, "Fraction of the tokens merged away before self-attention, in both phases: a higher one is faster "
            "and coarser. At most 1 − 1/cell of the strides in use: 0.75 with merge_stride 2.",
            hint="it is a fraction of the tokens, 0.4 merges 40 % of them",
            upstream="ratio", advanced=False, slider=(0.0, 0.75, 0.05),
        ),
    )  # fmt: skip
    early: float = field(
        default=0.4,
        metadata=number(
            0, 1, "Noisiest fraction of the diffusion run that uses agent attention; the rest does what late says. 1 "
            "is for models that were fine-tuned with agents, 0 is token merging alone (ToMeSD).",
            hint="it is a fraction of the diffusion run, 0.4 is the noisiest 40 %",
            upstream="(by hand: i == 20)", advanced=False, slider=(0.0, 1.0, 0.05),
        ),
    )  # fmt: skip
    early_ratio: float | None = field(
        default=None,
        metadata=number(
            0, 1, "The ratio of the agent phase alone: 0 is nearer to the unpatched model, at little more time. None "
            "takes ratio, as the paper does.",
            hint="it is a fraction of the tokens; None takes ratio", optional=True,
        ),
    )  # fmt: skip
    agents: str = field(
        default="merge",
        metadata=choice(
            ("merge", "grid"), 'Where agents come from: "merge" matches and averages tokens, as the paper does; "grid" '
            "takes one token of each agent_stride cell and neither matches nor merges in the agent phase, for GPUs on "
            "which matching takes longer than it saves.",
            hint='"merge" is the paper\'s way', option="--agents-from",
        ),
    )  # fmt: skip
    late: str = field(
        default="merge",
        metadata=choice(
            ("merge", "downsample", "full"), 'What the later steps do: "merge" tokens, as ToMeSD and the paper; '
            '"downsample" keys and values to one token of each merge_stride cell, as ToDo, whatever the ratio; or '
            '"full", the model\'s own attention, the slowest and nearest to the unpatched model.',
            hint='"merge" is the paper\'s way',
        ),
    )  # fmt: skip
    alpha: float = field(
        default=0.075,
        metadata=number(
            -10, 10, "Weight of the mixing term αV, which gives variety back to the tokens; the paper found 0.075 for "
            "models that were not trained with agents.",
            hint="the paper uses 0.075 without training", upstream="k_shortcut", slider=(0.0, 1.0, 0.025),
        ),
    )  # fmt: skip
    broadcast_exponent: float = field(
        default=-0.15,
        metadata=number(
            -2, 1, "The second softmax has the scale head_dim ** this: nearer to 0 is sharper. -0.5 is the standard "
            "scale, too smooth without training.",
            hint="-0.5 is the standard softmax scale, the paper uses -0.15",
            upstream="k_scale2 = 0.3 (× −0.5)", slider=(-0.5, 0.0, 0.05),
        ),
    )  # fmt: skip
    agent_ratio: float = field(
        default=0.95,
        metadata=number(
            0, 1, "Fraction of the tokens merged away to make agents: a lower one makes more agents than one a cell, "
            "slower and nearer to the unpatched model.",
            hint="it is a fraction of the tokens, 0.95 leaves one agent per cell of agent_stride 4",
            upstream="agent_ratio", slider=(0.0, 1.0, 0.05),
        ),
    )  # fmt: skip
    agent_stride: int | tuple[int, int] = field(
        default=4,
        metadata=cell(
            "Cell of the agents' grid in tokens, a number or (rows, columns): a smaller one makes more agents, slower "
            "and nearer to the unpatched model.",
            hint="a cell needs 1 row, 1 column and 2 tokens at least; the default is 4, on a command line N or "
            "ROWSxCOLUMNS",
            upstream="sx, sy",
        ),
    )  # fmt: skip
    merge_stride: int | tuple[int, int] = field(
        default=2,
        metadata=cell(
            "Cell of the later steps' grid in tokens, a number or (rows, columns): a larger one allows a ratio above "
            "0.75, and fewer keys with late=\"downsample\".",
            hint="a cell needs 1 row, 1 column and 2 tokens at least; the default is 2, on a command line N or "
            "ROWSxCOLUMNS",
            upstream="sx, sy",
        ),
    )  # fmt: skip
    max_agents: int | None = field(
        default=None,
        metadata=integer(
            1, None, "Most agents there may be, for 1024 px and more: cells of agent_stride grow until it holds. 256 "
            "is what 512 px have; None lets the number grow with the image.",
            hint="None for no limit; 256 is what 512 px have by default", optional=True,
        ),
    )  # fmt: skip
    max_keys: int | None = field(
        default=None,
        metadata=integer(
            1, None, 'Most keys there may be with late="downsample", for 1024 px and more: cells of merge_stride grow '
            "until it holds. 1024 is what 512 px have; None is a key a cell.",
            hint="None for no limit; 1024 is what 512 px have by default", optional=True,
        ),
    )  # fmt: skip
    match_tile: int | None = field(
        default=None,
        metadata=integer(
            2, None, "Compare tokens only within tiles of at most this many tokens a side, for 1024 px and more, where "
            "matching is slow; 16 is a good size. None compares all with all.",
            hint="None to compare all tokens with all; 16 is a good size", optional=True,
        ),
    )  # fmt: skip
    max_downsample: int | str = field(
        default="auto",
        metadata=choice(
            ("auto", 1, 2, 4, 8), "Patch the levels of the UNet down to this downsampling of the latent; a higher one "
            'patches smaller levels too, which saves little. "auto" is the highest-resolution level that has '
            "self-attention.",
            hint='"auto" patches the level of highest resolution that has self-attention',
            upstream="max_downsample = 1",
        ),
    )  # fmt: skip
    cache_interval: int = field(
        default=1,
        metadata=integer(
            1, 50, "At most this many consecutive UNet calls share one whole call, the others compute a small part: "
            "raise it for speed, at some fidelity. 1 caches nothing.",
            hint="1 caches nothing, 3 is two to five times as fast", advanced=False, slider=(1, 8, 1),
        ),
    )  # fmt: skip
    cache_order: int | str = field(
        default="auto",
        metadata=choice(
            ("auto", 0, 1), '0 reuses the kept feature, 1 extrapolates it, half of the linear way; "auto" is 1 with '
            "DDIM, PLMS and Euler, 0 with others and where no scheduler is known.",
            hint='0 reuses the kept feature, 1 extrapolates it, "auto" goes by the scheduler',
        ),
    )  # fmt: skip
    cache_depth: int | str = field(
        default="auto",
        metadata=integer(
            1, 10, "Pairs of resnet and transformer at the end of the last up block that a cached call recomputes: "
            'more are slower and nearer to the unpatched model; "auto" is one.',
            hint='"auto" recomputes one pair of resnet and transformer', choices=("auto",),
        ),
    )  # fmt: skip
    use_rand: bool = field(
        default=True,
        metadata=flag(
            "Choose the destination inside each cell at random; False takes the upper left token, to compare with "
            "other implementations.",
            upstream="use_rand", option="--rand",
        ),
    )  # fmt: skip
    seed: int = field(
        default=0,
        metadata=integer(
            0, 2**63 - 1, "Seed for choosing destination tokens; the image's own seed is another one.",
            option="--patch-seed",
        ),
    )  # fmt: skip
    merge_crossattn: bool = field(
        default=False,
        metadata=flag(
            "Merge around cross-attention too: saves a little more time, at some fidelity.", upstream="merge_crossattn"
        ),
    )
    merge_mlp: bool = field(
        default=False,
        metadata=flag(
            "Merge around feed-forward layers too: saves a little more time, at some fidelity.", upstream="merge_mlp"
        ),
    )
    upcast: bool | None = field(
        default=None,
        metadata=flag(
            "Compute softmax logits in float32: True if float16 gives black images; None does what the layer's own "
            "upcast_attention says.",
            optional=True, upstream="attn_precision",
        ),
    )  # fmt: skip

    def __post_init__(self) -> None:
        for name, setting in SETTINGS.items():
            # The dataclass is frozen; this is its own clean-up of what it was given.
            object.__setattr__(self, name, setting.check(name, getattr(self, name)))
        self._check_ratio_is_possible()

    def _check_ratio_is_possible(self) -> None:
        used = [("merge_stride", Phase.MERGE)] if self.early < 1 and self.late == "merge" else []
        used += [("agent_stride", Phase.AGENT)] if self.early > 0 else []
        for name, phase in used:
            rows, columns = self.stride(phase)
            possible = 1 - 1 / (rows * columns)
            if self.ratio_in(phase) > possible:
                own = phase is Phase.AGENT and self.early_ratio is not None
                setting = "early_ratio" if own else "ratio"
                raise ValueError(
                    f"{setting}={self.ratio_in(phase)}: at most {possible:g} of the tokens can be merged with {name}="
                    f"{getattr(self, name)!r} (one token of each {rows}×{columns} cell stays); lower {setting} or "
                    f"raise {name}"
                )

    def ratio_in(self, phase: Phase) -> float:
        """The fraction of the tokens merged away in a phase; agents from a grid have nothing merged beside them."""
        if phase is Phase.AGENT and self.agents == "grid":
            return 0.0
        return self.early_ratio if phase is Phase.AGENT and self.early_ratio is not None else self.ratio

    def stride(self, phase: Phase, grid: tuple[int, int] | None = None) -> tuple[int, int]:
        """(rows, columns) of one cell of the destination grid.

        On a given (height, width) grid it is as large as max_agents, or max_keys where keys are downsampled, asks for.
        """
        if phase is Phase.AGENT:
            stride, most = self.agent_stride, self.max_agents
        else:
            stride, most = self.merge_stride, self.max_keys if self.late == "downsample" else None
        rows, columns = (stride, stride) if isinstance(stride, int) else stride
        if grid is None or most is None:
            return rows, columns
        height, width = grid
        if rows > height or columns > width:
            return rows, columns  # no cell at all: nothing to make fewer
        factor = 1
        while (height // min(factor * rows, height)) * (width // min(factor * columns, width)) > most:
            factor += 1
        return min(factor * rows, height), min(factor * columns, width)

    def phase_at(self, timestep: float, num_train_timesteps: int = DEFAULT_NUM_TRAIN_TIMESTEPS) -> Phase:
        """The phase at a timestep: agent attention where timestep ≥ (1 − early) · num_train_timesteps."""
        if self.early > 0 and timestep >= self.first_agent_timestep(num_train_timesteps):
            return Phase.AGENT
        return Phase.MERGE

    def first_agent_timestep(self, num_train_timesteps: int = DEFAULT_NUM_TRAIN_TIMESTEPS) -> float:
        """The least noisy timestep of the agent phase, (1 − early) · num_train_timesteps."""
        # Rounded, as (1 − 0.7) · 1000 is a little more than 300 in floating point and would leave timestep 300 out.
        return round((1 - self.early) * num_train_timesteps, 6)

    def acts_in(self, phase: Phase) -> bool:
        """Whether patched layers do anything else in that phase than unpatched ones."""
        return phase is Phase.AGENT or self.late == "downsample" or (self.late == "merge" and self.ratio > 0)

    def num_merged(self, num_tokens: int, phase: Phase) -> int:
        """r = int(N · ratio), the number of tokens merged away before attention in a phase."""
        return int(num_tokens * self.ratio_in(phase))

    def num_merged_for_agents(self, num_tokens: int, num_src: int) -> int:
        """r_agent = min(num_src, int(N · agent_ratio)): N − r_agent tokens are left and become the agents.

        With max_agents it is more, where that many would be left.
        """
        r = int(num_tokens * self.agent_ratio)
        return min(num_src, r if self.max_agents is None else max(r, num_tokens - self.max_agents))


SETTINGS: dict[str, Setting] = {field.name: field.metadata["setting"] for field in fields(AgentConfig)}
"""Field of AgentConfig -> its help, bounds and choices, from which the command, the app, the ComfyUI node and the
page's table take theirs."""

FIELD_NAMES = tuple(SETTINGS)

AgentConfig.__doc__ = (AgentConfig.__doc__ or "").replace(
    "{attributes}", "\n        ".join(f"{name}: {setting.help}" for name, setting in SETTINGS.items())
)


@dataclass(frozen=True)
class Preset:
    """A set of fields with a name.

    Attributes:
        fields: of AgentConfig.
        help: what it does and who takes it.
        time: what it measured against the unpatched model, with machine and size; "" where nothing was.
        distance: how far its images are from the unpatched model's, with what it was measured on; "" likewise.
    """

    fields: dict[str, Any]
    help: str
    time: str = ""
    distance: str = ""


# Bounds on agents, keys and matching, so that the cost is linear in the tokens.
_CAPS = {"late": "downsample", "max_agents": 256, "max_keys": 1024, "match_tile": 16}

PRESET_NOTES: dict[str, Preset] = {
    "paper": Preset(
        {},
        "The paper's method, the defaults.",
        "UNet calls of 25 DDIM steps, SD 1.5, 512 px: 1.3× on 2 cores of a shared AMD EPYC "
        "(eval/call_bench.py), 1.0× forecast for an A100.",
        "Median PSNR to the unpatched image, 43 images of the demo model, 25 DDIM steps (eval/fid_bench.py): 47.3 dB; "
        "fewer steps in that CPU time are 1.8 to 9.9 dB nearer (4 images, eval/pareto.py).",
    ),
    "fast": Preset(
        {"cache_interval": 3},
        'The paper\'s method with step caching: CPUs and small GPUs; large GPUs take "cache".',
        "UNet calls of 25 DDIM steps, SD 1.5, 512 px: 2.8× on 2 cores of a shared AMD EPYC "
        "(eval/call_bench.py), 2.2× forecast for an A100.",
        "Median PSNR to the unpatched image, 24 images of the demo model (eval/pareto.py): DDIM 45.1, Euler "
        "Karras 45.3, DPM++ 2M Karras 42.2 dB; nearer than fewer steps in that CPU time by 7.0, 3.9, 8.9.",
    ),
    "fastest": Preset(
        {"cache_interval": 5, **_CAPS},
        "More step caching, and a cost of attention that grows linearly with the tokens: 1024 px and more; "
        "at 512 px on a large GPU fewer steps are about as near.",
        "UNet calls of 25 DDIM steps, SD 1.5, 512 px: 3.4× on 2 cores of a shared AMD EPYC "
        "(eval/call_bench.py), 2.7× forecast for an A100.",
        "Median PSNR to the unpatched image, 24 images of the demo model (eval/pareto.py): DDIM 40.3, Euler Karras "
        "40.1, DPM++ 2M Karras 39.9 dB; nearer than fewer steps in that A100 time by 1.2, −1.6, −0.6.",
    ),
    "large": Preset(
        {**_CAPS},
        "A cost that grows linearly with the tokens, without caching: 1024 px and more.",
        "UNet calls of 25 DDIM steps, SD 1.5, 512 px: 1.3× on 2 cores of a shared AMD EPYC "
        "(eval/call_bench.py), 1.1× forecast for an A100.",
        "Median PSNR to the unpatched image, 4 images of the demo model at 512 px (eval/pareto.py): 43 to 44 dB; fewer "
        "steps in that CPU time are 8 to 15 dB nearer.",
    ),
    "cache": Preset(
        {"ratio": 0, "early": 0, "cache_interval": 3},
        "Step caching with nothing merged: SDXL, and large GPUs; with DPM++ 2M and UniPC take fewer steps there.",
        "UNet calls of 25 DDIM steps, SD 1.5, 512 px: 2.3× on 2 cores of a shared AMD EPYC "
        "(eval/call_bench.py), 2.3× forecast for an A100.",
        "Median PSNR to the unpatched image, 24 images of the demo model (eval/pareto.py): DDIM 44.8, Euler "
        "Karras 49.0, DPM++ 2M Karras 42.9 dB; nearer than fewer steps in that A100 time by 3.6, 3.9, 1.2.",
    ),
}
"""The presets, each with what it is for and what it measured."""

PRESETS: dict[str, dict[str, Any]] = {name: dict(preset.fields) for name, preset in PRESET_NOTES.items()}
"""Settings by name for `apply_patch(pipe, preset=…)`."""


def make_config(config: AgentConfig | None = None, preset: str | None = None, **settings: Any) -> AgentConfig:
    """Settings from a config or a preset, and single fields that win over it, as `apply_patch` takes them.

    Raises:
        TypeError: an unknown field, a value of the wrong type, a config that is not an AgentConfig, or both a config
            and a preset.
        ValueError: an unknown preset, or a value out of its range.
    """
    unknown = sorted(set(settings) - set(FIELD_NAMES))
    if unknown:
        named = ", ".join(f"{name}{did_you_mean(name, FIELD_NAMES)}" for name in unknown)
        raise TypeError(f"unknown setting {named}; the settings are {', '.join(FIELD_NAMES)}")
    if config is not None and not isinstance(config, AgentConfig):
        raise TypeError(f"config={config!r}: must be an AgentConfig; single settings go by name, as in ratio=0.4")
    if preset is None:
        return replace(config or AgentConfig(), **settings)
    if config is not None:
        raise TypeError("config and preset: give one of them; single settings go by name, as in ratio=0.4")
    if not isinstance(preset, str) or preset not in PRESETS:
        meant = did_you_mean(str(preset), PRESETS)
        raise ValueError(f"preset={preset!r}: must be one of {', '.join(PRESETS)}{meant}")
    return AgentConfig(**{**PRESETS[preset], **settings})
