"""run: trace, predict and write the page; with tiny networks for a dry run."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from agentsd.files import write_atomically

from ..common.environment import commit, device_name
from ..common.fingerprint import package_versions
from .networks import Network, Shape
from .page import as_data, as_page
from .public_figures import RATIOS, TIMES, PublicFigure
from .runs import costs_of
from .validation import predict_all

SHAPES = (Shape("sd15", 512), Shape("sd15", 768), Shape("sd15", 1024), Shape("sdxl", 1024))


def run(
    command: str,
    out: Path | None,
    hook_ms: float | None = None,
    dry_run: bool = False,
    shapes: Sequence[Shape] = SHAPES,
    figures: Sequence[PublicFigure] = (*TIMES, *RATIOS),
) -> None:
    """Forecast, print where it was written, or with no `out` the page itself.

    Args:
        command: what the page says it was made by.
        out: folder of gpu-forecast.md and gpu-forecast.json.
        hook_ms: the host's time in the hooks of a call, in milliseconds; None measures it.
        dry_run: tiny networks: every step, and figures of no meaning.
        shapes: what to forecast.
        figures: what to compare with.
    """
    network_of = _tiny if dry_run else Network

    def say(text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    hooks = hook_ms / 1e3 if hook_ms is not None else 1e-3 if dry_run else None
    costs = {shape: costs_of(shape, hooks, network_of=network_of, say=say) for shape in shapes}
    predictions = predict_all(figures, network_of=network_of, say=say)
    versions = ", ".join(f"{name} {number}" for name, number in package_versions().items())
    about: dict[str, Any] = {"command": command, "commit": commit(), "versions": versions}
    about["machine"] = device_name(torch.device("cpu"))
    page = as_page(costs, predictions, about)
    if dry_run:
        page = page.replace("# A forecast for GPUs", "# A dry run with tiny networks: no figure here means anything", 1)
    if out is None:
        print(page)
        return
    out.mkdir(parents=True, exist_ok=True)
    data = json.dumps(as_data(costs, predictions, about), indent=1, ensure_ascii=False)
    for name, text in (("gpu-forecast.json", data + "\n"), ("gpu-forecast.md", page)):
        write_atomically(out / name, text)
        print(out / name)


def _tiny(shape: Shape) -> Network:
    """A network of the same kinds of layers, with a hundredth of the size."""
    levels = 2 if shape.architecture == "sdxl" else 3
    attends = [True, True, False][:levels] if levels == 3 else [False, True]
    config = dict(
        sample_size=16, layers_per_block=1, block_out_channels=(32,) * levels, norm_num_groups=8, attention_head_dim=8,
        cross_attention_dim=32,
        down_block_types=tuple("CrossAttnDownBlock2D" if one else "DownBlock2D" for one in attends),
        up_block_types=tuple("CrossAttnUpBlock2D" if one else "UpBlock2D" for one in reversed(attends)),
    )  # fmt: skip
    if shape.architecture == "sdxl":
        config |= dict(
            addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=80
        )
    return Network(dataclasses.replace(shape, size=128), config)
