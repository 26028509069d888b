"""The settings of a patch (AgentConfig) and the two phases of a diffusion run (Phase); standard library only."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass, fields, replace
from numbers import Integral, Real
from typing import Any, TypeGuard

DEFAULT_NUM_TRAIN_TIMESTEPS = 1000


class Phase(enum.Enum):
    """What the patched layers do in one UNet call; a function of the timestep alone."""

    AGENT = "agent"
    """Agent attention on merged tokens: the early, noisy steps."""
    MERGE = "merge"
    """The later steps: softmax attention on merged tokens, as ToMeSD does, or what else AgentConfig.late says."""


# Bounds on agents, keys and matching, so that the cost is linear in the tokens.
_CAPS = {"late": "downsample", "max_agents": 256, "max_keys": 1024, "match_tile": 16}

LATE = ("merge", "downsample", "full")
"""What AgentConfig.late can be."""


@dataclass(frozen=True)
class AgentConfig:
    """Settings of `agentsd.apply_patch`, checked when made.

    Attributes:
        ratio: fraction of the tokens merged away before self-attention, in both phases unless early_ratio is given.
            0 … 1 − 1/(rows · columns) of the smallest stride in use.
        early_ratio: the same for the agent phase alone. None takes `ratio`, as the paper does; 0 is nearer to the
            unpatched model there, at little more time.
        early: the noisiest fraction of the diffusion run that uses agent attention; the rest does what `late` says.
        late: "merge" is token merging alone, as in ToMeSD and the paper; "downsample" takes keys and values from one
            token of each merge_stride cell and keeps every query (ToDo), whatever the ratio; "full" leaves these steps
            to the model's own attention.
        alpha: α of the mixing term (agent_attention).
        broadcast_exponent: the second softmax has the scale head_dim ** broadcast_exponent.
        agent_ratio: fraction of the tokens merged away to make the agents, capped by the number of srcs.
        agent_stride, merge_stride: cell of the destination grid in each phase, in tokens; an int or (rows, columns).
        max_agents: the most agents there may be; cells of agent_stride grow with the picture until it holds, so that
            the agent phase costs the same for each token at any size. None: their number grows with the picture.
        max_keys: with late="downsample", the most keys there may be; cells of merge_stride grow with the picture until
            it holds, so that these steps too cost the same for each token at any size. None: a key per cell.
        match_tile: compare tokens only within tiles of at most so many tokens a side, so that matching costs the same
            for each token at any size. None compares all with all.
        max_downsample: patch the levels of the UNet down to this downsampling of the latent (1, 2, 4 or 8);
            "auto" takes the level of highest resolution that has self-attention.
        cache_interval: at most this many UNet calls in a row share one whole call; the others reuse its features and
            recompute the end of the last up block only. 1 caches nothing.
        cache_order: 0 reuses the kept feature, 1 goes half of the way that a line through the last two
            would, linear in the timestep; "auto" is 1 with DDIM, PLMS and Euler, and 0 with other schedulers and where
            none is known.
        cache_depth: how many pairs of resnet and transformer at the end of the last up block are recomputed; "auto" is
            one.
        use_rand: draw the destination inside each cell at random; False takes the upper left token.
        seed: of those draws.
        merge_crossattn, merge_mlp: merge around cross-attention and feed-forward too.
        upcast: softmax logits in float32; None does what the layer's own `upcast_attention` says.

    Raises:
        TypeError: a field has the wrong type.
        ValueError: a field is out of its range. The message names field, value, range and remedy.
    """

    ratio: float = 0.4
    early: float = 0.4
    late: str = "merge"
    early_ratio: float | None = None
    alpha: float = 0.075
    broadcast_exponent: float = -0.15
    agent_ratio: float = 0.95
    agent_stride: int | tuple[int, int] = 4
    merge_stride: int | tuple[int, int] = 2
    max_agents: int | None = None
    max_keys: int | None = None
    match_tile: int | None = None
    max_downsample: int | str = "auto"
    cache_interval: int = 1
    cache_order: int | str = "auto"
    cache_depth: int | str = "auto"
    use_rand: bool = True
    seed: int = 0
    merge_crossattn: bool = False
    merge_mlp: bool = False
    upcast: bool | None = None

    def __post_init__(self) -> None:
        for name, low, high in (
            ("ratio", 0, 1),
            ("early", 0, 1),
            ("alpha", -10, 10),
            ("broadcast_exponent", -2, 1),
            ("agent_ratio", 0, 1),
        ):
            self._set(name, _number(name, getattr(self, name), low, high))
        if self.early_ratio is not None:
            self._set("early_ratio", _number("early_ratio", self.early_ratio, 0, 1))
        for name in ("agent_stride", "merge_stride"):
            self._set(name, _stride(name, getattr(self, name)))
        if not isinstance(self.late, str) or self.late not in LATE:
            error: type[Exception] = ValueError if isinstance(self.late, str) else TypeError
            raise error(
                f'late={self.late!r}: must be "merge" (token merging), "downsample" (one key and value per '
                'merge_stride cell) or "full" (the model\'s own attention)'
            )
        for name, low, meaning in (
            ("max_agents", 1, "None for no limit; 256 is what 512 px have by default"),
            ("max_keys", 1, "None for no limit; 1024 is what 512 px have by default"),
            ("match_tile", 2, "None to compare all tokens with all; 16 is a good size"),
        ):
            self._set(name, _optional_int(name, getattr(self, name), low, meaning))
        if self.max_downsample != "auto" and (
            not _is_int(self.max_downsample) or self.max_downsample not in (1, 2, 4, 8)
        ):
            error = ValueError if _is_int(self.max_downsample) or isinstance(self.max_downsample, str) else TypeError
            raise error(
                f'max_downsample={self.max_downsample!r}: must be "auto", 1, 2, 4 or 8; "auto" patches the level of '
                "highest resolution that has self-attention"
            )
        self._check_cache()
        for name in ("use_rand", "merge_crossattn", "merge_mlp"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"{name}={getattr(self, name)!r}: must be True or False")
        if self.upcast is not None and not isinstance(self.upcast, bool):
            raise TypeError(
                f"upcast={self.upcast!r}: must be True, False or None (as the layer's upcast_attention says)"
            )
        if not _is_int(self.seed):
            raise TypeError(f"seed={self.seed!r}: must be an integer")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed={self.seed}: must lie in 0 … 2**63 − 1")
        for name in ("seed", "max_downsample"):  # NumPy's integers cannot be written as JSON
            if _is_int(value := getattr(self, name)):
                self._set(name, int(value))
        self._check_ratio_is_possible()

    def _set(self, name: str, value: object) -> None:
        object.__setattr__(self, name, value)  # the dataclass is frozen; this is its own clean-up of what it was given

    def _check_cache(self) -> None:
        for name, low, high, hint in (
            ("cache_interval", 1, 50, "1 caches nothing, 3 is two to five times as fast"),
            ("cache_order", 0, 1, '0 reuses the kept feature, 1 extrapolates it, "auto" goes by the scheduler'),
            ("cache_depth", 1, 10, '"auto" recomputes one pair of resnet and transformer'),
        ):
            value = getattr(self, name)
            if name != "cache_interval" and isinstance(value, str) and value == "auto":
                continue
            allowed = f"must be an integer in {low} … {high}" + ("" if name == "cache_interval" else ' or "auto"')
            if not _is_int(value):
                raise TypeError(f"{name}={value!r}: {allowed}; {hint}")
            if not low <= value <= high:
                raise ValueError(f"{name}={value}: {allowed}; {hint}")
            self._set(name, int(value))

    def _check_ratio_is_possible(self) -> None:
        used = [("merge_stride", Phase.MERGE)] if self.early < 1 and self.late == "merge" else []
        used += [("agent_stride", Phase.AGENT)] if self.early > 0 else []
        for name, phase in used:
            rows, columns = self.stride(phase)
            possible = 1 - 1 / (rows * columns)
            if self.ratio_in(phase) > possible:
                own = phase is Phase.AGENT and self.early_ratio is not None
                field = "early_ratio" if own else "ratio"
                raise ValueError(
                    f"{field}={self.ratio_in(phase)}: at most {possible:g} of the tokens can be merged with {name}="
                    f"{getattr(self, name)!r} (one token of each {rows}×{columns} cell stays); lower {field} or "
                    f"raise {name}"
                )

    def ratio_in(self, phase: Phase) -> float:
        """The fraction of the tokens merged away in a phase."""
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


PRESETS: dict[str, dict[str, object]] = {
    "paper": {},
    "fast": {"cache_interval": 3},
    "fastest": {"cache_interval": 5, **_CAPS},
    "large": {**_CAPS},
}
"""Settings by name for `apply_patch(pipe, preset=…)`: "paper" is the paper's method, "fast" adds step caching,
"fastest" caches more and bounds the cost of attention, "large" bounds it alone, for 1024 px and more. README has what
each measures."""


FIELD_NAMES = tuple(field.name for field in fields(AgentConfig))


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _number(name: str, value: object, low: float, high: float) -> float:
    allowed = f"must be a number in {low} … {high}"
    if not isinstance(value, Real) or isinstance(value, bool):
        raise TypeError(f"{name}={value!r}: {allowed}, not {type(value).__name__}")
    number = float(value)
    if not math.isfinite(number) or not low <= number <= high:
        raise ValueError(f"{name}={value!r}: {allowed}; {_HINTS[name]}")
    return number


def _optional_int(name: str, value: object, low: int, meaning: str) -> int | None:
    allowed = f"must be None or an integer of at least {low}; {meaning}"
    if value is None:
        return None
    if not _is_int(value):
        raise TypeError(f"{name}={value!r}: {allowed}")
    if value < low:
        raise ValueError(f"{name}={value}: {allowed}")
    return int(value)


_HINTS = {
    "ratio": "it is a fraction of the tokens, 0.4 merges 40 % of them",
    "early_ratio": "it is a fraction of the tokens; None takes ratio",
    "early": "it is a fraction of the diffusion run, 0.4 is the noisiest 40 %",
    "alpha": "the paper uses 0.075 without training",
    "broadcast_exponent": "-0.5 is the standard softmax scale, the paper uses -0.15",
    "agent_ratio": "it is a fraction of the tokens, 0.95 leaves one agent per cell of agent_stride 4",
}


def _stride(name: str, value: object) -> int | tuple[int, int]:
    parts = (value, value) if _is_int(value) else value
    if not isinstance(parts, (tuple, list)) or not all(_is_int(part) for part in parts):
        raise TypeError(f"{name}={value!r}: must be an integer or a pair (rows, columns)")
    if len(parts) != 2:
        raise ValueError(f"{name}={value!r}: must be an integer or a pair (rows, columns)")
    if min(parts) < 1 or math.prod(parts) < 2:
        raise ValueError(
            f"{name}={value!r}: a cell needs at least 1 row, 1 column and 2 tokens; the defaults are 4 for "
            "agent_stride and 2 for merge_stride"
        )
    return int(value) if _is_int(value) else (int(parts[0]), int(parts[1]))


def make_config(config: AgentConfig | None = None, preset: str | None = None, **settings: Any) -> AgentConfig:
    """Settings from a config or a preset, and single fields that win over it, as `apply_patch` takes them.

    Raises:
        TypeError: an unknown field, a value of the wrong type, a config that is not an AgentConfig, or both a config
            and a preset.
        ValueError: an unknown preset, or a value out of its range.
    """
    unknown = sorted(set(settings) - set(FIELD_NAMES))
    if unknown:
        raise TypeError(f"unknown setting {', '.join(unknown)}; the settings are {', '.join(FIELD_NAMES)}")
    if config is not None and not isinstance(config, AgentConfig):
        raise TypeError(f"config={config!r}: must be an AgentConfig; single settings go by name, as in ratio=0.4")
    if preset is None:
        return replace(config or AgentConfig(), **settings)
    if config is not None:
        raise TypeError("config and preset: give one of them; single settings go by name, as in ratio=0.4")
    if preset not in PRESETS:
        raise ValueError(f"preset={preset!r}: must be one of {', '.join(PRESETS)}")
    fields: dict[str, Any] = {**PRESETS[preset], **settings}
    return AgentConfig(**fields)
