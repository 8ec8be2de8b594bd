"""The two attentions of DINO: self-attention among queries, deformable attention into the feature maps."""

import torch
import torch.nn.functional as F
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttention
from torch import Tensor, nn

from ...ops.branches import has_hooks
from ...ops.deformable_sampling import sample_levels
from ...ops.linear import linear
from ...ops.step_weights import as_autocast
from ..structures import FeatureLevels


class SelfAttention(nn.Module):
    """Multi-head self-attention with residual; positions are added to queries and keys, not to values.

    Runs on ``scaled_dot_product_attention``: attention weights are never kept. The parameters are those of an
    ``nn.MultiheadAttention``. It runs itself where it has hooks, and hands them the attention weights.
    """

    def __init__(self, embed_dims: int, num_heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(embed_dims, num_heads, dropout, batch_first=True)
        self.dropout = nn.Dropout(dropout)

    def forward(self, query: Tensor, query_pos: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend.

        Args:
            query: (bs, num_queries, dim).
            query_pos: (bs, num_queries, dim).
            mask: (num_queries, num_queries), added to the logits, see :func:`attention_mask`. None: each query attends
                to all.
        """
        if has_hooks(self.attn):
            located = query + query_pos
            return query + self.dropout(self.attn(located, located, query, attn_mask=mask)[0])
        width = query.shape[-1]
        weights, biases = (p.split([2 * width, width]) for p in (self.attn.in_proj_weight, self.attn.in_proj_bias))
        located, content = linear(query + query_pos, weights[0], biases[0]), linear(query, weights[1], biases[1])
        q, k, v = (
            x.unflatten(-1, (self.attn.num_heads, -1)).transpose(1, 2) for x in (*located.split(width, -1), content)
        )
        dropout = self.attn.dropout if self.training else 0.0
        output = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout)
        return query + self.dropout(self.attn.out_proj(output.transpose(1, 2).flatten(2)))


def attention_mask(visible: Tensor, dtype: torch.dtype) -> Tensor:
    """What hides queries from one another if it is added to the logits, (num_queries, num_queries): 0 or -inf.

    torch makes this of a mask of truth values too, but in each layer. Rows start at multiples of eight numbers, or the
    kernels of GPUs would copy the mask.

    Args:
        visible: (num_dn, num_queries) bool, the queries that each denoising query, of the first ones, attends to. The
            others attend to one another.
        dtype: Of the queries.
    """
    num_dn, num_queries = visible.shape
    mask = visible.new_zeros(num_queries, num_queries + -num_queries % 8, dtype=dtype)[:, :num_queries]
    mask[:num_dn].masked_fill_(~visible, -torch.inf)
    mask[num_dn:, :num_dn] = -torch.inf
    return as_autocast(mask)


class DeformableAttention(MultiScaleDeformableAttention):
    """mmcv's ``MultiScaleDeformableAttention`` with its parameters, without waiting for the host.

    mmcv's own ``forward`` compares token counts on the host in every call. Here the shapes are known to the host
    beforehand, and under autocast the sampling runs in the precision of the reference points (float32), as
    half precision cannot address the pixels of a large map.

    Source: Deformable DETR, section 4.1.
    """

    def __init__(
        self,
        embed_dims: int,
        num_heads: int,
        num_levels: int,
        num_points: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__(embed_dims, num_heads, num_levels, num_points, dropout=dropout, batch_first=True)

    def forward(
        self,
        query: Tensor,
        query_pos: Tensor,
        value: Tensor,
        reference: Tensor,
        levels: FeatureLevels,
        padding_mask: Tensor | None,
    ) -> Tensor:
        """Sample ``value`` around each query's reference; residual included.

        Args:
            query: (bs, num_queries, dim).
            query_pos: (bs, num_queries, dim).
            value: (bs, num_tokens, dim).
            reference: (bs, num_queries, num_levels, 2) points or (..., 4) boxes, cxcywh, in [0, 1] of the padded map.
            levels: Geometry of the tokens.
            padding_mask: (bs, num_tokens) bool, True on padding; such tokens contribute 0.

        Returns:
            (bs, num_queries, dim).
        """
        bs, num_queries, _ = query.shape
        points = (bs, num_queries, self.num_heads, self.num_levels, self.num_points)
        located = as_autocast(query + query_pos)
        offsets = self.sampling_offsets(located).view(*points, 2)
        weights = self.attention_weights(located).view(*points[:3], -1).softmax(-1).view(points)
        locations = self.sampling_locations(offsets, reference, levels)

        value = self.value_proj(value)
        if padding_mask is not None:
            value = value.masked_fill(padding_mask[..., None], 0.0)
        value = value.view(bs, -1, self.num_heads, value.shape[-1] // self.num_heads)
        output = sample_levels(value.to(locations), locations, weights.to(locations), levels)
        return query + self.dropout(self.output_proj(output))

    def sampling_locations(self, offsets: Tensor, reference: Tensor, levels: FeatureLevels) -> Tensor:
        """Where to sample: (bs, num_queries, num_heads, num_levels, num_points, 2), (x, y) in [0, 1].

        Around a point, ``offsets`` of that shape count in pixels of the level; around a box, in half sizes of the box.
        """
        reference = reference[:, :, None, :, None]
        if reference.shape[-1] == 2:
            return reference + offsets / levels.sizes[:, None]  # not `addcdiv`, which ONNX lacks
        centers, sizes = reference.split(2, -1)
        return torch.addcmul(centers, offsets, sizes, value=0.5 / self.num_points)
