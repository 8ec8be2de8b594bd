"""What is computed again for the gradients rather than kept."""

from typing import Any

import torch
import torch.nn.functional as F
from mmcv.cnn import Linear as LinearOfMMCV
from mmcv.cnn.bricks.transformer import FFN
from mmengine.model import Sequential
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .branches import has_hooks
from .linear import Linear
from .step_weights import as_autocast
from .tracing import is_looked_into

#: Parts of which mmcv's feed-forward network is built, with its linear layers or ours.
PARTS = (FFN, Sequential, LinearOfMMCV, nn.Linear, Linear, nn.ReLU, nn.Dropout, nn.Identity)


def is_cheaper_to_compute_again(x: Tensor) -> bool:
    """Whether the hidden layer of a feed-forward network is to be computed again from ``x``.

    A product is done soon and memory is scarce, except on a CPU, where it is the other way round.
    """
    return not x.is_cpu


class _TwoLayers(torch.autograd.Function):
    """``second(relu(first(x)))`` that keeps ``x`` alone.

    torch's own checkpointing takes some milliseconds of the host each time, as long as ten layers take to start.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight1, bias1, weight2)
        return F.linear(F.linear(x, weight1, bias1).relu_(), weight2, bias2)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, weight1, bias1, weight2 = ctx.saved_tensors
        hidden = F.linear(x, weight1, bias1).relu_()
        grad_hidden = torch.ops.aten.threshold_backward(grad @ weight2, hidden, 0)
        weights = grad_hidden.t() @ x, grad_hidden.sum(0), grad.t() @ hidden, grad.sum(0)
        return grad_hidden @ weight1, *weights


def run_again_for_gradients(ffn: FFN, x: Tensor) -> Tensor | None:
    """``ffn(x)`` of rows ``x`` (n, dim), of whose parts ``x`` alone is kept for the gradients.

    None where the network is more than two linear layers with ReLU between and the input added.
    """
    modules = list(ffn.modules())
    linear = [module for module in modules if isinstance(module, nn.Linear)]
    if (
        is_looked_into()
        or not all(type(module) in PARTS and not has_hooks(module) for module in modules)
        or any(isinstance(module, nn.Dropout) and module.p and module.training for module in modules)
        or [len(linear), sum(isinstance(module, nn.ReLU) for module in modules)] != [2, 1]
        or not ffn.add_identity
    ):
        return None
    weights = (linear[0].weight, linear[0].bias, linear[1].weight, linear[1].bias)
    return x + _TwoLayers.apply(*map(as_autocast, (x, *weights)))
