"""agentsd.json: the settings that a fine-tuned model was trained for, used where none are given; standard library only.

`apps/dreambooth.py` writes the file beside a model's folders, and `load_pipeline` reads it. `apply_patch`, the command
and the app then start from its settings in place of the defaults; a config, a preset or a single field wins over them.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .config import FIELD_NAMES, AgentConfig, make_config

FILE_NAME = "agentsd.json"
FORMAT = 1
AGENTS = ("none", "sampling", "both")
"""Where the model uses agents: nowhere, when sampling only, in training and sampling."""

_ATTRIBUTE = "_agentsd_trained"
_PATCH = "_agentsd_patch"
"""Where a UNet has its patch; agentsd.unet names it, which this module may not import."""

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
        values = self.values(given)
        if not values or self.config is None:
            return ""
        every = self.agents == "both" and self.config.early == 1
        how = f"was trained with agents{' in every step' if every else ''}"
        return (
            f"{self.file}: this model {how if self.agents == 'both' else 'is to be sampled with agents'}; its settings "
            f"({values}) are used where none are given"
        )

    def values(self, given: Any = ()) -> str:
        """The settings that differ from the defaults, without the fields that are given: "ratio=0.3, early=1.0"."""
        if self.config is None:
            return ""
        usual, own = AgentConfig(), self.config
        names = [name for name in FIELD_NAMES if getattr(own, name) != getattr(usual, name) and name not in given]
        return ", ".join(f"{name}={getattr(own, name)!r}" for name in names)


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
    # make_config has arguments of these names, which are no fields.
    if isinstance(config, dict) and (wrong := sorted({"config", "preset"} & set(config))):
        raise ValueError(
            f"{file}: config: unknown setting {', '.join(wrong)}; a preset has a name in apply_patch alone, here its "
            f"fields are written out: the settings are {', '.join(FIELD_NAMES)}"
        )
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
    """A Trained on a UNet, the LoRA that it belongs to, and what has been said of both.

    Attributes:
        lora: the adapters that came with the folder, as peft keeps them on the UNet; empty where all weights did.
        chosen, given: the last settings that started from the trained ones, and the fields that were given beside;
            the patch may have them long after.
        said: what was said of the state that the LoRA is in.
    """

    def __init__(self, trained: Trained, lora: dict[str, Any]):
        self.trained = trained
        self.lora = lora
        self.announced = False
        self.chosen: AgentConfig | None = None
        self.given: tuple[str, ...] = ()
        self.said: set[tuple[str, ...]] = set()

    def is_at_work(self, unet: Any) -> bool:
        """Whether the UNet computes with the LoRA that the settings belong to; always where there is none."""
        at_work = _adapters_at_work(unet)
        return all(at_work.get(name) is config for name, config in self.lora.items())

    def others(self, unet: Any) -> tuple[str, ...]:
        """Names of other LoRAs that the UNet computes with."""
        at_work = _adapters_at_work(unet)
        return tuple(sorted(name for name, config in at_work.items() if self.lora.get(name) is not config))

    def say_once(self, where: str, unet: Any, given: Any = ()) -> str:
        """What is to be said of the LoRAs on a UNet, at "apply_patch" or in a "call"; "" where it was or is nothing."""
        values, gone, others = self.trained.values(given), not self.is_at_work(unet), self.others(unet)
        if not (gone or others):
            self.said.clear()
        if not values or not (gone or others) or (key := (where, str(gone), *others)) in self.said:
            return ""
        self.said.add(key)
        if not gone:
            return (
                f"{self.trained.file}: its settings ({values}) are used, and this UNet has another LoRA too "
                f"({', '.join(others)}), which need not be trained for them: give the settings that you want"
            )
        why = f"{self.trained.file}: this UNet no longer has the LoRA that was trained for {values}"
        if where == "call":
            return f"{why}, and the patch still has these settings: call agentsd.apply_patch again"
        return f"{why}; they are not used. If the LoRA was fused into the weights, give them yourself"


def attach_trained(unet: Any, trained: Trained) -> None:
    """Note on a UNet what it was trained for, and the LoRA on it that was. `save_pretrained` does not write it."""
    setattr(unet, _ATTRIBUTE, _Attached(trained, dict(getattr(unet, "peft_config", {})) if trained.lora else {}))
    if trained.values():
        unet.register_forward_pre_hook(_tell_in_call)


def _tell_in_call(unet: Any, args: tuple) -> None:
    """UNet pre-hook: warn where the patch has trained settings and their LoRA was exchanged since apply_patch."""
    import torch

    if torch.compiler.is_compiling():  # a graph cannot warn
        return
    attached, patch = getattr(unet, _ATTRIBUTE, None), getattr(unet, _PATCH, None)
    if attached is None or patch is None or patch.config is not attached.chosen:
        return
    if said := attached.say_once("call", unet, attached.given):
        warnings.warn(f"agentsd: {said}", stacklevel=2)


def _adapters_at_work(unet: Any) -> dict[str, Any]:
    """The LoRAs that change what a UNet computes, their configs by name: loaded, on, and of a weight other than 0."""
    configs = getattr(unet, "peft_config", None) or {}
    at_work, unseen = {}, set(configs)
    for module in unet.modules() if configs else ():
        if not hasattr(module, "merged_adapters"):  # peft's layers alone have it
            continue
        for name in unseen & set(module.scaling):
            unseen.discard(name)
            on = not module.disable_adapters and name in module.active_adapters and module.scaling[name] != 0
            if on or name in module.merged_adapters:
                at_work[name] = configs[name]
        if not unseen:
            break
    return at_work


def trained_of(unet: Any) -> Trained | None:
    """What `attach_trained` noted on a UNet, or None."""
    attached = getattr(unet, _ATTRIBUTE, None)
    return None if attached is None else attached.trained


def choose_settings(
    unet: Any, config: AgentConfig | None = None, preset: str | None = None, **settings: Any
) -> tuple[AgentConfig, str]:
    """The settings for a UNet by `start_from`, and a sentence about them that has not been said yet, or "".

    Trained settings whose LoRA is no longer at work on the UNet are left out.
    """
    attached = getattr(unet, _ATTRIBUTE, None)
    if attached is None or config is not None or preset is not None:
        return start_from(None, config, preset, **settings), ""
    said = attached.say_once("apply_patch", unet, settings)
    if not attached.is_at_work(unet):
        return start_from(None, **settings), said
    chosen = start_from(attached.trained, **settings)
    attached.chosen, attached.given = chosen, tuple(settings)
    if not attached.announced and (news := attached.trained.sentence(settings)):
        attached.announced = True
        return chosen, f"{news}. {said}" if said else news
    return chosen, said


def start_from(
    trained: Trained | None, config: AgentConfig | None = None, preset: str | None = None, **settings: Any
) -> AgentConfig:
    """As `make_config`, but the trained settings stand in for the defaults where neither config nor preset is given."""
    if config is None and preset is None and trained is not None:
        config = trained.config
    return make_config(config, preset, **settings)
