"""Token merging on a 2-D grid (ToMe for Stable Diffusion): match tokens, merge them, unmerge them; torch only.

Source: Bolya & Hoffman, "Token Merging for Fast Stable Diffusion" (arXiv 2303.17604), section 3, whose words are used
throughout: one destination (dst) token per cell of a regular grid, every other token is a source (src), the `r` most
similar srcs are averaged into their dst.

    split = split_grid(height, width, stride=(2, 2))     # dsts and srcs
    matching = match_tokens(x, split)                    # from the features that say what is alike
    merged = merge_tokens(y, matching, r)                # [B, N, C] -> [B, N - r, C]
    y_again = unmerge_tokens(merged, matching, r)        # [B, N - r, C] -> [B, N, C]
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

# Similarities computed at once. It bounds the memory of the matching (64 MiB in float32) whatever the image's size.
_SIMILARITIES_PER_BLOCK = 2**24


@dataclass(frozen=True)
class GridSplit:
    """Which tokens of a grid are dsts and which are srcs; with leading dimensions, of several grids.

    All counts are sizes of its tensors, so that a compiled graph takes them as dynamic sizes and not as constants.

    Attributes:
        tokens: [..., N] all token numbers: the srcs, rising within each tile, then the dsts, one per whole cell, row by
            row within each tile.
        dst_by_tile: [..., tiles, num_dst / tiles] the dsts again, one row for each of the equal tiles that the grid is
            cut into; a src is matched to a dst of its own tile.
    """

    tokens: Tensor
    dst_by_tile: Tensor

    @property
    def num_tokens(self) -> int:
        return self.tokens.shape[-1]

    @property
    def tiles(self) -> int:
        return self.dst_by_tile.shape[-2]

    @property
    def num_dst(self) -> int:
        return self.dst_by_tile.shape[-2] * self.dst_by_tile.shape[-1]

    @property
    def num_src(self) -> int:
        return self.num_tokens - self.num_dst

    @property
    def src_index(self) -> Tensor:
        """[..., num_src] token numbers of the srcs."""
        return self.tokens[..., : self.num_src]

    @property
    def dst_index(self) -> Tensor:
        """[..., num_dst] token numbers of the dsts."""
        return self.dst_by_tile.flatten(-2)

    def to(self, device: torch.device) -> GridSplit:
        """The same on another device."""
        return GridSplit(self.tokens.to(device), self.dst_by_tile.to(device))

    def unbind(self) -> list[GridSplit]:
        """The splits along the first dimension."""
        return [GridSplit(*parts) for parts in zip(self.tokens.unbind(), self.dst_by_tile.unbind())]

    def repeat(self, times: int) -> GridSplit:
        """Each split along the first dimension `times` times in a row, as where a sample has several frames."""
        return GridSplit(self.tokens.repeat_interleave(times, 0), self.dst_by_tile.repeat_interleave(times, 0))


@dataclass(frozen=True)
class TokenMatching:
    """Which token may merge into which: the edges from srcs to dsts, best first.

    A plain value: any number `r` of its edges can be used, on any features of the same tokens.

    Attributes:
        tokens: [B, N] all token numbers: the srcs in order of falling similarity to their best dst, then the dsts.
        best_dst: [B, num_src] for each src, in that order, its best dst as a position among the dsts.
    """

    tokens: Tensor
    best_dst: Tensor
    _flat_positions: list[tuple[int, Tensor]] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def num_tokens(self) -> int:
        return self.tokens.shape[1]

    @property
    def num_src(self) -> int:
        return self.best_dst.shape[1]

    @property
    def num_dst(self) -> int:
        return self.num_tokens - self.num_src


def grid_cells(height: int, width: int, stride: tuple[int, int]) -> int:
    """Number of whole (rows × columns) cells in a height × width grid: the number of dsts. It can be 0."""
    return (height // stride[0]) * (width // stride[1])


def tile_size(height: int, width: int, stride: tuple[int, int], limit: int) -> tuple[int, int]:
    """(rows, columns) of the largest tiles of at most `limit` tokens, or one cell, a side that cut the grid evenly.

    No cell is cut. A side that nothing cuts evenly, such as one of a prime length, is left whole.
    """

    def cut(length: int, cell: int) -> int:
        longest = min(max(limit, cell), length)
        return max((t for t in range(cell, longest + 1, cell) if length % t == 0), default=length)

    return cut(height, stride[0]), cut(width, stride[1])


def split_grid(
    height: int,
    width: int,
    stride: tuple[int, int],
    offsets: Tensor | None = None,
    device: torch.device | str | None = None,
    tile: tuple[int, int] | None = None,
) -> GridSplit:
    """Choose one dst in every whole cell of a grid; all other tokens, also those outside whole cells, are srcs.

    Args:
        height, width: size of the token grid. It need not be divisible by `stride`.
        stride: (rows, columns) of one cell.
        offsets: [..., cells] integers in [0, rows · columns), the place of the dst inside each cell, counted row by
            row; None takes the upper left token. Leading dimensions split several grids at once.
        device: where to, when there are no offsets.
        tile: (rows, columns) of the tiles within which tokens are matched, from `tile_size`; None matches over the
            whole grid.

    Raises:
        ValueError: no whole cell fits into the grid, `offsets` has the wrong length, or the tiles do not cut the grid
            evenly.

    Source: ToMe for Stable Diffusion, section 3.1.
    """
    cells = grid_cells(height, width, stride)
    if cells == 0:
        raise ValueError(f"no {stride[0]}×{stride[1]} cell fits into a {height}×{width} grid: use a smaller stride")
    if offsets is None:
        offsets = torch.zeros(cells, dtype=torch.int64, device=device)
    elif offsets.shape[-1] != cells:
        raise ValueError(f"offsets must have shape (…, {cells}), one per cell, not {tuple(offsets.shape)}")
    rows, columns = stride
    cell = torch.arange(cells, device=offsets.device)
    cells_across = width // columns
    corner = (cell // cells_across) * (rows * width) + (cell % cells_across) * columns
    dst_index = corner + (offsets // columns) * width + offsets % columns

    # The complement, rising: a stable sort keeps the shape static, which finding the unmarked tokens would not.
    is_dst = torch.zeros(*offsets.shape[:-1], height * width, dtype=torch.uint8, device=offsets.device)
    is_dst = is_dst.scatter(-1, dst_index, 1)
    num_src = height * width - cells
    if tile is None or tile == (height, width):
        src_index = is_dst.argsort(dim=-1, stable=True)[..., :num_src]
        return GridSplit(torch.cat([src_index, dst_index], dim=-1), dst_index.unsqueeze(-2))

    for length, cell_side, side in ((height, rows, tile[0]), (width, columns, tile[1])):
        if side != length and (length % side or side % cell_side):
            raise ValueError(
                f"{tile[0]}×{tile[1]} tiles do not cut a {height}×{width} grid of {rows}×{columns} cells evenly: take "
                "what tile_size returns"
            )
    down, across = height // tile[0], width // tile[1]
    by_tile = _tile_order(height, width, down, across, offsets.device)
    dst_index = dst_index[..., _tile_order(height // rows, cells_across, down, across, offsets.device)]
    src_index = by_tile[is_dst[..., by_tile].argsort(dim=-1, stable=True)[..., :num_src]]
    dst_by_tile = dst_index.unflatten(-1, (down * across, -1))
    return GridSplit(torch.cat([src_index, dst_index], dim=-1), dst_by_tile)


def _tile_order(height: int, width: int, down: int, across: int, device: torch.device) -> Tensor:
    """Numbers of the places of a height × width grid, tile by tile."""
    places = torch.arange(height * width, device=device)
    return places.view(down, height // down, across, width // across).transpose(1, 2).flatten()


def match_tokens(metric: Tensor, split: GridSplit) -> TokenMatching:
    """Find for every src the dst it is most similar to, and rank the srcs by that similarity.

    Args:
        metric: [B, N, C] features whose cosine similarity decides, N = height · width, row by row.
        split: dsts and srcs of that grid, the same for the whole batch ([N] tokens) or one for each sample ([B, N]).

    Returns:
        A TokenMatching for the B · N tokens. It carries no gradient.

    Raises:
        ValueError: N is not the number of tokens that were split, or B not the number of splits.

    Source: ToMe for Stable Diffusion, section 3.1.
    """
    batch, num_tokens, _ = metric.shape
    if num_tokens != split.num_tokens:
        raise ValueError(f"metric has {num_tokens} tokens, but the split is of a grid of {split.num_tokens}")
    if split.tokens.ndim == 2 and split.tokens.shape[0] != batch:
        raise ValueError(f"metric is a batch of {batch}, the split of {split.tokens.shape[0]}")

    with torch.no_grad():
        similarity, best_dst = _most_similar(metric, split)
        ranking = similarity.argsort(dim=-1, descending=True, stable=True)
        if split.tokens.ndim == 1:
            src = split.src_index[ranking]
        else:
            src = split.src_index.gather(1, ranking)
        tokens = torch.cat([src, split.dst_index.expand(batch, -1)], dim=1)
        return TokenMatching(tokens, best_dst.gather(1, ranking))


def _most_similar(metric: Tensor, split: GridSplit) -> tuple[Tensor, Tensor]:
    """Which dst each src is most similar to.

    Args:
        metric, split: as match_tokens takes them; [B, N, C] and the N tokens' srcs and dsts.

    Returns:
        [B, num_src] each src's best similarity, the cosine times a constant, which is all that ranking needs; and
        [B, num_src] its dst, as a position among the dsts.
    """
    batch, _, channels = metric.shape
    num_src, num_dst, tiles = split.num_src, split.num_dst, split.tiles
    tokens = select_tokens(metric, split.tokens)
    norm = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True, dtype=_accumulate_dtype(tokens))
    norm = norm.clamp_min(torch.finfo(torch.float32).tiny)
    src, dst = tokens[:, :num_src], tokens[:, num_src:]
    src_norm, dst_norm = norm[:, :num_src, 0], norm[:, num_src:]

    # A src's length does not change which dst it chooses. Only its best product is divided by it, for the ranking: that
    # walks through far less memory than dividing its features.
    if metric.dtype is torch.float16:
        dst_norm = dst_norm * 64  # lest a product with a long src exceed the range
    dst = (dst / dst_norm).to(metric.dtype)
    if tiles > 1:  # as if each tile were a sample of its own
        src, dst = (x.reshape(batch * tiles, -1, channels) for x in (src, dst))
    if src.shape[0] * src.shape[1] * dst.shape[1] <= _SIMILARITIES_PER_BLOCK:
        product, best_dst = (src @ dst.transpose(1, 2)).max(dim=-1)
    elif torch.compiler.is_compiling():
        product, best_dst = _largest_products_in_graph(src, dst)
    else:
        product, best_dst = _largest_products(src, dst)
    if tiles > 1:
        first_dst = torch.arange(0, num_dst, split.dst_by_tile.shape[-1], device=metric.device)
        best_dst = best_dst.view(batch, tiles, -1) + first_dst[:, None]
    return product.view(batch, -1) / src_norm, best_dst.view(batch, -1)


def _largest_products(src: Tensor, dst: Tensor) -> tuple[Tensor, Tensor]:
    """Largest product of each src [B, S, C] with a dst [B, D, C], and which: two [B, S]. Blocks bound the memory."""
    rows_per_block = max(1, _SIMILARITIES_PER_BLOCK // (dst.shape[0] * dst.shape[1]))
    best = [(block @ dst.transpose(1, 2)).max(dim=-1) for block in src.split(rows_per_block, dim=1)]
    product, best_dst = (torch.cat(parts, dim=1) for parts in zip(*best))
    return product, best_dst


# An operator of its own, as a graph would unroll the loop: another graph for each number of blocks.
@torch.library.custom_op("agentsd::largest_products", mutates_args=())
def _largest_products_in_graph(src: Tensor, dst: Tensor) -> tuple[Tensor, Tensor]:
    return _largest_products(src, dst)


@_largest_products_in_graph.register_fake
def _(src: Tensor, dst: Tensor) -> tuple[Tensor, Tensor]:
    return src.new_empty(src.shape[:2]), src.new_empty(src.shape[:2], dtype=torch.int64)


def select_tokens(x: Tensor, index: Tensor) -> Tensor:
    """Take tokens of [B, N, C] by their numbers, [M] for the whole batch or [B, M] for each sample: [B, M, C]."""
    if index.ndim == 1:
        return x.index_select(1, index)
    batch, num_tokens, channels = x.shape
    first_rows = torch.arange(0, batch * num_tokens, num_tokens, device=index.device)
    rows = (index + first_rows[:, None]).flatten()
    return x.reshape(batch * num_tokens, channels).index_select(0, rows).view(batch, -1, channels)


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
        ValueError: r is out of range, or x has other tokens or another batch than the matching.
    """
    if r == 0:
        return x
    _check(x, matching, r, matching.num_tokens)
    batch, num_tokens, channels = x.shape
    num_merged = num_tokens - r

    # Merging is one mean per bag of tokens, a bag being all tokens with the same position. Sorted bags make the sums
    # repeat exactly on every device; atomic additions on a GPU would not.
    position, token_rows = _flat_position(matching, r).sort(stable=True)
    bag_starts = torch.searchsorted(position, torch.arange(batch * num_merged, device=x.device))
    rows = x.reshape(batch * num_tokens, channels)
    if x.device.type not in ("cpu", "cuda", "meta"):  # meta, which only counts, counts what CUDA would run
        means = _means_by_adding(rows, position, token_rows, batch * num_merged)
    else:
        if x.device.type == "cpu" and x.dtype is torch.float16:
            rows = rows.float()  # this kernel rounds the sum to float16 before it divides: too large a sum is infinite
        means = F.embedding_bag(token_rows, rows, bag_starts, mode="mean")
    return means.view(batch, num_merged, channels).to(x.dtype)


def _means_by_adding(rows: Tensor, position: Tensor, token_rows: Tensor, num_bags: int) -> Tensor:
    """The bags' means [num_bags, C] in float32 or float64, where torch's oldest supported release has no bags (MPS).

    Which addition comes first is up to the device, so that its sums may differ in the last bits from run to run.
    """
    sums = torch.zeros(num_bags, rows.shape[1], dtype=_accumulate_dtype(rows), device=rows.device)
    sums = sums.index_add(0, position, rows.index_select(0, token_rows).to(sums.dtype))
    ones = torch.ones(len(position), 1, dtype=sums.dtype, device=rows.device)
    return sums / torch.zeros_like(sums[:, :1]).index_add(0, position, ones)


def unmerge_tokens(x: Tensor, matching: TokenMatching, r: int) -> Tensor:
    """Put the result of `merge_tokens` back on the grid: each merged src gets its dst's value.

    Args:
        x: [B, N − r, C], ordered as `merge_tokens(…, matching, r)` returns it.
        matching, r: the ones it was merged with.

    Returns:
        [B, N, C] in the grid's order. r = 0 returns x itself.

    Raises:
        ValueError: r is out of range, or x has not N − r tokens or another batch.
    """
    if r == 0:
        return x
    _check(x, matching, r, matching.num_tokens - r)
    batch, num_merged, channels = x.shape
    # Rows of a flat [B · M, C] matrix are copied whole, which is many times faster than a gather along dim 1.
    rows = x.reshape(batch * num_merged, channels).index_select(0, _flat_position(matching, r))
    return rows.view(batch, matching.num_tokens, channels)


def merged_position(matching: TokenMatching, r: int) -> Tensor:
    """Where each token of the grid went: [B, N] positions in the output of `merge_tokens(…, matching, r)`."""
    num_unmerged = matching.num_src - r
    # In the order of matching.tokens: the r merged srcs go to their dst's place, all others have a place of their own.
    # No slice of length r, which would tie a compiled graph to whether r is the number of srcs.
    rank = torch.arange(matching.num_src, device=matching.tokens.device)
    src = torch.where(rank < r, matching.best_dst + num_unmerged, rank - r)
    dst = torch.arange(matching.num_dst, device=matching.tokens.device) + num_unmerged
    by_rank = torch.cat([src, dst.expand(matching.tokens.shape[0], -1)], dim=1)
    return torch.empty_like(matching.tokens).scatter(1, matching.tokens, by_rank)


def _flat_position(matching: TokenMatching, r: int) -> Tensor:
    """[B · N] rows of the flattened [B · (N − r), C] merged tokens."""
    for known, flat in matching._flat_positions:  # merging and unmerging need the same: many small kernels done once
        if known == r:
            return flat
    batch, num_tokens = matching.tokens.shape
    first_rows = torch.arange(0, batch * (num_tokens - r), num_tokens - r, device=matching.tokens.device)
    flat = (merged_position(matching, r) + first_rows[:, None]).view(-1)
    matching._flat_positions.append((r, flat))
    return flat


def _accumulate_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _check(x: Tensor, matching: TokenMatching, r: int, expected_tokens: int) -> None:
    if not 0 <= r <= matching.num_src:
        raise ValueError(f"r must lie in 0 … {matching.num_src} (the number of srcs), not {r}")
    if x.shape[1] != expected_tokens:
        raise ValueError(f"x has {x.shape[1]} tokens, expected {expected_tokens} for r = {r}")
    if x.shape[0] != matching.tokens.shape[0]:
        raise ValueError(f"x is a batch of {x.shape[0]}, the matching of {matching.tokens.shape[0]}")
