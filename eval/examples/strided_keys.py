"""An example of a method of one's own: at full resolution every token attends to one token out of `stride`.

python eval/fid_bench.py --method-module eval/examples/strided_keys.py --methods sd,agentsd,strided-keys
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from eval.common.methods import Method, register
from eval.common.protocol import Scenario
from eval.common.scenarios import full_resolution_layers


class StridedKeys:
    """Attention of all tokens to every stride-th one, by the processor that was there."""

    def __init__(self, processor: Any, stride: int):
        self.processor = processor
        self.stride = stride

    def __call__(self, attn: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        return self.processor(attn, hidden_states, hidden_states[:, :: self.stride])


@contextmanager
def put_on(pipe: Any, scenario: Scenario) -> Iterator[None]:
    """Put the processors on the layers that agentsd patches; take them off afterwards."""
    before = {layer: layer.processor for layer in full_resolution_layers(pipe).values()}
    for layer, processor in before.items():
        layer.processor = StridedKeys(processor, scenario.options["stride"])
    try:
        yield
    finally:
        for layer, processor in before.items():
            layer.processor = processor


register(
    Method(
        name="strided-keys",
        colour="#7b3294",
        put_on=put_on,
        what="keys and values of every stride-th token alone",
        settings=({"stride": 2}, {"stride": 4}),
    )
)
