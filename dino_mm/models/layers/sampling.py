"""Weighted bilinear samples of feature maps, the core of deformable attention, and the choice of what runs them."""

from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction, multi_scale_deformable_attn_pytorch
from torch import Tensor

from ..structures import FeatureLevels

#: Images that mmcv's CUDA op takes at once; its default.
IM2COL_STEP = 64


def sample_levels(value: Tensor, locations: Tensor, weights: Tensor, levels: FeatureLevels) -> Tensor:
    """Weighted sum of bilinear samples: mmcv's op on a GPU, its PyTorch code on a CPU.

    Args:
        value: (bs, num_tokens, num_heads, dim / num_heads); 0 is read outside of a level.
        locations: (bs, num_queries, num_heads, num_levels, num_points, 2), (x, y) in [0, 1] of the level.
        weights: (bs, num_queries, num_heads, num_levels, num_points).
        levels: Geometry of the tokens.

    Returns:
        (bs, num_queries, dim).
    """
    if value.is_cuda:
        return MultiScaleDeformableAttnFunction.apply(
            value, levels.shape_tensor, levels.start_index, locations, weights, IM2COL_STEP
        )
    return multi_scale_deformable_attn_pytorch(value, levels.shapes, locations, weights)
