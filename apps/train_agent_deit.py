"""Trains small vision transformers on icons, from linear attention to Agent-DeiT, a row of the paper's ablation each.

Usage:

    pip install -e ".[vision,train]"
    python apps/train_agent_deit.py --out runs/agent-deit                # all rows, about 10 minutes on one CPU core
    python apps/train_agent_deit.py --out runs/agent-deit --rows deit,conv --steps 3000
    python apps/train_agent_deit.py --smoke --out runs/smoke             # seconds, with shapes drawn by the script

The classes are icons of the npm package @iconify-json/noto (Noto Emoji, Apache 2.0). Each image is a new rendering: the
icon turned, scaled, moved and dimmed, on a ground of two colours, with a piece of another icon in it. The test
renderings use other random numbers than the training ones. All rows see the same images in the same order.

| row | attention |
|---|---|
| deit | softmax attention: timm's VisionTransformer, the baseline |
| linear | linear attention, phi(x) = elu(x) + 1 |
| agents | agent attention without agent bias and without convolution |
| bias | with agent bias |
| conv | with agent bias and depthwise convolution: Agent-DeiT |

A finished row is kept in OUT/rows and not trained again; results.md holds the table. The same command on the same
machine gives the same numbers.
"""

from __future__ import annotations

import argparse
import io
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from agentsd.files import write_atomically
from agentsd.messages import install_hint
from agentsd.vision import AgentDeit

PACKAGE = "@iconify-json/noto@1.2.9"
ROWS = ("deit", "linear", "agents", "bias", "conv")

SIZE, PATCH = 64, 8
BODY = dict(img_size=SIZE, patch_size=PATCH, embed_dim=64, depth=4, num_heads=2, qkv_bias=True)
AGENTS = 16

_ICON = 80
"""Side in pixels of an icon before it is placed."""


class UsageError(ValueError):
    """Something the user can put right."""


# ---- data ----


def read_icons(path: Path | None, count: int) -> Tensor:
    """[count, 4, 80, 80] RGBA in 0 … 1, premultiplied: icons evenly spaced in the alphabet, without skin-tone variants.

    Args:
        path: the npm package; None fetches it.

    Raises:
        UsageError: the package cannot be had or read.
    """
    try:
        import resvg_py
        from PIL import Image
    except ImportError:
        raise UsageError(f"resvg-py is not installed: {install_hint('train')}") from None
    icon_set = _icon_set(path)
    names = sorted(
        name
        for name, icon in icon_set["icons"].items()
        if not icon.get("hidden") and not re.search("skin-tone|flag", name)
    )
    if len(names) < count:
        raise UsageError(f"--classes {count}: the package has {len(names)} icons")
    chosen = [names[i * len(names) // count] for i in range(count)]
    images = []
    for name in chosen:
        icon = icon_set["icons"][name]
        width, height = (icon.get(side, icon_set.get(side, 16)) for side in ("width", "height"))
        svg = (
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" width="{_ICON}" '
            f'height="{_ICON}" viewBox="0 0 {width} {height}">{icon["body"]}</svg>'
        )
        image = Image.open(io.BytesIO(bytes(resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True))))
        pixels = torch.frombuffer(bytearray(image.convert("RGBA").tobytes()), dtype=torch.uint8)
        images.append(pixels.view(_ICON, _ICON, 4).permute(2, 0, 1) / 255)
    return _premultiplied(torch.stack(images))


def _icon_set(path: Path | None) -> dict[str, Any]:
    if path is None:
        npm = shutil.which("npm")
        if npm is None:
            raise UsageError(f"npm is not installed: install it, or give the package file of {PACKAGE} with --icons")
        folder = Path.home() / ".cache" / "agentsd"
        folder.mkdir(parents=True, exist_ok=True)
        command = [npm, "pack", "--silent", "--pack-destination", str(folder), PACKAGE]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            raise UsageError(f"npm pack failed: give the package file of {PACKAGE} with --icons")
        path = folder / done.stdout.split()[-1]
    try:
        with tarfile.open(path) as archive:
            file = archive.extractfile("package/icons.json")
            if file is None:
                raise KeyError("package/icons.json is no file")
            return json.load(file)
    except (OSError, tarfile.TarError, KeyError, ValueError) as error:
        raise UsageError(f"--icons {path}: is not the package {PACKAGE} ({error})") from error


def drawn_shapes(count: int) -> Tensor:
    """[count, 4, 80, 80] simple shapes in place of icons, for runs of seconds."""
    generator = torch.Generator().manual_seed(0)
    y, x = torch.meshgrid(*(torch.linspace(-1, 1, _ICON),) * 2, indexing="ij")
    images = []
    for i in range(count):
        corners = 3 + i % 4
        angle, radius = torch.atan2(y, x), (x**2 + y**2).sqrt()
        edge = 0.9 * math.cos(math.pi / corners) / torch.cos((angle % (2 * math.pi / corners)) - math.pi / corners)
        colour = torch.rand(3, 1, 1, generator=generator).expand(3, _ICON, _ICON)
        images.append(torch.cat([colour, (radius < edge).float()[None]]))
    return _premultiplied(torch.stack(images))


def _premultiplied(images: Tensor) -> Tensor:
    return torch.cat([images[:, :3] * images[:, 3:], images[:, 3:]], dim=1)


def batch(icons: Tensor, split: str, number: int, size: int) -> tuple[Tensor, Tensor]:
    """Render a batch: images [size, 3, 64, 64], normalized, and their classes [size].

    A pure function of its arguments; "train" and "test" use different random numbers.
    """
    generator = torch.Generator().manual_seed(2 * number + (split == "test"))

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(size, generator=generator)

    labels = torch.randint(len(icons), (size,), generator=generator)
    others = torch.randint(len(icons), (size,), generator=generator)
    image = _ground(size, generator)
    small = _placed(
        icons[others], uniform(-math.pi, math.pi), uniform(0.25, 0.4), uniform(-0.8, 0.8), uniform(-0.8, 0.8)
    )
    large = _placed(icons[labels], uniform(-0.6, 0.6), uniform(0.5, 0.95), uniform(-0.3, 0.3), uniform(-0.3, 0.3))
    for layer in (small, large):
        image = image * (1 - layer[:, 3:]) + layer[:, :3]
    image = image * uniform(0.5, 1.0).view(-1, 1, 1, 1)
    return (image - 0.45) / 0.25, labels


def _ground(size: int, generator: torch.Generator) -> Tensor:
    """[size, 3, 64, 64] two colours that run into one another."""
    corners = torch.rand(size, 3, 2, 2, generator=generator)
    return F.interpolate(corners, size=(SIZE, SIZE), mode="bilinear", align_corners=True)


def _placed(icons: Tensor, angle: Tensor, scale: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """[B, 4, 64, 64] icons turned, scaled to a part of the image, and moved by parts of half its side."""
    cos, sin = torch.cos(angle) / scale, torch.sin(angle) / scale
    rows = [torch.stack([cos, sin, -cos * x - sin * y], 1), torch.stack([-sin, cos, sin * x - cos * y], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), [len(icons), 4, SIZE, SIZE], align_corners=False)
    return F.grid_sample(icons, grid, align_corners=False)


# ---- models ----


class LinearAttention(nn.Module):
    """O = phi(Q) (phi(K)^T V) / (phi(Q) phi(K)^T 1) with phi(x) = elu(x) + 1 (Katharopoulos et al., 2020)."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, **_: Any) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        query, key, value = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key = F.elu(query) + 1, F.elu(key) + 1
        out = query @ (key.mT @ value) / (query @ key.sum(dim=2).unsqueeze(-1))
        return self.proj(out.transpose(1, 2).flatten(2))


def make_model(row: str, num_classes: int) -> nn.Module:
    """The model of a row of the table, initialized."""
    torch.manual_seed(0)
    body: dict[str, Any] = {**BODY, "num_classes": num_classes, "drop_path_rate": 0.0}
    if row in ("deit", "linear"):
        model = VisionTransformer(**body, norm_layer=lambda dim, **factory: nn.LayerNorm(dim, eps=1e-6, **factory))
        if row == "linear":
            for block in model.blocks:
                block.attn = LinearAttention(BODY["embed_dim"], BODY["num_heads"])
            model.init_weights(needs_reset=False)
        return model
    return AgentDeit(
        **body, agents=AGENTS, agent_blocks=BODY["depth"], use_bias=row != "agents", use_conv=row == "conv"
    )


# ---- training ----


def train(row: str, icons: Tensor, steps: int, batch_size: int, test_images: int) -> dict[str, Any]:
    """Train one row and test it; returns what the table shows."""
    model = make_model(row, len(icons))
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=2e-3)
    warmup = max(1, steps // 20)
    rate = lambda step: min((step + 1) / warmup, 0.5 * (1 + math.cos(math.pi * step / steps)))  # noqa: E731
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    model.train()
    start, losses = time.process_time(), []
    for step in range(steps):
        images, labels = batch(icons, "train", step, batch_size)
        loss = F.cross_entropy(model(images), labels, label_smoothing=0.1)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        losses.append(loss.item())
        if (step + 1) % 100 == 0:
            print(f"{row}: step {step + 1} of {steps}, loss {sum(losses[-100:]) / 100:.3f}", file=sys.stderr)
    seconds = time.process_time() - start
    right = _right_answers(model, icons, test_images, batch_size)
    return {
        "row": row,
        "parameters": sum(p.numel() for p in model.parameters()),
        "final_loss": sum(losses[-100:]) / len(losses[-100:]),
        "right": right,
        "seconds": seconds,
    }


@torch.inference_mode()
def _right_answers(model: nn.Module, icons: Tensor, count: int, batch_size: int) -> int:
    model.eval()
    right = 0
    for number in range(count // batch_size):
        images, labels = batch(icons, "test", number, batch_size)
        right += int((model(images).argmax(1) == labels).sum())
    return right


def as_markdown(command: str, machine: str, setting: str, rows: list[dict[str, Any]], tested: int) -> str:
    """The table, with 95 % intervals of the accuracy over the test images."""
    lines = [
        "# Agent-DeiT on icons", "", f"`{command}`", "", machine, "", setting, "",
        "| row | parameters | training loss | test accuracy, % | ± (95 %) | CPU seconds |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]  # fmt: skip
    for row in rows:
        part = row["right"] / tested
        margin = 196 * math.sqrt(part * (1 - part) / tested)
        lines.append(
            f"| {row['row']} | {row['parameters']:,} | {row['final_loss']:.3f} | {100 * part:.1f} | {margin:.1f} | "
            f"{row['seconds']:.0f} |"
        )
    return "\n".join(
        [*lines, "", "The interval is over test images only; each row was trained once, with one seed.", ""]
    )


# ---- the command ----


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 2 wrong input."""
    command = sys.argv[1:] if arguments is None else arguments
    parser = argparse.ArgumentParser(prog="train_agent_deit.py", description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--out", type=Path, required=True, metavar="DIR")
    add("--rows", default=",".join(ROWS), help="default: %(default)s")
    add("--icons", type=Path, metavar="FILE.tgz", help=f"the npm package {PACKAGE}; left out, npm fetches it")
    add("--classes", type=int, default=50, help="default: %(default)s")
    add("--steps", type=int, default=1000, help="default: %(default)s")
    add("--batch-size", type=int, default=64, help="default: %(default)s")
    add("--test-images", type=int, default=4096, help="default: %(default)s")
    add("--smoke", action="store_true", help="shapes in place of icons, and few steps")
    options = parser.parse_args(command)
    try:
        return _run(options, shlex.join(["python", "apps/train_agent_deit.py", *command]))
    except UsageError as error:
        print(f"train_agent_deit: {error}", file=sys.stderr)
        return 2


def _run(options: argparse.Namespace, command: str) -> int:
    rows = options.rows.split(",")
    if strangers := set(rows) - set(ROWS):
        raise UsageError(f"--rows {', '.join(sorted(strangers))}: must be of {', '.join(ROWS)}")
    if options.smoke:
        options.classes, options.steps, options.batch_size, options.test_images = 4, 2, 8, 16
    for name in ("classes", "steps", "batch_size"):
        if getattr(options, name) < 1:
            raise UsageError(f"--{name.replace('_', '-')} {getattr(options, name)}: must be at least 1")
    if options.test_images < options.batch_size:
        raise UsageError(f"--test-images {options.test_images}: must be at least --batch-size {options.batch_size}")
    icons = drawn_shapes(options.classes) if options.smoke else read_icons(options.icons, options.classes)
    settings = {k: getattr(options, k) for k in ("classes", "steps", "batch_size", "test_images", "smoke")}
    (options.out / "rows").mkdir(parents=True, exist_ok=True)
    found = []
    for row in rows:
        path = options.out / "rows" / f"{row}.json"
        if path.exists():
            kept = json.loads(path.read_text())
            if kept["settings"] != settings:
                raise UsageError(f"{path} was made with other settings: give another --out, or remove it")
        else:
            kept = {**train(row, icons, options.steps, options.batch_size, options.test_images), "settings": settings}
            write_atomically(path, json.dumps(kept, indent=1))
        found.append(kept)
    tested = options.test_images // options.batch_size * options.batch_size
    setting = (
        f"{options.classes} classes, {SIZE} × {SIZE} pixels, {(SIZE // PATCH) ** 2} tokens, {AGENTS} agents, "
        f"{BODY['depth']} blocks of {BODY['embed_dim']} channels, {options.steps} steps of {options.batch_size} "
        f"images; tested on {tested:,} other renderings."
    )
    machine = f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads, torch {torch.__version__}"
    text = as_markdown(command, machine, setting, found, tested)
    write_atomically(options.out / "results.md", text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
