"""How the tensors of one naming scheme get our names and our layout."""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .errors import CheckpointError

#: (our name, the checkpoint's tensor, the model's tensor) -> the tensor in our layout.
Adapter = Callable[[str, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class NameMap:
    """A naming scheme that checkpoints use, told in regular expressions.

    Args:
        title: What it is, in words.
        signature: Patterns; a checkpoint is of this scheme if each matches some name.
        renames: (pattern, replacement), applied in this order, each to what the ones before made of a name.
        dropped: (pattern, reason) of names without a place in our models.
        initialised: (pattern, reason) of **our** names that such a checkpoint need not have: they stay as they are.
        zeros: (pattern, reason) of **our** names that such a checkpoint lacks because they are zero there, beside a
            weight that it has.
        adapt: Brings a tensor into our layout; None leaves all as they are.
    """

    title: str
    signature: tuple[str, ...]
    renames: tuple[tuple[str, str], ...] = ()
    dropped: tuple[tuple[str, str], ...] = ()
    initialised: tuple[tuple[str, str], ...] = ()
    zeros: tuple[tuple[str, str], ...] = ()
    adapt: Adapter | None = None

    def matches(self, names: Iterable[str]) -> bool:
        """Whether a checkpoint with these tensor names is of this scheme."""
        names = list(names)
        return all(any(re.search(pattern, name) for name in names) for pattern in self.signature)

    def rename(self, name: str) -> str:
        """Our name of a checkpoint's tensor."""
        for pattern, replacement in self.renames:
            name = re.sub(pattern, replacement, name)
        return name

    def why_dropped(self, name: str) -> str | None:
        """Why a checkpoint's tensor has no place in our models; None if it has one."""
        return _first_reason(self.dropped, name)

    def why_initialised(self, name: str) -> str | None:
        """Why such a checkpoint need not have our tensor ``name``; None if it must."""
        return _first_reason(self.initialised, name)


@dataclass
class Conversion:
    """Tensors under our names, and the account of what became of a checkpoint's tensors.

    Attributes:
        tensors: Our name -> tensor.
        origin: Our name -> the checkpoint's name.
        dropped: The checkpoint's name -> why it was left out.
        filled: Our name -> why the checkpoint does not have it, and what it is instead.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    origin: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    filled: dict[str, str] = field(default_factory=dict)


def convert(
    scheme: NameMap, tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], resize: bool = True
) -> Conversion:
    """Bring ``tensors`` under our names and into our layout.

    Args:
        scheme: The naming scheme of ``tensors``.
        tensors: The checkpoint's name -> tensor.
        own: The model's own tensors, which tell shapes and what may stay as it is.
        resize: Whether a tensor may come to another number of elements, as position tables of other image sizes do.

    Raises:
        CheckpointError: Two different tensors get the same name.
    """
    result = Conversion()
    for name, tensor in tensors.items():
        reason = scheme.why_dropped(name)
        if reason is not None:
            result.dropped[name] = reason
            continue
        ours = scheme.rename(name)
        if ours in result.tensors:
            _drop_alias(result, ours, name, tensor)
            continue
        result.tensors[ours] = tensor
        result.origin[ours] = name
    _fill(scheme, result, own)
    if scheme.adapt is not None:
        for ours in result.tensors.keys() & own.keys():
            if resize or result.tensors[ours].numel() == own[ours].numel():
                result.tensors[ours] = scheme.adapt(ours, result.tensors[ours], own[ours])
    return result


def _drop_alias(result: Conversion, ours: str, name: str, tensor: Tensor) -> None:
    """A name that stands for a tensor already there, as of heads that two modules share."""
    first = result.origin[ours]
    if not torch.equal(result.tensors[ours], tensor):
        raise CheckpointError(
            f'`{first}` and `{name}` of the checkpoint are both `{ours}` here, but their values differ.'
        )
    result.dropped[name] = f'the same tensor as {first}'


def _fill(scheme: NameMap, result: Conversion, own: Mapping[str, Tensor]) -> None:
    """Add what the checkpoint need not have."""
    for ours in [name for name in own if name not in result.tensors]:
        parent, _, last = ours.rpartition('.')
        if f'{parent}.weight' in result.tensors and (reason := _first_reason(scheme.zeros, ours)):
            result.tensors[ours] = torch.zeros_like(own[ours])
            result.filled[ours] = f'zero: {reason}'
        elif reason := scheme.why_initialised(ours):
            result.filled[ours] = f'left as it is: {reason}'
        elif last == 'num_batches_tracked' and f'{parent}.running_var' in result.tensors:
            result.filled[ours] = 'left as it is: frozen norms elsewhere do not count batches'


def _first_reason(rules: tuple[tuple[str, str], ...], name: str) -> str | None:
    return next((reason for pattern, reason in rules if re.search(pattern, name)), None)
