"""One invocation: its settings and random numbers, and the folders that it may write to, resume or must refuse."""

from __future__ import annotations

import contextlib
import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from PIL import Image

from agentsd.files import write_atomically

from .presets import Preset


class UsageError(ValueError):
    """Something the user can put right; its text is the one sentence that the command line prints."""


@dataclass(frozen=True)
class Run:
    """What one invocation works with: the preset, the seed, and where; not what has been done so far."""

    out: Path
    preset_name: str
    preset: Preset
    seed: int
    precision: str
    device: torch.device
    compile: bool
    icons: tuple[Path, ...]
    grow_from: Path | None
    count: int
    checkpoint_seconds: float

    def generator(self, *key: object) -> torch.Generator:
        """A CPU generator that depends on the seed and `key` alone: a resumed run gets the same numbers."""
        digest = hashlib.blake2b(repr((self.seed, *key)).encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)

    def autocast(self) -> contextlib.AbstractContextManager:
        """bfloat16 autocast, or nothing with precision fp32."""
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=torch.bfloat16)


def write_json(path: Path, value: object) -> None:
    """Write `value` as JSON, atomically."""
    write_atomically(path, json.dumps(value, indent=1) + "\n")


def write_png(path: Path, image: Image.Image) -> None:
    """Write an image as PNG, atomically."""
    write_atomically(path, lambda file: image.save(file, format="PNG"))


def file_digest(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    return hashlib.sha256(path.read_bytes()).hexdigest()


def claim_folder(folder: Path, settings: dict) -> None:
    """Make `folder` for work with `settings`, or checks that the work in it was done with the same.

    Raises:
        UsageError: the folder was made with other settings.
    """
    path = folder / "settings.json"
    if path.exists():
        check_folder(folder, settings)
    else:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)


def check_folder(folder: Path, settings: dict, besides: tuple[str, ...] = ()) -> None:
    """Check that the work in `folder`, which `claim_folder` has claimed, was done with `settings`.

    Args:
        besides: keys that may differ.

    Raises:
        UsageError: it was done with others.
    """
    settings = json.loads(json.dumps(settings))  # tuples become lists, as they have when read back
    found = json.loads((folder / "settings.json").read_text())
    for key in [*settings, *(key for key in found if key not in settings)]:
        if key not in besides and found.get(key) != settings.get(key):
            raise UsageError(
                f"{folder} was made with another {key} ({brief(found.get(key))}, not {brief(settings.get(key))}): "
                "give the settings it was made with, or another --out"
            )


def brief(value: object) -> str:
    """`value` as text short enough for an error message."""
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def training_settings(run: Run, stage: str) -> dict:
    """What must stay the same for `stage` to be continued; the device may change."""
    at_leisure = (
        "grid_steps", "checkpoint_seconds", "sample_steps", "guidance", "precision", "icon_size", "grid_samples",
        "grows",
    )  # fmt: skip
    other = {"autoencoder": ("unet_", "text_", "ema_", "phases"), "unet": ("autoencoder_", "latent_noise")}[stage]
    settings = {key: value for key, value in asdict(run.preset).items() if key not in at_leisure}
    if run.grow_from:
        files = sorted(path for path in run.grow_from.rglob("*") if path.suffix in (".safetensors", ".json", ".txt"))
        settings["grown_from"] = [file_digest(path) for path in files]
    return {
        "preset": run.preset_name,
        "seed": run.seed,
        "precision": run.precision,
        **{key: value for key, value in settings.items() if not key.startswith(other)},
    }


def origin_of_unet(run: Run) -> dict[str, str]:
    """Digests of what the stage unet works from, by their names in its settings.

    Raises:
        UsageError: the stage autoencoder or data has not been finished.
    """
    weights = require(run, run.out / "autoencoder" / "weights.safetensors", "autoencoder")
    index = require(run, run.out / "data" / "index.json", "data")
    return {"data": file_digest(index), "autoencoder": file_digest(weights)}


def announce(stage: str, text: str) -> None:
    """Say how a stage ended."""
    print(f"{stage}: {text}", flush=True)


def require(run: Run, path: Path, stage: str) -> Path:
    """`path`, which an earlier stage writes last.

    Raises:
        UsageError: that stage has not been finished.
    """
    if not path.exists():
        raise UsageError(
            f"{path} is not there: run the stage {stage} with --preset {run.preset_name} --out {run.out} first"
        )
    return path


def writable_folder(path: Path) -> Path:
    """`path`, made if need be.

    Raises:
        UsageError: it cannot be made or written to.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise UsageError(f"--out {path} cannot be written to ({error.strerror})") from None
    return path
