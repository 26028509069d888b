"""Composes training pictures: one, two, three or many icons on a light background, with captions that say so.

A canvas is planned first (`plan_canvas`: what stands where, a plain value that depends on a seed alone) and drawn
afterwards (`draw_canvas`). Lengths in a CanvasRecipe are fractions of the picture's side, in a Canvas pixels.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageOps


@dataclass(frozen=True)
class CanvasRecipe:
    """What the canvases of a training look like.

    Attributes:
        size: least and greatest side of an object that stands alone.
        jitter: how far such an object's centre may be from the middle; None for anywhere inside the picture.
        rotation: greatest angle either way, in degrees.
        mirrored: share of the objects that are mirrored.
        patterned: share of the backgrounds that have a pattern; the others are plain.
        groups: share of the canvases with two or three different objects.
        repeats: share of the canvases that repeat one object all over.
        group_size: least and greatest side of an object in a group.
        cells: the placement cells are cells × cells; odd, so that one of them is the middle.
        held_out: share of the (name, cell) pairs that never occur, and of the names that are never repeated.
        style_words: (icon set, its word in captions); empty for captions without style.
    """

    size: tuple[float, float]
    jitter: float | None
    rotation: float = 0.0
    mirrored: float = 0.5
    patterned: float = 0.5
    groups: float = 0.0
    repeats: float = 0.0
    group_size: tuple[float, float] = (0.28, 0.46)
    cells: int = 1
    held_out: float = 0.0
    style_words: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True)
class Background:
    """A light ground: `colours` in 0 … 1 (the second is unused when plain), `period` and `phase` in pixels."""

    kind: str
    colours: tuple[tuple[float, float, float], tuple[float, float, float]]
    period: float
    phase: tuple[float, float]
    angle: float


@dataclass(frozen=True)
class Placed:
    """An icon on a canvas: centre and side in pixels (the side before rotation), angle in degrees."""

    name: str
    style: str
    x: float
    y: float
    side: float
    angle: float
    mirrored: bool

    @property
    def reach(self) -> float:
        """Half the side of the upright square around the rotated icon."""
        turn = math.radians(self.angle)
        return self.side * (abs(math.cos(turn)) + abs(math.sin(turn))) / 2


@dataclass(frozen=True)
class Canvas:
    """One training picture before it is drawn; `kind` is "one", "group" or "repeat"."""

    kind: str
    objects: tuple[Placed, ...]
    background: Background


BACKGROUNDS = ("stripes", "dots", "checks", "gradient")
PERIODS = (1 / 16, 5 / 32)
"""Least and greatest period of a pattern: 32 to 80 pixels of 512, 4 to 10 latents."""

REPEATED = "repeated"
"""Stands for the cell of an object that is repeated all over: names are held out from that, too."""


def cell_of(recipe: CanvasRecipe, x: float, y: float, size: int) -> tuple[int, int]:
    """(row, column) of the placement cell that a centre lies in."""
    last = recipe.cells - 1
    return min(last, int(y * recipe.cells / size)), min(last, int(x * recipe.cells / size))


def is_held_out(recipe: CanvasRecipe, name: str, cell: tuple[int, int] | str) -> bool:
    """Whether `name` is never trained on in that cell (or, with REPEATED, as a pattern)."""
    middle = recipe.cells // 2
    if cell == (middle, middle):
        return False  # where a large object has to stand
    digest = hashlib.blake2b(repr((name, cell)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "big") / 2**64 < recipe.held_out


def plan_canvas(
    recipe: CanvasRecipe, icons: Sequence[tuple[str, str]], main: int, size: int, seed: int, kind: str | None = None
) -> Canvas:
    """Decides what stands where on one canvas.

    Args:
        icons: (name, style) of all that may occur.
        main: which of them this canvas is about; the others of a group are drawn from the same style.
        size: side of the picture in pixels.
        seed: all that the draws depend on.
        kind: "one", "group" or "repeat" instead of the recipe's shares.
    """
    draw = np.random.default_rng(seed)
    name, style = icons[main]
    share = draw.random()
    if kind is None:
        kind = "group" if share < recipe.groups else "repeat" if share < recipe.groups + recipe.repeats else "one"
    background = plan_background(recipe, size, draw)
    objects = ()
    if kind == "repeat" and not is_held_out(recipe, name, REPEATED):
        objects = plan_repeat(recipe, name, style, size, draw)
    elif kind == "group":
        others = [icon for icon in icons if icon[1] == style and icon[0] != name]
        count = min(len(others), 1 if draw.random() < 0.7 else 2)
        picks = [int(pick) for pick in draw.choice(len(others), count, replace=False)]
        objects = plan_group(recipe, [(name, style), *(others[pick] for pick in picks)], size, draw)
    if objects:
        return Canvas(kind, objects, background)
    return Canvas("one", (plan_one(recipe, name, style, size, draw),), background)


def between(draw: np.random.Generator, bounds: tuple[float, float]) -> float:
    """A uniform draw between two bounds."""
    return bounds[0] + (bounds[1] - bounds[0]) * draw.random()


def plan_object(
    recipe: CanvasRecipe, name: str, style: str, size: int, sides: tuple[float, float], jitter: float | None, draw
) -> Placed:
    """One placement inside the picture, held out or not."""
    angle = between(draw, (-recipe.rotation, recipe.rotation))
    mirrored = bool(draw.random() < recipe.mirrored)
    placed = Placed(name, style, 0.0, 0.0, size * between(draw, sides), angle, mirrored)
    room = size / 2 - placed.reach
    if room < 0:  # a corner would stick out: as large as fits
        placed = Placed(name, style, 0.0, 0.0, placed.side * size / 2 / placed.reach, angle, mirrored)
        room = 0.0
    far = room if jitter is None else min(room, jitter * size)
    x, y = (size / 2 + between(draw, (-far, far)) for _ in range(2))
    return Placed(name, style, x, y, placed.side, angle, mirrored)


def plan_one(recipe: CanvasRecipe, name: str, style: str, size: int, draw: np.random.Generator) -> Placed:
    """An object that stands alone, in a cell that is not held out for it."""
    while True:  # ends: the middle cell is never held out, and every size has places there
        placed = plan_object(recipe, name, style, size, recipe.size, recipe.jitter, draw)
        if not is_held_out(recipe, name, cell_of(recipe, placed.x, placed.y, size)):
            return placed


def plan_group(
    recipe: CanvasRecipe, icons: Sequence[tuple[str, str]], size: int, draw: np.random.Generator, tries: int = 400
) -> tuple[Placed, ...]:
    """Objects that do not overlap, none in a cell held out for it; empty if `tries` draws found no such places."""
    objects: list[Placed] = []
    for attempt in range(tries):
        if attempt % 50 == 49:
            objects = []  # those already placed may leave no room
        placed = plan_object(recipe, *icons[len(objects)], size, recipe.group_size, None, draw)
        apart = all(
            max(abs(placed.x - other.x), abs(placed.y - other.y)) >= placed.reach + other.reach for other in objects
        )
        if apart and not is_held_out(recipe, placed.name, cell_of(recipe, placed.x, placed.y, size)):
            objects.append(placed)
            if len(objects) == len(icons):
                return tuple(objects)
    return ()


def plan_repeat(
    recipe: CanvasRecipe, name: str, style: str, size: int, draw: np.random.Generator
) -> tuple[Placed, ...]:
    """One object 2 × 2 to 4 × 4 times: same size, orientation and style throughout."""
    across = int(draw.integers(2, 5))
    tile = size / across
    angle = between(draw, (-recipe.rotation, recipe.rotation))
    mirrored = bool(draw.random() < recipe.mirrored)
    reach_of_one = Placed(name, style, 0, 0, 1.0, angle, mirrored).reach
    side = tile * between(draw, (0.75, 0.95)) / (2 * reach_of_one)
    return tuple(
        Placed(name, style, (column + 0.5) * tile, (row + 0.5) * tile, side, angle, mirrored)
        for row in range(across)
        for column in range(across)
    )


def plan_background(recipe: CanvasRecipe, size: int, draw: np.random.Generator) -> Background:
    """A plain pastel, white among them, or a pattern of two neighbouring light colours."""
    patterned, white = draw.random() < recipe.patterned, draw.random() < 0.2
    light = 1 - 0.14 * draw.random(3)
    if white and not patterned:
        light = np.ones(3)
    # Strong enough to outlive the autoencoder, weak enough to stay a background.
    dark = light - between(draw, (0.07, 0.12)) * (0.5 + 0.5 * draw.random(3))
    kind = BACKGROUNDS[int(draw.integers(len(BACKGROUNDS)))]
    period = size * between(draw, PERIODS)
    phase = (period * draw.random(), period * draw.random())
    angle = 45.0 * int(draw.integers(4)) if kind == "stripes" else 360 * draw.random()
    colours = tuple(tuple(round(float(value), 4) for value in colour) for colour in (light, dark))
    return Background(kind if patterned else "plain", colours, float(period), phase, angle)


def draw_background(background: Background, size: int) -> Image.Image:
    """The background alone: RGB, size × size pixels."""
    y, x = np.mgrid[:size, :size].astype(np.float32)
    turn, period = math.radians(background.angle), background.period
    along = x * math.cos(turn) + y * math.sin(turn)
    x, y = x + background.phase[0], y + background.phase[1]

    def wave(position: np.ndarray) -> np.ndarray:
        return np.sin(position * (2 * math.pi / period))

    if background.kind == "plain":
        share = np.zeros_like(x)
    elif background.kind == "stripes":
        share = np.clip(0.5 + 1.5 * wave(along + background.phase[0]), 0, 1)
    elif background.kind == "checks":
        share = np.clip(0.5 + 3 * wave(x) * wave(y), 0, 1)
    elif background.kind == "dots":
        away = np.hypot(x % period - period / 2, y % period - period / 2)
        share = np.clip(0.3 * period - away + 0.5, 0, 1)
    else:
        share = (along - along.min()) / (along.max() - along.min())
    first, second = (np.array(colour, np.float32) for colour in background.colours)
    pixels = first + share[..., None] * (second - first)
    return Image.fromarray((255 * pixels).round().astype(np.uint8))


def draw_canvas(canvas: Canvas, icon_of: Callable[[str, str], Image.Image], size: int) -> Image.Image:
    """The training picture: RGB, size × size pixels.

    Args:
        icon_of: (name, style) to a square RGBA picture.
    """
    picture = draw_background(canvas.background, size).convert("RGBA")
    drawn: dict[tuple, Image.Image] = {}
    for placed in canvas.objects:
        look = (placed.name, placed.style, placed.side, placed.angle, placed.mirrored)
        if look not in drawn:
            icon = icon_of(placed.name, placed.style)
            if placed.mirrored:
                icon = ImageOps.mirror(icon)
            icon = icon.resize((max(1, int(placed.side)),) * 2, Image.Resampling.LANCZOS)
            if placed.angle:
                icon = icon.rotate(placed.angle, Image.Resampling.BICUBIC, expand=True)
            drawn[look] = icon
        icon = drawn[look]
        # Rotation rounds outwards by a pixel or two.
        left = min(max(0, round(placed.x - icon.width / 2)), max(0, size - icon.width))
        top = min(max(0, round(placed.y - icon.height / 2)), max(0, size - icon.height))
        picture.alpha_composite(icon.crop((0, 0, min(size, icon.width), min(size, icon.height))), (left, top))
    return picture.convert("RGB")


def captions_of(canvas: Canvas, recipe: CanvasRecipe) -> list[tuple[str, float]]:
    """The captions of a canvas with their probabilities; as many for every canvas of a recipe.

    The empty one, last, is what classifier-free guidance compares with. The background is never named.
    """
    names = [placed.name for placed in canvas.objects]
    if canvas.kind == "repeat":
        bare = f"pattern of {names[0]}"
        full = f"a {bare}"
    else:
        bare = listed(names)
        full = listed([f"a {name}" for name in names])
    photograph = f"a high quality photograph of {full}."
    words = dict(recipe.style_words)
    if not words:
        return [(full, 0.3), (photograph, 0.4), (bare, 0.2), ("", 0.1)]
    style = f"{bare}, {words[canvas.objects[0].style]} style"
    return [(full, 0.2), (photograph, 0.3), (style, 0.2), (bare, 0.2), ("", 0.1)]


def listed(parts: Sequence[str]) -> str:
    """ "x", "x and y" or "x, y and z"."""
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"
