"""What a benchmark generates: prompts, one seed per image, and the scenarios to compare; touches no model."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from agentsd import AgentConfig
from agentsd.config import PRESETS

from .errors import BenchError as BenchError
from .methods import METHODS as METHODS

PROMPT = "A high quality photograph of a {}."
"""ToMe's wording (https://github.com/dbolya/tomesd/issues/46), which the Agent Attention paper took over."""

CONTROLS = tuple(name for name, method in METHODS.items() if method.control)
METHODS_WITH_CONFIG = tuple(name for name, method in METHODS.items() if method.takes == "config")
WITH_INTERVAL = tuple(name for name, method in METHODS.items() if method.takes == "interval")
UNSCORED = tuple(name for name, method in METHODS.items() if not method.scored)
"""Methods of this repository that are timed only: the images of sd-naive are those of sd, the limit's are of no use."""

DEMO_REFERENCE = Path(__file__).parents[1] / "demo_reference.npz"
"""Names and features of the demo model's training images; eval/gate_reference.py made it."""

# torchvision calls the garment and the dog breed cardigan and Cardigan, which CLIP's tokenizer cannot tell apart.
_RENAMED = {264: "Cardigan Welsh corgi", 517: "construction crane"}

# Tables 11-13 of the Agent Attention paper. Two broadcast exponents, -0.25 and -0.05, stand in for ones that are not
# legible in our copy.
ABLATIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "alpha": tuple({"alpha": value} for value in (0.0, 0.025, 0.075, 0.15)),
    "scale": tuple({"broadcast_exponent": value} for value in (-0.5, -0.25, -0.15, -0.05)),
    "early": tuple({"early": value} for value in (0.2, 0.4, 0.6, 0.8)),
    "alpha-early": tuple({"alpha": a, "early": e} for a in (0.0, 0.075, 0.15) for e in (0.2, 0.4, 0.8)),
    # Not the paper's: less merging in the agent phase, and trade-offs for larger images.
    "early-ratio": tuple({"early_ratio": value} for value in (None, 0.2, 0.0)),
    "late": (
        {"late": "merge"},
        {"late": "downsample"},
        {"late": "downsample", "merge_stride": 4},
        {"late": "full"},
    ),
    "agents": tuple({"max_agents": value} for value in (None, 256, 64, 16)),
    "tile": tuple({"match_tile": value} for value in (None, 16, 8)),
    "cache": (
        {},
        *({"cache_interval": value} for value in (2, 3, 5)),
        {"cache_interval": 3, "cache_order": 0},
        {"cache_interval": 3, "ratio": 0.0, "early": 0.0},
    ),
    "cache-alone": (
        {},
        {"cache_interval": 3, "ratio": 0.0, "early": 0.0},
    ),
    "presets": tuple(PRESETS.values()),
}
"""Name on the command line: the fields of AgentConfig that each of its scenarios sets."""


_LABELS = {
    "early_ratio": "er{:g}",
    "alpha": "alpha{:g}",
    "broadcast_exponent": "scale{:g}",
    "agents": "{}",
    "late": "{}",
    "merge_stride": "stride{}",
    "max_agents": "agents{}",
    "max_keys": "keys{}",
    "match_tile": "tile{}",
    "cache_interval": "cache{}",
    "cache_order": "order{}",
    "cache_depth": "depth{}",
}
"""How a setting of agentsd appears in a scenario's name where it is not the default."""


@dataclass(frozen=True)
class Scenario:
    """One way to generate all the images: a row of the table.

    Attributes:
        method: a key of METHODS.
        config: settings of the patch; None for the methods that have none.
        interval: of deepcache: the deep blocks are computed in one UNet call out of so many; of fewer-steps: so many
            times fewer steps; 1 for all other methods.
        own: (name, value) of the settings of a method that has its own (`Method.settings`).
    """

    method: str
    config: AgentConfig | None = None
    interval: int = 1
    own: tuple[tuple[str, Any], ...] = ()

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise BenchError(f"method {self.method!r} is unknown: use {', '.join(METHODS)}")
        if (self.config is not None) != (self.method in METHODS_WITH_CONFIG):
            raise ValueError(f"method {self.method!r} takes {'no' if self.config else 'a'} config")
        if self.method not in WITH_INTERVAL and self.interval != 1:
            raise ValueError(f"method {self.method!r} takes no interval")
        if self.own and self.options not in METHODS[self.method].settings:
            raise ValueError(f"method {self.method!r} has no settings {self.options}")

    @property
    def options(self) -> dict[str, Any]:
        """The settings of a method that has its own, by name."""
        return dict(self.own)

    @property
    def settings(self) -> AgentConfig:
        """The config of a method that has one. Raises ValueError for the others."""
        if self.config is None:
            raise ValueError(f"method {self.method!r} has no config")
        return self.config

    @property
    def name(self) -> str:
        """Short and unique among scenarios: method, ratio, what differs from the defaults. Serves as folder name."""
        parts = [self.method]
        if self.config is not None:
            parts.append(f"r{self.config.ratio:g}")
            if self.method != "tomesd" and self.config.early != AgentConfig.early:
                parts.append(f"early{self.config.early:g}")
            if self.method == "agentsd":
                for name, label in _LABELS.items():
                    value = getattr(self.config, name)
                    if value != getattr(AgentConfig, name):
                        parts.append(label.format(value))
        if self.method in WITH_INTERVAL:
            parts.append(str(self.interval))
        for key, value in self.own:
            text = f"{value:g}" if isinstance(value, float) else str(value)
            parts.append(re.sub(r"[^\w.-]", "_", f"{key}{text}"))
        return "-".join(parts)

    @property
    def cache_interval(self) -> int:
        """At most one UNet call in so many is computed as a whole; 1 where nothing is cached."""
        if self.config is not None:
            return self.config.cache_interval
        return self.interval if self.method == "deepcache" else self.options.get("cache_interval", 1)


SD = Scenario("sd")
"""The baseline that images are paired with and times are compared with."""


@dataclass(frozen=True)
class Sample:
    """One image to generate: index and name of its class, its number among the images of that class, its seed."""

    index: int
    name: str
    copy: int
    seed: int

    @property
    def prompt(self) -> str:
        return PROMPT.format(self.name)

    @property
    def file(self) -> str:
        """Name of its PNG: class, then copy."""
        return f"{self.index:04d}-{self.name.replace(' ', '_').replace('/', '_')}-{self.copy}.png"


@dataclass(frozen=True)
class Plan:
    """Everything that decides what the images look like, beside model and scenario. Checked when made.

    Attributes:
        classes: (index, name) of the classes to generate.
        copies: images per class.
        steps, guidance, scheduler: of the sampling.
        size: height and width in pixels; None takes the model's own.
        batch_size: images per pipeline call.
        threads: of a process that generates on a CPU. Batch size and threads change the last bits of a float, so that a
            token may be merged elsewhere: images of the same seed then differ by up to 29 of 255 on the demo model.
        seed: another one gives other images throughout.
    """

    classes: tuple[tuple[int, str], ...]
    copies: int = 2
    steps: int = 50
    guidance: float = 7.5
    scheduler: str = "plms"
    size: int | None = None
    batch_size: int = 1
    threads: int = 1
    seed: int = 0
    samples: tuple[Sample, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not self.classes:
            raise BenchError("there is no class to generate: --classes must be at least 1")
        for name, value, low, high in (
            ("images-per-class", self.copies, 1, 1000),
            ("steps", self.steps, 1, 999),
            ("batch-size", self.batch_size, 1, 1024),
            ("threads", self.threads, 1, 1024),
            ("seed", self.seed, 0, 2**63 - 1),
            ("size", self.size or 512, 64, 8192),
        ):
            if not low <= value <= high:
                raise BenchError(f"--{name} {value}: must lie in {low} … {high}")
        if not 0 <= self.guidance <= 100:
            raise BenchError(f"--guidance {self.guidance}: must lie in 0 … 100")
        if self.size is not None and self.size % 8:
            raise BenchError(f"--size {self.size}: must be a multiple of 8 (one latent pixel is 8 × 8 pixels)")
        samples = tuple(
            Sample(index, name, copy, image_seed(self.seed, index, copy))
            for copy in range(self.copies)
            for index, name in self.classes
        )
        object.__setattr__(self, "samples", samples)

    @property
    def batches(self) -> list[tuple[Sample, ...]]:
        """The images in groups of batch_size; an image's group does not depend on which process generates it."""
        return [self.samples[i : i + self.batch_size] for i in range(0, len(self.samples), self.batch_size)]


def image_seed(seed: int, index: int, copy: int) -> int:
    """The seed of one image, from the run's seed, its class and its copy alone: 0 … 2**32 − 1."""
    return int.from_bytes(hashlib.blake2b(f"{seed}/{index}/{copy}".encode(), digest_size=4).digest(), "big")


def imagenet_classes() -> list[str]:
    """The 1,000 classes of ImageNet-1k in their usual order, all different also in lower case.

    torchvision's names, whose cranes are made "crane bird" and "construction crane". ToMe's own list may word others
    differently; it was published as a file of its author's, not with the code.
    """
    from torchvision.models import get_weight

    names = list(get_weight("ResNet18_Weights.DEFAULT").meta["categories"])
    for index, name in _RENAMED.items():
        names[index] = name
    return names


def demo_classes() -> list[str]:
    """The names that the demo model was trained on, all of them ImageNet classes, in the reference's order."""
    with np.load(DEMO_REFERENCE) as file:
        return list(dict.fromkeys(str(name) for name in file["names"]))  # a name may have several images


def choose_classes(names: Sequence[str], count: int) -> tuple[tuple[int, str], ...]:
    """`count` classes spread evenly over the list, as (index, name). Raises BenchError where there are not so many."""
    if not 1 <= count <= len(names):
        raise BenchError(f"--classes {count}: must lie in 1 … {len(names)}, the classes of this model's protocol")
    return tuple((i, names[i]) for i in (k * len(names) // count for k in range(count)))


def parse_numbers(flag: str, text: str, low: Any, high: Any, multiple: int = 1) -> tuple[Any, ...]:
    """ "1,2" -> (1, 2), each once; floats if the bounds are. Raises BenchError for anything else or out of bounds."""
    kind = type(low)
    try:
        values = tuple(dict.fromkeys(kind(part) for part in text.split(",")))
        if all(low <= value <= high and (kind is float or value % multiple == 0) for value in values):
            return values
    except ValueError:
        pass
    what = "numbers" if kind is float else "integers" if multiple == 1 else f"multiples of {multiple}"
    raise BenchError(f"--{flag} {text!r}: must be {what} in {low:g} … {high:g} with commas between")


def parse_methods(text: str) -> tuple[str, ...]:
    """ "sd,agentsd" -> ("sd", "agentsd"), each once. Raises BenchError for an unknown name."""
    methods = tuple(dict.fromkeys(part.strip() for part in text.split(",")))
    for method in methods:
        if method not in METHODS:
            raise BenchError(f"--methods {text!r}: {method!r} is unknown, use {', '.join(METHODS)}")
    return methods


def make_scenarios(
    methods: Iterable[str],
    ratios: Sequence[float],
    early: float = AgentConfig.early,
    ablate: Sequence[str] = (),
    intervals: Sequence[int] = (),
) -> list[Scenario]:
    """The grid methods × ratios, with caching at each interval, then the ablations of agentsd at the last ratio.

    Args:
        methods: from METHODS. sd is always first: everything is compared with it.
        ratios: of the methods that merge. The controls are generated at the last one only.
        early: of agentsd and the controls.
        ablate: keys of ABLATIONS.
        intervals: of deepcache and fewer-steps (3 if none is given), and of agentsd at the last ratio.

    Returns:
        Different scenarios, sd first.
    """
    scenarios = [SD]
    for method in methods:
        if method in WITH_INTERVAL:
            scenarios += [Scenario(method, interval=interval) for interval in intervals or (3,)]
        elif method not in METHODS_WITH_CONFIG:
            scenarios += [Scenario(method, own=tuple(own.items())) for own in METHODS[method].settings]
        else:
            for ratio in ratios if method in ("tomesd", "agentsd") else ratios[-1:]:
                # ToMeSD has no early phase; one value for it keeps its scenarios equal whatever --early says.
                scenarios.append(Scenario(method, _config(ratio, 0.0 if method == "tomesd" else early)))
            if method == "agentsd":
                base = scenarios[-1].settings
                scenarios += [Scenario(method, replace(base, cache_interval=interval)) for interval in intervals]
    for name in ablate:
        if name not in ABLATIONS:
            raise BenchError(f"--ablate {name!r}: is unknown, use {', '.join(ABLATIONS)}")
        base = _config(ratios[-1], early)
        scenarios += [Scenario("agentsd", replace(base, **settings)) for settings in ABLATIONS[name]]
    scenarios = list(dict.fromkeys(scenarios))
    names = [scenario.name for scenario in scenarios]
    if twice := {name for name in names if names.count(name) > 1}:
        raise BenchError(f"two scenarios are called {twice.pop()}: rename the method or its settings")
    return scenarios


def rivals_of(scenarios: Iterable[Scenario]) -> dict[tuple[str, str], str]:
    """(agentsd's scenario, rival method) to the rival's scenario, by name, for those to be compared with each other.

    tomesd of the same ratio is the rival of agentsd without caching, deepcache of the same interval that with it.
    """
    scenarios = tuple(scenarios)
    found = {}
    for ours in scenarios:
        for other in scenarios:
            if (
                ours.method == "agentsd"
                and ours.cache_interval == other.cache_interval
                and (
                    other.method == "deepcache"
                    or (other.method == "tomesd" and ours.settings.ratio == other.settings.ratio)
                )
            ):
                found[ours.name, other.method] = other.name
    return found


def _config(ratio: float, early: float) -> AgentConfig:
    try:
        return AgentConfig(ratio=ratio, early=early)
    except (ValueError, TypeError) as error:
        raise BenchError(str(error)) from error
