"""measure_effective_keys: over how many keys a model's full-resolution self-attention spreads its weights."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor

from agentsd import AgentConfig
from agentsd.unet.processor import project_key_value, project_queries
from eval.common.protocol import SD, BenchError, Plan, Sample
from eval.common.scenarios import full_resolution_layers, in_agent_phase
from eval.fid.generation import generate_batch

QUERY_STRIDE = 7
"""One query token in so many is measured. An odd number reaches all columns of grids whose width is a power of two;
every 8th would always be in the same ones."""

_LOGITS_AT_ONCE = 1 << 22


def effective_keys(query: Tensor, key: Tensor) -> Tensor:
    """exp of the entropy (natural logarithm) of each query's attention weights softmax(q Kᵀ / √d).

    N for weights that are all equal, 1 for a query that attends to one key alone. Computed in float32, some queries at
    a time, so that no M × N × heads matrix is ever held.

    Args:
        query: [B, heads, M, d].
        key: [B, heads, N, d].

    Returns:
        [B, heads, M], float32, 1 … N.
    """
    query, key = query.float() * query.shape[-1] ** -0.5, key.float()
    rows = max(1, _LOGITS_AT_ONCE // (key.shape[0] * key.shape[1] * key.shape[2]))
    found = []
    for block in query.split(rows, dim=2):
        logits = block @ key.mT
        log_weights = logits - logits.logsumexp(dim=-1, keepdim=True)
        found.append(-(log_weights.exp() * log_weights).sum(dim=-1))
    return torch.cat(found, dim=2).clamp_min(0).exp()


class RecordingProcessor:
    """Wraps a processor and records the effective keys of its self-attention.

    Attributes:
        original: the wrapped processor; it computes the output, which is bit-identical to the unrecorded one.
        query_stride: one query in so many is measured.
        found: one [B, heads, M] for each call.
        num_tokens: N of the last call.
    """

    def __init__(self, original: Any, query_stride: int = QUERY_STRIDE):
        self.original = original
        self.query_stride = query_stride
        self.found: list[Tensor] = []
        self.num_tokens = 0

    def __call__(self, attn: Attention, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        with torch.no_grad():
            key, _ = project_key_value(attn, hidden_states)
            query = project_queries(attn, hidden_states[:, :: self.query_stride])
            self.found.append(effective_keys(query, key).cpu())
        self.num_tokens = hidden_states.shape[1]
        return self.original(attn, hidden_states, *args, **kwargs)


@contextlib.contextmanager
def recording(
    pipe: Any, config: AgentConfig, query_stride: int = QUERY_STRIDE
) -> Iterator[dict[str, RecordingProcessor]]:
    """Record the full-resolution self-attention of an unpatched pipeline in the agent phase; its images stay the same.

    Args:
        config: says which timesteps the agent phase is.

    Yields:
        Module name of the layer to its recorder, which fills as the pipeline is called.

    Raises:
        BenchError: the model has no such layer.
    """
    layers = full_resolution_layers(pipe)
    if not layers:
        raise BenchError("this model's UNet has no full-resolution self-attention that agentsd could replace")
    recorders = {name: RecordingProcessor(layer.processor, query_stride) for name, layer in layers.items()}
    with in_agent_phase(pipe, config, {layer: recorders[name] for name, layer in layers.items()}):
        yield recorders


@dataclass(frozen=True)
class KeySpread:
    """How many keys the queries of one layer, or of all of them, attend to.

    Attributes:
        layer: module name, or "all".
        tokens: N, which is the most there can be.
        queries: how many were measured, over prompts, guidance halves, heads and steps.
        low, median, high: quartiles of the effective number of keys.
    """

    layer: str
    tokens: int
    queries: int
    low: float
    median: float
    high: float

    @property
    def share(self) -> float:
        """The median as a fraction of N."""
        return self.median / self.tokens


def measure_effective_keys(
    pipe: Any, plan: Plan, samples: Iterable[Sample], config: AgentConfig, query_stride: int = QUERY_STRIDE
) -> list[KeySpread]:
    """Generate images with the unpatched pipeline and measure how many keys its queries attend to in the agent phase.

    Args:
        pipe: an unpatched pipeline.
        plan: steps, guidance and size.
        samples: images to generate, one at a time; none is kept.
        config: says which timesteps the agent phase is.

    Returns:
        All layers together, then each.

    Raises:
        BenchError: no layer to measure, or none of the steps is in the agent phase.
    """
    with recording(pipe, config, query_stride) as recorders:
        for sample in samples:
            generate_batch(pipe, SD, plan, [sample])
    if not all(recorder.found for recorder in recorders.values()):
        raise BenchError(f"no UNet call of {plan.steps} steps is in the agent phase: raise --early or --steps")
    values = {
        name: torch.cat([part.flatten() for part in recorder.found]).numpy() for name, recorder in recorders.items()
    }
    # The layers are all of one level of the UNet, so they have the same tokens.
    tokens = next(iter(recorders.values())).num_tokens
    everything = {"all": np.concatenate(list(values.values())), **values}
    return [
        KeySpread(name, tokens, len(found), *map(float, np.quantile(found, (0.25, 0.5, 0.75))))
        for name, found in everything.items()
    ]
