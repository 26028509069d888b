"""complete_class_images: generate the images of the class that --class-data-dir lacks, with the untrained model."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers import DiffusionPipeline
from tqdm import tqdm

from agentsd.files import write_atomically

from .data import Found, find_images
from .draws import number
from .sampling import generate, ready_to_sample
from .settings import DreamBoothSettings, UsageError


def check_class_folder(settings: DreamBoothSettings) -> Found:
    """What is in the folder already; of more than num_class_images the first ones by name. It need not exist yet.

    Raises:
        UsageError: it is a file or cannot be listed, or an image in it is a link to nothing.
    """
    folder: Any = settings.class_data_dir
    if not folder.exists() and not folder.is_symlink():
        return Found([], {})
    found = find_images(folder, "class_data_dir", (settings.instance_data_dir, settings.output_dir))
    count = settings.num_class_images
    if rest := found.images[count:]:
        found.left_out[f"more than --num-class-images {count}"] = [path.name for path in rest]
    return Found(found.images[:count], found.left_out)


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
    return check_class_folder(settings).images


def _generate(pipe: Any, settings: DreamBoothSettings, accelerator: Accelerator, files: list[tuple[int, Path]]) -> None:
    prompt: Any = settings.class_prompt  # there is one: checked with the other settings
    seeds = [number(settings.seed, "class image", i) for i, _ in files]
    bar = tqdm(total=len(files), desc="class images", unit="image", disable=not accelerator.is_main_process)
    with ready_to_sample(pipe, accelerator.device), bar:
        images = generate(
            pipe, prompt, seeds, resolution=settings.resolution,
            steps=settings.class_inference_steps, guidance=settings.guidance_scale,
            precision=accelerator.autocast,
        )  # fmt: skip
        for (_, path), image in zip(files, images):
            write_atomically(path, partial(image.save, format="PNG"))
            bar.update()


def _missing(folder: Path, wanted: int) -> list[tuple[int, Path]]:
    """Number and path of each image to generate."""
    found = find_images(folder, "class_data_dir").images
    count = wanted - len(found)
    free = ((i, folder / f"class-{i:05d}.png") for i in range(wanted + len(found)))
    return [(i, path) for i, path in free if path not in found][: max(0, count)]
