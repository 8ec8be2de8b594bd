"""From a feature pyramid to tokens."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmdet.structures import DetDataSample
from torch import Tensor, nn

from ...ops.transfer import to_device
from ..structures import FeatureLevels, ImageSizes, Tokens, name_image


def flatten_levels(
    feats: Sequence[Tensor],
    samples: Sequence[DetDataSample] | ImageSizes,
    positional_encoding: nn.Module,
    level_embed: Tensor,
) -> Tokens:
    """Join feature maps into one sequence, finest level first, row by row.

    Args:
        feats: Feature maps (bs, dim, height, width).
        samples: Data samples, for ``img_shape`` and ``batch_input_shape``; none, or all of the same size: no padding.
            Or the sizes alone, with which any image may have padding.
        positional_encoding: Position embedding of a mask or a map, mmdet's interface.
        level_embed: (num_levels, dim).
    """
    levels, masks, valid_sizes = measure_levels(feats, samples)
    positions = [
        positional_encoding(mask, input=feat).to(level_embed).flatten(2).transpose(1, 2) + embed
        for feat, mask, embed in zip(feats, masks, level_embed, strict=True)
    ]
    return Tokens(
        features=torch.cat([feat.flatten(2).transpose(1, 2) for feat in feats], 1),
        positions=torch.cat(positions, 1),
        centers=torch.cat(
            [token_centers(shape, size) for shape, size in zip(levels.shapes, valid_sizes.unbind(1), strict=True)],
            1,
        ),
        padding_mask=None if masks[0] is None else torch.cat([m.flatten(1) for m in masks if m is not None], 1),
        levels=levels,
    )


def measure_levels(
    feats: Sequence[Tensor], samples: Sequence[DetDataSample] | ImageSizes
) -> tuple[FeatureLevels, Sequence[Tensor | None], Tensor]:
    """Geometry of the feature maps, and where they are image and where padding.

    Args: as :func:`flatten_levels`.

    Returns:
        The levels; for each a mask (bs, height, width), True on padding, or None for all if no image is padded; and
        (bs, num_levels, 2) float32, columns and rows of each map that are image.

    Raises:
        ValueError: An image is larger than the batch that ``batch_input_shape`` states.
    """
    shapes = tuple((feat.shape[2], feat.shape[3]) for feat in feats)
    starts = [sum(height * width for height, width in shapes[:level]) for level in range(len(shapes))]
    tables: list = [shapes, starts, [(width, height) for height, width in shapes]]
    given = samples if isinstance(samples, ImageSizes) else None
    data_samples: Sequence[DetDataSample] = [] if isinstance(samples, ImageSizes) else samples
    if _are_padded(data_samples):
        tables.append([sample.img_shape[:2] for sample in data_samples])
    shape_tensor, start_index, sizes, *image_shapes = to_device(tables, feats[0].device)
    masks: Sequence[Tensor | None] = [None] * len(feats)
    valid_sizes = sizes.float().expand(feats[0].shape[0], -1, -1)
    if given is None and image_shapes:
        given = ImageSizes(image_shapes[0], data_samples[0].batch_input_shape)
    if given is not None:
        masks, valid_sizes = _valid_area(shapes, *given)
    return FeatureLevels(shapes, shape_tensor, start_index, sizes, valid_sizes / sizes), masks, valid_sizes


def _valid_area(
    shapes: Sequence[tuple[int, int]], image_shapes: Tensor, batch_shape: tuple[int, int]
) -> tuple[list[Tensor], Tensor]:
    """Masks and sizes as of :func:`measure_levels`, of images of ``image_shapes`` (bs, 2), (height, width)."""
    # Padding is a band at the bottom and one at the right: a mask of the rows and one of the columns say it all.
    rows, columns = (
        (torch.arange(length, device=image_shapes.device) >= valid[:, None]).float()[:, None]
        for length, valid in zip(batch_shape, image_shapes.unbind(1), strict=True)
    )
    level_rows = [F.interpolate(rows, size=height)[:, 0].bool() for height, _ in shapes]
    level_columns = [F.interpolate(columns, size=width)[:, 0].bool() for _, width in shapes]
    valid = [torch.stack([(~x).sum(1), (~y).sum(1)], -1) for x, y in zip(level_columns, level_rows, strict=True)]
    masks = [y[:, :, None] | x[:, None] for x, y in zip(level_columns, level_rows, strict=True)]
    return masks, torch.stack(valid, 1).float()


def _are_padded(samples: Sequence[DetDataSample]) -> bool:
    """Whether any image is smaller than its batch."""
    image_area = batch_area = 0
    for sample in samples:
        (height, width), (batch_height, batch_width) = sample.img_shape[:2], sample.batch_input_shape
        if height > batch_height or width > batch_width:
            raise ValueError(
                f'{name_image(sample)} has {height} x {width} pixels (height x width), more than the batch that '
                f'`batch_input_shape` states, {batch_height} x {batch_width}. If `BatchFixedSizePad` pads the batches, '
                'its `size` must be at least that of the largest image in both directions.'
            )
        image_area += height * width
        batch_area += batch_height * batch_width
    # One comparison for the whole batch: torch.compile makes a new graph for each combination of outcomes.
    return image_area < batch_area


def token_centers(shape: tuple[int, int], size: Tensor) -> Tensor:
    """Centres (x, y) of a level's pixels, (bs, height * width, 2), in [0, 1] of the valid ``size`` (bs, 2)."""
    height, width = shape
    y = torch.arange(height, dtype=size.dtype, device=size.device) + 0.5
    x = torch.arange(width, dtype=size.dtype, device=size.device) + 0.5
    grid = torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1)
    return grid.flatten(0, 1) / size[:, None]
