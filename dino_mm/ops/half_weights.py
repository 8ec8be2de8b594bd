"""Weights in half precision, cast all at once."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call

from .tracing import is_looked_into


class _Cast(torch.autograd.Function):
    """Tensors in another precision, their gradients back in that of the tensors: one kernel for many."""

    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype = weights[0].dtype
        halves = _cast(weights, dtype)
        frozen = [half for half, trained in zip(halves, ctx.needs_input_grad[1:], strict=True) if not trained]
        ctx.mark_non_differentiable(*frozen)
        return tuple(halves)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        cast = iter(_cast([grad for grad in grads if grad is not None], ctx.dtype))
        return None, *(None if grad is None else next(cast) for grad in grads)


def _cast(tensors: Any, dtype: torch.dtype) -> list[Tensor]:
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    if copies:
        torch._foreach_copy_(copies, tensors)
    return copies


def call_with_half_weights(module: nn.Module, *args: Any) -> Any:
    """``module(*args)``; under autocast, with its weights cast beforehand and all at once.

    The values are those of autocast, which starts a kernel for each weight, and another for its gradient: together a
    fifth of those of a training step. Compiled code, and torch before 2.4, leave it to autocast.
    """
    weights = {} if is_looked_into() else _weights(module)
    device = next(iter(weights.values())).device.type if weights else 'cpu'
    known = hasattr(torch, 'get_autocast_dtype') and torch.amp.is_autocast_available(device)  # not on `meta`
    if not (weights and known and torch.is_autocast_enabled(device)):
        return module(*args)
    halves = _Cast.apply(torch.get_autocast_dtype(device), *weights.values())
    return functional_call(module, dict(zip(weights, halves, strict=True)), args)


def _weights(module: nn.Module) -> dict[str, Tensor]:
    """Those float32 weights that autocast would cast, by name; none where a part is compiled."""
    children = dict(module.named_modules())
    if any(child._compiled_call_impl or hasattr(child, '_orig_mod') for child in children.values()):
        return {}
    return {
        f'{path}.{name}' if path else name: weight
        for path, child in children.items()
        if isinstance(child, nn.Linear) or type(child) in (nn.Conv2d, nn.MultiheadAttention)
        for name, weight in child.named_parameters(recurse=False)
        if weight.dtype is torch.float32
    }
