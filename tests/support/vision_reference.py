"""The four vision families computed naively from a state dict under the authors' names, softmax by its formula.


Each function takes `w`, a dict of tensors under the published names, and returns the logits [B, classes].
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F


def soft(logits):
    exp = (logits - logits.amax(-1, keepdim=True)).exp()
    return exp / exp.sum(-1, keepdim=True)


def linear(w, name, x):
    return x @ w[f"{name}.weight"].mT + w[f"{name}.bias"]


def norm(w, name, x, eps):
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (variance + eps).sqrt() * w[f"{name}.weight"] + w[f"{name}.bias"]


def conv(w, name, image, **settings):
    return F.conv2d(image, w[f"{name}.weight"], w[f"{name}.bias"], **settings)


def mlp(w, name, x):
    hidden = linear(w, f"{name}.fc1", x)
    return linear(w, f"{name}.fc2", hidden * 0.5 * (1 + torch.erf(hidden / math.sqrt(2))))


def image_of(tokens, grid):
    return torch.stack([row.T.reshape(row.shape[1], *grid) for row in tokens])


def tokens_of(image):
    return torch.stack([sample.reshape(sample.shape[0], -1).T for sample in image])


def attend(query, key, value, heads, bias=None):
    """Plain attention, one head at a time; tokens [B, N, C] in and out."""
    dim = query.shape[-1] // heads
    out = []
    for h in range(heads):
        part = slice(h * dim, (h + 1) * dim)
        logits = query[..., part] @ key[..., part].mT / math.sqrt(dim)
        out.append(soft(logits if bias is None else logits + bias[h]) @ value[..., part])
    return torch.cat(out, -1)


def agent_biases(w, name, grid, pooled):
    """(B1 [H, A, N], B2 [H, N, A]) by the authors' order: sum rows and columns at the trained grid, then resize."""
    resize = lambda x, size: F.interpolate(x, size=size, mode="bilinear", align_corners=False)  # noqa: E731
    axes = (w[f"{name}.ah_bias"] + w[f"{name}.aw_bias"])[0]  # H, A, s, s
    first = (resize(w[f"{name}.an_bias"], grid) + resize(axes, grid)).flatten(2)
    axes = (w[f"{name}.ha_bias"] + w[f"{name}.wa_bias"])[0].permute(0, 3, 1, 2)
    second = (resize(w[f"{name}.na_bias"], grid) + resize(axes, grid)).flatten(2).mT
    if f"{name}.ac_bias" in w:
        first = torch.cat([w[f"{name}.ac_bias"][0], first], 2)
        second = torch.cat([w[f"{name}.ca_bias"][0], second], 1)
    side = math.isqrt(first.shape[1])
    if pooled != side:
        over = lambda b: resize(b.unflatten(-1, (side, side)), (pooled, pooled)).flatten(2)  # noqa: E731
        first, second = over(first.mT).mT, over(second)
    return first, second


def agent(w, name, query, key, value, grid, heads, dwc="dwc", pooled=None):
    """The agent attention module on projected tokens, without the output projection."""
    prefix = int(f"{name}.ac_bias" in w)
    pooled = pooled or math.isqrt(w[f"{name}.an_bias"].shape[1])
    agents = tokens_of(F.adaptive_avg_pool2d(image_of(query[:, prefix:], grid), pooled))
    first, second = agent_biases(w, name, grid, pooled)
    aggregated = attend(agents, key, value, heads, first)
    out = attend(query, agents, aggregated, heads, second)
    local = conv(w, f"{name}.{dwc}", image_of(value[:, prefix:], grid), padding=1, groups=value.shape[-1])
    return torch.cat([out[:, :prefix], out[:, prefix:] + tokens_of(local)], 1)


def deit(w, image, heads, patch, agent_blocks):
    x = conv(w, "patch_embed.proj", image, stride=patch)
    grid = tuple(x.shape[-2:])
    x = tokens_of(x)
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], 1) + w["pos_embed"]
    depth = 1 + max(int(name.split(".")[1]) for name in w if name.startswith("blocks."))
    for i in range(depth):
        name = f"blocks.{i}"
        query, key, value = linear(w, f"{name}.attn.qkv", norm(w, f"{name}.norm1", x, 1e-6)).chunk(3, -1)
        if i < agent_blocks:
            out = agent(w, f"{name}.attn", query, key, value, grid, heads)
        else:
            out = attend(query, key, value, heads)
        x = x + linear(w, f"{name}.attn.proj", out)
        x = x + mlp(w, f"{name}.mlp", norm(w, f"{name}.norm2", x, 1e-6))
    return linear(w, "head", norm(w, "norm", x, 1e-6)[:, 0])


def pvt(w, image, heads, patches=(4, 2, 2, 2), pooled=(None,) * 4):
    for s in range(1, 5):
        x = conv(w, f"patch_embed{s}.proj", image, stride=patches[s - 1])
        grid = tuple(x.shape[-2:])
        x = norm(w, f"patch_embed{s}.norm", tokens_of(x), 1e-5)
        positions = w[f"pos_embed{s}"]
        side = math.isqrt(positions.shape[1])
        positions = F.interpolate(image_of(positions, (side, side)), size=grid, mode="bilinear", align_corners=False)
        x = x + tokens_of(positions)
        i = 0
        while f"block{s}.{i}.norm1.weight" in w:
            name = f"block{s}.{i}"
            y = norm(w, f"{name}.norm1", x, 1e-6)
            key, value = linear(w, f"{name}.attn.kv", y).chunk(2, -1)
            query = linear(w, f"{name}.attn.q", y)
            out = agent(w, f"{name}.attn", query, key, value, grid, heads[s - 1], pooled=pooled[s - 1])
            x = x + linear(w, f"{name}.attn.proj", out)
            x = x + mlp(w, f"{name}.mlp", norm(w, f"{name}.norm2", x, 1e-6))
            i += 1
        image = image_of(x, grid)
    return linear(w, "head", x.mean(1))


def window_attention(w, name, x, heads, window, shift):
    """Swin's window attention on [B, H, W, C]: pad at the bottom and right, roll, attend in each window, undo."""
    batch, height, width, dim = x.shape
    padded = F.pad(x, (0, 0, 0, -width % window, 0, -height % window))
    rolled = torch.roll(padded, (-shift, -shift), (1, 2))
    tall, wide = rolled.shape[1:3]

    def region(i, side):  # which of the three bands of a shifted side a place lies in
        return 0 if not shift or i < side - window else 1 if i < side - shift else 2

    table = w[f"{name}.relative_position_bias_table"]
    out = torch.zeros_like(rolled)
    for top in range(0, tall, window):
        for left in range(0, wide, window):
            cells = [(top + r, left + c) for r in range(window) for c in range(window)]
            tokens = torch.stack([rolled[:, r, c] for r, c in cells], 1)
            bias = torch.empty(heads, len(cells), len(cells))
            for i, (r1, c1) in enumerate(cells):
                for j, (r2, c2) in enumerate(cells):
                    bias[:, i, j] = table[(r1 - r2 + window - 1) * (2 * window - 1) + c1 - c2 + window - 1]
                    if (region(r1, tall), region(c1, wide)) != (region(r2, tall), region(c2, wide)):
                        bias[:, i, j] -= 100
            query, key, value = linear(w, f"{name}.qkv", tokens).chunk(3, -1)
            done = linear(w, f"{name}.proj", attend(query, key, value, heads, bias))
            for i, (r, c) in enumerate(cells):
                out[:, r, c] = done[:, i]
    return torch.roll(out, (shift, shift), (1, 2))[:, :height, :width]


def swin(w, image, heads, window, patch=4, always_partition=False, pooled=(None,) * 4):
    """Returns (logits, the map [B, H, W, C] at the end of each stage, before its downsampling)."""
    x = conv(w, "patch_embed.proj", image, stride=patch)
    x = norm(w, "patch_embed.norm", x.permute(0, 2, 3, 1), 1e-5)
    maps, s = [], 0
    while f"layers.{s}.blocks.0.norm1.weight" in w:
        i = 0
        while f"layers.{s}.blocks.{i}.norm1.weight" in w:
            name = f"layers.{s}.blocks.{i}"
            batch, height, width, dim = x.shape
            y = norm(w, f"{name}.norm1", x, 1e-5)
            if f"{name}.attn.an_bias" in w:
                tokens = y.reshape(batch, -1, dim)
                query, key, value = linear(w, f"{name}.attn.qkv", tokens).chunk(3, -1)
                y = agent(w, f"{name}.attn", query, key, value, (height, width), heads[s], pooled=pooled[s])
                y = linear(w, f"{name}.attn.proj", y).reshape(x.shape)
            else:
                fits = min(height, width) <= window and not always_partition
                side = min(height, width) if fits else window
                y = window_attention(w, f"{name}.attn", y, heads[s], side, 0 if fits or i % 2 == 0 else window // 2)
            x = x + y
            x = x + mlp(w, f"{name}.mlp", norm(w, f"{name}.norm2", x, 1e-5))
            i += 1
        maps.append(x)
        if f"layers.{s}.downsample.reduction.weight" in w:
            x = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
            # The order of the four neighbours: down each column first.
            x = torch.cat([x[:, 0::2, 0::2], x[:, 1::2, 0::2], x[:, 0::2, 1::2], x[:, 1::2, 1::2]], -1)
            x = norm(w, f"layers.{s}.downsample.norm", x, 1e-5) @ w[f"layers.{s}.downsample.reduction.weight"].mT
        s += 1
    return linear(w, "head", norm(w, "norm", x, 1e-5).mean((1, 2))), maps


def stripes(w, name, query, key, value, grid, heads, tall, wide):
    """CSwin's attention inside stripes of tall × wide places, each with its own local position encoding."""
    height, width = grid
    out = torch.zeros_like(value)
    places = torch.arange(height * width).reshape(grid)
    for top in range(0, height, tall):
        for left in range(0, width, wide):
            cells = places[top : top + tall, left : left + wide]
            mine = cells.flatten()
            local = conv(w, f"{name}.get_v", image_of(value[:, mine], cells.shape), padding=1, groups=value.shape[-1])
            out[:, mine] = attend(query[:, mine], key[:, mine], value[:, mine], heads) + tokens_of(local)
    return out


def cswin(w, image, heads, split, stride=4):
    x = conv(w, "stage1_conv_embed.0", image, stride=stride, padding=2)
    grid = tuple(x.shape[-2:])
    x = norm(w, "stage1_conv_embed.2", tokens_of(x), 1e-5)
    for s in range(1, 5):
        i = 0
        while f"stage{s}.{i}.norm1.weight" in w:
            name = f"stage{s}.{i}"
            query, key, value = linear(w, f"{name}.qkv", norm(w, f"{name}.norm1", x, 1e-5)).chunk(3, -1)
            if f"{name}.attns.0.an_bias" in w:
                out = agent(w, f"{name}.attns.0", query, key, value, grid, heads[s - 1], dwc="get_v")
            elif f"{name}.attns.1.get_v.weight" in w:
                half = slice(None, x.shape[-1] // 2), slice(x.shape[-1] // 2, None)
                parts = [(query[..., p], key[..., p], value[..., p]) for p in half]
                n = heads[s - 1] // 2
                out = [stripes(w, f"{name}.attns.0", *parts[0], grid, n, grid[0], split)]
                out.append(stripes(w, f"{name}.attns.1", *parts[1], grid, n, split, grid[1]))
                out = torch.cat(out, -1)
            else:
                out = stripes(w, f"{name}.attns.0", query, key, value, grid, heads[s - 1], *grid)
            x = x + linear(w, f"{name}.proj", out)
            x = x + mlp(w, f"{name}.mlp", norm(w, f"{name}.norm2", x, 1e-5))
            i += 1
        if s < 4:
            down = conv(w, f"merge{s}.conv", image_of(x, grid), stride=2, padding=1)
            grid = tuple(down.shape[-2:])
            x = norm(w, f"merge{s}.norm", tokens_of(down), 1e-5)
    return linear(w, "head", norm(w, "norm", x, 1e-5).mean(1))
