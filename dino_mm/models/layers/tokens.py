"""From a feature pyramid to tokens."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmdet.structures import DetDataSample
from torch import Tensor, nn

from ..structures import FeatureLevels, Tokens


def flatten_levels(
    feats: Sequence[Tensor],
    samples: Sequence[DetDataSample],
    positional_encoding: nn.Module,
    level_embed: Tensor,
) -> Tokens:
    """Join feature maps into one sequence, finest level first, row by row.

    Args:
        feats: Feature maps (bs, dim, height, width).
        samples: Data samples, for ``img_shape`` and ``batch_input_shape``; none, or all of the same size: no padding.
        positional_encoding: Position embedding of a mask or a map, mmdet's interface.
        level_embed: (num_levels, dim).
    """
    masks = padding_masks(feats, samples)
    positions = [
        positional_encoding(mask, input=feat).to(level_embed).flatten(2).transpose(1, 2) + embed
        for feat, mask, embed in zip(feats, masks, level_embed, strict=True)
    ]
    sizes = torch.stack([valid_size(feat, mask) for feat, mask in zip(feats, masks, strict=True)], 1)
    shapes = tuple((feat.shape[2], feat.shape[3]) for feat in feats)
    shape_tensor = torch.tensor(shapes, device=level_embed.device)
    levels = FeatureLevels(
        shapes=shapes,
        shape_tensor=shape_tensor,
        start_index=shape_tensor.prod(1).cumsum(0) - shape_tensor.prod(1),
        valid_ratios=sizes / shape_tensor.flip(-1),
    )
    return Tokens(
        features=torch.cat([feat.flatten(2).transpose(1, 2) for feat in feats], 1),
        positions=torch.cat(positions, 1),
        centers=torch.cat(
            [token_centers(shape, size) for shape, size in zip(shapes, sizes.unbind(1), strict=True)],
            1,
        ),
        padding_mask=None if masks[0] is None else torch.cat([m.flatten(1) for m in masks if m is not None], 1),
        levels=levels,
    )


def padding_masks(feats: Sequence[Tensor], samples: Sequence[DetDataSample]) -> list[Tensor | None]:
    """For each feature map where it is padding, (bs, height, width) bool; None for all if no image is padded."""
    batch_shapes = {tuple(sample.batch_input_shape) for sample in samples}
    if {tuple(sample.img_shape[:2]) for sample in samples} == batch_shapes:
        return [None] * len(feats)
    mask = feats[0].new_ones(len(samples), *batch_shapes.pop(), dtype=torch.float32)
    for image, sample in zip(mask, samples, strict=True):
        height, width = sample.img_shape[:2]
        image[:height, :width] = 0
    return [F.interpolate(mask[None], size=feat.shape[-2:])[0].bool() for feat in feats]


def valid_size(feat: Tensor, mask: Tensor | None) -> Tensor:
    """Columns and rows of a feature map that are image, (bs, 2) float32, from its first row and column."""
    if mask is None:
        return torch.tensor(feat.shape[:1:-1], dtype=torch.float32, device=feat.device).expand(len(feat), 2)
    return torch.stack([(~mask[:, 0]).sum(1), (~mask[:, :, 0]).sum(1)], -1).float()


def token_centers(shape: tuple[int, int], size: Tensor) -> Tensor:
    """Centres (x, y) of a level's pixels, (bs, height * width, 2), in [0, 1] of the valid ``size`` (bs, 2)."""
    height, width = shape
    y = torch.arange(height, dtype=size.dtype, device=size.device) + 0.5
    x = torch.arange(width, dtype=size.dtype, device=size.device) + 0.5
    grid = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1)
    return grid.flatten(0, 1) / size[:, None]
