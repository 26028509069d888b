"""Token merging on a 2-D grid (ToMe for Stable Diffusion): match tokens, merge them, unmerge them; torch only.

Source: Bolya & Hoffman, "Token Merging for Fast Stable Diffusion" (arXiv 2303.17604), section 3, whose words are used
throughout: one destination (dst) token per cell of a regular grid, every other token is a source (src), the `r` most
similar srcs are averaged into their dst.

    split = split_grid(height, width, stride=(2, 2))     # dsts and srcs
    matching = match_tokens(x, split)                    # from the features that say what is alike
    merged = merge_tokens(y, matching, r)                # [B, N, C] -> [B, N - r, C]
    y_again = unmerge_tokens(merged, matching, r)        # [B, N - r, C] -> [B, N, C]

A UNet runs this many times a call, and on a GPU each operator costs its launch. So what does not depend on the
features is laid out once for all layers of a grid, and two merges of the same tokens share their operators:

    layout = lay_out(split, batch=2, counts=(r, r_agents))
    rows = merge_each(y, matching, layout)
    tokens, agents = layout.parts(rows)                  # [B, N - r, C], [B, N - r_agents, C]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from .grid_split import GridSplit

# Similarities computed at once. It bounds the memory of the matching (64 MiB in float32) whatever the image's size.
_SIMILARITIES_PER_BLOCK = 2**24
# Devices that divide tokens by their lengths in one operator. The meta device counts what CUDA would run.
_FUSED_NORM = ("cuda", "meta") if torch.__version__ >= "2.9" else ()


@dataclass(frozen=True)
class TokenMatching:
    """Which token may merge into which: the edges from srcs to dsts, best first.

    A plain value: any number `r` of its edges can be used, on any features of the same tokens.

    Attributes:
        split: of the grid whose tokens were matched.
        dst_of_src: [B, num_src] for each src, in the split's order, its best dst as a position among the dsts.
        ranking: [B, num_src] the srcs, by their places in the split, in order of falling similarity to their best dst.
    """

    split: GridSplit
    dst_of_src: Tensor
    ranking: Tensor
    _positions: list[tuple[MergeLayout, Tensor]] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def batch(self) -> int:
        return self.ranking.shape[0]

    @property
    def num_tokens(self) -> int:
        return self.split.num_tokens

    @property
    def num_src(self) -> int:
        return self.ranking.shape[1]

    @property
    def num_dst(self) -> int:
        return self.num_tokens - self.num_src

    @property
    def tokens(self) -> Tensor:
        """[B, N] all token numbers: the srcs in order of falling similarity to their best dst, then the dsts."""
        src = self.split.src_index.expand(self.batch, -1).gather(1, self.ranking)
        return torch.cat([src, self.split.dst_index.expand(self.batch, -1)], dim=1)

    @property
    def best_dst(self) -> Tensor:
        """[B, num_src] for each src, in order of falling similarity, its best dst as a position among the dsts."""
        return self.dst_of_src.gather(1, self.ranking)


@dataclass(frozen=True)
class MergeLayout:
    """Which rows merged tokens take, as far as that is known before the tokens are matched.

    It is for one merge of the tokens of a grid or for several at once, each of r > 0 srcs. Rows are those of all
    results, one after the other: [B · (N − r₁) + B · (N − r₂) + …, C]. All counts are sizes of its tensors.

    Attributes:
        start: [merges, B, N] the row of a dst; for a src, the row of the first dst, to which its own dst's number adds.
        from_end: [num_src] −num_src … −1: of a src by its rank, its row counted from the first dst's if it stays.
        rows: [all rows] 0, 1, 2, …
        merged: for each merge, [r, 0] holds no element.
    """

    start: Tensor
    from_end: Tensor
    rows: Tensor
    merged: tuple[Tensor, ...]

    @property
    def batch(self) -> int:
        return self.start.shape[-2]

    @property
    def num_tokens(self) -> int:
        return self.start.shape[-1]

    @property
    def counts(self) -> list[int]:
        """r of each merge: how many of the srcs are merged into dsts."""
        return [merged.shape[0] for merged in self.merged]

    def to(self, device: torch.device) -> MergeLayout:
        """The same on another device."""
        return MergeLayout(self.start.to(device), self.from_end.to(device), self.rows.to(device), self.merged)

    def unbind(self) -> list[MergeLayout]:
        """The layouts of several grids, along the first dimension of `start`."""
        return [MergeLayout(start, self.from_end, self.rows, self.merged) for start in self.start.unbind()]

    def parts(self, rows: Tensor) -> list[Tensor]:
        """The results of the merges, [B, N − r, C] each, from all rows [all rows, C]."""
        sizes = [self.num_tokens - r for r in self.counts]
        parts = rows.split([self.batch * size for size in sizes])
        return [part.unflatten(0, (self.batch, size)) for part, size in zip(parts, sizes)]


def lay_out(split: GridSplit, batch: int, counts: Sequence[int]) -> MergeLayout:
    """Prepare one merge or several, for all samples of a batch.

    Args:
        split: of one grid or, with a leading dimension, of several (then `unbind` the result); [..., N] tokens.
        batch: number of samples, B.
        counts: r of each merge, 0 < r ≤ num_src.
    """
    return _lay_out(split.dst_index.unsqueeze(-2), split.num_src, batch, counts)


def lay_out_by_sample(split: GridSplit, counts: Sequence[int]) -> MergeLayout:
    """As `lay_out`, for splits of which each sample has its own: [..., B, N] tokens."""
    return _lay_out(split.dst_index, split.num_src, split.tokens.shape[-2], counts)


def _lay_out(dst_index: Tensor, num_src: int, batch: int, counts: Sequence[int]) -> MergeLayout:
    device, num_dst = dst_index.device, dst_index.shape[-1]
    sizes = [num_src + num_dst - r for r in counts]
    rows = torch.arange(batch * sum(sizes), device=device)
    # A sample's last rows are its dsts.
    by_merge = rows.split([batch * size for size in sizes])
    dst_rows = [part.unflatten(0, (batch, size))[:, size - num_dst :] for part, size in zip(by_merge, sizes)]
    dsts = torch.stack(dst_rows) if len(counts) > 1 else dst_rows[0][None]
    shape = (*dst_index.shape[:-2], len(counts), batch)
    first, index = dsts[..., :1].expand(*shape, num_src + num_dst), dst_index.unsqueeze(-3).expand(*shape, num_dst)
    start = first.scatter(-1, index, dsts.expand(*shape, num_dst))
    merged = tuple(torch.empty(r, 0, device=device) for r in counts)
    return MergeLayout(start, torch.arange(-num_src, 0, device=device), rows, merged)


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
        similarity, dst_of_src = _most_similar(metric, split)
        return TokenMatching(split, dst_of_src, similarity.argsort(dim=-1, descending=True, stable=True))


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
    norm = None
    # One operator in place of four. With bfloat16 too many cosines would round to one number, and rank by their places.
    if metric.device.type in _FUSED_NORM and metric.dtype is not torch.bfloat16:
        tokens = F.rms_norm(tokens, (channels,), eps=1e-30)
    else:
        norm = torch.linalg.vector_norm(tokens, dim=-1, keepdim=True, dtype=_accumulate_dtype(tokens))
        # Never zero, and with float16 64 times as large, lest a product with a long src exceed the range: one operator.
        norm = torch.rsub(norm, torch.finfo(torch.float32).tiny, alpha=-64 if metric.dtype is torch.float16 else -1)
    src, dst = tokens[:, :num_src], tokens[:, num_src:]
    if norm is not None:
        # A src's length does not change which dst it chooses. Only its best product is divided by it, for the ranking:
        # that walks through far less memory than dividing its features.
        dst = dst.div_(norm[:, num_src:])
    if tiles > 1:  # as if each tile were a sample of its own
        src, dst = (x.reshape(batch * tiles, -1, channels) for x in (src, dst))
    if src.shape[0] * src.shape[1] * dst.shape[1] <= _SIMILARITIES_PER_BLOCK:
        product, best_dst = torch.bmm(src, dst.mT).max(dim=-1)
    elif torch.compiler.is_compiling():
        product, best_dst = _largest_products_in_graph(src, dst)
    else:
        product, best_dst = _largest_products(src, dst)
    if tiles > 1:
        first_dst = torch.arange(0, num_dst, split.dst_by_tile.shape[-1], device=metric.device)
        best_dst = best_dst.view(batch, tiles, -1) + first_dst[:, None]
    product = product.view(batch, -1)
    return product if norm is None else product / norm[:, :num_src, 0], best_dst.view(batch, -1)


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


def merge_each(x: Tensor, matching: TokenMatching, layout: MergeLayout) -> Tensor:
    """Average the best srcs of each merge of a layout into their dsts.

    Args:
        x: [B, N, C] features of the matched tokens.
        matching: from `match_tokens`.
        layout: from `lay_out`.

    Returns:
        [all rows, C] in x's dtype, which `layout.parts` divides: of each merge and sample the un-merged srcs in order
        of falling similarity, then the dsts, each the mean of itself and its merged srcs (accumulated in float32 for
        half-precision types).
    """
    position = _positions(matching, layout)
    # Merging is one mean per bag of tokens, a bag being all tokens with the same position. Sorted bags make the sums
    # repeat exactly on every device; atomic additions on a GPU would not.
    position, token_rows = position.sort(dim=-1, stable=True)
    position, token_rows = position.flatten(), token_rows.flatten()
    rows = x.flatten(0, 1)
    if x.device.type not in ("cpu", "cuda", "meta"):  # meta, which only counts, counts what CUDA would run
        means = _means_by_adding(rows, position, token_rows, layout.rows.shape[0])
    else:
        if x.device.type == "cpu" and x.dtype is torch.float16:
            rows = rows.float()  # this kernel rounds the sum to float16 before it divides: too large a sum is infinite
        means = F.embedding_bag(token_rows, rows, torch.searchsorted(position, layout.rows), mode="mean")
    return means.to(x.dtype)


def merge_tokens(x: Tensor, matching: TokenMatching, r: int) -> Tensor:
    """Average the `r` best srcs into their dsts; undone, as far as a mean can be, by `unmerge_tokens`.

    Args:
        x: [B, N, C] features of the matched tokens.
        matching: from `match_tokens`.
        r: how many srcs to merge, 0 ≤ r ≤ num_src.

    Returns:
        [B, N − r, C], as `merge_each` describes. r = 0 returns x itself.

    Raises:
        ValueError: r is out of range, or x has other tokens or another batch than the matching.
    """
    if r == 0:
        return x
    _check(x, matching, r, matching.num_tokens)
    layout = _layout_of(matching, r)
    return layout.parts(merge_each(x, matching, layout))[0]


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
    # Rows of a flat [B · M, C] matrix are copied whole, which is many times faster than a gather along dim 1.
    position = _positions(matching, _layout_of(matching, r))[0]
    return x.flatten(0, 1).index_select(0, position).unflatten(0, (matching.batch, matching.num_tokens))


def merged_position(matching: TokenMatching, r: int) -> Tensor:
    """Where each token of the grid went: [B, N] positions in the output of `merge_tokens(…, matching, r)`."""
    if r == 0:  # which returns the grid as it is
        return torch.arange(matching.num_tokens, device=matching.ranking.device).expand(matching.batch, -1)
    position = _positions(matching, _layout_of(matching, r))[0].view(matching.batch, matching.num_tokens)
    return position - torch.arange(matching.batch, device=position.device)[:, None] * (matching.num_tokens - r)


def _positions(matching: TokenMatching, layout: MergeLayout) -> Tensor:
    """[merges, B · N] the row of each token, by merge."""
    for known, position in matching._positions:  # merging and unmerging need the same
        if known is layout:
            return position
    added = matching.dst_of_src.expand(len(layout.merged), -1, -1)
    for merge, r in enumerate(layout.counts):
        if torch.compiler.is_compiling() or r < matching.num_src:  # as a condition it would have two graphs made
            this = _keep_unmerged(added[merge:], matching.ranking, layout.from_end, r)
            added = this if merge == 0 else torch.cat([added[:merge], this])
    # Each src has its own place, so that what is added does not depend on the order.
    position = layout.start.scatter_add(-1, matching.split.src_index.expand(added.shape), added).flatten(1)
    matching._positions.append((layout, position))
    return position


def _keep_unmerged(dst: Tensor, ranking: Tensor, from_end: Tensor, r: int) -> Tensor:
    """Replace the dst of each src that stays by its row, counted from the first dst's: [merges, B, num_src] again.

    That is in the first of the merges alone.
    """
    if torch.compiler.is_compiling():
        # No slice of a length that can be 0, for which another graph would be made.
        by_rank = torch.where(from_end < r - from_end.shape[0], dst[0].gather(1, ranking), from_end)
        this = dst[0].scatter(1, ranking, by_rank)
        return torch.cat([this[None], dst[1:]]) if dst.shape[0] > 1 else this[None]
    last = ranking[None, :, r:]  # an index of the first merge only leaves the others as they are
    return dst.scatter(-1, last, from_end[r:].expand(last.shape))


def _layout_of(matching: TokenMatching, r: int) -> MergeLayout:
    """A layout of one merge of r srcs: that of the merge that was made already, or a new one."""
    for known, position in matching._positions:
        if known.counts[0] == r:
            if len(known.merged) == 1:
                return known
            rows = known.rows[: matching.batch * (matching.num_tokens - r)]
            first = MergeLayout(known.start[:1], known.from_end, rows, known.merged[:1])
            matching._positions.append((first, position[:1]))
            return first
    split = matching.split
    return lay_out(split, matching.batch, (r,)) if split.tokens.ndim == 1 else lay_out_by_sample(split, (r,))


def _accumulate_dtype(x: Tensor) -> torch.dtype:
    return torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype


def _check(x: Tensor, matching: TokenMatching, r: int, expected_tokens: int) -> None:
    if not 0 <= r <= matching.num_src:
        raise ValueError(f"r must lie in 0 … {matching.num_src} (the number of srcs), not {r}")
    if x.shape[1] != expected_tokens:
        raise ValueError(f"x has {x.shape[1]} tokens, expected {expected_tokens} for r = {r}")
    if x.shape[0] != matching.batch:
        raise ValueError(f"x is a batch of {x.shape[0]}, the matching of {matching.batch}")
