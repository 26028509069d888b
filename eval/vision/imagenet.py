"""Stage imagenet: top-1 and top-5 accuracy by the authors' protocol, in chunks that are kept as they are finished."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import PartialState
from torch import nn
from torch.utils.data import DataLoader
from torchvision.datasets import ImageFolder

from agentsd.files import write_atomically
from agentsd.vision import VARIANTS, load_official_checkpoint
from eval.common.protocol import BenchError


def check(options: Any) -> None:
    """Raise BenchError where the arguments do not suffice."""
    if not options.imagenet:
        if options.checkpoint or options.model:
            raise BenchError("--checkpoint and --model: give --imagenet DIR with them, the images to classify")
        return
    if not options.checkpoint or not options.model:
        raise BenchError("--imagenet: give --checkpoint FILE and --model NAME with it")
    if options.model not in VARIANTS:
        raise BenchError(f"--model {options.model}: must be one of {', '.join(VARIANTS)}")


def evaluate_checkpoint(options: Any, out: Path, dtype: torch.dtype) -> dict[str, Any] | None:
    """Evaluate the checkpoint that the arguments name, with the share of this process among all of `accelerate launch`.

    Returns:
        The scores, in the main process only; None in the others.

    Raises:
        BenchError: the folder or the checkpoint is another than said.
    """
    state = PartialState(cpu=options.device == "cpu")
    model: Any = timm.create_model(options.model)
    try:
        loaded = load_official_checkpoint(model, options.checkpoint)
    except (ValueError, OSError) as error:
        raise BenchError(f"--checkpoint {options.checkpoint}: {error}") from error
    if loaded.left:
        raise BenchError(f"--checkpoint {options.checkpoint}: has another number of classes than {model.num_classes}")
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    data = open_folder(Path(options.imagenet), model.num_classes, transform)
    settings = {
        "model": options.model,
        "checkpoint_sha256": _digest(Path(options.checkpoint)),
        "images": len(data),
        "images_sha256": hashlib.sha256("\n".join(Path(p).name for p, _ in data.samples).encode()).hexdigest(),
        "dtype": str(dtype).removeprefix("torch."),
        "chunk": options.imagenet_batch,
    }
    model = model.to(state.device, dtype).eval()
    return evaluate(model, data, settings, out, state, options.workers)


def open_folder(folder: Path, num_classes: int, transform: Any) -> ImageFolder:
    """The images of a folder with one folder per class, sorted by name as ImageNet's classes are.

    Raises:
        BenchError: there are no images, or not as many classes.
    """
    folder = folder / "val" if (folder / "val").is_dir() else folder
    try:
        data = ImageFolder(folder, transform)
    except (OSError, ValueError) as error:
        raise BenchError(f"--imagenet {folder}: must hold one folder of images for each class ({error})") from error
    if len(data.classes) != num_classes:
        raise BenchError(
            f"--imagenet {folder}: has {len(data.classes)} folders and the model {num_classes} classes; give the "
            "validation images sorted into one folder per class, named by its WordNet number"
        )
    return data


def evaluate(
    model: nn.Module, data: ImageFolder, settings: dict[str, Any], out: Path, state: PartialState, workers: int = 0
) -> dict[str, Any] | None:
    """Count the images whose class is the model's first choice, and among its first five.

    Each chunk of images goes to one process and leaves one line in that process's file, so that a stopped run goes on
    with what is left, by any number of processes.

    Args:
        settings: what must be the same for finished chunks to count; "chunk" is the number of images in one.
        out: folder for the lines.
        state: of accelerate; says which share is this process's.

    Returns:
        {"images", "top1", "top5"} in per cent, in the main process; None in the others.
    """
    folder = out / "imagenet"
    if state.is_main_process:
        _claim(folder, settings)
    state.wait_for_everyone()
    if json.loads((folder / "settings.json").read_text()) != settings:
        raise BenchError(f"{folder} holds results of other settings; give another --out, or remove it")
    chunk = settings["chunk"]
    starts = [start for start in range(0, len(data), chunk) if start not in _finished(folder)]
    mine = starts[state.process_index :: state.num_processes]
    with open(folder / f"done-{state.process_index}.jsonl", "a", encoding="utf-8") as lines:
        for start, pixels, labels in _chunks(data, mine, chunk, workers):
            line = {"start": start, "images": len(labels), **_hits(model, pixels, labels, state.device)}
            lines.write("\n" + json.dumps(line))  # first the newline: the line before may have been cut off
            lines.flush()
            print(f"{start + len(labels)} of {len(data)} images …", file=sys.stderr)
    state.wait_for_everyone()
    if not state.is_main_process:
        return None
    done = _finished(folder).values()
    images = sum(line["images"] for line in done)
    scores = {key: 100 * sum(line[key] for line in done) / images for key in ("top1", "top5")}
    return {**settings, **scores, "images": images}


def _claim(folder: Path, settings: dict[str, Any]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "settings.json").exists():
        write_atomically(folder / "settings.json", json.dumps(settings, indent=1))


def _finished(folder: Path) -> dict[int, dict[str, int]]:
    """The finished chunks by their first image; a line that was cut off when the run stopped is left out."""
    found = {}
    for path in sorted(folder.glob("done-*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                entry = json.loads(line)
            except ValueError:
                continue
            found[entry["start"]] = entry
    return found


def _chunks(
    data: ImageFolder, starts: Sequence[int], chunk: int, workers: int
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """(first image, images, labels) of each chunk."""
    groups = [list(range(start, min(start + chunk, len(data)))) for start in starts]
    loader: DataLoader[Any] = DataLoader(data, batch_sampler=groups, num_workers=workers)
    for start, (images, labels) in zip(starts, loader):
        yield start, images, labels


@torch.inference_mode()
def _hits(model: nn.Module, images: torch.Tensor, labels: torch.Tensor, device: torch.device) -> dict[str, int]:
    like = next(model.parameters(), images)
    logits = model(images.to(device, like.dtype)).float().cpu()
    ranked = logits.topk(min(5, logits.shape[1])).indices
    right = ranked == labels[:, None]
    return {"top1": int(right[:, 0].sum()), "top5": int(right.any(dim=1).sum())}


def _digest(path: Path) -> str:
    total = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            total.update(block)
    return total.hexdigest()
