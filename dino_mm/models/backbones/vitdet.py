"""ViTDet: the plain vision transformer as a backbone, with attention in windows and a few global blocks."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks import DropPath
from mmengine.model import BaseModule
from timm.layers import Mlp, PatchEmbed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dino_mm.registry import MODELS

from ...checkpoints.loading import convert_backbones_on_load
from ...ops.tracing import is_compiling


@MODELS.register_module()
class ViTDet(BaseModule):
    """Plain ViT on images of any size.

    The patch embedding floors: up to ``patch_size - 1`` pixels at the right and bottom are not seen. The position
    embedding of the pretraining is resized to the tokens of each image, relative positions are decomposed into rows
    and columns. Names of the parameters are those of MAE's and detectron2's releases.

    Source: Li et al., Exploring Plain Vision Transformer Backbones for Object Detection (ViTDet), section 3; decomposed
    relative positions: Li et al., MViTv2, section 4.1.

    Args:
        embed_dims: Channels of the tokens and of the output.
        depth: Number of blocks.
        num_heads: Attention heads of a block.
        mlp_ratio: Hidden channels of a block's MLP, in ``embed_dims``.
        patch_size: Side of a patch in pixels, and the output's stride.
        img_size: Image side for which the relative position tables of the global blocks have one row per distance;
            for other sizes they are interpolated.
        window_size: Side of a window in tokens.
        global_attn_indexes: The blocks that attend over the whole image.
        drop_path_rate: Stochastic depth of the last block; it grows linearly from 0 at the first.
        pretrain_img_size: Image side of the pretraining, which gives the position embedding its size.
        key_bias: Whether keys have a bias. EVA's do not: its ``q_bias`` and ``v_bias`` are parameters of their own.
        frozen_stages: 0: the patch embedding does not train; k: the position embedding and the first k blocks do not
            either, and these blocks drop no paths. -1: all trains.
        with_cp: Recompute each block in the backward pass (activation checkpointing) instead of storing its
            intermediate values.
        in_channels: Channels of the image.
        init_cfg: mmengine's initialisation; None: as in detectron2, truncated normal of 0.02 for all linear layers.

    Raises:
        ValueError: Channels cannot be shared among the heads, or an index is not one of a block.
    """

    def __init__(
        self,
        embed_dims: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = 4.0,
        patch_size: int = 16,
        img_size: int = 1024,
        window_size: int = 14,
        global_attn_indexes: Sequence[int] = (2, 5, 8, 11),
        drop_path_rate: float = 0.0,
        pretrain_img_size: int = 224,
        key_bias: bool = True,
        frozen_stages: int = -1,
        with_cp: bool = False,
        in_channels: int = 3,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg or dict(type='TruncNormal', layer='Linear', std=0.02))
        _check(embed_dims, num_heads, depth, global_attn_indexes, frozen_stages)
        self.frozen_stages = frozen_stages
        self.with_cp = with_cp
        self.patch_embed = PatchEmbed(None, patch_size, in_channels, embed_dims, output_fmt='NHWC')
        # The first of the positions is the class token's: pretraining has one, detection does not.
        self.pos_embed = nn.Parameter(torch.empty(1, 1 + (pretrain_img_size // patch_size) ** 2, embed_dims))
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        self.blocks = nn.ModuleList()
        for index, drop_path in enumerate(torch.linspace(0, drop_path_rate, depth, device='cpu').tolist()):
            windowed = index not in global_attn_indexes
            table_size = window_size if windowed else img_size // patch_size
            attn = RelativeAttention(embed_dims, num_heads, table_size, key_bias)
            hidden = int(embed_dims * mlp_ratio)
            self.blocks.append(ViTDetBlock(attn, embed_dims, hidden, drop_path, window_size if windowed else None))
        self._freeze_stages()
        convert_backbones_on_load(self)

    def forward(self, inputs: Tensor) -> tuple[Tensor]:
        """Features of images.

        Args:
            inputs: (bs, in_channels, height, width).

        Returns:
            One map, (bs, embed_dims, height // patch_size, width // patch_size).
        """
        x = self.patch_embed(inputs)
        x = x + self._positions(x.shape[1], x.shape[2])
        for block in self.blocks:
            recompute = self.with_cp and torch.is_grad_enabled()
            x = checkpoint(block, x, use_reentrant=False) if recompute else block(x)
        return (x.permute(0, 3, 1, 2),)

    def train(self, mode: bool = True) -> 'ViTDet':
        """Set the mode; what is frozen stays in evaluation mode."""
        super().train(mode)
        self._freeze_stages()
        return self

    def _positions(self, height: int, width: int) -> Tensor:
        """Position embedding at the size of an image: (1, height, width, dim), in tokens."""
        grid = self.pos_embed[:, 1:].transpose(1, 2)
        side = math.isqrt(grid.shape[-1])
        grid = F.interpolate(grid.unflatten(-1, (side, side)), (height, width), mode='bicubic', align_corners=False)
        return grid.permute(0, 2, 3, 1)

    def _freeze_stages(self) -> None:
        if self.frozen_stages < 0:
            return
        if self.frozen_stages > 0:
            self.pos_embed.requires_grad_(False)  # else the backward pass would run through frozen blocks for it alone
        for module in [self.patch_embed, *self.blocks[: self.frozen_stages]]:
            module.eval().requires_grad_(False)


class ViTDetBlock(nn.Module):
    """Attention and MLP, each after a norm and beside a residual.

    Args:
        attn: Attention over the tokens of a rectangle.
        embed_dims: Channels of the tokens.
        feedforward_channels: Hidden channels of the MLP.
        drop_path: Probability that a residual branch is left out for an image.
        window_size: Side of a window in tokens; None attends over the whole image.
    """

    def __init__(
        self,
        attn: 'RelativeAttention',
        embed_dims: int,
        feedforward_channels: int,
        drop_path: float,
        window_size: int | None,
    ) -> None:
        super().__init__()
        self.window_size = window_size
        self.norm1 = nn.LayerNorm(embed_dims, eps=1e-6)
        self.attn = attn
        self.norm2 = nn.LayerNorm(embed_dims, eps=1e-6)
        self.mlp = Mlp(embed_dims, feedforward_channels)
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (bs, height, width, dim) to tokens of the same shape."""
        x = x + self.drop_path(self._attend(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))

    def _attend(self, x: Tensor) -> Tensor:
        if self.window_size is None:
            return self.attn(x)
        windows = to_windows(x, self.window_size)
        return from_windows(self.attn(windows), x.shape[1], x.shape[2])


class RelativeAttention(nn.Module):
    """Multi-head self-attention over a rectangle of tokens, with decomposed relative positions.

    The logit of a query at (row, column) and a key gets ``query @ rel_pos_h[row distance]`` and
    ``query @ rel_pos_w[column distance]``.

    Args:
        embed_dims: Channels of the tokens.
        num_heads: Attention heads.
        table_size: Side of the square for which the tables have one row per distance.
        key_bias: Whether keys have a bias.
    """

    def __init__(self, embed_dims: int, num_heads: int, table_size: int, key_bias: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(embed_dims, 3 * embed_dims, bias=key_bias)
        if not key_bias:
            self.q_bias = nn.Parameter(torch.zeros(embed_dims))
            self.v_bias = nn.Parameter(torch.zeros(embed_dims))
        self.proj = nn.Linear(embed_dims, embed_dims)
        self.rel_pos_h = nn.Parameter(torch.zeros(2 * table_size - 1, embed_dims // num_heads))
        self.rel_pos_w = nn.Parameter(torch.zeros(2 * table_size - 1, embed_dims // num_heads))

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (bs, height, width, dim) to tokens of the same shape."""
        bs, height, width, dim = x.shape
        qkv = F.linear(x, self.qkv.weight, self._qkv_bias())
        query, key, value = qkv.view(bs, height * width, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4).unbind()
        bias = self._position_bias(query.view(bs, self.num_heads, height, width, -1), height, width)
        output = F.scaled_dot_product_attention(query, key, value, attn_mask=bias).transpose(1, 2)
        if is_compiling():  # a view that is recorded here does not fit the strides of other code for attention
            output = copy(output)
        return self.proj(output.reshape(bs, height, width, dim))

    def _qkv_bias(self) -> Tensor:
        if self.qkv.bias is not None:
            return self.qkv.bias
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

    def _position_bias(self, query: Tensor, height: int, width: int) -> Tensor:
        """Position term of the logits; a trace does not find ``height`` and ``width`` in ``query``.

        Args:
            query: (bs, num_heads, height, width, head_dim), not scaled: the term is not divided by its root.
            height: Of the rectangle, in tokens.
            width: Likewise.

        Returns:
            (bs, num_heads, num_tokens, num_tokens), queries before keys.
        """
        rows = self._along_first(query.permute(2, 0, 1, 3, 4), relative_positions(self.rel_pos_h, height))
        columns = self._along_first(query.permute(3, 0, 1, 2, 4), relative_positions(self.rel_pos_w, width))
        rows, columns = copy(rows.permute(1, 2, 0, 3, 4)), copy(columns.permute(1, 2, 3, 0, 4))
        return (rows[..., :, None] + columns[..., None, :]).flatten(4).flatten(2, 3)

    @staticmethod
    def _along_first(query: Tensor, positions: Tensor) -> Tensor:
        """Products of ``query`` (length, bs, num_heads, other, head_dim) and ``positions`` (length, length, head_dim).

        What `einsum` computes, and as it does; but an exported program would have guards on `einsum`'s strides.

        Returns:
            (length, bs, num_heads, other, length), keys last.
        """
        length, bs, num_heads, other, head_dim = query.shape
        rows = copy(query).view(length, bs * num_heads * other, head_dim)
        return (rows @ positions.transpose(1, 2)).view(length, bs, num_heads, other, length)


def relative_positions(table: Tensor, length: int) -> Tensor:
    """Embedding of the distance between all positions of an axis.

    Args:
        table: (num_distances, dim), from the most negative distance (the key lies after the query) on; it is
            interpolated linearly if ``length`` positions have another number of distances.
        length: Number of positions.

    Returns:
        (length, length, dim), queries before keys.
    """
    num_distances = 2 * length - 1
    # What is recorded serves other lengths; interpolation to the same number changes nothing.
    if torch.jit.is_tracing() or isinstance(length, torch.SymInt) or table.shape[0] != num_distances:
        table = F.interpolate(table.t()[None], num_distances, mode='linear', align_corners=False)[0].t()
    positions = torch.arange(length, device=table.device)
    return table[positions[:, None] - positions + length - 1]


def to_windows(x: Tensor, size: int) -> Tensor:
    """Cut tokens (bs, height, width, dim) into windows (bs * num_windows, size, size, dim), row by row.

    Zeros fill up the last windows. Attention does not mask them: as keys and values they are the bias alone.
    """
    # By shapes and `view`: traces and ONNX files make constants of the sizes that `unflatten` and `flatten` find.
    bs, height, width, dim = x.shape
    rows, columns = windows_along(height, size), windows_along(width, size)
    x = F.pad(x, (0, 0, 0, columns * size - width, 0, rows * size - height))
    x = copy(x.view(bs, rows, size, columns, size, dim).transpose(2, 3))
    return x.view(bs * rows * columns, size, size, dim)


def from_windows(windows: Tensor, height: int, width: int) -> Tensor:
    """Put windows (bs * num_windows, size, size, dim) together to (bs, height, width, dim), without the filling."""
    size, dim = windows.shape[2:]
    rows, columns = windows_along(height, size), windows_along(width, size)
    x = copy(windows.view(-1, rows, columns, size, size, dim).transpose(2, 3))
    return crop(x.view(-1, rows * size, columns * size, dim), height, width)


def copy(x: Tensor) -> Tensor:
    """``x``, contiguous. `reshape` copies too, but an exported program would have guards on when it need not."""
    return x.clone(memory_format=torch.contiguous_format)


def crop(x: Tensor, height: int, width: int) -> Tensor:
    """The first ``height`` rows and ``width`` columns of ``x``, (bs, rows, columns, dim).

    An exported program gathers them: slices would have guards on whether they are all of ``x``.
    """
    if not is_compiling():
        return x[:, :height, :width]
    rows, columns = (torch.arange(length, device=x.device) for length in (height, width))
    return x.index_select(1, rows).index_select(2, columns)


def windows_along(length: int, size: int) -> int:
    """Number of windows that cover ``length`` tokens; without a negative dividend, which ONNX rounds the other way."""
    return (length + size - 1) // size


def _check(embed_dims: int, num_heads: int, depth: int, global_attn_indexes: Sequence[int], frozen_stages: int) -> None:
    if embed_dims % num_heads:
        raise ValueError(f'`embed_dims` is {embed_dims}: make it a multiple of `num_heads`, {num_heads}.')
    strangers = [index for index in global_attn_indexes if not 0 <= index < depth]
    if strangers:
        raise ValueError(f'`global_attn_indexes` has {strangers}: with `depth` {depth} use 0 to {depth - 1}.')
    if not -1 <= frozen_stages <= depth:
        raise ValueError(f'`frozen_stages` is {frozen_stages}: with `depth` {depth} use -1 (none) to {depth}.')
