"""agentsd's nodes for ComfyUI. Link this folder into ComfyUI's `custom_nodes`; README.md has the two lines."""

from .core import find_core

find_core()

# ComfyUI takes NODE_CLASS_MAPPINGS where both are there, so that only one of them may be.
try:
    from .v3 import comfy_entrypoint  # noqa: F401
except ImportError:  # an older ComfyUI, or none: the folder's own tests
    from .v1 import NODE_CLASS_MAPPINGS, NODE_DISPLAY_NAME_MAPPINGS  # noqa: F401

WEB_DIRECTORY = "./web"
"""Its folder `docs` has the help page of each node."""
