"""Weights as a forward pass takes them, made at once: scaled by frozen norms, cast for autocast; inputs cast once."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .frozen_norms import FrozenNorm
from .tracing import is_looked_into

#: Numbers of the weights that are made together, about: 25 MB, as many as DistributedDataParallel sends at once. Their
#: gradients are ready together, and are sent to other processes while those of earlier layers are computed.
GROUP = 6_000_000


class _Made(torch.autograd.Function):
    """Weights times ``scales`` where there is one, then in another precision: one kernel for many.

    The gradients go back the same way.
    """

    @staticmethod
    def forward(
        ctx: Any, dtype: torch.dtype | None, scales: Sequence[Tensor | None], *weights: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.dtype, ctx.scales = dtype and weights[0].dtype, scales
        made = _cast(_multiply(weights, scales), dtype)
        fixed = [weight for weight, trained in zip(made, ctx.needs_input_grad[2:], strict=True) if not trained]
        ctx.mark_non_differentiable(*fixed)
        return tuple(made)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        there = [i for i, grad in enumerate(grads) if grad is not None]
        cast = _cast([grad for grad in grads if grad is not None], ctx.dtype)
        own = dict(zip(there, _multiply(cast, [ctx.scales[i] for i in there]), strict=True))
        return None, None, *(own.get(i) for i in range(len(grads)))


def _multiply(tensors: Sequence[Tensor], scales: Sequence[Tensor | None]) -> list[Tensor]:
    products = list(tensors)
    chosen = {i: scale for i, scale in enumerate(scales) if scale is not None}
    if chosen:
        scaled = torch._foreach_mul([products[i] for i in chosen], list(chosen.values()))
        for i, product in zip(chosen, scaled, strict=True):
            products[i] = product
    return products


def _cast(tensors: list[Tensor], dtype: torch.dtype | None) -> list[Tensor]:
    if dtype is None or not tensors:
        return tensors
    copies = [torch.empty_like(tensor, dtype=dtype) for tensor in tensors]
    torch._foreach_copy_(copies, tensors)
    return copies


class _Place(NamedTuple):
    """Where a module keeps a weight."""

    parameters: dict[str, Any]
    name: str
    weight: Tensor
    norm: FrozenNorm | None = None
    """What is to be folded into it."""


@contextmanager
def step_weights(module: nn.Module, norms: Sequence[FrozenNorm] = ()) -> Iterator[None]:
    """While the context is open, have the weights of ``module`` as a step wants them.

    Under autocast they are in half precision. The values are those of autocast, which starts a kernel for each weight,
    and another for its gradient: together a fifth of those of a training step. Where gradients are wanted, the norms
    that are frozen are folded into the convolutions before them, whose weights are scaled before they are rounded. Here
    one kernel serves many weights, see ``GROUP``. Compiled parts stay as they are. Before torch 2.4 autocast casts.
    """
    weight = next(module.parameters(), None)
    dtype = None if weight is None else _autocast_dtype(weight.device.type)
    is_training = torch.is_grad_enabled() and not is_looked_into()
    frozen = {id(norm.conv): norm for norm in norms if norm.is_frozen()} if is_training else {}
    places = _places(module, dtype, frozen) if dtype is not None or frozen else []
    folded = [place.norm for place in places if place.norm is not None]
    shifts = dict(zip(map(id, folded), _cast([norm.shift() for norm in folded], dtype), strict=True))
    try:
        for group in _groups(places):
            scales = [place.norm and place.norm.scale() for place in group]
            made = _Made.apply(dtype, scales, *(place.weight for place in group))
            for place, weight in zip(group, made, strict=True):
                if place.norm is None:
                    place.parameters[place.name] = weight
                else:
                    place.norm.fold(weight, shifts[id(place.norm)])
        yield
    finally:
        _put(places, [place.weight for place in places])
        for norm in folded:
            norm.unfold()


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
    """``module`` with the weights it has now, for code that calls it again when the context has closed."""
    replaced = []
    for child in module.modules():
        parameters: dict[str, Any] = child._parameters
        for name, weight in parameters.items():
            if weight is not None and not isinstance(weight, nn.Parameter):
                replaced.append(_Place(parameters, name, weight))

    def call(*args: Any) -> Any:
        before = [place.parameters[place.name] for place in replaced]
        _put(replaced, [place.weight for place in replaced])
        try:
            return module(*args)
        finally:
            _put(replaced, before)

    return call if replaced else module


def _put(places: list[_Place], weights: Any) -> None:
    # Past `setattr`, which takes parameters only, and longer.
    for place, weight in zip(places, weights, strict=True):
        place.parameters[place.name] = weight


def _places(module: nn.Module, dtype: torch.dtype | None, frozen: Mapping[int, FrozenNorm]) -> list[_Place]:
    """Where ``module`` has weights that have a norm, and float32 ones that autocast would cast; not in compiled parts.

    They are in the order of the layers.
    """
    if module._compiled_call_impl is not None or '_orig_mod' in module._modules:
        return []
    found, norm = [], frozen.get(id(module))
    is_cast = isinstance(module, nn.Linear) or type(module) in (nn.Conv2d, nn.MultiheadAttention)
    if norm is not None or (is_cast and dtype is not None):
        for name, weight in module._parameters.items():
            if isinstance(weight, nn.Parameter) and (weight.dtype is torch.float32 or dtype is None):
                found.append(_Place(module._parameters, name, weight, norm))
    for child in module._modules.values():
        if child is not None:
            found += _places(child, dtype, frozen)
    return found


def _groups(places: list[_Place]) -> Iterator[list[_Place]]:
    """See ``GROUP``."""
    group: list[_Place] = []
    size = 0
    for place in places:
        group.append(place)
        size += place.weight.numel()
        if size >= GROUP:
            yield group
            group, size = [], 0
    if group:
        yield group
