"""Agent-DeiT: timm's vision transformer with agent attention in its first blocks, or in all of them."""

from functools import partial
from typing import Any, cast

import torch
from timm.layers import to_2tuple
from timm.models import checkpoint, register_notrace_function
from timm.models._features import feature_take_indices
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from .attention import AgentAttention, to_image
from .common import AnySizePatchEmbed, refuse, resized_positions

torch.fx.wrap("resized_positions")  # by name, where it is called


class GridBlock(Block):
    """timm's transformer block, told the grid of its tokens, which agent attention needs."""

    __constants__ = ["has_agents"]  # TorchScript leaves out the call that does not fit
    has_agents = False

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:  # type: ignore[override]
        normed = self.norm1(x)
        if self.has_agents:
            attended = self.attn(normed, grid)
        else:
            attended = self.attn(normed)
        x = x + self.drop_path1(self.ls1(attended))
        return x + self.drop_path2(self.ls2(self.mlp(self.norm2(x))))


class AgentDeit(VisionTransformer):
    """Agent-DeiT for classification; a timm VisionTransformer in all but its attention.

    Args:
        agents: number of agents, a square number; pooled from the patch tokens only.
        agent_blocks: how many of the first blocks use agent attention; the others keep softmax attention.
        agent_grid: side of the agents' grid at run time where it differs from training.
        use_bias, use_conv: False leaves out the agent bias or the depthwise convolution (the paper's ablation).
        dynamic_img_size: take images of any size; positions and biases are resized in the forward pass.
        Others: as in timm.

    Raises:
        ValueError: a number of agents that is no square, or a setting of timm's that agent attention cannot follow.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        agents: int = 49,
        agent_blocks: int = 12,
        agent_grid: int | None = None,
        use_bias: bool = True,
        use_conv: bool = True,
        dynamic_img_size: bool = False,
        depth: int = 12,
        device=None,
        dtype=None,
        **settings: Any,
    ):
        refuse(settings, ("attn_drop_rate", "qk_norm", "scale_attn_norm"), "agent attention has no such thing")
        refuse(settings, ("reg_tokens", "patch_drop_rate"), "agents are pooled from the whole grid of patches")
        settings.setdefault("norm_layer", partial(nn.LayerNorm, eps=1e-6))
        settings.setdefault("qkv_bias", True)
        mode = settings.pop("weight_init", "")
        super().__init__(
            img_size=img_size,
            depth=depth,
            dynamic_img_size=dynamic_img_size,
            embed_layer=partial(AnySizePatchEmbed, least=max(to_2tuple(settings.get("patch_size", 16)))),
            block_fn=GridBlock,
            weight_init="skip",  # below, when the attention has been exchanged
            device=device,
            dtype=dtype,
            **settings,
        )
        self.blocks = cast(Any, nn.ModuleList(self.blocks))  # a sequence could not hand the grid on
        block: Any
        for block in self.blocks[:agent_blocks]:
            block.has_agents = True
            block.attn = AgentAttention(
                self.embed_dim,
                block.attn.num_heads,
                agents,
                self.patch_embed.grid_size,
                qkv_bias=settings["qkv_bias"],
                proj_drop=settings.get("proj_drop_rate", 0.0),
                class_token=self.has_class_token,
                agent_grid=agent_grid,
                enabled=use_bias,
                use_conv=use_conv,
                device=device,
                dtype=dtype,
            )
        self.weight_init_mode = "reset" if mode == "skip" else mode
        if mode != "skip":
            self.init_weights(needs_reset=False)

    def set_input_size(self, img_size=None, patch_size=None) -> None:
        """Change the image size; positions are resized as the authors do, biases in the forward pass."""
        positions, old = self.pos_embed, self.patch_embed.grid_size
        super().set_input_size(img_size, patch_size)
        if positions is not None and self.patch_embed.grid_size != old:
            resized = resized_positions(positions.detach(), old, self.patch_embed.grid_size)
            self.pos_embed = nn.Parameter(resized, requires_grad=positions.requires_grad)

    def embed(self, x: Tensor) -> tuple[Tensor, tuple[int, int]]:
        """Patch tokens with their positions, the class token first, and the (height, width) of their grid."""
        x = self.patch_embed(x)
        if self.dynamic_img_size:
            grid = (x.shape[1], x.shape[2])
            x = x.flatten(1, 2)
        else:
            grid = self.patch_embed.grid_size
        return self.norm_pre(self._add_positions(x, grid)), grid

    def _add_positions(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """[B, h·w, C] -> [B, N, C]: positions of that grid, resized as the authors do, and the class token."""
        positions = self.pos_embed
        if positions is not None and self.dynamic_img_size:
            positions = resized_positions(positions, self.patch_embed.grid_size, grid)
        if positions is not None and self.no_embed_class:  # none for the class token
            x = x + positions
        if self.cls_token is not None:
            x = torch.cat([self.cls_token.expand(x.shape[0], -1, -1), x], dim=1)
        if positions is not None and not self.no_embed_class:
            x = x + positions
        return self.pos_drop(x)

    def forward_features(self, x: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False) -> Tensor:
        """[B, in_chans, H, W] -> tokens [B, 1 + N, embed_dim] after the last norm."""
        x, grid = self.embed(without_mask(x, attn_mask, is_causal))
        for block in self.blocks:
            if self.grad_checkpointing and not torch.jit.is_scripting():
                x = checkpoint(block, x, grid)  # recomputed in the backward pass
            else:
                x = block(x, grid)
        return self.norm(x)

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        output_dict: bool = False,
        attn_mask: Tensor | None = None,
        is_causal: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """The tokens after chosen blocks, as timm returns them.

        Args:
            indices: the last so many blocks, or these; None for all.
            return_prefix_tokens: pair each with the class token [B, 1, C].
            norm: apply the last norm to each.
            stop_early: skip the blocks after the last chosen one.
            output_fmt: "NCHW" or "NLC".
            intermediates_only: leave out the final tokens.
            output_dict: return a dictionary of image_features, image_intermediates and, where asked for,
                image_intermediates_prefix.

        Returns:
            The list, or (final tokens, list), or the dictionary.

        Raises:
            ValueError: another output_fmt, or a mask.
        """
        if output_fmt != "NCHW" and output_fmt != "NLC":
            raise ValueError(f"output_fmt='{output_fmt}': must be 'NCHW' or 'NLC'")
        taken, last = feature_take_indices(len(self.blocks), indices)
        x, grid = self.embed(without_mask(x, attn_mask, is_causal))
        found = []
        for number, block in enumerate(self.blocks):
            if not stop_early or number <= last:
                if self.grad_checkpointing and not torch.jit.is_scripting():
                    x = checkpoint(block, x, grid)
                else:
                    x = block(x, grid)
                if number in taken:
                    found.append(self.norm(x) if norm else x)
        skipped = self.num_prefix_tokens
        images = [tokens[:, skipped:] for tokens in found]
        if output_fmt == "NCHW":
            images = [to_image(tokens, grid).contiguous() for tokens in images]
        if not torch.jit.is_scripting():  # which takes neither dictionaries nor pairs here, as in timm
            prefixes = [tokens[:, :skipped] for tokens in found] if return_prefix_tokens and skipped else None
            if output_dict:
                return cast(Any, _as_dictionary(images, prefixes, None if intermediates_only else self.norm(x)))
            if prefixes is not None:
                images = list(zip(images, prefixes))
        if intermediates_only:
            return images
        return self.norm(x), images


def _as_dictionary(images: list[Tensor], prefixes: list[Tensor] | None, tokens: Tensor | None) -> dict[str, Any]:
    out: dict[str, Any] = {"image_intermediates": images}
    if prefixes is not None:
        out["image_intermediates_prefix"] = prefixes
    if tokens is not None:
        out["image_features"] = tokens
    return out


@torch.fx.wrap
@register_notrace_function  # reason: looks at the mask
def without_mask(x: Tensor, attn_mask: Tensor | None, is_causal: bool) -> Tensor:
    """The image itself, where no mask is given; returning it keeps the check in a traced graph.

    Raises:
        ValueError: a mask, or causal attention.
    """
    if attn_mask is not None or is_causal:
        raise ValueError("attn_mask: agents read all tokens, so agent attention takes no mask; leave it out")
    return x
