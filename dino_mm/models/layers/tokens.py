"""From a feature pyramid to tokens."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from mmdet.models.layers import SinePositionalEncoding
from mmdet.structures import DetDataSample
from torch import Tensor, nn

from ...ops.transfer import to_device
from ..box_ops import sine_encoding, wavelengths
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

    Raises:
        ValueError: An image is larger than the batch that ``batch_input_shape`` states.
    """
    levels, grid, padding_mask = measure_levels(feats, samples)
    if type(positional_encoding) is SinePositionalEncoding:
        positions = sine_positions(positional_encoding, levels, grid, padding_mask)
    else:
        positions = torch.cat(_positions_by_level(positional_encoding, feats, padding_mask), 1)
    return Tokens(
        features=torch.cat([feat.flatten(2).transpose(1, 2) for feat in feats], 1),
        # Not `level_embed[grid.level]`: its gradient would be added up token by token.
        positions=positions.to(level_embed)
        + torch.cat(
            [
                embed.expand(height * width, -1)
                for embed, (height, width) in zip(level_embed, levels.shapes, strict=True)
            ]
        ),
        centers=(grid.pixel + 0.5) / grid.valid_size,
        padding_mask=padding_mask,
        levels=levels,
    )


class Grid(NamedTuple):
    """Where each token is."""

    level: Tensor
    """(num_tokens,) int64."""
    pixel: Tensor
    """(num_tokens, 2) float32, column and row."""
    valid_size: Tensor
    """(bs, num_tokens, 2) float32, columns and rows of its level that are image, not padding."""


def measure_levels(
    feats: Sequence[Tensor], samples: Sequence[DetDataSample] | ImageSizes
) -> tuple[FeatureLevels, Grid, Tensor | None]:
    """Geometry of the feature maps and of their pixels, and where they are padding.

    All levels are worked out together, so that a GPU has few kernels to start.

    Args, and errors: as :func:`flatten_levels`.

    Returns:
        The levels, the grid, and (bs, num_tokens) bool, True on padding; None if no image is padded.
    """
    shapes = tuple((feat.shape[2], feat.shape[3]) for feat in feats)
    starts = [sum(height * width for height, width in shapes[:level]) for level in range(len(shapes))]
    tables: list = [shapes, starts, [(width, height) for height, width in shapes]]
    given = samples if isinstance(samples, ImageSizes) else None
    data_samples: Sequence[DetDataSample] = [] if isinstance(samples, ImageSizes) else samples
    if given is not None:
        tables.append(given.batch_shape[::-1])
    elif _are_padded(data_samples):
        tables += [data_samples[0].batch_input_shape[::-1], [sample.img_shape[1::-1] for sample in data_samples]]
    shape_tensor, start_index, sizes, *batch = to_device(tables, feats[0].device)
    if given is not None:
        batch.append(given.sizes.flip(-1))
    level, pixel = _token_places(sum(height * width for height, width in shapes), start_index, sizes)
    sizes = sizes.float()
    if batch:
        padding_mask, valid_sizes = _valid_area(level, pixel, sizes, *batch)
    else:
        padding_mask, valid_sizes = None, sizes.expand(feats[0].shape[0], -1, -1)
    levels = FeatureLevels(shapes, shape_tensor, start_index, sizes, valid_sizes / sizes)
    return levels, Grid(level, pixel, valid_sizes[:, level]), padding_mask


def _token_places(num_tokens: int, start_index: Tensor, sizes: Tensor) -> tuple[Tensor, Tensor]:
    """``level`` and ``pixel`` of a :class:`Grid`."""
    token = torch.arange(num_tokens, device=sizes.device)
    level = (token >= start_index[1:, None]).sum(0)
    token, width = token - start_index[level], sizes[:, 0][level]
    return level, torch.stack([token % width, token // width], -1).float()


def _valid_area(
    level: Tensor, pixel: Tensor, sizes: Tensor, batch_size: Tensor, image_sizes: Tensor
) -> tuple[Tensor, Tensor]:
    """Padding of (bs, num_tokens), and (bs, num_levels, 2) columns and rows that are image.

    Args:
        level: As in :class:`Grid`.
        pixel: The same.
        sizes: (num_levels, 2), (width, height) of the maps.
        batch_size: (2,), the same of the batch, padding included.
        image_sizes: (bs, 2), the same of the images.
    """
    # A pixel of a map is padding if the nearest pixel of the batch, as `interpolate` rounds, is.
    source = (pixel * (batch_size / sizes)[level]).floor()
    padding = (source >= image_sizes[:, None]).any(-1)
    end = (pixel + 1).masked_fill(padding[..., None], 0.0)
    of_level = level == torch.arange(len(sizes), device=level.device)[:, None]
    # Not a scatter, which formats of exports lack.
    return padding, torch.where(of_level[..., None], end[:, None], 0.0).amax(2)


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


def sine_positions(
    encoding: SinePositionalEncoding, levels: FeatureLevels, grid: Grid, padding_mask: Tensor | None
) -> Tensor:
    """What ``encoding`` gives for the masks of all levels, (bs, num_tokens, 2 * num_feats), y before x."""
    count, last = grid.pixel + 1, grid.valid_size
    if padding_mask is not None:
        # It counts pixels that are image: none along a row or a column that is padding.
        across = (grid.pixel < last).flip(-1)
        count, last = torch.minimum(count, last) * across, last * across
    if encoding.normalize:
        count = (count + encoding.offset) / (last + encoding.eps) * encoding.scale
    count = count.expand_as(last).flip(-1)
    return sine_encoding(count, wavelengths(encoding.num_feats, count.device, encoding.temperature))


def _positions_by_level(encoding: nn.Module, feats: Sequence[Tensor], padding_mask: Tensor | None) -> list[Tensor]:
    """The positions (bs, height * width, dim) of each level, by mmdet's interface."""
    masks: Sequence[Tensor | None] = [None] * len(feats)
    if padding_mask is not None:
        parts = padding_mask.split([feat.shape[2] * feat.shape[3] for feat in feats], 1)
        masks = [part.view(-1, *feat.shape[2:]) for part, feat in zip(parts, feats, strict=True)]
    return [encoding(mask, input=feat).flatten(2).transpose(1, 2) for feat, mask in zip(feats, masks, strict=True)]
