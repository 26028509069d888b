"""The method in naive loops over tokens, in float64: written from the formulas, sharing no code with the package."""

from __future__ import annotations

import math

import torch


def match(metric, height, width, stride, offsets=None, tile=None):
    """For one sample, metric [N, C]: (srcs ranked by falling similarity, {src: dst}, dsts row by row).

    With a tile (rows, columns), a src looks for its dst in its own tile only.
    """
    tile_rows, tile_columns = tile or (height, width)
    tile_of = lambda token: (token // width // tile_rows, token % width // tile_columns)  # noqa: E731
    rows, columns = stride
    dsts = []
    for i in range(height // rows):
        for j in range(width // columns):
            place = 0 if offsets is None else int(offsets[len(dsts)])
            dsts.append((i * rows + place // columns) * width + j * columns + place % columns)
    best = {}
    for token in range(height * width):
        if token in dsts:
            continue
        near = [dst for dst in dsts if tile_of(dst) == tile_of(token)]
        similarities = [cosine(metric[token], metric[dst]) for dst in near]
        k = max(range(len(near)), key=lambda k: similarities[k])
        best[token] = (similarities[k], near[k])
    ranked = sorted(best, key=lambda token: -best[token][0])
    return ranked, {token: dst for token, (_, dst) in best.items()}, dsts


def cosine(a, b):
    return float((a * b).sum() / math.sqrt(float((a * a).sum()) * float((b * b).sum())))


def merge(x, ranked, best, dsts, r):
    """For one sample, x [N, C]: list of (mean vector, its member tokens), un-merged srcs first, then dsts."""
    groups = [[token] for token in ranked[r:]]
    groups += [[dst] + [src for src in ranked[:r] if best[src] == dst] for dst in dsts]
    return [(sum(x[token] for token in group) / len(group), group) for group in groups]


def attend(queries, keys, values, scale):
    """Softmax attention for one head, one query at a time: lists of vectors in, list of vectors out."""
    out = []
    for query in queries:
        logits = scale * torch.stack([query @ key for key in keys])
        weights = (logits - logits.detach().max()).exp()
        out.append(sum(weight * value for weight, value in zip(weights, values)) / weights.sum())
    return out


def double(module, x):
    """A linear layer in float64; of a model that is in float64, the module itself, with its LoRA."""
    if next(module.parameters()).dtype is torch.float64:
        return module(x)
    return torch.nn.functional.linear(x, module.weight.double(), None if module.bias is None else module.bias.double())


@torch.no_grad()
def downsampled_layer(attn, hidden_states, dsts):
    """Self-attention in which every token is a query and only the tokens `dsts` are keys and values."""
    outputs = []
    for y in hidden_states.double():
        q, k, v = (
            double(m, x).unflatten(-1, (attn.heads, -1))
            for m, x in ((attn.to_q, y), (attn.to_k, y[dsts]), (attn.to_v, y[dsts]))
        )
        per_head = [torch.stack(attend(q[:, h], k[:, h], v[:, h], q.shape[-1] ** -0.5)) for h in range(attn.heads)]
        outputs.append(double(attn.to_out[0], torch.cat(per_head, dim=-1)))
    return torch.stack(outputs)


@torch.no_grad()
def grid_agents_layer(attn, hidden_states, dsts, alpha, exponent):
    """Agent attention of all tokens through the tokens `dsts`, projected like queries."""
    outputs = []
    for y in hidden_states.double():
        q, a, k, v = (
            double(m, x).unflatten(-1, (attn.heads, -1))
            for m, x in ((attn.to_q, y), (attn.to_q, y[dsts]), (attn.to_k, y), (attn.to_v, y))
        )
        d, per_head = q.shape[-1], []
        for h in range(attn.heads):
            aggregated = attend(a[:, h], k[:, h], v[:, h], d**-0.5)
            out = attend(q[:, h], a[:, h], aggregated, d**exponent)
            per_head.append(torch.stack([o + alpha * value for o, value in zip(out, v[:, h])]))
        outputs.append(double(attn.to_out[0], torch.cat(per_head, dim=-1)))
    return torch.stack(outputs)


@torch.no_grad()
def layer(attn, block_input, hidden_states, height, width, stride, offsets, r, r_agents, alpha, exponent, tile=None):
    """One patched self-attention layer, [B, N, C] -> [B, N, C]; r_agents None is the merge phase."""
    matched = [match(x, height, width, stride, offsets, tile) for x in block_input.double()]
    return attend_merged(attn, hidden_states, matched, r, r_agents, alpha, exponent)


def attend_merged(attn, hidden_states, matched, r, r_agents, alpha, exponent):
    """As `layer`, from what `match` found for each sample; gradients flow through it."""
    outputs = []
    for (ranked, best, dsts), y in zip(matched, hidden_states.double()):
        merged = merge(y, ranked, best, dsts, r)
        heads = attn.heads
        tokens = torch.stack([mean for mean, _ in merged])
        q, k, v = (double(m, tokens).unflatten(-1, (heads, -1)) for m in (attn.to_q, attn.to_k, attn.to_v))
        d = q.shape[-1]
        if r_agents is not None:
            agent_tokens = torch.stack([mean for mean, _ in merge(y, ranked, best, dsts, r_agents)])
            a = double(attn.to_q, agent_tokens).unflatten(-1, (heads, -1))
        per_head = []
        for h in range(heads):
            if r_agents is None:
                out = attend(q[:, h], k[:, h], v[:, h], d**-0.5)
            else:
                gathered = attend(a[:, h], k[:, h], v[:, h], d**-0.5)
                out = attend(q[:, h], a[:, h], gathered, d**exponent)
                out = [o + alpha * value for o, value in zip(out, v[:, h])]
            per_head.append(torch.stack(out))
        projected = double(attn.to_out[0], torch.cat(per_head, dim=-1))
        row_of = {token: row for row, (_, group) in zip(projected, merged) for token in group}
        outputs.append(torch.stack([row_of[token] for token in range(len(y))]))
    return torch.stack(outputs)
