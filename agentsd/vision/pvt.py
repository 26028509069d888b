"""Agent-PVT: the first Pyramid Vision Transformer (without class token) with agent attention in all four stages.

Sources: Han et al., "Agent Attention", ECCV 2024 (arXiv 2312.08874); Wang et al., "Pyramid Vision Transformer", ICCV
2021 (arXiv 2102.12122), whose spatial reduction of keys and values is not needed here.
"""

from typing import TYPE_CHECKING

import torch
from timm.layers import DropPath
from torch import Tensor, nn

from .attention import SeparateAgentAttention, from_image, grid_of
from .common import both_sides, pad_to_multiple, per_stage, refuse, resized_positions
from .stages import Blocks, Pyramid, TransformerBlock, drop_path_rates, initialize, make_head

torch.fx.wrap("pad_to_multiple")  # by name, where they are called
torch.fx.wrap("resized_positions")


class PatchEmbedding(nn.Module):
    """Non-overlapping patches: a strided convolution, then a norm.

    Odd sizes are padded at the bottom and the right, so that no pixel is lost.
    """

    def __init__(self, in_chans: int, dim: int, patch: int, **factory):
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(in_chans, dim, patch, stride=patch, **factory)
        self.norm = nn.LayerNorm(dim, eps=1e-5, **factory)

    def forward(self, image: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """[B, in_chans, H, W] -> tokens [B, N, dim] and their grid."""
        image = self.proj(pad_to_multiple(image, self.patch, self.patch))
        return self.norm(from_image(image)), grid_of(image)


class AgentPvt(Pyramid):
    """Agent-PVT for classification, and as a backbone with maps at strides 4, 8, 16 and 32 (no norms on them).

    Args:
        depths, dims, num_heads, mlp_ratios: of each stage.
        agents: number of agents in training, a square number, of each stage.
        agent_grid: side of the agents' grid at run time, for all stages or of each; None takes that of training.
        patches: stride of each stage's embedding.
        Others: as in Pyramid.

    Raises:
        ValueError: a number of agents that is no square, a sequence that has not one value per stage, or attention
            dropout.
    """

    if TYPE_CHECKING:  # set by name below; TorchScript reads annotations and does not know these
        block1: Blocks
        block2: Blocks
        block3: Blocks
        block4: Blocks
        patch_embed1: PatchEmbedding
        patch_embed2: PatchEmbedding
        patch_embed3: PatchEmbedding
        patch_embed4: PatchEmbedding
        pos_embed1: Tensor
        pos_embed2: Tensor
        pos_embed3: Tensor
        pos_embed4: Tensor

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: str = "avg",
        depths: tuple[int, ...] = (2, 2, 2, 2),
        dims: tuple[int, ...] = (64, 128, 320, 512),
        num_heads: tuple[int, ...] = (1, 2, 5, 8),
        mlp_ratios: tuple[float, ...] = (8, 8, 4, 4),
        agents: tuple[int, ...] = (9, 16, 49, 49),
        agent_grid: int | tuple[int | None, ...] | None = None,
        patches: tuple[int, ...] = (4, 2, 2, 2),
        dynamic_img_size: bool = False,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.1,
        device=None,
        dtype=None,
    ):
        refuse({"attn_drop_rate": attn_drop_rate}, ("attn_drop_rate",), "agent attention has no such thing")
        factory = {"device": device, "dtype": dtype}
        super().__init__(both_sides(img_size), dynamic_img_size, in_chans, num_classes, global_pool, dims, drop_rate)
        agent_grid = per_stage("agent_grid", agent_grid, self.num_stages)
        agents = per_stage("agents", agents, self.num_stages)
        rates = drop_path_rates(drop_path_rate, depths)
        self.pos_drop = nn.Dropout(pos_drop_rate)
        self.grids: list[tuple[int, int]] = []
        grid, stride = self.img_size, 1
        for i in range(self.num_stages):
            grid, stride = _divided(grid, patches[i]), stride * patches[i]
            self.grids.append(grid)
            blocks = Blocks()
            for rate in rates[i]:
                attention = SeparateAgentAttention(
                    dims[i], num_heads[i], agents[i], grid, proj_drop_rate, agent_grid=agent_grid[i], **factory
                )
                blocks.append(TransformerBlock(dims[i], attention, mlp_ratios[i], 1e-6, DropPath(rate), **factory))
            positions = torch.empty(1, grid[0] * grid[1], dims[i], **factory)
            setattr(
                self,
                f"patch_embed{i + 1}",
                PatchEmbedding(dims[i - 1] if i else in_chans, dims[i], patches[i], **factory),
            )
            setattr(self, f"pos_embed{i + 1}", nn.Parameter(nn.init.trunc_normal_(positions, std=0.02)))
            setattr(self, f"block{i + 1}", blocks)
            self.feature_info.append({"num_chs": dims[i], "reduction": stride, "module": f"block{i + 1}"})
        self.head = make_head(dims[-1], num_classes, **factory)
        self.apply(initialize)

    def run_stage(self, stage: int, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        grid = (0, 0)
        if stage == 0:
            x, grid = self.patch_embed1(x)
            x = self.block1(self.add_positions(x, self.pos_embed1, 0, grid), grid)
        if hasattr(self, "block2"):
            if stage == 1:
                x, grid = self.patch_embed2(x)
                x = self.block2(self.add_positions(x, self.pos_embed2, 1, grid), grid)
        if hasattr(self, "block3"):
            if stage == 2:
                x, grid = self.patch_embed3(x)
                x = self.block3(self.add_positions(x, self.pos_embed3, 2, grid), grid)
        if hasattr(self, "block4"):
            if stage == 3:
                x, grid = self.patch_embed4(x)
                x = self.block4(self.add_positions(x, self.pos_embed4, 3, grid), grid)
        return x, grid

    def add_positions(self, x: Tensor, positions: Tensor, stage: int, grid: tuple[int, int]) -> Tensor:
        """[B, N, C] -> [B, N, C]."""
        # Each stage's own grid decides, not the number of tokens: stages may agree in that by accident.
        return self.pos_drop(x + resized_positions(positions, self.grids[stage], grid, mode="bilinear"))

    def blocks_of(self, stage: int) -> Blocks:
        return getattr(self, f"block{stage + 1}")

    def remove_stage(self, stage: int) -> None:
        for name in ("patch_embed", "pos_embed", "block"):
            delattr(self, f"{name}{stage + 1}")

    @torch.jit.ignore
    def no_weight_decay(self) -> set[str]:
        """Parameters that weight decay should leave alone."""
        return {f"pos_embed{i + 1}" for i in range(len(self.feature_info))}

    @torch.jit.ignore
    def group_matcher(self, coarse: bool = False) -> dict:
        """Patterns that group the parameters by depth, for layer-wise learning rates."""
        return {
            "stem": r"^(?:patch|pos)_embed1",
            "blocks": r"^(?:block|patch_embed|pos_embed)(\d)"
            if coarse
            else [(r"^block(\d)\.(\d+)", None), (r"^(?:patch|pos)_embed(\d)", (0,))],
        }

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Change the image size: positions are resized bicubically, as loading does; biases in the forward pass."""
        self.img_size = both_sides(img_size)
        grid = self.img_size
        for i in range(len(self.feature_info)):
            grid = _divided(grid, getattr(self, f"patch_embed{i + 1}").patch)
            positions = getattr(self, f"pos_embed{i + 1}")
            resized = resized_positions(positions.detach(), self.grids[i], grid)
            setattr(self, f"pos_embed{i + 1}", nn.Parameter(resized, requires_grad=positions.requires_grad))
            self.grids[i] = grid


def _divided(grid: tuple[int, int], patch: int) -> tuple[int, int]:
    """The grid of patches on a grid, rounded up."""
    return -(-grid[0] // patch), -(-grid[1] // patch)
