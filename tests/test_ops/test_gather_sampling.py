"""Gathers sample as `grid_sample` does: inside of levels, at their edges, and outside."""

import pytest
import torch
from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch

from dino_mm.models.structures import FeatureLevels
from dino_mm.ops import gather_sampling
from dino_mm.ops.deformable_sampling import by_gathers, recorded_as, sample_levels


def make(shapes, bs=2, num_queries=7, num_heads=2, dim=3, num_points=4):
    """Arguments as of ``sample_levels``; a third of the points lies outside of the levels."""
    torch.manual_seed(0)
    tokens = sum(height * width for height, width in shapes)
    value = torch.randn(bs, tokens, num_heads, dim, dtype=torch.float64)
    points = (bs, num_queries, num_heads, len(shapes), num_points)
    locations = torch.rand(*points, 2, dtype=torch.float64) * 1.6 - 0.3
    starts = [sum(height * width for height, width in shapes[:i]) for i in range(len(shapes))]
    shape_tensor = torch.tensor(shapes)
    sizes = shape_tensor.flip(1)
    levels = FeatureLevels(tuple(shapes), shape_tensor, torch.tensor(starts), sizes, torch.ones(bs, len(shapes), 2))
    return value, locations, torch.rand(points, dtype=torch.float64), levels


@pytest.mark.parametrize('shapes', [[(4, 6)], [(5, 3), (3, 2), (1, 1)], [(1, 9), (7, 1)]])
@pytest.mark.parametrize('bs', [1, 3])
def test_values_are_those_of_grid_sample(shapes, bs) -> None:
    value, locations, weights, levels = make(shapes, bs)
    expected = multi_scale_deformable_attn_pytorch(value, shapes, locations, weights)
    found = by_gathers(value, locations, weights, levels)
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize('place', [-0.5, 0.0, 0.125, 0.5, 0.875, 1.0, 1.5])
def test_edges_fade_to_zero(place) -> None:
    """A map of one row of four ones: 1 inside, half at the very edge, 0 beyond it by half a pixel."""
    value = torch.ones(1, 4, 1, 1)
    locations = torch.tensor([place, 0.5]).view(1, 1, 1, 1, 1, 2)
    shapes, starts = torch.tensor([[1, 4]], dtype=torch.int32), torch.tensor([0], dtype=torch.int32)
    found = gather_sampling.sample(value, shapes, starts, locations, torch.ones(1, 1, 1, 1, 1))
    expected = {0.0: 0.5, 1.0: 0.5}.get(place, 1.0 if 0 < place < 1 else 0.0)
    assert found.item() == pytest.approx(expected, abs=1e-6)


def test_only_what_is_recorded_changes() -> None:
    value, locations, weights, levels = make([(4, 6), (2, 3)])

    def negative(*arguments):
        return -by_gathers(*arguments)

    def sample(*inputs):
        return sample_levels(*inputs, levels)

    with recorded_as(negative):
        ran = sample_levels(value, locations, weights, levels)
        traced = torch.jit.trace(sample, (value, locations, weights), check_trace=False)
    torch.testing.assert_close(traced(value, locations, weights), -ran, rtol=0, atol=1e-12)
    again = torch.jit.trace(sample, (value, locations, weights), check_trace=False)
    torch.testing.assert_close(again(value, locations, weights), ran, rtol=0, atol=1e-12)
