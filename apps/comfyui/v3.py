"""The nodes in ComfyUI's current form: `io.ComfyNode` and `comfy_entrypoint`. Raises ImportError where it has none."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import ComfyExtension, io

from .nodes import describe, patch
from .schema import CATEGORY, PATCH, REPORT, Input, Node

_KINDS: dict[str, Any] = {
    "MODEL": io.Model,
    "LATENT": io.Latent,
    "INT": io.Int,
    "FLOAT": io.Float,
    "COMBO": io.Combo,
    "STRING": io.String,
}


def _schema(node: Node) -> Any:
    outputs = [_KINDS[node.kind].Output(display_name=node.output or None, tooltip=node.tip or None)]
    return io.Schema(
        node_id=node.name,
        display_name=node.title,
        category=CATEGORY,
        description=node.description,
        inputs=[_input(one) for one in node.inputs],
        outputs=outputs,
        is_output_node=node.shows,
    )


def _input(one: Input) -> Any:
    options = dict(one.bounds)
    if one.choices:
        options["options"] = list(one.choices)
    if one.default is not None:
        options["default"] = one.default
    made = _KINDS[one.kind].Input(one.name, optional=one.optional, tooltip=one.tooltip, **options)
    if one.advanced:  # an argument of newer versions only
        made.extra_dict = {**made.extra_dict, "advanced": True}
    return made


class AgentSD(io.ComfyNode):
    """The node that patches a model."""

    @classmethod
    def define_schema(cls) -> Any:
        return _schema(PATCH)

    @classmethod
    def execute(cls, **values: Any) -> Any:
        return io.NodeOutput(patch(**values))


class AgentSDReport(io.ComfyNode):
    """The node that says what the last run did."""

    @classmethod
    def define_schema(cls) -> Any:
        return _schema(REPORT)

    @classmethod
    def execute(cls, **values: Any) -> Any:
        text = describe(**values)
        return io.NodeOutput(text, ui={"text": (text,)})


class Nodes(ComfyExtension):
    """Both nodes."""

    async def get_node_list(self) -> list[Any]:
        return [AgentSD, AgentSDReport]


async def comfy_entrypoint() -> Nodes:
    """What ComfyUI calls to get the nodes."""
    return Nodes()
