"""Frozen batch norms that keep nothing but their output."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...ops.tracing import is_looked_into


class _FrozenNorm(torch.autograd.Function):
    """Batch norm with fixed statistics, weight and bias: a linear map, whose gradient needs no input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, mean: Tensor, var: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
        ctx.save_for_backward(mean, var, weight)
        ctx.eps = eps
        return F.batch_norm(x, mean, var, weight, bias, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        mean, var, weight = ctx.saved_tensors
        # torch's own gradient, of the input alone, for which it does not read the input: the gradient stands in for it.
        # On a GPU it demands statistics of the batch, and takes empty ones for none.
        none = weight.new_empty(0)
        grad_x, _, _ = torch.ops.aten.native_batch_norm_backward(
            grad, grad, weight, mean, var, none, none, False, ctx.eps, [True, False, False]
        )
        return grad_x, None, None, None, None, None


class BatchNorm2d(nn.BatchNorm2d):
    """``nn.BatchNorm2d`` that does not keep its input where it is frozen: in evaluation mode, with a fixed weight.

    The convolution before it would keep that map alive for this gradient alone. Values and gradients are the same.
    """

    def forward(self, input: Tensor) -> Tensor:
        """(bs, dim, height, width) to the same."""
        frozen = not self.training and self.track_running_stats and self.affine
        if not frozen or self.weight.requires_grad or self.bias.requires_grad or is_looked_into():
            return super().forward(input)
        return _FrozenNorm.apply(input, self.running_mean, self.running_var, self.weight, self.bias, self.eps)


def use_frozen_norms(module: nn.Module) -> None:
    """Have all batch norms of ``module`` run as :class:`BatchNorm2d`; names and parameters stay."""
    for child in module.modules():
        if type(child) is nn.BatchNorm2d:
            child.__class__ = BatchNorm2d
