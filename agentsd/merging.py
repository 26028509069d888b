"""Token merging on a 2-D grid (ToMe for Stable Diffusion): match tokens, merge them, unmerge them; torch only.

Source: Bolya & Hoffman, "Token Merging for Fast Stable Diffusion" (arXiv 2303.17604), section 3, whose words are used
throughout: one destination (dst) token per cell of a regular grid, every other token is a source (src), the `r` most
similar srcs are averaged into their dst.

    matching = match_tokens(x, height, width, stride=(2, 2))     # from the features that say what is alike
    merged = merge_tokens(y, matching, r)                        # [B, N, C] -> [B, N - r, C]
    y_again = unmerge_tokens(merged, matching, r)                # [B, N - r, C] -> [B, N, C]
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass

import torch
from torch import Tensor

# Similarities computed at once. It bounds the memory of the matching (64 MiB in float32) whatever the picture's size.
_SIMILARITIES_PER_BLOCK = 2**24


@dataclass(frozen=True)
class TokenMatching:
    """Which token may merge into which: the edges from srcs to dsts, best first.

    A plain value: any number `r` of its edges can be used, on any features of the same tokens.

    Attributes:
        src_index: [B, num_src] token numbers of the srcs, in order of falling similarity to their best dst.
        best_dst: [B, num_src] for each of them its best dst, as a position in `dst_index`.
        dst_index: [num_dst] token numbers of the dsts, row by row.
        num_tokens: N = num_src + num_dst.
    """

    src_index: Tensor
    best_dst: Tensor
    dst_index: Tensor
    num_tokens: int

    @property
    def num_src(self) -> int:
        return self.src_index.shape[1]

    @property
    def num_dst(self) -> int:
        return self.dst_index.shape[0]


def grid_cells(height: int, width: int, stride: tuple[int, int]) -> int:
    """Number of whole (rows × columns) cells in a height × width grid: the number of dsts. It can be 0."""
    return (height // stride[0]) * (width // stride[1])


def match_tokens(
    metric: Tensor, height: int, width: int, stride: tuple[int, int], offsets: Tensor | None = None
) -> TokenMatching:
    """Find for every src the dst it is most similar to, and rank the srcs by that similarity.

    Args:
        metric: [B, N, C] features whose cosine similarity decides, N = height · width, row by row.
        height, width: size of the token grid. It need not be divisible by `stride`: tokens outside whole cells are srcs.
        stride: (rows, columns) of one cell.
        offsets: [cells] integers in [0, rows · columns), the place of the dst inside each cell, counted row by row;
            None takes the upper left token.

    Returns:
        A TokenMatching for the B · N tokens. It carries no gradient.

    Raises:
        ValueError: N is not height · width, no whole cell fits into the grid, or `offsets` has the wrong length.

    Source: ToMe for Stable Diffusion, section 3.1.
    """
    batch, num_tokens, _ = metric.shape
    if num_tokens != height * width:
        raise ValueError(f"metric has {num_tokens} tokens, but a {height}×{width} grid has {height * width}")
    cells = grid_cells(height, width, stride)
    if cells == 0:
        raise ValueError(f"no {stride[0]}×{stride[1]} cell fits into a {height}×{width} grid: use a smaller stride")
    if offsets is not None and offsets.shape != (cells,):
        raise ValueError(f"offsets must have shape ({cells},), one per cell, not {tuple(offsets.shape)}")

    with torch.no_grad():
        dst_index = _dst_index(height, width, stride, offsets, metric.device)
        src_index = _complement(dst_index, num_tokens)

        # The squares of a half-precision token can exceed the range of float16.
        norm = torch.linalg.vector_norm(metric, dim=-1, keepdim=True, dtype=_accumulate_dtype(metric))
        unit = (metric / norm.clamp_min(torch.finfo(torch.float32).tiny)).to(metric.dtype)
        src, dst = unit.index_select(1, src_index), unit.index_select(1, dst_index).transpose(1, 2)

        rows_per_block = max(1, _SIMILARITIES_PER_BLOCK // (batch * cells))
        best = [(block @ dst).max(dim=-1) for block in src.split(rows_per_block, dim=1)]
        similarity = torch.cat([values for values, _ in best], dim=1)
        best_dst = torch.cat([indices for _, indices in best], dim=1)

        ranking = similarity.argsort(dim=-1, descending=True, stable=True)
        return TokenMatching(
            src_index=src_index[ranking],
            best_dst=best_dst.gather(1, ranking),
            dst_index=dst_index,
            num_tokens=num_tokens,
        )


def merge_tokens(x: Tensor, matching: TokenMatching, r: int) -> Tensor:
    """Average the `r` best srcs into their dsts; undone, as far as a mean can be, by `unmerge_tokens`.

    Args:
        x: [B, N, C] features of the matched tokens.
        matching: from `match_tokens`.
        r: how many srcs to merge, 0 ≤ r ≤ num_src.

    Returns:
        [B, N − r, C] in x's dtype: the un-merged srcs, then the dsts, each the mean of itself and its merged srcs
        (accumulated in float32 for half-precision types). r = 0 returns x itself.

    Raises:
        ValueError: r is out of range, or x has other tokens than the matching.
    """
    if r == 0:
        return x
    _check(x, matching, r, matching.num_tokens)
    batch, num_tokens, channels = x.shape
    rows = x.reshape(batch * num_tokens, channels)
    num_dst = matching.num_dst

    # Rows of a flat [B · N, C] matrix are copied whole, which is many times faster than a gather along dim 1.
    src_rows = _flat_rows(matching.src_index, num_tokens)
    unmerged = rows.index_select(0, src_rows[:, r:].reshape(-1)).view(batch, -1, channels)
    merged = rows.index_select(0, src_rows[:, :r].reshape(-1))
    dst = x.index_select(1, matching.dst_index).view(batch * num_dst, channels)
    target = _flat_rows(matching.best_dst[:, :r], num_dst).reshape(-1)

    accumulate_dtype = _accumulate_dtype(x)
    totals = _add_rows(dst.to(accumulate_dtype), target, merged.to(accumulate_dtype))
    counts = torch.ones(batch * num_dst, dtype=accumulate_dtype, device=x.device)
    counts = counts.index_add(0, target, torch.ones_like(target, dtype=accumulate_dtype))
    means = (totals / counts[:, None]).to(x.dtype).view(batch, num_dst, channels)
    return torch.cat([unmerged, means], dim=1)


def unmerge_tokens(x: Tensor, matching: TokenMatching, r: int) -> Tensor:
    """Put the result of `merge_tokens` back on the grid: each merged src gets its dst's value.

    Args:
        x: [B, N − r, C], ordered as `merge_tokens(…, matching, r)` returns it.
        matching, r: the ones it was merged with.

    Returns:
        [B, N, C] in the grid's order. r = 0 returns x itself.

    Raises:
        ValueError: r is out of range, or x has not N − r tokens.
    """
    if r == 0:
        return x
    _check(x, matching, r, matching.num_tokens - r)
    batch, num_merged, channels = x.shape
    rows = _flat_rows(merged_position(matching, r), num_merged).reshape(-1)
    return x.reshape(batch * num_merged, channels).index_select(0, rows).view(batch, matching.num_tokens, channels)


def merged_position(matching: TokenMatching, r: int) -> Tensor:
    """Where each token of the grid went: [B, N] positions in the output of `merge_tokens(…, matching, r)`."""
    batch, num_src = matching.src_index.shape
    num_unmerged, device = num_src - r, matching.src_index.device
    src_position = torch.cat(
        [matching.best_dst[:, :r] + num_unmerged, torch.arange(num_unmerged, device=device).expand(batch, -1)], dim=1
    )
    dst_position = torch.arange(num_unmerged, num_unmerged + matching.num_dst, device=device).expand(batch, -1)
    tokens = torch.cat([matching.src_index, matching.dst_index.expand(batch, -1)], dim=1)
    return torch.empty_like(tokens).scatter(1, tokens, torch.cat([src_position, dst_position], dim=1))


def draw_offsets(
    seed: int, timestep: float, num_layers: int, cells: int, cell_size: int, device: torch.device | str = "cpu"
) -> Tensor:
    """Draw the place of the dst in each cell, for every layer of one UNet call.

    A stateless hash of (seed, timestep, layer, cell): the same arguments give the same draws on every device, no
    generator is read or advanced, and nothing is copied between host and device.

    Returns:
        [num_layers, cells] int64, uniform over 0 … cell_size − 1.
    """
    digest = hashlib.blake2b(struct.pack("<qd", seed, timestep), digest_size=4).digest()
    key = int.from_bytes(digest, "little")
    layer_keys = _mix32(torch.arange(num_layers, dtype=torch.int64, device=device) ^ key)
    drawn = _mix32(layer_keys[:, None] ^ torch.arange(cells, dtype=torch.int64, device=device))
    return drawn * cell_size >> 32


def _mix32(x: Tensor) -> Tensor:
    """Scramble 32-bit integers held in int64. Both factors are below 2**31, so no product overflows."""
    for factor in (0x7FEB352D, 0x297A2D39):
        x = ((x ^ (x >> 16)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 15)


def _dst_index(height: int, width: int, stride: tuple[int, int], offsets: Tensor | None, device) -> Tensor:
    rows, columns = stride
    cells_down, cells_across = height // rows, width // columns
    top = torch.arange(cells_down, device=device)[:, None] * rows
    left = torch.arange(cells_across, device=device)[None, :] * columns
    if offsets is not None:
        inside = offsets.to(device).view(cells_down, cells_across)
        top, left = top + torch.div(inside, columns, rounding_mode="floor"), left + inside % columns
    return (top * width + left).reshape(-1)


def _complement(index: Tensor, size: int) -> Tensor:
    """The numbers of 0 … size − 1 that are not in `index`, rising. A stable sort keeps the shape static."""
    taken = torch.zeros(size, dtype=torch.uint8, device=index.device).index_fill(0, index, 1)
    return taken.argsort(stable=True)[: size - index.shape[0]]


def _flat_rows(index: Tensor, rows_per_sample: int) -> Tensor:
    """[B, K] indices inside each sample -> [B, K] row numbers of the flattened [B · rows_per_sample, C] matrix."""
    return index + torch.arange(index.shape[0], device=index.device)[:, None] * rows_per_sample


def _add_rows(totals: Tensor, target: Tensor, rows: Tensor) -> Tensor:
    # On CUDA index_add sums in whatever order the threads come, so pictures would differ in their last bits from run to
    # run; index_put sorts first and is deterministic. On CPU index_add is, and is ten times faster.
    if totals.is_cuda:
        return totals.index_put((target,), rows, accumulate=True)
    return totals.index_add(0, target, rows)


def _accumulate_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _check(x: Tensor, matching: TokenMatching, r: int, expected_tokens: int) -> None:
    if not 0 <= r <= matching.num_src:
        raise ValueError(f"r must lie in 0 … {matching.num_src} (the number of srcs), not {r}")
    if x.shape[1] != expected_tokens:
        raise ValueError(f"x has {x.shape[1]} tokens, expected {expected_tokens} for r = {r}")
