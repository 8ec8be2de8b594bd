"""Weighted bilinear samples of feature maps, the core of deformable attention, and the choice of what runs them."""

import warnings
from collections.abc import Callable
from itertools import product
from typing import Any, NamedTuple

import numpy as np
import torch
from mmcv.ops.multi_scale_deform_attn import MultiScaleDeformableAttnFunction, multi_scale_deformable_attn_pytorch
from scipy.sparse import csc_array
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from ..structures import FeatureLevels
from .linear import is_looked_into

#: Images that mmcv's CUDA op takes at once; its default.
IM2COL_STEP = 64

# torch warns once per process that its CSR layout is in beta, which no user can act on: the warning is spent here.
with warnings.catch_warnings():
    warnings.simplefilter('ignore')
    torch.sparse_csr_tensor(torch.tensor([0, 1]), torch.tensor([0]), torch.ones(1), (1, 1), check_invariants=False)


def sample_levels(value: Tensor, locations: Tensor, weights: Tensor, levels: FeatureLevels) -> Tensor:
    """Weighted sum of bilinear samples.

    On a GPU mmcv's op runs, on a CPU a sparse product. mmcv's PyTorch code is slower, but torch can look into it:
    it serves to compile, trace and export, on the meta device, and in half precision.

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
    plain = value.device.type == 'cpu' and value.dtype in (torch.float32, torch.float64)
    if is_looked_into() or not plain:
        return multi_scale_deformable_attn_pytorch(value, levels.shapes, locations, weights)
    return SparseSampling.apply(value, locations, weights, levels.shapes)


class Geometry(NamedTuple):
    """What does not depend on where the samples are, ``num_samples = num_heads * num_levels * num_points`` a query."""

    sizes: Tensor
    """(2, 1, num_samples), (width, height) of each sample's level, in the precision of the locations."""
    half_sizes: Tensor
    minus_half: Tensor
    """() a number."""
    first: Tensor
    """() 0, the first pixel."""
    last: Tensor
    """(2, 1, 1, num_samples), the last one, ``sizes - 1``."""
    strides: Tensor
    """(2, 1, 1, num_samples) int32, from a pixel's value to that of its right and of its lower neighbour."""
    start: Tensor
    """(num_samples,) int32, the first value of each sample's level and head."""


class Corners(NamedTuple):
    """The four pixels around every sample: its two columns times its two rows.

    All are (2 axes, 2 corners, num_bags, bag_size), axes (x, y), corners (left, right) or (upper, lower). A bag is one
    head of one query with its samples in all levels, ``bag_size = num_levels * num_points``.
    """

    place: Tensor
    """int32, what x and y add to the place of the pixel's value. Outside of the level it is that of a pixel on the
    border, so that there always is something to read."""
    share: Tensor
    """Weight in linear interpolation, 0 outside of the level."""
    inside: Tensor
    """1 inside of the level, else 0; a number, to be multiplied."""


class SparseSampling(torch.autograd.Function):
    """The samples as product of a sparse matrix and the values, image by image.

    The matrix, (num_bags, num_tokens * num_heads), has in each row the four corners of each of the bag's samples. The
    output is its product with the values, (num_tokens * num_heads, dim / num_heads). The gradient of the values is the
    transposed product with the output's gradient; that of an entry of the matrix is the dot product of the row of
    gradients and the row of values that meet there. So no sampled value is ever stored, and for the backward pass
    only the inputs are. One image at a time bounds the memory, and is faster than a batch at once.
    """

    @staticmethod
    def forward(
        ctx: Any, value: Tensor, locations: Tensor, weights: Tensor, shapes: tuple[tuple[int, int], ...]
    ) -> Tensor:
        """See :func:`sample_levels`."""
        ctx.geometry = make_geometry(locations, shapes)
        ctx.save_for_backward(value, locations, weights)
        outputs = []
        for rows, points, scores in zip(value.flatten(1, 2), locations, weights, strict=True):
            index, entries = matrix_entries(find_corners(points, ctx.geometry), scores)
            outputs.append(F.embedding_bag(index, rows, per_sample_weights=entries, mode='sum'))
        return torch.stack(outputs).view(*weights.shape[:2], value.shape[2] * value.shape[3])

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of value, locations and weights."""
        # Read once only: what a checkpoint has computed again is handed out once.
        inputs = value, locations, weights = ctx.saved_tensors
        images = zip(value.flatten(1, 2), locations, weights, grad.contiguous(), strict=True)
        grads = zip(*(image_grads(*image, ctx.geometry) for image in images), strict=True)
        return *(torch.stack(g).view(x.shape) for g, x in zip(grads, inputs, strict=True)), None


def make_geometry(locations: Tensor, shapes: tuple[tuple[int, int], ...]) -> Geometry:
    """Geometry of levels with these shapes, (height, width). The host makes it: many tiny steps."""
    num_heads, num_levels, num_points = locations.shape[2:5]

    def per_sample(of_level: np.ndarray) -> np.ndarray:
        return np.tile(of_level.repeat(num_points, -1), num_heads)

    height, width = np.array(shapes).T
    sizes = torch.from_numpy(per_sample(np.stack([width, height]))[:, None]).to(locations)
    strides = per_sample(np.stack([np.ones_like(width), width]))[:, None, None] * num_heads
    heads = np.arange(num_heads).repeat(num_levels * num_points)
    start = per_sample(np.cumsum(height * width) - height * width) * num_heads + heads
    return Geometry(
        sizes,
        half_sizes=sizes / 2,
        minus_half=sizes.new_full((), -0.5),
        first=sizes.new_zeros(()),
        last=(sizes - 1)[:, None],
        strides=torch.from_numpy(strides.astype(np.int32)),
        start=torch.from_numpy(start.astype(np.int32)),
    )


def find_corners(locations: Tensor, geometry: Geometry) -> Corners:
    """Corners of the samples at ``locations``, (num_queries, num_heads, num_levels, num_points, 2)."""
    num_queries, num_heads, num_levels, num_points, _ = locations.shape
    # Axis by axis in memory: short or strided innermost loops would take several times as long.
    planes = locations.reshape(num_queries, num_heads * num_levels * num_points, 2).movedim(-1, 0).contiguous()
    # The arithmetic of F.grid_sample to the last rounding, hence addcmul: a location's gradient jumps where a pixel's
    # centre is, and there most samples of a new model are.
    position = torch.addcmul(geometry.minus_half, planes.mul(2).sub_(1).add_(1), geometry.half_sizes)
    lower = position.floor()
    share = position.sub_(lower)
    # A sample that is nowhere (NaN) reads some pixel as well; its share remains NaN, and so will the output.
    pixel = torch.stack([lower, lower + 1], 1).nan_to_num_()
    clamped = pixel.clamp(geometry.first, geometry.last)
    inside = pixel.eq_(clamped)

    place = clamped.int().mul_(geometry.strides)
    place[1].add_(geometry.start)
    corners = (place, torch.stack([1 - share, share], 1).mul_(inside), inside)
    return Corners(*(x.view(2, 2, num_queries * num_heads, num_levels * num_points) for x in corners))


def matrix_entries(corners: Corners, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Columns and values of the matrix, (num_bags, 4 * bag_size) both: all upper left corners, upper right, ..."""
    (x_place, y_place), (x_share, y_share) = corners.place, corners.share
    index = combine(torch.add, y_place, x_place)
    return index, combine(torch.mul, y_share * weights.reshape(y_share.shape[1:]), x_share)


def combine(operation: Callable, rows: Tensor, columns: Tensor) -> Tensor:
    """Each of two rows with each of two columns, (2, num_bags, bag_size) both, to (num_bags, 4 * bag_size)."""
    corners = rows.new_empty(rows.shape[1], 4, rows.shape[2])
    # One operation with broadcasting takes eight times as long, for its innermost loops.
    for (row, column), corner in zip(product(rows, columns), corners.unbind(1), strict=True):
        operation(row, column, out=corner)
    return corners.flatten(1)


def image_grads(
    rows: Tensor, points: Tensor, scores: Tensor, grad: Tensor, geometry: Geometry
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of one image's values, locations and weights; ``grad``, (num_queries, dim), is the output's."""
    corners = find_corners(points, geometry)
    index, entries = matrix_entries(corners, scores)
    grad = grad.view(len(index), rows.shape[1])
    grad_rows = transposed_product(index, entries, grad, len(rows))
    grad_entries = entry_grads(index, entries, rows, grad)  # overwrites the entries
    return grad_rows, *sample_grads(grad_entries, corners, scores, geometry)


def row_starts(index: Tensor) -> Tensor:
    """Where each row of the matrix starts among its entries, (num_bags + 1,)."""
    return torch.arange(0, index.numel() + 1, index.shape[1], dtype=index.dtype)


def transposed_product(index: Tensor, entries: Tensor, grad: Tensor, num_rows: int) -> Tensor:
    """The transposed matrix times ``grad``, (num_bags, dim / num_heads) to (num_rows, dim / num_heads).

    torch would sort the entries first, which takes twenty times as long as the product; scipy just adds row to row.
    """
    numbers = (entries.flatten().numpy(), index.flatten().numpy(), row_starts(index).numpy())
    return torch.from_numpy(csc_array(numbers, shape=(num_rows, len(index))) @ grad.numpy())


def entry_grads(index: Tensor, entries: Tensor, rows: Tensor, grad: Tensor) -> Tensor:
    """Dot products of the rows of ``grad`` and of values that meet in the matrix, written over its ``entries``."""
    if len(rows) < index.shape[1]:
        # torch allows no more entries than the matrix has places; corners clamped to the pixels of tiny maps are more.
        rows = F.pad(rows, (0, 0, 0, index.shape[1] - len(rows)))
    shape = (len(index), len(rows))
    numbers = (row_starts(index), index.flatten(), entries.flatten())
    matrix = torch.sparse_csr_tensor(*numbers, shape, check_invariants=False)
    torch.sparse.sampled_addmm(matrix, grad, rows.t(), beta=0.0, out=matrix)
    return entries


def sample_grads(grad_entries: Tensor, corners: Corners, weights: Tensor, geometry: Geometry) -> tuple[Tensor, Tensor]:
    """Gradients of an image's locations and weights from that of the matrix' entries."""
    (left, right), (upper, lower) = corners.share
    (left_inside, right_inside), (upper_inside, lower_inside) = corners.inside
    upper_left, upper_right, lower_left, lower_right = grad_entries.view(len(left), 4, left.shape[1]).unbind(1)
    in_upper = upper_left * left + upper_right * right
    in_lower = lower_left * left + lower_right * right
    in_left = upper_left * upper + lower_left * lower
    in_right = upper_right * upper + lower_right * lower

    # As a sample moves by one pixel, all of its share goes over from one corner to the other.
    by_pixel = torch.stack([
        in_right * right_inside - in_left * left_inside,
        in_lower * lower_inside - in_upper * upper_inside,
    ])  # fmt: skip
    by_pixel *= weights.reshape(left.shape)
    grad_locations = by_pixel.view(2, len(weights), geometry.start.numel()).mul_(geometry.sizes).movedim(0, -1)
    return grad_locations, in_upper * upper + in_lower * lower
