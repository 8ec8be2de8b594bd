"""Deformable convolution v3 as deformable attention with one level, so that no op of its own has to be compiled."""

from typing import Any, NamedTuple

import torch
from mmengine.model import constant_init, xavier_init
from torch import Tensor, nn

from ...ops.deformable_sampling import sample_levels
from ..structures import FeatureLevels

NUM_POINTS = 9


class ConvNorm(nn.Module):
    """3x3 convolution with padding 1, then LayerNorm, on maps whose channels come last."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, groups: int = 1, bias: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3, stride, padding=1, groups=groups, bias=bias)
        self.norm = nn.LayerNorm(out_channels, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """(bs, height, width, in_channels) to (bs, ceil(height / stride), ceil(width / stride), out_channels)."""
        return self.norm(self.conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


class SamplingGrid(NamedTuple):
    """Where an undeformed 3x3 kernel samples a feature map; the same for all layers on maps of one size."""

    points: Tensor
    """(num_queries, 1, 1, num_points, 2), (x, y) in [0, 1] of the map; each pixel is a query, row by row."""
    step: Tensor
    """(2,), how far an offset (1, 1) moves a point, (x, y)."""
    levels: FeatureLevels
    """The map as a pyramid of one level."""


def sampling_grid(feature: Tensor, offset_scale: float = 1.0) -> SamplingGrid:
    """Sampling points of a 3x3 kernel with padding 1, as DCNv3 counts them: column by column.

    All is made on the device, without a copy from the host, and at least in float32, as half precision cannot
    address the pixels of a large map.

    Args:
        feature: (bs, height, width, dim); its size, device and precision count.
        offset_scale: Stretches both the kernel and the offsets.
    """
    height, width = feature.shape[1:3]
    options: dict[str, Any] = dict(device=feature.device, dtype=torch.promote_types(feature.dtype, torch.float32))
    size = torch.stack([torch.full((), length, **options) for length in (width, height)])
    taps = torch.arange(-1, 2, **options) * offset_scale
    kernel = torch.stack(torch.meshgrid(taps, taps, indexing='ij'), -1).flatten(0, 1)
    centers = token_centers((height, width), size)
    levels = FeatureLevels(
        shapes=((height, width),),
        shape_tensor=size.flip(0).long()[None],
        start_index=size.new_zeros(1, dtype=torch.long),
        sizes=size[None],
        valid_ratios=size.new_ones(1, 1, 2),
    )
    return SamplingGrid(centers.view(-1, 1, 1, 1, 2) + kernel / size, offset_scale / size, levels)


def token_centers(shape: tuple[int, int], size: Tensor) -> Tensor:
    """Centres (x, y) of a map's pixels, (height * width, 2), in [0, 1]; ``size`` is (width, height) on the device."""
    height, width = shape
    y = torch.arange(height, dtype=size.dtype, device=size.device) + 0.5
    x = torch.arange(width, dtype=size.dtype, device=size.device) + 0.5
    return torch.stack([x.expand(height, width), y[:, None].expand(height, width)], -1).flatten(0, 1) / size


class DCNv3(nn.Module):
    """Deformable convolution v3: per group, a weighted sum of 3x3 samples whose places and weights follow the input.

    With the projected map as value, the moved kernel points as sampling locations and the softmax over a group's
    points as attention weights, this is deformable attention into one level: :func:`sample_levels` runs it. Outside
    of the map there are zeros, which is what the padding of a convolution gives.

    Args:
        channels: Width ``dim``.
        groups: Groups of channels with offsets and weights of their own.

    Raises:
        ValueError: ``groups`` does not divide ``channels``.

    Source: InternImage, section 3.1.
    """

    def __init__(self, channels: int, groups: int) -> None:
        super().__init__()
        if channels % groups:
            raise ValueError(
                f'DCNv3 cannot split {channels} channels into {groups} groups: choose `groups` that divide `channels`.'
            )
        self.groups = groups
        self.depthwise = nn.Sequential(ConvNorm(channels, channels, stride=1, groups=channels), nn.GELU())
        self.offset = nn.Linear(channels, groups * NUM_POINTS * 2)
        self.mask = nn.Linear(channels, groups * NUM_POINTS)
        self.input_proj = nn.Linear(channels, channels)
        self.output_proj = nn.Linear(channels, channels)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start as a mean over the undeformed kernel; projections xavier-uniform."""
        for linear in (self.offset, self.mask):
            constant_init(linear, 0)
        for linear in (self.input_proj, self.output_proj):
            xavier_init(linear, distribution='uniform')

    def forward(self, x: Tensor, grid: SamplingGrid) -> Tensor:
        """Convolve.

        Args:
            x: (bs, height, width, dim).
            grid: The undeformed sampling points of a map of this size.

        Returns:
            The same shape.
        """
        bs, dim = x.shape[0], x.shape[-1]  # `len` would make a trace's batch size a constant
        value = self.input_proj(x)
        query = self.depthwise(x)
        offsets = self.offset(query).view(bs, -1, self.groups, 1, NUM_POINTS, 2)
        weights = self.mask(query).view(bs, -1, self.groups, 1, NUM_POINTS).softmax(-1)

        locations = grid.points + offsets * grid.step
        heads = value.view(bs, -1, self.groups, dim // self.groups)
        output = sample_levels(heads.to(locations), locations, weights.to(locations), grid.levels)
        return self.output_proj(output.to(value).view(x.shape))
