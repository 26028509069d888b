"""agentsd's nodes for ComfyUI. Link this folder into ComfyUI's `custom_nodes`; README.md has the two lines."""

from .nodes import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS

__all__ = ["NODE_CLASS_MAPPINGS", "NODE_DISPLAY_NAME_MAPPINGS"]
