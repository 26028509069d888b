"""Sharpen self-attention: each query attends to the tokens that look like its own (a non-local mean)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from diffusers.models.attention_processor import Attention


@torch.no_grad()
def sharpen(attn: Attention, tokens: Tensor, share: float) -> None:
    """Set an Attention's projections so that it averages, for each token, those with similar features.

    From random weights, attention in a small network settles near the mean over all tokens, where its gradient is
    almost nothing, and stays there. After this it is a non-local mean: queries and keys are the same projection on the
    principal components of the features within an image, scaled so that the median query spreads its weights over
    `share` of the keys; what is averaged, and given out twofold, is the features themselves.

    Args:
        attn: a diffusers Attention over [B, N, C] with inner width C, without biases before the softmax.
        tokens: what the layer is given, [B, N, C].
        share: effective number of keys (exp of the entropy) of the median query, as a share of N; 0 … 1.

    Raises:
        ValueError: the inner width is not C.
    """
    width = tokens.shape[-1]
    if attn.to_q.weight.shape != (width, width):
        raise ValueError(f"to_q is {tuple(attn.to_q.weight.shape)}, not {(width, width)}")
    tokens = tokens.float()
    spread = tokens - tokens.mean(dim=1, keepdim=True)
    components = torch.linalg.eigh(spread.flatten(0, 1).T @ spread.flatten(0, 1)).eigenvectors.flip(-1)
    # The mean token's direction separates no tokens; with it a few keys would get the weight of every query.
    mean = nn.functional.normalize(tokens.mean(dim=(0, 1)), dim=0)
    components = components - mean[:, None] * (mean @ components)
    order = torch.arange(width).view(-1, attn.heads).T.flatten()  # strong and weak components for every head
    projection = components.T[order]

    scale = scale_for(share, spread, projection, attn)
    for linear in (attn.to_q, attn.to_k):
        linear.weight.copy_(projection * scale)
    nn.init.eye_(attn.to_v.weight)
    nn.init.eye_(attn.to_out[0].weight).mul_(2)  # no less than the features it is added to
    nn.init.zeros_(attn.to_out[0].bias)


@torch.no_grad()
def calibrate(attn: Attention, tokens: Tensor, share: float) -> None:
    """Scale queries and keys so that the median query again has `share` of the keys.

    Projections that stay fixed do not keep attention sharp while the features that they compare are trained.

    Args:
        attn: an Attention after `sharpen`: queries and keys have the same weights.
        tokens: what the layer is now given, [B, N, C].
        share: as in `sharpen`.
    """
    scale = scale_for(share, tokens.float(), attn.to_q.weight.float(), attn)
    for linear in (attn.to_q, attn.to_k):
        linear.weight.mul_(scale)


def scale_for(share: float, tokens: Tensor, projection: Tensor, attn: Attention) -> float:
    """By bisection, what to multiply the projection by so that the median query spreads over `share` of the keys.

    Args:
        share: 0 … 1.
        tokens: before the projection, [B, N, C]; about 64 of the N are the queries, all are keys.
        projection: of queries and keys, [C, C].
        attn: for its heads and scale.

    Returns:
        A factor in 0.001 … 1000.
    """
    queries = tokens[:, :: max(1, tokens.shape[1] // 64)]
    low, high = 1e-3, 1e3
    for _ in range(24):
        scale = (low * high) ** 0.5
        if median_share(queries, tokens, projection, scale, attn) > share:
            low = scale
        else:
            high = scale
    return scale


def keep_sharp(attn: Attention, keep: bool) -> None:
    """Fix the projections of queries and keys, or lets them be trained.

    Trained, the weights flatten out within some hundred steps; fixed, more slowly, as the features still change.
    """
    for linear in (attn.to_q, attn.to_k):
        linear.requires_grad_(not keep)


def median_share(queries: Tensor, keys: Tensor, projection: Tensor, scale: float, attn: Attention) -> float:
    """Effective number of keys of the median query, as a share of all keys.

    Args:
        queries, keys: tokens before the projection, [B, M, C] and [B, N, C].
        projection: of both, [C, C], to be multiplied by `scale`.
        attn: for its heads and scale.
    """

    def heads_of(tokens: Tensor) -> Tensor:
        return (tokens @ projection.T * scale).unflatten(-1, (attn.heads, -1)).transpose(1, 2)

    logs = (heads_of(queries) @ heads_of(keys).mT * attn.scale).log_softmax(dim=-1)
    return (-(logs.exp() * logs).sum(dim=-1)).exp().median().item() / keys.shape[1]
