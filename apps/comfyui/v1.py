"""The nodes in ComfyUI's first form, NODE_CLASS_MAPPINGS: for a ComfyUI without the current one (`v3`)."""

from __future__ import annotations

from typing import Any

from .nodes import describe, patch
from .schema import CATEGORY, PATCH, REPORT, Input, Node


def _types(node: Node) -> dict[str, Any]:
    """INPUT_TYPES of a node."""
    found = {"required": {one.name: _input(one) for one in node.required}}
    if node.optional:
        found["optional"] = {one.name: _input(one) for one in node.optional}
    return found


def _input(one: Input) -> tuple[Any, dict[str, Any]]:
    options: dict[str, Any] = {"tooltip": one.tooltip, **dict(one.bounds)}
    if one.default is not None:
        options["default"] = one.default
    if one.advanced:
        options["advanced"] = True
    return list(one.choices) if one.choices else one.kind, options


class AgentSD:
    """The node that patches a model."""

    CATEGORY, DESCRIPTION = CATEGORY, PATCH.description
    RETURN_TYPES, OUTPUT_TOOLTIPS = (PATCH.kind,), (PATCH.tip,)
    FUNCTION = "run"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return _types(PATCH)

    def run(self, **values: Any) -> tuple[Any]:
        return (patch(**values),)


class AgentSDReport:
    """The node that says what the last run did."""

    CATEGORY, DESCRIPTION = CATEGORY, REPORT.description
    RETURN_TYPES, RETURN_NAMES = (REPORT.kind,), (REPORT.output,)
    FUNCTION = "run"
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:
        return _types(REPORT)

    def run(self, **values: Any) -> dict[str, Any]:
        text = describe(**values)
        return {"ui": {"text": (text,)}, "result": (text,)}


NODE_CLASS_MAPPINGS = {PATCH.name: AgentSD, REPORT.name: AgentSDReport}
NODE_DISPLAY_NAME_MAPPINGS = {PATCH.name: PATCH.title, REPORT.name: REPORT.title}
