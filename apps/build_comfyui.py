"""Build the folder of the ComfyUI nodes that needs nothing installed: `python apps/build_comfyui.py FOLDER`.

It is apps/comfyui with the modules of agentsd that it needs in its folder `core`, copied as they are. `--texts` writes
instead what ComfyUI shows of the nodes (locales/en/nodeDefs.json) from the nodes themselves.
"""

from __future__ import annotations

import argparse
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
        FileNotFoundError: the folder that it would lie in does not.
    """
    from comfyui.core import MODULES, PACKAGE

    if folder.exists():
        raise FileExistsError(f"{folder} exists; remove it, or name another")
    if not folder.absolute().parent.is_dir():
        raise FileNotFoundError(f"there is no folder {folder.absolute().parent}; name one in ComfyUI's custom_nodes")
    shutil.copytree(NODES, folder, ignore=shutil.ignore_patterns("__pycache__"))
    core = folder / "core" / PACKAGE
    core.mkdir(parents=True)
    for module in MODULES:
        shutil.copy(ROOT / PACKAGE / f"{module}.py", core)
    shutil.copy(ROOT / "LICENSE", folder)


def texts() -> dict[str, Any]:
    """What ComfyUI shows of the nodes, in the form of its nodeDefs.json."""
    from comfyui.schema import PATCH, REPORT

    return {
        node.name: {
            "display_name": node.title,
            "description": node.description,
            "inputs": {one.name: {"name": one.name, "tooltip": one.tooltip} for one in node.inputs},
            "outputs": {"0": {"name": node.output or node.kind, **({"tooltip": node.tip} if node.tip else {})}},
        }
        for node in (PATCH, REPORT)
    }


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
    except (FileExistsError, FileNotFoundError) as error:
        parser.error(str(error))
    print(f"{options.folder}: the nodes and all that they need; restart ComfyUI to load them")
    return 0


if __name__ == "__main__":
    sys.exit(main())
