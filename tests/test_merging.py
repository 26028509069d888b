"""merging.py: against naive loops, and by its properties."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import reference
import torch
from hypothesis import given, settings
from torch.utils._python_dispatch import TorchDispatchMode

from agentsd import merging
from agentsd.grid_split import grid_cells, split_grid, tile_size
from agentsd.layer_plan import draw_offsets
from agentsd.merging import lay_out, match_tokens, merge_each, merge_tokens, merged_position, unmerge_tokens


@st.composite
def grids(draw):
    """(height, width, stride, offsets or None, batch, r) with at least one whole cell."""
    stride = draw(st.sampled_from([(2, 2), (4, 4), (1, 2), (3, 2), (2, 5)]))
    height = draw(st.integers(stride[0], 11))
    width = draw(st.integers(stride[1], 11))
    cells = grid_cells(height, width, stride)
    offsets = None
    if draw(st.booleans()):
        size = stride[0] * stride[1]
        offsets = torch.tensor(draw(st.lists(st.integers(0, size - 1), min_size=cells, max_size=cells)))
    num_src = height * width - cells
    return height, width, stride, offsets, draw(st.integers(1, 3)), draw(st.integers(0, num_src))


@settings(max_examples=60, deadline=None)
@given(grids(), st.integers(0, 2**31))
def test_equals_naive_loops(grid, seed):
    height, width, stride, offsets, batch, r = grid
    generator = torch.Generator().manual_seed(seed)
    metric = torch.randn(batch, height * width, 6, generator=generator, dtype=torch.float64)
    x = torch.randn(batch, height * width, 5, generator=generator, dtype=torch.float64)
    matching = match_tokens(metric, split_grid(height, width, stride, offsets))
    merged = merge_tokens(x, matching, r)
    unmerged = unmerge_tokens(merged, matching, r)
    for b in range(batch):
        ranked, best, dsts = reference.match(metric[b], height, width, stride, offsets)
        assert matching.tokens[b].tolist() == ranked + dsts
        groups = reference.merge(x[b], ranked, best, dsts, r)
        if r:
            torch.testing.assert_close(merged[b], torch.stack([mean for mean, _ in groups]))
        else:
            assert merged is x  # nothing merged: the grid's own order
            continue
        for mean, group in groups:
            for token in group:
                torch.testing.assert_close(unmerged[b, token], mean)


@settings(max_examples=60, deadline=None)
@given(grids(), st.integers(1, 12), st.integers(0, 2**31))
def test_within_tiles_equals_naive_loops(grid, limit, seed):
    height, width, stride, offsets, batch, r = grid
    tile = tile_size(height, width, stride, limit)
    split = split_grid(height, width, stride, offsets, tile=tile)
    whole = split_grid(height, width, stride, offsets)
    assert split.tiles == (height // tile[0]) * (width // tile[1])
    for name in ("dst_index", "src_index"):  # the same tokens, in another order
        assert torch.equal(getattr(split, name).sort().values, getattr(whole, name).sort().values)
    generator = torch.Generator().manual_seed(seed)
    metric = torch.randn(batch, height * width, 6, generator=generator, dtype=torch.float64)
    x = torch.randn(batch, height * width, 5, generator=generator, dtype=torch.float64)
    matching = match_tokens(metric, split)
    unmerged = unmerge_tokens(merge_tokens(x, matching, r), matching, r)
    for b in range(batch):
        ranked, best, dsts = reference.match(metric[b], height, width, stride, offsets, tile)
        assert matching.tokens[b, : len(ranked)].tolist() == ranked
        for mean, group in reference.merge(x[b], ranked, best, dsts, r):
            for token in group:
                torch.testing.assert_close(unmerged[b, token], mean)


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 70), st.integers(1, 70), st.sampled_from([(2, 2), (4, 4), (3, 2), (1, 5)]), st.integers(1, 80))
def test_tiles_cut_the_grid_and_no_cell(height, width, stride, limit):
    for length, cell, side in zip((height, width), stride, tile_size(height, width, stride, limit)):
        fitting = [t for t in range(cell, min(length, max(limit, cell)) + 1) if length % t == 0 and t % cell == 0]
        assert side == (max(fitting) if fitting else length)


@pytest.mark.parametrize("tile", [(3, 8), (8, 5), (6, 8), (16, 8)])
def test_tiles_that_do_not_fit_are_refused(tile):
    with pytest.raises(ValueError, match="tiles do not cut a 8×8 grid of 4×4 cells evenly"):
        split_grid(8, 8, (4, 4), tile=tile)


def test_tiles_bound_the_work(monkeypatch):
    """All similarities that are computed: each src with the dsts of its own tile."""
    computed = []
    bmm = torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: computed.append(a.shape[0] * a.shape[1] * b.shape[2]) or bmm(a, b))
    match_tokens(torch.randn(2, 32 * 32, 4), split_grid(32, 32, (2, 2), tile=(8, 8)))
    assert sum(computed) == 2 * 768 * 16


@settings(max_examples=60, deadline=None)
@given(grids(), st.integers(0, 2**31))
def test_properties(grid, seed):
    height, width, stride, offsets, batch, r = grid
    num_tokens = height * width
    metric = torch.randn(batch, num_tokens, 4, generator=torch.Generator().manual_seed(seed))
    matching = match_tokens(metric, split_grid(height, width, stride, offsets))
    # Every token is used once, as a src or as a dst.
    assert torch.equal(matching.tokens.sort(dim=1).values, torch.arange(num_tokens).expand(batch, -1))
    # Constant input survives merge and unmerge exactly in shape, and in value.
    constant = torch.full((batch, num_tokens, 3), 0.7)
    torch.testing.assert_close(unmerge_tokens(merge_tokens(constant, matching, r), matching, r), constant)
    # Merging keeps every token's share: the means weighted by group size add up to the sum of all tokens.
    if r:
        x = torch.randn(batch, num_tokens, 3)
        sizes = torch.zeros(batch, num_tokens - r).scatter_add(
            1, merged_position(matching, r), torch.ones(batch, num_tokens)
        )
        torch.testing.assert_close(
            (merge_tokens(x, matching, r) * sizes[..., None]).sum(1), x.sum(1), atol=1e-4, rtol=1e-4
        )


def test_blocks_of_similarities_change_nothing(monkeypatch):
    metric = torch.randn(2, 24 * 16, 8, generator=torch.Generator().manual_seed(0))
    whole = match_tokens(metric, split_grid(24, 16, (2, 2)))
    monkeypatch.setattr(merging, "_SIMILARITIES_PER_BLOCK", 2 * 96 * 7)
    blocked = match_tokens(metric, split_grid(24, 16, (2, 2)))
    assert torch.equal(whole.tokens, blocked.tokens)
    assert torch.equal(whole.best_dst, blocked.best_dst)


def test_similarities_never_stand_in_memory_whole():
    """At 2048 px (65,536 tokens) the full similarity matrix would take 3 GiB per sample; a block takes 64 MiB."""
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for tensor in torch.utils._pytree.tree_leaves(out):
                if isinstance(tensor, torch.Tensor):
                    largest = max(largest, tensor.numel())
            return out

    with Watch():
        match_tokens(torch.empty(2, 256 * 256, 8, device="meta"), split_grid(256, 256, (2, 2)))
    assert largest <= merging._SIMILARITIES_PER_BLOCK


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_keep_their_dtype_and_accumulate_in_float32(dtype):
    # 63 tokens merge into one: summed in half precision, 60,000 × 64 overflows float16 and bfloat16 loses the ones.
    x = torch.full((1, 64, 2), 60000.0).to(dtype)
    matching = match_tokens(torch.ones(1, 64, 4, dtype=dtype), split_grid(8, 8, (8, 8)))
    merged = merge_tokens(x, matching, 63)
    assert merged.dtype == dtype and merged.shape == (1, 1, 2)
    torch.testing.assert_close(merged, x[:, :1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_means_of_other_devices_are_the_same(dtype):
    """What MPS gets, whose torch may have no embedding_bag."""
    x = torch.randn(2, 64, 24, generator=torch.Generator().manual_seed(0)).to(dtype)
    matching = match_tokens(x, split_grid(8, 8, (2, 2)))
    expected = merge_tokens(x, matching, 30)
    position, token_rows = merging._positions(matching, merging._layout_of(matching, 30))[0].sort(stable=True)
    means = merging._means_by_adding(x.view(-1, 24), position, token_rows, 2 * 34)
    assert means.dtype is merging._accumulate_dtype(x)
    torch.testing.assert_close(means.view(2, 34, 24).to(dtype), expected)


@pytest.fixture(params=["as on a CPU", "as on a GPU"])
def norms(request, monkeypatch):
    """Both ways of dividing tokens by their lengths."""
    monkeypatch.setattr(merging, "_FUSED_NORM", ("cpu",) if request.param == "as on a GPU" else ())


@pytest.mark.usefixtures("norms")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_edges_are_the_best_ones_up_to_the_rounding_of_products(dtype):
    """By float64 cosines, the dst of a src and the srcs that merge first are as similar as any, within roundings."""
    generator = torch.Generator().manual_seed(0)
    metric = (torch.randn(2, 256, 64, generator=generator) + torch.randn(2, 1, 64, generator=generator)).to(dtype)
    metric *= torch.rand(2, 256, 1, generator=generator).to(dtype) + 0.1
    split = split_grid(16, 16, (4, 4))
    unit = metric.double() / metric.double().norm(dim=-1, keepdim=True)
    cosines = unit[:, split.src_index] @ unit[:, split.dst_index].mT
    best, matching = cosines.amax(-1), match_tokens(metric, split)
    chosen = cosines.gather(-1, matching.dst_of_src[..., None])[..., 0]
    allowed = 4 * torch.finfo(dtype).eps
    assert (best - chosen).max() < allowed
    ranked = chosen.gather(1, matching.ranking)
    assert (ranked.cummin(1).values - ranked).min() > -2 * allowed


@pytest.mark.usefixtures("norms")
def test_large_half_precision_tokens_still_match():
    generator = torch.Generator().manual_seed(0)
    metric = torch.randn(1, 64, 8, generator=generator)
    exact = match_tokens(metric, split_grid(8, 8, (2, 2)))
    large = match_tokens((metric * 2000).half(), split_grid(8, 8, (2, 2)))  # squared norms far above 65,504
    assert (exact.best_dst.sort().values == large.best_dst.sort().values).float().mean() > 0.9
    assert large.best_dst.unique().numel() > 8  # with infinite norms every src would take dst 0


@pytest.mark.usefixtures("norms")
def test_products_beyond_float16_still_match():
    """Tokens of 16 features of up to 60,000, so that a src's product with its unit dst would be 170,000."""
    angle = torch.arange(16).view(4, 4).mul(torch.pi / 8).repeat_interleave(2, 0).repeat_interleave(2, 1).flatten()
    src = torch.ones(8, 8, dtype=torch.bool)
    src[::2, ::2] = False
    angle = angle + torch.linspace(-0.1, 0.1, 64)[torch.randperm(64, generator=torch.Generator().manual_seed(0))] * (
        src.flatten()
    )
    length = torch.linspace(10_000, 60_000, 64)
    metric = (length[:, None] * torch.stack([angle.cos(), angle.sin()], 1)).repeat(1, 8)[None].half()
    matching = match_tokens(metric, split_grid(8, 8, (2, 2)))
    rows, columns = matching.tokens[0, :48] // 8, matching.tokens[0, :48] % 8
    assert torch.equal(matching.best_dst[0], rows // 2 * 4 + columns // 2)  # each src the dst of its own cell
    apart = (angle[matching.tokens[0, :48]] - matching.best_dst[0] * torch.pi / 8).abs()
    assert apart[:12].max() < apart[-12:].min()  # and the most similar ones first


@pytest.mark.usefixtures("norms")
def test_zero_tokens_are_no_nan():
    matching = match_tokens(torch.zeros(1, 16, 4), split_grid(4, 4, (2, 2)))
    assert torch.isfinite(merge_tokens(torch.randn(1, 16, 4), matching, 6)).all()


def test_gradients_flow_through_features_not_through_the_matching():
    metric = torch.randn(1, 16, 4, requires_grad=True)
    x = torch.randn(1, 16, 4, requires_grad=True)
    matching = match_tokens(metric, split_grid(4, 4, (2, 2)))
    unmerge_tokens(merge_tokens(x, matching, 6), matching, 6).sum().backward()
    assert metric.grad is None
    torch.testing.assert_close(x.grad.sum(), torch.tensor(64.0))


def matching_of(tokens: int):
    return match_tokens(torch.ones(1, tokens, 2), split_grid(4, 4, (2, 2)))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: matching_of(15), "15 tokens.*grid of 16"),
        (lambda: split_grid(2, 2, (4, 4)), "no 4×4 cell"),
        (lambda: split_grid(4, 4, (2, 2), torch.zeros(3)), "offsets"),
        (lambda: merge_tokens(torch.ones(1, 16, 2), matching_of(16), 13), "r must"),
        (lambda: merge_tokens(torch.ones(1, 15, 2), matching_of(16), 3), "15 tokens"),
        (lambda: unmerge_tokens(torch.ones(1, 16, 2), matching_of(16), 3), "16 tokens"),
    ],
)
def test_errors(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_several_grids_are_split_at_once_as_one_by_one():
    offsets = draw_offsets(0, 500, 3, grid_cells(9, 14, (2, 4)), 8)
    for split, row in zip(split_grid(9, 14, (2, 4), offsets).unbind(), offsets):
        alone = split_grid(9, 14, (2, 4), row)
        assert torch.equal(split.dst_index, alone.dst_index) and torch.equal(split.src_index, alone.src_index)


def test_on_the_meta_device_merging_runs_the_operators_that_it_runs_on_a_gpu():
    """Costs are counted there; adding by index is the way of devices without bags."""
    names = []

    class Names(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            names.append(func._schema.name)
            return func(*args, **(kwargs or {}))

    x = torch.empty(2, 64, 8, dtype=torch.float16, device="meta")
    with Names():
        matching = match_tokens(x, split_grid(8, 8, (2, 2), device="meta"))
        merged = merge_tokens(x, matching, 20)
    assert merged.shape == (2, 44, 8) and merged.dtype is torch.float16
    assert not any("index_add" in name for name in names)


@settings(max_examples=40, deadline=None)
@given(grids(), st.integers(0, 2**31))
def test_several_merges_at_once_are_those_one_by_one(grid, seed):
    height, width, stride, offsets, batch, r = grid
    generator = torch.Generator().manual_seed(seed)
    metric = torch.randn(batch, height * width, 6, generator=generator)
    x = torch.randn(batch, height * width, 5, generator=generator)
    split = split_grid(height, width, stride, offsets)
    counts = [one for one in (r, split.num_src, split.num_src // 2) if one]
    matching = match_tokens(metric, split)
    layout = lay_out(split, batch, counts)
    rows = merge_each(x, matching, layout)
    for count, part in zip(counts, layout.parts(rows), strict=True):
        alone = match_tokens(metric, split)
        assert torch.equal(part, merge_tokens(x, alone, count))
        # What the first of several merges found out serves merging and unmerging by the same number again.
        assert torch.equal(merge_tokens(x, matching, count), part)
        assert torch.equal(unmerge_tokens(part, matching, count), unmerge_tokens(part, alone, count))


@pytest.mark.usefixtures("norms")
def test_ties_are_decided_by_the_order_of_the_tokens():
    """Of equally similar srcs the first ones of the grid are merged, into the first of equally similar dsts.

    A black picture has nothing but ties.
    """
    matching = match_tokens(torch.ones(2, 64, 3), split_grid(8, 8, (2, 2), torch.arange(16) % 4))
    src = [token for token in range(64) if token not in matching.split.dst_index.tolist()]
    for b in range(2):
        assert matching.tokens[b, :48].tolist() == src and not matching.best_dst[b].any()
        position = merged_position(matching, 20)[b]
        assert position[src[:20]].tolist() == [28] * 20  # 28 srcs stay, then come the dsts
        assert position[src[20:]].tolist() == list(range(28))
        assert position[matching.split.dst_index].tolist() == list(range(28, 44))


@pytest.mark.usefixtures("norms")
def test_zero_tokens_rank_as_not_similar_at_all():
    """Not as the most similar, which a quotient that is no number would be."""
    metric = torch.randn(1, 64, 4, generator=torch.Generator().manual_seed(0)).abs()
    metric[:, [9, 30]] = 0
    tokens = match_tokens(metric, split_grid(8, 8, (2, 2))).tokens
    assert sorted(tokens[0, 46:48].tolist()) == [9, 30]


def test_positions_of_no_merge_are_those_of_the_grid():
    """As what merge_tokens returns for r = 0: maps of agents beside unmerged tokens would be scrambled."""
    matching = match_tokens(torch.randn(2, 16, 4), split_grid(4, 4, (2, 2)))
    assert merged_position(matching, 0).tolist() == [list(range(16))] * 2
