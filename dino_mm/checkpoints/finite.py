"""Numbers that are none: NaN and infinity among weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .errors import CheckpointError


def first_non_finite(tensors: Mapping[str, Any]) -> str | None:
    """Name of the first tensor that holds NaN or infinity; None if there is none. What is no tensor is passed over."""
    for name, value in tensors.items():
        # Tensors on the meta device have no values.
        has_values = isinstance(value, Tensor) and value.is_floating_point() and not value.is_meta
        if has_values and not bool(torch.isfinite(value).all()):
            return name
    return None


def require_finite(tensors: Mapping[str, Any]) -> None:
    """Raise CheckpointError if a tensor of a checkpoint holds NaN or infinity; the message has its name."""
    name = first_non_finite(tensors)
    if name is not None:
        raise CheckpointError(
            f'The checkpoint is of no use: its tensor {name!r} holds NaN or infinity, so the training had failed '
            'before it was saved. Take an earlier checkpoint.'
        )
