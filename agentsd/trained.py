"""agentsd.json: the settings that a fine-tuned model was trained for, used where none are given; standard library only.

`apps/dreambooth.py` writes the file beside a model's folders, and `load_pipeline` reads it. `apply_patch`, the command
and the app then start from its settings in place of the defaults; a config, a preset or a single field wins over them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .config import FIELD_NAMES, AgentConfig, make_config

FILE_NAME = "agentsd.json"
FORMAT = 1
AGENTS = ("none", "sampling", "both")
"""Where the model uses agents: nowhere, when sampling only, in training and sampling."""

_ATTRIBUTE = "_agentsd_trained"
_KEYS = ("format", "agents", "config", "base_model", "lora", "instance_prompt", "versions")


@dataclass(frozen=True)
class Trained:
    """What an agentsd.json says.

    Attributes:
        file: where it is.
        agents: one of AGENTS.
        config: settings to sample the model with; None where it uses no agents.
        base_model: what was fine-tuned, as `load_pipeline` takes it.
        lora: name of the LoRA file beside it, which `base_model` needs; None where the folder has all weights.
        instance_prompt: the prompt of the subject.
        versions: of the packages that it was trained with.
    """

    file: Path
    agents: str
    config: AgentConfig | None = None
    base_model: str = ""
    lora: str | None = None
    instance_prompt: str = ""
    versions: dict[str, Any] = field(default_factory=dict)

    def sentence(self, given: Any = ()) -> str:
        """Say which settings it sets, beside the fields that are given; "" where those are the defaults anyway."""
        if self.config is None:
            return ""
        usual = AgentConfig()
        own = [name for name in FIELD_NAMES if getattr(self.config, name) != getattr(usual, name) and name not in given]
        if not own:
            return ""
        every = self.agents == "both" and self.config.early == 1
        how = f"was trained with agents{' in every step' if every else ''}"
        values = ", ".join(f"{name}={getattr(self.config, name)!r}" for name in own)
        return (
            f"{self.file}: this model {how if self.agents == 'both' else 'is to be sampled with agents'}; its settings "
            f"({values}) are used where none are given"
        )


def read_trained(folder: str | Path) -> Trained | None:
    """Read the agentsd.json of a model's folder; None where there is no such file.

    Raises:
        ValueError: the file is damaged, of another format, or has a field or a value that does not exist. The message
            names the file, the field, the value and what is allowed.
    """
    file = Path(folder) / FILE_NAME
    try:
        text = file.read_text(encoding="utf-8")
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: cannot be read ({error})") from error
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file}: is damaged, it is not JSON ({error}): {_REMEDY}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}: is damaged, it is no JSON object: {_REMEDY}")
    return _checked(file, found)


_REMEDY = "train again, or remove the file to use the default settings"


def _checked(file: Path, found: dict[str, Any]) -> Trained:
    def refuse(name: str, allowed: str) -> ValueError:
        return ValueError(f"{file}: {name}={found.get(name)!r}: must be {allowed}; {_REMEDY}")

    if found.get("format") != FORMAT:
        raise refuse("format", f"{FORMAT}, the format that this version of agentsd reads")
    if unknown := sorted(set(found) - set(_KEYS)):
        raise ValueError(f"{file}: unknown field {', '.join(unknown)}; the fields are {', '.join(_KEYS)}")
    agents, config, lora = found.get("agents"), found.get("config"), found.get("lora")
    if agents not in AGENTS:
        raise refuse("agents", f"one of {', '.join(AGENTS)}")
    if agents == "none" and config is not None:
        raise refuse("config", "null where agents is none")
    if agents != "none" and not isinstance(config, dict):
        raise refuse("config", "an object of fields of AgentConfig")
    # A name alone: the file lies beside this one, and no other of the machine is to be opened.
    if lora is not None and not (isinstance(lora, str) and lora.endswith(".safetensors") and Path(lora).name == lora):
        raise refuse("lora", "null or the name of a .safetensors file beside this one")
    for name, kind, allowed in (
        ("base_model", str, "a text"), ("instance_prompt", str, "a text"), ("versions", dict, "an object"),
    ):  # fmt: skip
        if not isinstance(found.get(name, kind()), kind):
            raise refuse(name, allowed)
    if lora is not None and not found.get("base_model"):
        raise refuse("base_model", "the model that the LoRA belongs to")
    try:
        made = None if config is None else make_config(**config)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: {error}") from error
    return Trained(
        file,
        agents,
        made,
        found.get("base_model", ""),
        lora,
        found.get("instance_prompt", ""),
        found.get("versions", {}),
    )


class _Attached:
    """A Trained on a UNet, and whether its settings have been announced."""

    def __init__(self, trained: Trained):
        self.trained = trained
        self.announced = False


def attach_trained(unet: Any, trained: Trained) -> None:
    """Note on a UNet what it was trained for. `save_pretrained` does not write it."""
    setattr(unet, _ATTRIBUTE, _Attached(trained))


def trained_of(unet: Any) -> Trained | None:
    """What `attach_trained` noted on a UNet, or None."""
    attached = getattr(unet, _ATTRIBUTE, None)
    return None if attached is None else attached.trained


def announcement(unet: Any, given: Any = ()) -> str:
    """The sentence about a UNet's trained settings the first time it is asked for, then ""."""
    attached = getattr(unet, _ATTRIBUTE, None)
    if attached is None or attached.announced:
        return ""
    said = attached.trained.sentence(given)
    attached.announced = bool(said)
    return said


def start_from(
    trained: Trained | None, config: AgentConfig | None = None, preset: str | None = None, **settings: Any
) -> AgentConfig:
    """As `make_config`, but the trained settings stand in for the defaults where neither config nor preset is given."""
    if config is None and preset is None and trained is not None:
        config = trained.config
    return make_config(config, preset, **settings)
