"""Numbers that the host knows, on their way to the device."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .tracing import is_looked_into


def to_device(tables: Sequence[Any], device: torch.device, dtype: torch.dtype = torch.int64) -> list[Tensor]:
    """Copy numbers that the host knows to the device, all of them at once and without waiting.

    ``torch.tensor(values, device=...)`` copies from memory that the system may move, so a host waits there until its
    GPU has done all that was queued before. Pinned memory is read whenever the GPU comes to it, and torch keeps it
    until then.

    Where torch looks into the code, every table is a tensor of its own: a compiler makes constants of it, and a trace
    keeps sizes that are not constant.

    Args:
        tables: Numbers, nested sequences of numbers, or arrays; of any shapes.
        device: Where to.
        dtype: Of all results.

    Returns:
        A contiguous tensor of the shape of each table, on ``device``.
    """
    if is_looked_into():
        return [_recorded(table, device, dtype) for table in tables]
    arrays = [np.asarray(table, str(dtype).removeprefix('torch.')) for table in tables]
    host = torch.from_numpy(np.concatenate([array.ravel() for array in arrays]))
    if device.type == 'cuda':
        host = host.pin_memory()
    parts = host.to(device, non_blocking=True).split([array.size for array in arrays])
    return [part.view(array.shape) for part, array in zip(parts, arrays, strict=True)]


def _recorded(table: Any, device: torch.device, dtype: torch.dtype) -> Tensor:
    """``table`` as a tensor; a trace's sizes, which are tensors, stay what they are."""
    if not torch.jit.is_tracing():
        return torch.tensor(table, dtype=dtype, device=device)
    if isinstance(table, list | tuple):
        return torch.stack([_recorded(row, device, dtype) for row in table])
    return torch.full((), table, dtype=dtype, device=device)
