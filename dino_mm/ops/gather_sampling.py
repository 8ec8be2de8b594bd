"""Weighted bilinear samples by gathering rows, in operators that every runtime has."""

import torch
from torch import Tensor


def sample(value: Tensor, shape_tensor: Tensor, start_index: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """See :func:`~dino_mm.ops.deformable_sampling.sample_levels`; the geometry of the levels comes as tensors alone.

    Args:
        value: (bs, num_tokens, num_heads, dim / num_heads).
        shape_tensor: (num_levels, 2) integers, (height, width).
        start_index: (num_levels,) integers.
        locations: (bs, num_queries, num_heads, num_levels, num_points, 2), (x, y) in [0, 1] of the level.
        weights: (bs, num_queries, num_heads, num_levels, num_points).

    Returns:
        (bs, num_queries, num_heads, dim / num_heads).
    """
    bs, num_tokens, num_heads, _ = value.shape
    sizes = shape_tensor.flip(1).to(locations)  # (width, height)
    last = (sizes - 1)[:, None]
    pixels = locations * sizes[:, None] - 0.5
    corner = pixels.floor()
    offset = pixels - corner
    starts = start_index.long()[:, None]
    # A row of `rows` is a token's values in one head; each index is (image * num_tokens + token) * num_heads + head.
    rows = value.flatten(0, 2)
    images = torch.arange(bs, device=value.device).view(-1, 1, 1, 1, 1)
    heads = torch.arange(num_heads, device=value.device).view(-1, 1, 1)
    output = torch.zeros_like(value[:, :1, :, None])
    for right in (0, 1):
        for below in (0, 1):
            point = torch.stack([corner[..., 0] + right, corner[..., 1] + below], -1)
            nearest = torch.minimum(point.clamp(min=0), last)
            shares = torch.stack([_share(offset[..., 0], right), _share(offset[..., 1], below)], -1)
            # Outside of its level a point reads 0.
            shares = shares * (point == nearest).to(shares)
            pixel = nearest.long()
            tokens = starts + pixel[..., 1] * shape_tensor[:, 1, None].long() + pixel[..., 0]
            index = (images * num_tokens + tokens) * num_heads + heads
            weight = weights * shares[..., 0] * shares[..., 1]
            output = output + weight.flatten(3)[..., None, :] @ rows[index.flatten(3)]
    return output.squeeze(3)


def _share(offset: Tensor, far: int) -> Tensor:
    """Share of the near or the far pixel in a point that lies ``offset`` behind the near one."""
    return offset if far else 1 - offset
