"""find_core: makes the part of agentsd that the nodes need importable: installed, carried by this folder, or beside it.

The nodes need a few modules of agentsd that import torch and NumPy alone, so that nothing has to be installed into
ComfyUI's Python. Standard library only.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

PACKAGE = "agentsd"
MODULES = (
    "__init__",
    "attention",
    "config",
    "fields",
    "grid_split",
    "layer_plan",
    "merging",
    "messages",
    "step_cache",
)
"""What of agentsd the nodes need; `apps/build_comfyui.py` copies it to the folder `core` of what it builds."""


def find_core(folder: Path | None = None) -> str:
    """Make `import agentsd` work; returns where it was found.

    Args:
        folder: of the nodes; None is this one.

    Raises:
        ImportError: an older agentsd is installed, or there is none.
    """
    if importlib.util.find_spec(PACKAGE) is not None:
        if importlib.util.find_spec(f"{PACKAGE}.step_cache") is None:
            raise ImportError("AgentSD: the agentsd in this Python is older than its nodes; update or uninstall it")
        return "installed"
    folder = (folder or Path(__file__).parent).resolve()  # of a link, where the clone is
    for place in (folder / "core", folder.parents[1]):
        package = place / PACKAGE
        if (package / "step_cache.py").is_file():
            _load(package)
            return str(package)
    raise ImportError(
        "AgentSD: its core was not found. Link the folder apps/comfyui of a clone of agentsd into custom_nodes, or "
        "copy the folder that `python apps/build_comfyui.py FOLDER` makes"
    )


def _load(package: Path) -> None:
    """Import the package from a folder, with Python's list of places left as it is."""
    spec = importlib.util.spec_from_file_location(
        PACKAGE, package / "__init__.py", submodule_search_locations=[str(package)]
    )
    assert spec is not None and spec.loader is not None  # it ends in .py
    module = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = module
    spec.loader.exec_module(module)
