"""Build the folder of the ComfyUI nodes that needs nothing installed: `python apps/build_comfyui.py FOLDER`.

It is apps/comfyui with the modules of agentsd that it needs in its folder `core`, copied as they are. `--texts` writes
instead what ComfyUI shows of the nodes (locales/en/nodeDefs.json) from the nodes themselves.
"""

from __future__ import annotations

import argparse
import importlib
import json
import shutil
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NODES = Path(__file__).resolve().parent / "comfyui"
TEXTS = NODES / "locales" / "en" / "nodeDefs.json"


def build(folder: Path) -> None:
    """Write the folder to install.

    Raises:
        FileExistsError: it exists.
    """
    from comfyui.core import MODULES, PACKAGE

    if folder.exists():
        raise FileExistsError(f"{folder} exists; remove it, or name another")
    shutil.copytree(NODES, folder, ignore=shutil.ignore_patterns("__pycache__"))
    core = folder / "core" / PACKAGE
    core.mkdir(parents=True)
    for module in MODULES:
        shutil.copy(ROOT / PACKAGE / f"{module}.py", core)
    shutil.copy(ROOT / "LICENSE", folder)


def texts() -> dict[str, Any]:
    """What ComfyUI shows of the nodes, in the form of its nodeDefs.json."""
    nodes = importlib.import_module("comfyui.nodes")
    found = {}
    for name, node in nodes.NODE_CLASS_MAPPINGS.items():
        given = node.INPUT_TYPES()
        inputs = {**given["required"], **given.get("optional", {})}
        outputs = getattr(node, "RETURN_NAMES", node.RETURN_TYPES)
        tips = getattr(node, "OUTPUT_TOOLTIPS", ("",) * len(outputs))
        found[name] = {
            "display_name": nodes.NODE_DISPLAY_NAME_MAPPINGS[name],
            "description": node.DESCRIPTION,
            "inputs": {one: {"name": one, "tooltip": spec[1]["tooltip"]} for one, spec in inputs.items()},
            "outputs": {
                str(i): {"name": output, **({"tooltip": tip} if tip else {})}
                for i, (output, tip) in enumerate(zip(outputs, tips))
            },
        }
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the command; returns the exit code: 0 done, 2 wrong input."""
    parser = argparse.ArgumentParser(prog="build_comfyui.py", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("folder", nargs="?", type=Path, help="to write, as custom_nodes/agentsd of a ComfyUI")
    parser.add_argument("--texts", action="store_true", help="write locales/en/nodeDefs.json of apps/comfyui")
    options = parser.parse_args(arguments)
    if options.texts == (options.folder is not None):
        parser.error("name a folder, or give --texts")
    if options.texts:
        TEXTS.parent.mkdir(parents=True, exist_ok=True)
        TEXTS.write_text(json.dumps(texts(), indent=2, ensure_ascii=False) + "\n", "utf-8")
        return 0
    try:
        build(options.folder)
    except FileExistsError as error:
        parser.error(str(error))
    return 0


if __name__ == "__main__":
    sys.exit(main())
