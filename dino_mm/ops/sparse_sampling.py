"""Samples of deformable attention on a CPU, as product of a sparse matrix and the values."""

import warnings
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from scipy.sparse import csc_array
from torch import Tensor
from torch.nn import functional as F

# torch warns once per process that its CSR layout is in beta, which no user can act on: the warning is spent here.
with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), (1, 1), check_invariants=False)


#: (height, width) of each level.
Shapes = tuple[tuple[int, int], ...]


class Geometry(NamedTuple):
    """What does not depend on where the samples are, ``num_samples = num_heads * num_levels * num_points`` a query.

    Values are read from levels with a border of zeros, two pixels above and below, one left and right: a row is next to
    the one below it, so that these are two as well. What is outside of a level then is read as any other pixel.
    """

    half_sizes: Tensor
    """(2, 1, 1, num_samples), half of (width, height) of each sample's level, in the precision of the locations."""
    minus_half: Tensor
    """() a number."""
    first: Tensor
    """() int32 -2, the first pixel of both borders."""
    last: Tensor
    """(2, 1, 1, num_samples) int32, (width, height): the last pixel that has a neighbour in the borders."""
    row: Tensor
    """(num_samples,) int32, from a pixel to the one below it."""
    start: Tensor
    """(bs, 1, num_samples) int32, the first pixel of each sample's image, head and level."""
    shapes: Shapes
    first_pixels: list[int]
    """The upper left pixel of each level."""
    num_pixels: int
    """Pixels of all levels and borders."""
    border: Tensor
    """(num_pixels - num_tokens,), those of the borders."""


class Samples(NamedTuple):
    """Where samples are; a bag is one head of one query with ``bag_size = num_levels * num_points`` of them."""

    pixel: Tensor
    """(bs, num_queries, num_heads, bag_size) int32, the upper left of the four pixels around each sample."""
    share: Tensor
    """(2, bs, num_queries, num_heads, bag_size), weights in linear interpolation of the right and of the lower ones."""


class Matrix(NamedTuple):
    """A sparse matrix with a row for each bag, head after head, and a column for each pixel, row by row.

    In a row come first the upper left pixels of all samples, then the upper right, the lower left, the lower right.
    """

    starts: Tensor
    """(bs * num_heads * num_queries + 1,) int32, where each row starts among the entries."""
    columns: Tensor
    """(num_entries,) int32, the column of each entry."""
    entries: Tensor
    """(num_entries,), the share of the pixel times the weight of the sample."""


def sample(value: Tensor, locations: Tensor, weights: Tensor, shapes: Shapes) -> Tensor:
    """See :func:`~dino_mm.ops.deformable_sampling.sample_levels`: the samples as product of a sparse matrix and values.

    No sampled value is ever stored. Head after head, for a CPU's caches hold the values of one.
    """
    geometry, values, samples = prepare(value, locations, shapes)
    starts, columns, entries = make_matrix(samples, weights, geometry)
    output = F.embedding_bag(columns, values, starts, mode='sum', per_sample_weights=entries, include_last_offset=True)
    return by_query(output, weights, values.shape[1]).flatten(2)


def gradients(
    grad: Tensor, value: Tensor, locations: Tensor, weights: Tensor, shapes: Shapes
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights from that of the output, (bs, num_queries, dim).

    That of the values is the transposed product with the output's gradient; that of an entry of the matrix is the dot
    product of the row of gradients and the row of values that meet there. The samples are found anew.
    """
    geometry, values, samples = prepare(value, locations, shapes)
    matrix = make_matrix(samples, weights, geometry)
    bs, num_queries, num_heads, *_ = weights.shape
    grad = grad.reshape(bs, num_queries, num_heads, values.shape[1]).transpose(1, 2).flatten(0, 2)
    grad_values = transposed_product(matrix, grad, len(values))
    grad_entries = entry_grads(matrix, values, grad)  # overwrites the entries
    return (take_levels(grad_values, geometry, bs), *sample_grads(grad_entries, samples, weights, geometry))


def prepare(value: Tensor, locations: Tensor, shapes: Shapes) -> tuple[Geometry, Tensor, Samples]:
    """What both passes need: the geometry, the values as :func:`pad_levels` has them, and where the samples are."""
    geometry = make_geometry(shapes, len(value), *locations.shape[2:5:2], locations.dtype)
    return geometry, pad_levels(value, geometry), find_samples(locations, geometry)


@lru_cache(maxsize=16)
def make_geometry(shapes: Shapes, bs: int, num_heads: int, num_points: int, dtype: torch.dtype) -> Geometry:
    """Geometry of levels with these shapes, (height, width), for locations of type ``dtype``.

    The host makes it, many tiny steps, once for all layers.
    """

    def per_sample(of_level: np.ndarray) -> Tensor:
        return torch.from_numpy(np.tile(of_level.repeat(num_points, -1), num_heads))

    height, width = np.array(shapes).T
    area = (height + 4) * (width + 2)
    # The upper left pixel reads one before the first, the lower right one after the last.
    level_start = 1 + np.cumsum(area) - area + 2 * (width + 2) + 1
    bag_size = len(shapes) * num_points
    # torch allows no more entries in a row of a matrix than it has columns.
    num_pixels = max(int(area.sum()) + 2, 4 * bag_size)
    head_start = torch.arange(bs * num_heads).view(bs, 1, num_heads) * num_pixels
    sizes = per_sample(np.stack([width, height]))[:, None, None]
    is_border = np.ones(num_pixels, bool)
    for (h, w), start in zip(shapes, level_start, strict=True):
        is_border[start : start + h * (w + 2)].reshape(h, w + 2)[:, :w] = False
    return Geometry(
        half_sizes=sizes.to(dtype) / 2,
        minus_half=torch.tensor(-0.5, dtype=dtype),
        first=torch.tensor(-2, dtype=torch.int32),
        last=sizes.int(),
        row=per_sample(width + 2).int(),
        start=(head_start.repeat_interleave(bag_size, -1) + per_sample(level_start)).int(),
        shapes=shapes,
        first_pixels=level_start.tolist(),
        num_pixels=num_pixels,
        border=torch.from_numpy(is_border.nonzero()[0]),
    )


def level_views(pixels: Tensor, tokens: Tensor, geometry: Geometry) -> Iterator[tuple[Tensor, Tensor]]:
    """Views of each level, (bs, num_heads, height, width, dim / num_heads), in both layouts.

    To copy level by level takes a third of the time of indices.

    Args:
        pixels: (bs, num_heads, num_pixels, dim / num_heads), contiguous.
        tokens: (bs, num_tokens, num_heads, dim / num_heads).
        geometry: Of the levels.
    """
    bs, num_heads, _, dim = pixels.shape
    of_tokens = tokens.transpose(1, 2).split([height * width for height, width in geometry.shapes], 2)
    for (height, width), first, level in zip(geometry.shapes, geometry.first_pixels, of_tokens, strict=True):
        strides = (*pixels.stride()[:2], (width + 2) * dim, dim, 1)
        rows = pixels.as_strided((bs, num_heads, height, width, dim), strides, first * dim)
        yield rows, level.unflatten(2, (height, width))


def pad_levels(value: Tensor, geometry: Geometry) -> Tensor:
    """Values (bs, num_tokens, num_heads, dim / num_heads) of all pixels, those of the borders included.

    Returns:
        (bs * num_heads * num_pixels, dim / num_heads).
    """
    bs, _, num_heads, width = value.shape
    # Zeros of all pixels would take longer than all that follows.
    padded = value.new_empty(bs, num_heads, geometry.num_pixels, width).index_fill_(2, geometry.border, 0)
    for pixels, tokens in level_views(padded, value, geometry):
        pixels.copy_(tokens)
    return padded.view(-1, width)


def take_levels(padded: Tensor, geometry: Geometry, bs: int) -> Tensor:
    """The reverse of :func:`pad_levels`."""
    width = padded.shape[1]
    padded = padded.view(bs, -1, geometry.num_pixels, width)
    num_tokens = sum(height * width for height, width in geometry.shapes)
    value = padded.new_empty(bs, num_tokens, padded.shape[1], width)
    for pixels, tokens in level_views(padded, value, geometry):
        tokens.copy_(pixels)
    return value


def by_query(bags: Tensor, weights: Tensor, *sizes: int) -> Tensor:
    """What is of all bags, of ``sizes`` each, as view (bs, num_queries, num_heads, *sizes), as ``weights`` are."""
    bs, num_queries, num_heads = weights.shape[:3]
    return bags.view(bs, num_heads, num_queries, *sizes).transpose(1, 2)


def find_samples(locations: Tensor, geometry: Geometry) -> Samples:
    """Where the samples at ``locations``, (bs, num_queries, num_heads, num_levels, num_points, 2), are."""
    bs, num_queries, num_heads, num_levels, num_points, _ = locations.shape
    # Axis by axis in memory: short or strided innermost loops would take several times as long.
    num_samples = num_heads * num_levels * num_points
    planes = locations.reshape(bs, num_queries, num_samples, 2).movedim(-1, 0).contiguous()
    # The arithmetic of F.grid_sample to the last rounding, hence addcmul: a location's gradient jumps where a pixel's
    # centre is, and there most samples of a new model are.
    position = torch.addcmul(geometry.minus_half, planes.mul(2).sub_(1).add_(1), geometry.half_sizes)
    corner = position.floor()
    share = position.sub_(corner)
    # A sample that is nowhere (NaN) reads some pixel as well, for integers are clamped, whatever they were made from;
    # its share remains NaN, and so will the output.
    x, y = corner.int().clamp_(geometry.first, geometry.last).unbind()
    pixel = torch.addcmul(geometry.start, y, geometry.row).add_(x)
    bags = (bs, num_queries, num_heads, num_levels * num_points)
    return Samples(pixel.view(bags), share.view(2, *bags))


def make_matrix(samples: Samples, weights: Tensor, geometry: Geometry) -> Matrix:
    """The matrix for samples with ``weights``, (bs, num_queries, num_heads, num_levels, num_points)."""
    bs, num_queries, num_heads, bag_size = samples.pixel.shape
    num_entries = bs * num_heads * num_queries * 4 * bag_size
    # One operation with broadcasting takes eight times as long, for its innermost loops.
    columns = samples.pixel.new_empty(num_entries)
    upper_left, upper_right, lower_left, lower_right = by_query(columns, weights, 4, bag_size).unbind(3)
    upper_left.copy_(samples.pixel)
    torch.add(samples.pixel, 1, out=upper_right)
    torch.add(samples.pixel, geometry.row[:bag_size], out=lower_left)
    torch.add(lower_left, 1, out=lower_right)

    entries = weights.new_empty(num_entries)
    upper_left, upper_right, lower_left, lower_right = by_query(entries, weights, 4, bag_size).unbind(3)
    right, below = samples.share.unbind()
    weights = weights.flatten(3)
    lower = weights * below
    upper = weights - lower
    torch.mul(upper, right, out=upper_right)
    torch.sub(upper, upper_right, out=upper_left)
    torch.mul(lower, right, out=lower_right)
    torch.sub(lower, lower_right, out=lower_left)
    starts = torch.arange(0, num_entries + 1, 4 * bag_size, dtype=columns.dtype)
    return Matrix(starts, columns, entries)


def transposed_product(matrix: Matrix, grad: Tensor, num_columns: int) -> Tensor:
    """The transposed matrix times ``grad``, (num_rows, dim / num_heads) to (num_columns, dim / num_heads).

    torch would sort the entries first, which takes twenty times as long as the product; scipy just adds row to row.
    """
    starts, columns, entries, rows = map(np.from_dlpack, (*matrix, grad))
    return torch.from_numpy(csc_array((entries, columns, starts), shape=(num_columns, len(rows))) @ rows)


def entry_grads(matrix: Matrix, values: Tensor, grad: Tensor) -> Tensor:
    """Dot products of the rows of ``grad`` and of ``values`` that meet in the matrix, written over its entries."""
    product = torch.sparse_csr_tensor(*matrix, (len(grad), len(values)), check_invariants=False)
    torch.sparse.sampled_addmm(product, grad, values.t(), beta=0.0, out=product)
    return matrix.entries


def sample_grads(grad_entries: Tensor, samples: Samples, weights: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Gradients of locations and weights from those of the matrix' entries, (num_entries,)."""
    right, below = samples.share.unbind()
    upper_left, upper_right, lower_left, lower_right = by_query(grad_entries, weights, 4, right.shape[-1]).unbind(3)
    in_upper, in_lower = torch.lerp(upper_left, upper_right, right), torch.lerp(lower_left, lower_right, right)
    # As a sample moves by one pixel, all of its share goes over from one pixel to its neighbour.
    by_pixel = torch.stack([
        torch.lerp(upper_right - upper_left, lower_right - lower_left, below),
        in_lower - in_upper,
    ])  # fmt: skip
    by_pixel *= weights.flatten(3)
    grad_locations = by_pixel.flatten(3).mul_(geometry.last).movedim(0, -1)
    grad_weights = torch.lerp(in_upper, in_lower, below)
    return grad_locations.reshape(*weights.shape, 2).contiguous(), grad_weights.view(weights.shape).contiguous()
