"""generate_all: every row's images and their distance to the full run's, one line of JSON each, kept as they come."""

from __future__ import annotations

import contextlib
import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PillowImage
from tqdm import tqdm

from agentsd.config import AgentConfig, Phase
from eval.common.fair_schedules import Run, set_fair_schedule
from eval.common.image_distance import flip, psnr, ssim
from eval.common.protocol import BenchError, image_seed
from eval.common.scenarios import use_scenario
from eval.fid.features import FeatureNetwork, load_features

from .rows import FEWER_STEPS, Row

RESULTS = "distances.jsonl"
FEATURES = "efficientnet-lite0"


@dataclass(frozen=True)
class Image:
    """An image to generate.

    Attributes:
        index: among all.
        prompt: its text.
        chooses: settings are chosen by it; reported figures are of the others.
    """

    index: int
    prompt: str
    chooses: bool

    @property
    def seed(self) -> int:
        return image_seed(0, self.index, 0)


def images_of(prompts: list[str]) -> list[Image]:
    """One image a prompt; every fourth is there to choose settings by, the others to check what was chosen."""
    return [Image(index, prompt, index % 4 == 3) for index, prompt in enumerate(prompts)]


@dataclass(frozen=True)
class Sampling:
    """What all images of a folder share.

    Attributes:
        model: its name.
        guidance: scale.
        size: in pixels.
    """

    model: str
    guidance: float
    size: int

    def of(self, image: Image) -> dict[str, Any]:
        """What a stored result says of its image, so that no other one is taken for it."""
        return {"model": self.model, "guidance": self.guidance, "size": self.size, "prompt": image.prompt}


def generate_all(pipe: Any, rows: dict[Run, list[Row]], images: list[Image], sampling: Sampling, folder: Path) -> None:
    """Generate what is missing; results are appended to RESULTS as they come, so that a stopped run goes on.

    Args:
        pipe: an unpatched text-to-image pipeline; its scheduler is left another one.
        rows: of each run.
        images: of each row.
        sampling: of all of them.
        folder: of the results, and of the full runs' images.

    Raises:
        BenchError: the folder has results of another model, guidance, size or prompt.
    """
    known = _known(folder, images, sampling)
    total = [(image, run) for image in images for run in rows]
    (folder / "full").mkdir(parents=True, exist_ok=True)
    network = _features()
    for image, run in tqdm(total, unit="image and run"):
        missing = [row for row in rows[run] if (run.name, row.key, image.index) not in known]
        if not missing:
            continue
        set_fair_schedule(pipe, run.schedule)
        full = _full(pipe, run, image, sampling, folder)
        for row in missing:
            generated, calls, seconds = generate(pipe, row, image, sampling)
            line = {
                "run": run.name, "key": row.key, "row": row.name, "image": image.index, "chooses": image.chooses,
                **distances(generated, full, network), "calls": calls, "seconds": seconds, "of": sampling.of(image),
            }  # fmt: skip
            with (folder / RESULTS).open("a", encoding="utf-8") as file:  # a line a write: processes may share it
                file.write(json.dumps(line) + "\n")


def _known(folder: Path, images: list[Image], sampling: Sampling) -> set[tuple[str, str, int]]:
    wanted = {image.index: sampling.of(image) for image in images}
    found = set()
    for one in read(folder):
        ours = wanted.get(one["image"])
        if ours is not None and one.get("of") != ours:
            raise BenchError(
                f"{folder}: image {one['image']} is of {one.get('of')}, and this command's is of {ours}: give "
                "another --out"
            )
        found.add((one["run"], one["key"], one["image"]))
    return found


def _features() -> FeatureNetwork | None:
    """The benchmark's feature network that works offline; None where its packages are not installed."""
    try:
        return load_features(FEATURES)
    except BenchError:
        return None


def read(folder: Path) -> list[dict[str, Any]]:
    """What is there so far; the end of a line that a stopped run left is passed over."""
    path = folder / RESULTS
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines():
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return found


def generate(pipe: Any, row: Row, image: Image, sampling: Sampling) -> tuple[np.ndarray, dict[str, int], float]:
    """One image of a row.

    Returns:
        [H, W, 3] in 0 … 1; how many UNet calls of each kind there were ("whole, agent", "cached, merge" …); and the
        seconds that they took.
    """
    config = row.scenario.config or AgentConfig(early=0.0, ratio=0.0)
    with use_scenario(pipe, row.scenario) as call, _counted(pipe.unet, config, pipe.scheduler) as (calls, seconds):
        images = call(
            image.prompt, num_inference_steps=row.steps, guidance_scale=sampling.guidance, height=sampling.size,
            width=sampling.size, generator=torch.Generator().manual_seed(image.seed), output_type="np",
        ).images  # fmt: skip
    return images[0], dict(calls), round(sum(seconds), 4)


def distances(image: np.ndarray, full: np.ndarray, network: FeatureNetwork | None) -> dict[str, float | None]:
    """Distances of two images, [H, W, 3] in 0 … 1.

    Returns:
        psnr: in dB, 100 at most. ssim. flip: 0 … 1, None without its package. features: length of the difference of
        the network's features, in lengths of those of `full`; None without a network.
    """
    flipped = flip(image, full)
    found: dict[str, float | None] = {
        "psnr": round(psnr(image, full), 3),
        "ssim": round(ssim(image, full), 5),
        "flip": None if flipped is None else round(flipped, 5),
        "features": None,
    }
    if network is not None:
        pair = [PillowImage.fromarray((one * 255).round().astype(np.uint8)) for one in (image, full)]
        ours, theirs = network.of_images(pair)
        found["features"] = round(float(np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)), 5)
    return found


def _full(pipe: Any, run: Run, image: Image, sampling: Sampling, folder: Path) -> np.ndarray:
    """The unpatched image of the full run, from disk where it is there."""
    path = folder / "full" / f"{run.schedule}-{run.steps}-{image.index:04d}.npy"
    if not path.exists():
        full, _, _ = generate(pipe, Row("full", run.steps, FEWER_STEPS), image, sampling)
        with path.with_suffix(".part").open("wb") as file:
            np.save(file, full)
        path.with_suffix(".part").replace(path)
    return np.load(path)


@contextlib.contextmanager
def _counted(unet: Any, config: AgentConfig, scheduler: Any) -> Iterator[tuple[Counter[str], list[float]]]:
    """Count a UNet's calls by kind, and their seconds.

    A call is whole where it runs the innermost layers: a resnet's convolution, as DeepCache skips a resnet's forward
    and not its hooks.
    """
    calls: Counter[str] = Counter()
    seconds: list[float] = []
    deep: list[bool] = []
    begun: list[float] = []
    length = scheduler.config.num_train_timesteps

    def enter(*_: Any) -> None:
        deep.clear()
        begun[:] = [_now(unet)]

    def leave(_: Any, args: tuple, kwargs: dict, __: Any) -> None:
        seconds.append(_now(unet) - begun[0])
        timestep = float(kwargs["timestep"] if "timestep" in kwargs else args[1])
        phase = "agent" if config.phase_at(timestep, length) is Phase.AGENT else "merge"
        calls[f"{'whole' if deep else 'cached'}, {phase}"] += 1

    handles = [
        unet.down_blocks[-1].resnets[-1].conv1.register_forward_hook(lambda *_: deep.append(True)),
        unet.register_forward_pre_hook(enter),
        unet.register_forward_hook(leave, with_kwargs=True),
    ]
    try:
        yield calls, seconds
    finally:
        for handle in handles:
            handle.remove()


def _now(unet: Any) -> float:
    if unet.device.type == "cuda":
        torch.cuda.synchronize(unet.device)
    return time.perf_counter()
