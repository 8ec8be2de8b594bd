"""What autocast casts, cast at once: the weights of a forward pass, and inputs of several layers."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

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


class _Place(NamedTuple):
    """Where a module keeps a weight."""

    parameters: dict[str, Any]
    name: str
    weight: Tensor


@contextmanager
def half_weights(module: nn.Module) -> Iterator[None]:
    """Under autocast, have the weights of ``module`` in half precision while the context is open.

    The values are those of autocast, which starts a kernel for each weight, and another for its gradient: together a
    fifth of those of a training step. Here one kernel serves a child of ``module``, so that the gradients of the later
    children are ready, and can be sent to other processes, while the earlier ones are computed. Compiled parts, and
    torch before 2.4, leave it to autocast.
    """
    weight = next(module.parameters(), None)
    dtype = None if weight is None else _autocast_dtype(weight.device.type)
    if dtype is None:
        yield
        return
    parts = list(filter(None, map(_places, module.children())))
    try:
        for places in parts:
            _put(places, _Cast.apply(dtype, *(place.weight for place in places)))
        yield
    finally:
        for places in parts:
            _put(places, [place.weight for place in places])


def as_autocast(x: Tensor) -> Tensor:
    """``x`` in the precision in which autocast runs linear layers: one cast for several that take it."""
    dtype = _autocast_dtype(x.device.type)
    return x if dtype is None or x.dtype is torch.float64 else x.to(dtype)


def _autocast_dtype(device: str) -> torch.dtype | None:
    """Autocast's precision on this type of device; None where it is off, or left to work by itself."""
    if is_looked_into() or not hasattr(torch, 'get_autocast_dtype') or not torch.amp.is_autocast_available(device):
        return None
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


def with_its_weights(module: nn.Module) -> Callable[..., Any]:
    """``module`` with the half weights it has now, for code that calls it again when the context has closed."""
    halves = []
    for child in module.modules():
        parameters: dict[str, Any] = child._parameters
        for name, weight in parameters.items():
            if weight is not None and not isinstance(weight, nn.Parameter):
                halves.append(_Place(parameters, name, weight))

    def call(*args: Any) -> Any:
        before = [place.parameters[place.name] for place in halves]
        _put(halves, [place.weight for place in halves])
        try:
            return module(*args)
        finally:
            _put(halves, before)

    return call if halves else module


def _put(places: list[_Place], weights: Any) -> None:
    # Past `setattr`, which takes parameters only, and longer.
    for place, weight in zip(places, weights, strict=True):
        place.parameters[place.name] = weight


def _places(module: nn.Module) -> list[_Place]:
    """Where ``module`` has float32 weights that autocast would cast; compiled parts are left out."""
    if module._compiled_call_impl is not None or '_orig_mod' in module._modules:
        return []
    found = []
    if isinstance(module, nn.Linear) or type(module) in (nn.Conv2d, nn.MultiheadAttention):
        for name, weight in module._parameters.items():
            if isinstance(weight, nn.Parameter) and weight.dtype is torch.float32:
                found.append(_Place(module._parameters, name, weight))
    for child in module._modules.values():
        if child is not None:
            found += _places(child)
    return found
