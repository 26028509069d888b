"""complete_class_images: generate the images of the class that --class-data-dir lacks, with the untrained model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers import DiffusionPipeline
from tqdm import tqdm

from agentsd.files import write_atomically

from .data import find_images
from .draws import number
from .sampling import generate, ready_to_sample
from .settings import DreamBoothSettings, UsageError


def check_class_folder(settings: DreamBoothSettings) -> list[Path]:
    """The images that are there already, at most num_class_images of them; the folder need not exist yet.

    Raises:
        UsageError: it is a file or cannot be listed.
    """
    folder: Any = settings.class_data_dir
    if not folder.exists():
        return []
    return find_images(folder, "class_data_dir")[0][: settings.num_class_images]


def complete_class_images(
    pipe: DiffusionPipeline, settings: DreamBoothSettings, accelerator: Accelerator
) -> list[Path]:
    """Generate what is missing, divided among the processes; returns num_class_images files.

    Image number i depends on the seed and i alone. Each is written atomically, so that a killed run goes on where it
    was and ends with the same images.

    Raises:
        UsageError: the folder cannot be made or written to.
    """
    folder: Any = settings.class_data_dir
    try:
        folder.mkdir(parents=True, exist_ok=True)
        missing = _missing(folder, settings.num_class_images)
        accelerator.wait_for_everyone()  # all have counted before any adds one
        mine = missing[accelerator.process_index :: accelerator.num_processes]
        if mine:
            _generate(pipe, settings, accelerator, mine)
    except OSError as error:
        raise UsageError(
            f"--class-data-dir {folder}: cannot be written to ({error.strerror}); give a folder with room that you may "
            "write to"
        ) from None
    accelerator.wait_for_everyone()
    return check_class_folder(settings)


def _generate(pipe: Any, settings: DreamBoothSettings, accelerator: Accelerator, files: list[tuple[int, Path]]) -> None:
    seeds = [number(settings.seed, "class image", i) for i, _ in files]
    bar = tqdm(total=len(files), desc="class images", unit="image", disable=not accelerator.is_main_process)
    with ready_to_sample(pipe, accelerator.device), accelerator.autocast(), bar:
        images = generate(
            pipe, settings.class_prompt, seeds, resolution=settings.resolution,
            steps=settings.class_inference_steps, guidance=settings.guidance_scale,
        )  # fmt: skip
        for (_, path), image in zip(files, images):
            write_atomically(path, lambda file, image=image: image.save(file, format="PNG"))
            bar.update()


def _missing(folder: Path, wanted: int) -> list[tuple[int, Path]]:
    """Number and path of each image to generate."""
    found = find_images(folder, "class_data_dir")[0]
    count = wanted - len(found)
    free = ((i, folder / f"class-{i:05d}.png") for i in range(wanted + len(found)))
    return [(i, path) for i, path in free if path not in found][: max(0, count)]
