"""Inputs of deformable sampling for tests."""

import torch
from torch import Tensor

from dino_mm.models.structures import FeatureLevels

Inputs = tuple[Tensor, Tensor, Tensor]


def make_levels(*shapes: tuple[int, int], device: str = 'cpu') -> FeatureLevels:
    shape_tensor = torch.tensor(shapes)
    area = shape_tensor.prod(1)
    start_index, valid_ratios = area.cumsum(0) - area, torch.ones(1, len(shapes), 2)
    return FeatureLevels(
        shapes, shape_tensor.to(device), start_index.to(device), shape_tensor.flip(-1).to(device), valid_ratios
    )


def make_inputs(
    levels: FeatureLevels,
    bs: int = 2,
    num_queries: int = 5,
    num_heads: int = 2,
    num_points: int = 3,
    head_dim: int = 4,
    where: str = 'anywhere',
    dtype: torch.dtype = torch.float64,
) -> Inputs:
    num_levels, num_tokens = len(levels.shapes), sum(height * width for height, width in levels.shapes)
    samples = (bs, num_queries, num_heads, num_levels, num_points)
    size = levels.sizes[:, None].double()
    locations = {
        'anywhere': lambda: torch.rand(*samples, 2).double() * 1.6 - 0.3,
        'far outside': lambda: torch.randn(*samples, 2).double() * 1e4,
        'centres': lambda: (torch.randint(-2, 12, (*samples, 2)) % (size + 4) - 1.5) / size,
        'borders': lambda: torch.randint(-2, 12, (*samples, 2)) % (size + 3) / size - 1 / size,
        'offsets from centres': lambda: (
            (torch.randint(0, 12, (*samples, 2)) % size + 0.5) / size + torch.randint(-3, 4, (*samples, 2)) / size
        ),
    }[where]()
    weights = torch.randn(*samples[:3], num_levels * num_points).softmax(-1).view(samples)
    value = torch.randn(bs, num_tokens, num_heads, head_dim)
    return value.to(dtype), locations.to(dtype), weights.to(dtype)


def output_and_grads(function, inputs: Inputs, levels: FeatureLevels) -> list[Tensor]:
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    output = function(*inputs, levels)
    output.backward(direction_of(output))
    return [output.detach(), *(x.grad for x in inputs)]


def direction_of(output: Tensor) -> Tensor:
    """Gradient of some loss, different everywhere."""
    return torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=output.device).view_as(output)
