"""Feed-forward networks of encoder and decoder, and the choice of how they run."""

from functools import partial, reduce
from typing import Any

import torch
import torch.nn.functional as F
from mmcv.cnn.bricks.transformer import FFN
from mmengine.model import Sequential
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from ...ops.tracing import is_looked_into
from .linear import Linear, as_kernel, as_map, runs_as_convolution

#: Most memory of the hidden layer of tokens that a CPU computes at once. For a tensor of 32 MiB and more glibc asks the
#: system, which clears all its pages before they are written to; the memory of smaller ones it uses again.
PIECE_BYTES = 31 * 2**20
#: What a network consists of that :class:`FeedForward` can stand for.
PLAIN_MODULES = {FFN, Sequential, Linear, nn.ReLU, nn.Dropout, nn.Identity}
#: Since torch 2.4 the type of the device is an argument.
is_autocasting = (
    partial(torch.is_autocast_enabled, 'cpu') if hasattr(torch, 'get_autocast_dtype') else torch.is_autocast_cpu_enabled
)


class Products:
    """Linear layers of rows, as products of matrices. A weight is (out_features, in_features)."""

    @staticmethod
    def split(tokens: Tensor, num_pieces: int) -> tuple[Tensor, ...]:
        """Views of ``tokens`` (bs, num_tokens, dim): pieces (num_rows, dim) of the rows of all images."""
        return tokens.view(-1, tokens.shape[-1]).chunk(num_pieces)

    @staticmethod
    def kernel(weight: Tensor) -> Tensor:
        """View of the weight as the linear layers take it."""
        return weight.t()

    @staticmethod
    def linear(x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
        """The linear layer of a piece."""
        return torch.addmm(bias, x, kernel)

    @staticmethod
    def add_linear(total: Tensor, x: Tensor, kernel: Tensor) -> None:
        """Add that of a piece, without bias, to ``total``."""
        total.addmm_(x, kernel)

    @staticmethod
    def grad(grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Gradient of the piece ``x`` from that of its linear layer."""
        return grad @ weight

    @staticmethod
    def add_grad(total: Tensor, grad: Tensor, x: Tensor, weight: Tensor) -> None:
        """Add it to ``total``."""
        total.addmm_(grad, weight)

    @staticmethod
    def parameter_grads(grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the weight and the bias."""
        return grad.t() @ x, grad.sum(0)


class Convolutions:
    """The same of a map, as 1 x 1 convolutions: see :func:`~dino_mm.models.layers.linear.runs_as_convolution`."""

    @staticmethod
    def split(tokens: Tensor, num_pieces: int) -> tuple[Tensor, ...]:
        """Views of ``tokens`` (bs, num_tokens, dim): pieces (1, dim, 1, num_rows) of the map of all images."""
        return as_map(tokens.view(1, -1, tokens.shape[-1])).chunk(num_pieces, -1)

    kernel = staticmethod(as_kernel)
    linear = staticmethod(F.conv2d)

    @staticmethod
    def add_linear(total: Tensor, x: Tensor, kernel: Tensor) -> None:
        """Add the linear layer of a piece, without bias, to ``total``."""
        total.add_(F.conv2d(x, kernel))

    @classmethod
    def grad(cls, grad: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        """Gradient of the piece ``x`` from that of its linear layer."""
        return cls._backward(grad, x, weight, [True, False, False])[0]

    @classmethod
    def add_grad(cls, total: Tensor, grad: Tensor, x: Tensor, weight: Tensor) -> None:
        """Add it to ``total``."""
        total.add_(cls.grad(grad, x, weight))

    @classmethod
    def parameter_grads(cls, grad: Tensor, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of the weight and the bias."""
        _, grad_kernel, grad_bias = cls._backward(grad, x, weight, [False, True, True])
        return grad_kernel.flatten(1), grad_bias

    @staticmethod
    def _backward(grad: Tensor, x: Tensor, weight: Tensor, wanted: list[bool]) -> tuple[Tensor, Tensor, Tensor]:
        one, none = [1, 1], [0, 0]
        return torch.ops.aten.convolution_backward(
            grad, x, as_kernel(weight), [len(weight)], one, none, one, False, none, 1, wanted
        )


class FeedForward(torch.autograd.Function):
    """``x + down(relu(up(x)))`` piece by piece, for the sake of memory; both layers are linear, with biases.

    A piece's hidden layer, which is wide, goes through its ReLU in place, in the backward pass too. What is added up is
    added by the products themselves.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, up: Tensor, up_bias: Tensor, down: Tensor, down_bias: Tensor, needs_grad: bool
    ) -> Tensor:
        """(bs, num_tokens, dim), contiguous, to the same; weights are (out_features, in_features).

        Without ``needs_grad`` no hidden layer is kept. torch does not say here whether gradients are enabled.
        """
        ctx.way = way = Convolutions if runs_as_convolution(x) else Products
        ctx.num_pieces = max(1, -(-x.shape[:2].numel() * up_bias.nbytes // PIECE_BYTES))
        to_hidden, from_hidden, output, activations = way.kernel(up), way.kernel(down), x + down_bias, []
        for piece, total in zip(way.split(x, ctx.num_pieces), way.split(output, ctx.num_pieces), strict=True):
            hidden = way.linear(piece, to_hidden, up_bias).relu_()
            way.add_linear(total, hidden, from_hidden)
            if needs_grad:
                activations.append(hidden)
        ctx.save_for_backward(x, up, down, *activations)
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of all tensors."""
        x, up, down, *activations = ctx.saved_tensors
        way, grad = ctx.way, grad.contiguous()
        grad_x, of_parameters = grad.clone(), []
        pieces = (way.split(tensor, ctx.num_pieces) for tensor in (x, grad, grad_x))
        for hidden, piece, grad_piece, total in zip(activations, *pieces, strict=True):
            grad_hidden = way.grad(grad_piece, hidden, down)
            torch.ops.aten.threshold_backward.grad_input(grad_hidden, hidden, 0, grad_input=grad_hidden)
            way.add_grad(total, grad_hidden, piece, up)
            of_parameters.append(
                (*way.parameter_grads(grad_hidden, piece, up), *way.parameter_grads(grad_piece, hidden, down))
            )
        return grad_x, *(reduce(Tensor.add_, of_pieces) for of_pieces in zip(*of_parameters, strict=True)), None


def runs_in_pieces(ffn: FFN, query: Tensor) -> bool:
    """Whether :class:`FeedForward` can stand for ``ffn``: on a CPU, where nobody changes or looks into the network."""
    plain_type = query.device.type == 'cpu' and query.dtype in (torch.float32, torch.float64) and not is_autocasting()
    if not plain_type or is_looked_into():
        return False
    if torch.is_grad_enabled() and not all(parameter.requires_grad for parameter in ffn.parameters()):
        return False
    return all(
        type(module) in PLAIN_MODULES
        and not (module._forward_hooks or module._forward_pre_hooks)
        and not (module._backward_hooks or module._backward_pre_hooks)
        and not (isinstance(module, nn.Dropout) and module.training and module.p > 0)
        for module in ffn.modules()
    )


def run_ffn(ffn: FFN, query: Tensor) -> Tensor:
    """Apply ``ffn``, whose layers are :class:`Linear`, residual included, to ``query`` (bs, num_queries, dim)."""
    if runs_in_pieces(ffn, query):
        (up, *_), down, *_ = ffn.layers
        return FeedForward.apply(
            query.contiguous(), up.weight, up.bias, down.weight, down.bias, torch.is_grad_enabled()
        )
    # Rows, as what a linear layer gives of them is not a view: writing to one, as mmcv's ReLU does, costs four copies.
    return ffn(query.flatten(0, 1)).view_as(query)
