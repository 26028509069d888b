"""agentsd's nodes for ComfyUI. Link this folder into ComfyUI's `custom_nodes`; README.md has the two lines."""

from .core import find_core

find_core()

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS  # noqa: E402

WEB_DIRECTORY = "./web"
"""Its folder `docs` has the help page of each node."""

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS", "WEB_DIRECTORY"]
