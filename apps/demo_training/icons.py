"""Stage data: the icons of the sets that a preset names, rasterised as RGBA images and listed in an index."""

from __future__ import annotations

import functools
import io
import json
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image, ImageDraw
from tqdm import tqdm

from .presets import SMOKE_NAMES, Preset
from .run import Run, UsageError, announce, claim_folder, file_digest, require, write_json, write_png

PACKAGES = {"fluent-emoji": "@iconify-json/fluent-emoji@1.2.7", "noto": "@iconify-json/noto@1.2.9"}
"""Icon set (the `prefix` inside icons.json) to the npm package that holds it."""


@dataclass(frozen=True)
class Icon:
    """One row of data/index.json: an icon that was rasterised."""

    name: str
    style: str
    file: str
    sha256: str


def icons_by_caption(icon_set: dict) -> dict[str, str]:
    """Caption ("hot dog") to SVG text for every icon of an Iconify set, without hidden icons and skin-tone variants.

    Args:
        icon_set: a parsed icons.json (the IconifyJSON format: prefix, icons, width, height).
    """
    tone = re.compile(r"(-(light|medium|dark))+$")
    icons = icon_set["icons"]
    found = {}
    for key, icon in icons.items():
        # Noto spells a variant astronaut-dark-skin-tone, Fluent astronaut-dark; horizontal-traffic-light is none.
        if icon.get("hidden") or "skin-tone" in key or (tone.search(key) and tone.sub("", key) in icons):
            continue
        left, top, width, height = (
            icon.get(side, icon_set.get(side, default))
            for side, default in (("left", 0), ("top", 0), ("width", 16), ("height", 16))
        )
        found[key.replace("-", " ")] = (
            '<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" '
            f'viewBox="{left} {top} {width} {height}">{icon["body"]}</svg>'
        )
    return found


def read_icon_set(path: Path) -> dict:
    """Read an icons.json, alone or inside an npm package file (.tgz).

    Raises:
        UsageError: there is no such file, or it is not an Iconify set.
    """
    try:
        if path.suffix == ".json":
            icon_set = json.loads(path.read_bytes())
        else:
            with tarfile.open(path) as archive:
                file = archive.extractfile("package/icons.json")
                if file is None:
                    raise KeyError("package/icons.json is no file")
                icon_set = json.load(file)
        icon_set["prefix"], icon_set["icons"].items()
    except OSError as error:
        raise UsageError(f"--icons {path} cannot be read ({error.strerror or error})") from None
    except (tarfile.TarError, KeyError, TypeError, AttributeError, ValueError):
        raise UsageError(
            f"--icons {path} is neither an npm package with package/icons.json nor an icons.json in Iconify format"
        ) from None
    return icon_set


def download_packages(folder: Path) -> list[Path]:
    """Fetch PACKAGES with `npm pack` into `folder`; returns the package files.

    Raises:
        UsageError: npm is not there, or it failed.
    """
    npm = shutil.which("npm")
    names = " and ".join(PACKAGES.values())
    if npm is None:
        raise UsageError(f"npm is not installed: install it, or give the package files of {names} with --icons")
    folder.mkdir(parents=True, exist_ok=True)
    command = [npm, "pack", "--silent", "--pack-destination", str(folder.resolve()), *PACKAGES.values()]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        reason = (done.stderr.strip() or "no reason given").splitlines()[-1]
        raise UsageError(f"npm pack failed ({reason}): give the package files of {names} with --icons")
    return [folder / line for line in done.stdout.split() if line.endswith(".tgz")]


def rasterise(svg: str, size: int) -> Image.Image:
    """An SVG as an RGBA image of size × size pixels: scaled to fit, centred, on a transparent ground."""
    try:
        import resvg_py
    except ImportError:
        raise UsageError("resvg-py is not installed: pip install resvg-py") from None

    # The root element's own size keeps the aspect ratio of the few icons that are not square.
    svg = svg.replace("<svg ", f'<svg width="{size}" height="{size}" ', 1)
    drawn = resvg_py.svg_to_bytes(svg_string=svg, skip_system_fonts=True)
    return Image.open(io.BytesIO(bytes(drawn))).convert("RGBA")


def stand_in(name: str, size: int) -> Image.Image:
    """A simple image of one of SMOKE_NAMES for runs without icons: RGBA, size × size pixels."""
    icon = Image.new("RGBA", (size, size))
    pen = ImageDraw.Draw(icon)
    end = size - 1
    if name == "basketball":
        pen.ellipse((0, 0, end, end), fill="#f08020")
        pen.line((0, end / 2, end, end / 2), fill="#402010", width=max(1, size // 16))
    elif name == "door":
        pen.rectangle((end * 0.25, 0, end * 0.75, end), fill="#80502a")
    elif name == "lemon":
        pen.ellipse((0, end * 0.2, end, end * 0.8), fill="#f8e030")
    else:
        pen.polygon([(0, end), (end / 2, 0), (end, end)], fill="#3070d0")
    return icon


def wanted_icons(preset: Preset, sources: Mapping[str, Iterable[str]]) -> list[tuple[str, str]]:
    """(name, style) of every icon that some phase of the preset sees, in a fixed order.

    Args:
        sources: the names that each style has.
    """
    seen = {(name, style) for phase in preset.phases for style in (phase.styles or sources) for name in phase.names}
    return sorted(seen, key=lambda pair: (pair[1], pair[0]))


def needed_styles(preset: Preset) -> set[str]:
    """The icon sets that the preset names; none for one that takes what it is given."""
    return {style for phase in preset.phases for style in phase.styles or ()}


def icon_files(run: Run) -> list[Path]:
    """The files of the icon sets: those given, else npm's where the preset needs any.

    Raises:
        UsageError: the packages cannot be had.
    """
    if run.icons or not needed_styles(run.preset):
        return list(run.icons)
    return download_packages(run.out / "packages")


def icon_sources(run: Run, files: Sequence[Path]) -> dict[str, dict[str, Callable[[], Image.Image]]]:
    """Style and name to a function that makes its RGBA image; without files, the stand-ins.

    Raises:
        UsageError: an icon set or a name that the preset needs is missing.
    """
    if not files:
        return {"drawn": {name: functools.partial(stand_in, name, run.preset.icon_size) for name in SMOKE_NAMES}}

    icon_sets = {}
    for path in files:
        icon_set = read_icon_set(path)
        icon_sets[icon_set["prefix"]] = icons_by_caption(icon_set)
    if missing := sorted(needed_styles(run.preset) - icon_sets.keys()):
        raise UsageError(
            f"--icons gives {', '.join(sorted(icon_sets))}, but preset {run.preset_name} also needs "
            f"{' and '.join(PACKAGES[style] for style in missing)}"
        )
    for name, style in wanted_icons(run.preset, icon_sets):
        if name not in icon_sets[style]:
            raise UsageError(
                f"the icon set {style} has no icon named {name!r}: use {PACKAGES.get(style, 'another set')}"
            )
    return {
        style: {name: functools.partial(rasterise, svg, run.preset.icon_size) for name, svg in icon_sets[style].items()}
        for style in sorted(icon_sets)
    }


def data_stage(run: Run) -> None:
    """Rasterise the icons: data/<style>/<name>.png (RGBA) and, when all are there, data/index.json."""
    folder = run.out / "data"
    index = folder / "index.json"
    settings = {
        "icon_size": run.preset.icon_size,
        "phases": [[phase.names, phase.styles] for phase in run.preset.phases],
    }
    claimed = folder / "settings.json"
    if index.exists() and claimed.exists() and not run.icons:
        claim_folder(folder, settings | {"icons": json.loads(claimed.read_text())["icons"]})
        return announce("data", "already done")
    files = icon_files(run)
    # By content, so that the same package may lie elsewhere the next time.
    claim_folder(folder, settings | {"icons": sorted(file_digest(path) for path in files)})
    if index.exists():
        return announce("data", "already done")

    sources = icon_sources(run, files)
    icons = []
    for name, style in tqdm(wanted_icons(run.preset, sources), desc="data", unit="icon"):
        path = folder / style / f"{name.replace(' ', '-')}.png"
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            write_png(path, sources[style][name]())
        icons.append(Icon(name, style, str(path.relative_to(folder)), file_digest(path)))
    write_json(index, [asdict(icon) for icon in icons])
    announce("data", f"{len(icons)} icons of {len({icon.name for icon in icons})} names in {folder}")


def load_index(run: Run) -> list[Icon]:
    """The icons that the data stage rasterised.

    Raises:
        UsageError: the data stage has not been finished, or a file was changed since.
    """
    folder = run.out / "data"
    index = require(run, folder / "index.json", "data")
    icons = [Icon(**row) for row in json.loads(index.read_text())]
    for icon in icons:
        path = folder / icon.file
        if not path.is_file() or file_digest(path) != icon.sha256:
            raise UsageError(f"{path} is missing or was changed: delete {folder} and run the stage data again")
    return icons


def trained_names(run: Run) -> list[str]:
    """Every name that some phase shows, sorted."""
    return sorted({icon.name for icon in load_index(run)})
