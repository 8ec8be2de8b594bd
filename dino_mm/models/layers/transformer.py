"""Encoder and decoder of DINO."""

from typing import Any

import torch
from mmcv.cnn.bricks.transformer import FFN
from mmdet.models.layers.transformer.utils import MLP
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dino_mm.registry import MODELS

from ...ops.linear import use_fast_linear
from ...ops.recomputation import is_cheaper_to_compute_again, run_again_for_gradients
from ...ops.step_weights import as_autocast, with_its_weights
from ..box_ops import encode_boxes, refine_boxes, wavelengths
from ..structures import DecoderStates, FeatureLevels, Tokens
from .attention import DeformableAttention, SelfAttention, attention_mask


def init_transformer(module: nn.Module) -> None:
    """Xavier-uniform for matrices, deformable attention's own start; biases and norms stay as torch sets them."""
    for parameter in module.parameters():
        if parameter.dim() > 1:
            nn.init.xavier_uniform_(parameter)
    for child in module.modules():
        if isinstance(child, DeformableAttention):
            child.init_weights()


def check_num_cp(num_cp: int, num_layers: int) -> int:
    """Return ``num_cp`` if there are so many layers to checkpoint; ValueError otherwise."""
    if not 0 <= num_cp <= num_layers:
        raise ValueError(
            f'`num_cp` is {num_cp}, but there are {num_layers} layers: set the number of layers, 0 to {num_layers}, '
            'that compute their activations again instead of keeping them.'
        )
    return num_cp


def run_layer(layer: nn.Module, recompute: bool, *args: Any) -> Tensor:
    """Call ``layer``; with ``recompute``, keep only its inputs and compute the rest again for the gradients."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(with_its_weights(layer), *args, use_reentrant=False)
    return layer(*args)


def run_ffn(ffn: FFN, query: Tensor, recompute: bool = False) -> Tensor:
    """Apply ``ffn``, residual included, to ``query`` (bs, num_queries, dim); ``recompute`` as in :func:`run_layer`."""
    # Rows, as what a linear layer gives of them is not a view: writing to one, as mmcv's ReLU does, costs four copies.
    rows, output = query.flatten(0, 1), None
    if recompute and torch.is_grad_enabled():
        output = run_again_for_gradients(ffn, rows)
    return (run_layer(ffn, recompute, rows) if output is None else output).view_as(query)


class DINOEncoderLayer(BaseModule):
    """Deformable self-attention over all levels, then a feed-forward network, each followed by LayerNorm."""

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        feedforward_channels: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.self_attn = DeformableAttention(embed_dims, num_heads, num_levels, num_points, dropout)
        self.ffn = FFN(embed_dims, feedforward_channels, ffn_drop=dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(embed_dims) for _ in range(2))

    def forward(self, query: Tensor, reference: Tensor, tokens: Tokens) -> Tensor:
        """``query`` (bs, num_tokens, dim) sampled around ``reference`` (bs, num_tokens, num_levels, 2)."""
        query = self.self_attn(query, tokens.positions, query, reference, tokens.levels, tokens.padding_mask)
        query = self.norms[0](query)  # by that name, so that nothing holds its input, which is as large as the memory
        # The hidden layers of all tokens, eight times as wide as these, would be a quarter of a training step's memory.
        return self.norms[1](run_ffn(self.ffn, query, is_cheaper_to_compute_again(query)))


@MODELS.register_module()
class DINOEncoder(BaseModule):
    """Stack of deformable encoder layers.

    Args:
        embed_dims: Width ``dim``; handed down by the detector.
        num_levels: Number of feature levels; handed down by the detector.
        num_layers: Number of layers.
        num_heads: Heads of the attention.
        num_points: Sampling points of each head on each level.
        feedforward_channels: Hidden width of the feed-forward networks.
        dropout: Dropout rate of attention outputs and feed-forward networks.
        num_cp: Layers, counted from the first, that are checkpointed: in training they keep only their inputs and
            compute their activations again for the gradients, less memory for more time.

    Raises:
        ValueError: ``num_cp`` is not between 0 and ``num_layers``.

    Source: DINO, section 3.2; Deformable DETR, section 4.1.
    """

    def __init__(
        self,
        embed_dims: int,
        num_levels: int,
        num_layers: int = 6,
        num_heads: int = 8,
        num_points: int = 4,
        feedforward_channels: int = 2048,
        dropout: float = 0.0,
        num_cp: int = 0,
    ) -> None:
        super().__init__()
        self.num_layers = num_layers
        self.num_cp = check_num_cp(num_cp, num_layers)
        self.layers = nn.ModuleList(
            DINOEncoderLayer(embed_dims, num_heads, num_levels, num_points, feedforward_channels, dropout)
            for _ in range(num_layers)
        )
        use_fast_linear(self.layers)

    def init_weights(self) -> None:
        """See :func:`init_transformer`."""
        super().init_weights()
        init_transformer(self)

    def forward(self, tokens: Tokens) -> Tensor:
        """Return the memory, (bs, num_tokens, dim). Positions join the queries, never the values."""
        reference = tokens.centers[:, :, None] * tokens.levels.valid_ratios[:, None]
        memory = tokens.features
        for i, layer in enumerate(self.layers):
            memory = run_layer(layer, i < self.num_cp, memory, reference, tokens)
        return memory


class DINODecoderLayer(BaseModule):
    """Self-attention among queries, deformable attention into the memory, feed-forward; LayerNorm after each."""

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        feedforward_channels: int,
        dropout: float,
    ) -> None:
        super().__init__()
        self.self_attn = SelfAttention(embed_dims, num_heads, dropout)
        self.cross_attn = DeformableAttention(embed_dims, num_heads, num_levels, num_points, dropout)
        self.ffn = FFN(embed_dims, feedforward_channels, ffn_drop=dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(embed_dims) for _ in range(3))

    def forward(
        self,
        query: Tensor,
        query_pos: Tensor,
        memory: Tensor,
        reference: Tensor,
        levels: FeatureLevels,
        padding_mask: Tensor | None,
        attn_mask: Tensor | None,
    ) -> Tensor:
        """``query`` (bs, num_queries, dim) sampled around ``reference`` (bs, num_queries, num_levels, 4)."""
        query = self.norms[0](self.self_attn(query, query_pos, attn_mask))
        query = self.cross_attn(query, query_pos, memory, reference, levels, padding_mask)
        return self.norms[2](run_ffn(self.ffn, self.norms[1](query)))


@MODELS.register_module()
class DINODecoder(BaseModule):
    """Decoder that refines boxes layer by layer and looks forward twice.

    A layer's box is refined from the previous one's, detached; the box that the *next* layer's loss starts from is
    not detached, so that each layer also learns from the loss of the layer after it.

    Args, and errors: as :class:`DINOEncoder`.

    Source: DINO, sections 3.2 and 3.5; DAB-DETR for the position queries made from boxes.
    """

    def __init__(
        self,
        embed_dims: int,
        num_levels: int,
        num_layers: int = 6,
        num_heads: int = 8,
        num_points: int = 4,
        feedforward_channels: int = 2048,
        dropout: float = 0.0,
        num_cp: int = 0,
    ) -> None:
        super().__init__()
        self.embed_dims = embed_dims
        self.num_layers = num_layers
        self.num_cp = check_num_cp(num_cp, num_layers)
        self.layers = nn.ModuleList(
            DINODecoderLayer(embed_dims, num_heads, num_levels, num_points, feedforward_channels, dropout)
            for _ in range(num_layers)
        )
        use_fast_linear(self.layers)
        self.ref_point_head = MLP(embed_dims * 2, embed_dims, embed_dims, 2)
        self.norm = nn.LayerNorm(embed_dims)

    def init_weights(self) -> None:
        """See :func:`init_transformer`."""
        super().init_weights()
        init_transformer(self)

    def forward(
        self,
        query: Tensor,
        reference: Tensor,
        memory: Tensor,
        tokens: Tokens,
        reg_branches: nn.ModuleList,
        visible: Tensor | None = None,
    ) -> DecoderStates:
        """Decode.

        Args:
            query: (bs, num_queries, dim), content of the queries.
            reference: (bs, num_queries, 4), their boxes, cxcywh in [0, 1] of the image without padding.
            memory: (bs, num_tokens, dim), the encoder's output.
            tokens: For its geometry and padding mask.
            reg_branches: The head's box branches, one for each layer; they refine here and predict there.
            visible: Where denoising queries come first, what they see: see :class:`DenoisingQueries`.
        """
        levels, states, references = tokens.levels, [], [reference]
        ratios = levels.valid_ratios.repeat(1, 1, 2)[:, None]
        lengths = wavelengths(self.embed_dims // 2, reference.device)
        attn_mask = None if visible is None else attention_mask(visible, query.dtype)
        memory = as_autocast(memory)
        for i, (layer, reg_branch) in enumerate(zip(self.layers, reg_branches, strict=False)):
            level_boxes = reference[:, :, None] * ratios
            query_pos = self.ref_point_head(encode_boxes(level_boxes[:, :, 0], lengths))
            inputs = (query, query_pos, memory, level_boxes, levels, tokens.padding_mask, attn_mask)
            query = run_layer(layer, i < self.num_cp, *inputs)
            refined = refine_boxes(reg_branch(query), reference)
            states.append(query)
            references.append(refined)
            reference = refined.detach()
        return DecoderStates(self.norm(torch.stack(states)), references)
