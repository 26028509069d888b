"""What it costs that agent biases follow their parameters: CPU time of one image, in three ways, in turn.

    OMP_NUM_THREADS=1 python -m eval.vision.bias_cost [MODEL ...]

"fixed": the biases of the first call, never looked at again. "compared": as the package does in eval on the CPU, kept
while every number of the parameters is the same. "resized": computed in each call, as in training and on other devices.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import timm
import torch

from agentsd.images.rounds import rotated
from agentsd.vision.bias import AgentBias

MODELS = (
    "agent_deit_tiny_patch16_224",
    "agent_deit_small_patch16_224",
    "agent_pvt_tiny",
    "agent_swin_tiny_patch4_window56_224",
    "agent_cswin_tiny_224",
)
_COMPARED = AgentBias.current_biases


def _fixed(self: Any, *args: Any) -> Any:
    return _COMPARED(self, *args) if self._kept is None else self._kept.biases


WAYS: dict[str, Callable] = {"fixed": _fixed, "compared": _COMPARED, "resized": AgentBias.biases}


@torch.no_grad()
def seconds(name: str, rounds: int = 9) -> dict[str, float]:
    """Median CPU seconds of one image by each way; the order of the ways turns with the rounds."""
    model: Any = timm.create_model(name).eval()
    image = torch.randn(1, *model.default_cfg["input_size"])
    laps: dict[str, list[float]] = {way: [] for way in WAYS}
    model(image)
    for turn in range(rounds):
        for way in rotated(list(WAYS), turn):
            with mock.patch.object(AgentBias, "current_biases", WAYS[way]):
                start = time.process_time()
                model(image)
                laps[way].append(time.process_time() - start)
    return {way: statistics.median(times) for way, times in laps.items()}


if __name__ == "__main__":
    torch.manual_seed(0)
    for model_name in sys.argv[1:] or MODELS:
        found = seconds(model_name)
        more = {way: 100 * (found[way] / found["fixed"] - 1) for way in ("compared", "resized")}
        print(
            f"{model_name}: fixed {1000 * found['fixed']:.1f} ms, "
            + ", ".join(f"{way} {part:+.1f} %" for way, part in more.items()),
            flush=True,
        )
