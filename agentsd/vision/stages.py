"""What our own pyramids (PVT, CSwin) share: timm's interface around four stages of tokens at strides 4 to 32."""

from typing import Any

import torch
from timm.layers import Mlp
from timm.models import checkpoint
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from .attention import to_image
from .common import checked_image

torch.fx.wrap("checked_image")  # by name, where it is called


class Blocks(nn.ModuleList):
    """The blocks of a stage, called as block(tokens, grid) one after the other."""

    def __init__(self, blocks=None):
        super().__init__(blocks)
        self.grad_checkpointing = False

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, N, C] -> [B, N, C]; grid is the (height, width) of the tokens."""
        for block in self:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, grid)
            else:
                x = block(x, grid)
        return x


class Pyramid(nn.Module):
    """Base of a classifier of four stages; a subclass says how a stage begins and which blocks it has.

    Args:
        img_size: pixels, one number or (height, width).
        dynamic_img_size: take images of any size.
        num_classes: 0 leaves the head out.
        global_pool: "avg" averages the tokens, "" keeps them.
        dims: channels of each stage.
        drop_rate: dropout before the head.

    Raises:
        ValueError: another global_pool.
    """

    __constants__ = ["num_stages"]
    num_stages = 4

    def __init__(
        self,
        img_size: tuple[int, int],
        dynamic_img_size: bool,
        in_chans: int,
        num_classes: int,
        global_pool: str,
        dims: tuple[int, ...],
        drop_rate: float,
    ):
        super().__init__()
        self.img_size = img_size
        self.feature_info: list[dict[str, Any]] = []
        self.dynamic_img_size = dynamic_img_size
        self.in_chans = in_chans
        self.num_classes = num_classes
        self.global_pool = _checked_pool(global_pool)
        self.num_features = self.head_hidden_size = dims[-1]
        self.stages_left = self.num_stages
        self.head_drop = nn.Dropout(drop_rate)

    # ---- what a subclass gives ----

    def run_stage(self, stage: int, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """The image (stage 0) or the maps [B, C, h, w] of the stage before -> tokens [B, N, C] and their grid.

        Each stage by its name, and one that may be removed under hasattr: TorchScript takes no computed names.
        """
        raise NotImplementedError

    def blocks_of(self, stage: int) -> Blocks:
        """The blocks of a stage."""
        raise NotImplementedError

    def remove_stage(self, stage: int) -> None:
        """Drop the modules of a stage that is not needed."""
        raise NotImplementedError

    def final_norm(self, x: Tensor) -> Tensor:
        """The norm after the last stage, on tokens; none by default."""
        return x

    # ---- timm's interface ----

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The maps at the end of chosen stages, as timm returns them.

        Args:
            x: [B, in_chans, H, W].
            indices: the last so many stages, or these; None for all.
            norm: apply the last norm, where there is one, to the last stage's.
            stop_early: skip the stages after the last chosen one.
            output_fmt: "NCHW", or "NLC" for tokens.
            intermediates_only: leave out the final tokens.

        Returns:
            The list, or (final tokens [B, N, C], list).
        """
        if output_fmt != "NCHW" and output_fmt != "NLC":
            raise ValueError(f"output_fmt='{output_fmt}': must be 'NCHW' or 'NLC'")
        taken, last_taken = feature_take_indices(self.stages_left, indices)
        # Pruned to its first stages, the model has no others to run.
        stages = last_taken + 1 if stop_early else self.stages_left
        x = self.check(x)
        grid = (0, 0)
        found = []
        for stage in range(stages):
            if stage > 0:
                x = to_image(x, grid)
            x, grid = self.run_stage(stage, x)
            if stage in taken:
                out = self.final_norm(x) if norm and stage == self.num_stages - 1 else x
                found.append(to_image(out, grid).contiguous() if output_fmt == "NCHW" else out)
        if intermediates_only:
            return found
        if stages == self.num_stages:
            x = self.final_norm(x)
        return x, found

    def forward_features(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> tokens [B, N, C] of the last stage, after the last norm."""
        x = self.check(x)
        grid = (0, 0)
        for stage in range(self.stages_left):
            if stage > 0:
                x = to_image(x, grid)
            x, grid = self.run_stage(stage, x)
        return self.final_norm(x) if self.stages_left == self.num_stages else x

    def check(self, x: Tensor) -> Tensor:
        """The image itself, where the model takes it."""
        return checked_image(x, None if self.dynamic_img_size else self.img_size, 32)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens -> logits [B, num_classes]; with pre_logits, what the head would read."""
        x = self.head_drop(x.mean(dim=1) if self.global_pool == "avg" else x)
        return x if pre_logits else self.head(x)

    def forward(self, x: Tensor) -> Tensor:
        """[B, in_chans, H, W] -> logits [B, num_classes]."""
        return self.forward_head(self.forward_features(x))

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last chosen one, as timm does for feature extraction; returns the chosen ones."""
        taken, last = feature_take_indices(self.stages_left, indices)
        for stage in range(last + 1, self.stages_left):
            self.remove_stage(stage)
        removed = last < self.stages_left - 1
        self.stages_left = last + 1
        self.feature_info = self.feature_info[: last + 1]
        if prune_norm or removed:
            self.remove_norm()
        if removed:
            self.num_features = self.head_hidden_size = self.feature_info[-1]["num_chs"]
        if prune_head or removed:
            self.reset_classifier(0, "")
        return taken

    def remove_norm(self) -> None:
        """Drop the norm after the last stage, where there is one."""

    @torch.jit.ignore
    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass to save memory."""
        for stage in range(self.stages_left):
            self.blocks_of(stage).grad_checkpointing = enable

    @torch.jit.ignore
    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head; 0 classes leave it out."""
        if global_pool is not None:
            self.global_pool = _checked_pool(global_pool)
        self.num_classes = num_classes
        like = next(self.parameters())
        self.head = make_head(self.num_features, num_classes, device=like.device, dtype=like.dtype)
        self.head.train(self.training)


class TransformerBlock(nn.Module):
    """Pre-norm block: x + attention(norm(x)), then x + MLP(norm(x)).

    Args:
        attention: called as attention(tokens, grid).
        eps: of both norms.
        drop_path: a module for stochastic depth.
    """

    def __init__(self, dim: int, attn: nn.Module, mlp_ratio: float, eps: float, drop_path: nn.Module, **factory: Any):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=eps, **factory)
        self.attn = attn
        self.drop_path = drop_path
        self.norm2 = nn.LayerNorm(dim, eps=eps, **factory)
        self.mlp = Mlp(dim, int(dim * mlp_ratio), **factory)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, N, C] -> [B, N, C]; grid is the (height, width) of the tokens."""
        x = x + self.drop_path(self.attn(self.norm1(x), grid))
        return x + self.drop_path(self.mlp(self.norm2(x)))


def drop_path_rates(most: float, depths: tuple[int, ...]) -> list[list[float]]:
    """Rates of stochastic depth, growing linearly from 0 over all blocks; one list per stage."""
    last = max(1, sum(depths) - 1)
    numbers = iter(range(sum(depths)))
    return [[most * next(numbers) / last for _ in range(depth)] for depth in depths]


def make_head(dim: int, num_classes: int, **factory: Any) -> nn.Module:
    """A linear classifier, initialized; without classes, nothing."""
    if num_classes == 0:
        return nn.Identity()
    head = nn.Linear(dim, num_classes, **factory)
    initialize(head)
    return head


def initialize(module: nn.Module) -> None:
    """Initialize a linear layer as the authors do; other modules keep PyTorch's values."""
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


def _checked_pool(global_pool: str) -> str:
    if global_pool not in ("avg", ""):
        raise ValueError(f"global_pool={global_pool!r}: must be 'avg', or '' for tokens")
    return global_pool
