"""Checkpoints of mmengine's runner under torch's safe loading."""

import pickle
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from packaging.version import Version


def _history_statistic(owner: object, name: str) -> Callable:
    """Stand-in for ``getattr`` in checkpoints: a ``HistoryBuffer`` refers to its statistics by it, and to no more."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'mean', 'current'):
        raise pickle.UnpicklingError(f'A checkpoint may not look up {name!r} of {owner!r}.')
    return getattr(HistoryBuffer, name)


def _runner_types() -> dict[str, Any]:
    """What a checkpoint of mmengine's runner holds besides tensors, by the name it goes by: its log, plain data."""
    plain = [
        HistoryBuffer,
        deque,
        np.ndarray,
        np.dtype,
        *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)),
    ]
    names = {f'{kind.__module__}.{kind.__qualname__}': kind for kind in plain}
    # What makes arrays and scalars; numpy 1 and 2 write different names of the same functions.
    makers: list[Any] = [value.__reduce__()[0] for value in (np.zeros(0), np.float64(0))]
    for core in ('core', '_core'):
        names |= {f'numpy.{core}.multiarray.{maker.__name__}': maker for maker in makers}
    return names | {'builtins.getattr': _history_statistic}


#: Name -> type or function; anything else in a checkpoint is still refused.
RUNNER_TYPES = _runner_types()


def allow_mmengine_checkpoints() -> None:
    """Let ``torch.load(weights_only=True)``, torch 2.6's default, read what mmengine's runner saves."""
    if Version(torch.__version__) < Version('2.6'):
        return  # mmengine's own `torch.load` is not restricted there
    torch.serialization.add_safe_globals([(kind, name) for name, kind in RUNNER_TYPES.items()])
