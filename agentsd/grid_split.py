"""The dsts and srcs of a token grid (GridSplit): one destination token per cell, every other token is a source.

    split_grid(height=4, width=4, stride=(2, 2)).dst_index      # tensor([0, 2, 8, 10])

Source: Bolya & Hoffman, "Token Merging for Fast Stable Diffusion" (arXiv 2303.17604), section 3.1.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


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
        return self.tokens[..., self.num_src :]

    def to(self, device: torch.device) -> GridSplit:
        """The same on another device."""
        return GridSplit(self.tokens.to(device), self.dst_by_tile.to(device))

    def unbind(self) -> list[GridSplit]:
        """The splits along the first dimension."""
        return [GridSplit(*parts) for parts in zip(self.tokens.unbind(), self.dst_by_tile.unbind())]

    def repeat(self, times: int) -> GridSplit:
        """Each split along the first dimension `times` times in a row, as where a sample has several frames."""
        return GridSplit(self.tokens.repeat_interleave(times, 0), self.dst_by_tile.repeat_interleave(times, 0))


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
    offsets: np.ndarray | Tensor | None = None,
    device: torch.device | str | None = None,
    tile: tuple[int, int] | None = None,
) -> GridSplit:
    """Choose one dst in every whole cell of a grid; all other tokens, also those outside whole cells, are srcs.

    It is worked out on the host and copied to the device at once: on a GPU that is one operator for all layers, and
    takes no longer than launching the kernels that would do it there.

    Args:
        height, width: size of the token grid. It need not be divisible by `stride`.
        stride: (rows, columns) of one cell.
        offsets: [..., cells] integers in [0, rows · columns), the place of the dst inside each cell, counted row by
            row; None takes the upper left token. Leading dimensions split several grids at once.
        device: where to; None takes that of the offsets.
        tile: (rows, columns) of the tiles within which tokens are matched, from `tile_size`; None matches over the
            whole grid.

    Raises:
        ValueError: no whole cell fits into the grid, `offsets` has the wrong length, or the tiles do not cut the grid
            evenly.

    Source: ToMe for Stable Diffusion, section 3.1.
    """
    rows, columns = stride
    cells = grid_cells(height, width, stride)
    if cells == 0:
        raise ValueError(f"no {rows}×{columns} cell fits into a {height}×{width} grid: use a smaller stride")
    if isinstance(offsets, Tensor):
        device = offsets.device if device is None else device
        offsets = offsets.cpu().numpy()
    elif offsets is None:
        offsets = np.zeros(cells, dtype=np.int64)
    if offsets.shape[-1] != cells:
        raise ValueError(f"offsets must have shape (…, {cells}), one per cell, not {offsets.shape}")
    tile = tile or (height, width)
    for length, cell_side, side in ((height, rows, tile[0]), (width, columns, tile[1])):
        if side != length and (length % side or side % cell_side):
            raise ValueError(
                f"{tile[0]}×{tile[1]} tiles do not cut a {height}×{width} grid of {rows}×{columns} cells evenly: take "
                "what tile_size returns"
            )
    down, across = height // tile[0], width // tile[1]
    num_tokens, leading = height * width, offsets.shape[:-1]
    by_cell = _by_tile(height // rows * rows, width // columns * columns, height // rows, width // columns, width)
    dst_index = by_cell[np.arange(0, by_cell.size, rows * columns) + offsets.reshape(-1, cells)]
    first = np.arange(0, len(dst_index) * num_tokens, num_tokens)[:, None]  # of each grid, where all lie in one row
    is_src = np.ones((len(dst_index), num_tokens), dtype=bool)
    is_src.reshape(-1)[dst_index + first] = False
    if down * across > 1:
        by_tile = _by_tile(height, width, down, across, width)
        dst_index = dst_index[:, _by_tile(height // rows, width // columns, down, across, width // columns)]
        is_src = is_src[:, by_tile]
    src_index = np.flatnonzero(is_src).reshape(len(dst_index), -1) - first
    if down * across > 1:
        src_index = by_tile[src_index]
    tokens = _to_device(np.concatenate([src_index, dst_index], axis=1).reshape(*leading, num_tokens), device)
    return GridSplit(tokens, tokens[..., num_tokens - cells :].unflatten(-1, (down * across, -1)))


@lru_cache(maxsize=64)
def _by_tile(height: int, width: int, down: int, across: int, line: int) -> np.ndarray:
    """Numbers of the places of a height × width area, tile by tile and row by row within each; not to be written to.

    Args:
        down, across: how many tiles there are.
        line: width of the grid whose upper left part the area is.
    """
    places = np.arange(height)[:, None] * line + np.arange(width)
    return places.reshape(down, height // down, across, width // across).swapaxes(1, 2).ravel()


def _to_device(numbers: np.ndarray, device: torch.device | str | None) -> Tensor:
    """A copy on a device for which the host does not wait."""
    device = torch.device("cpu" if device is None else device)
    # CUDA copies what is not pinned before it returns, so that the array may go; other devices do not promise it. On
    # the meta device costs are counted as CUDA would have them.
    return torch.from_numpy(numbers).to(device, non_blocking=device.type in ("cuda", "meta"))
