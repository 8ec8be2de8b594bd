"""What the libraries below need to work together: version checks, and checkpoints under torch's safe loading."""

import importlib.metadata
import pickle
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from mmengine.logging import HistoryBuffer
from packaging.version import Version

#: Smallest version that fits, and the first that does not.
SUPPORTED = {
    'mmcv': ('2.0.0', '2.2.0'),
    'mmdet': ('3.3.0', '4.0.0'),
    'mmengine': ('0.10.4', '1.0.0'),
    'timm': ('1.0.16', '2.0.0'),
}


def check_versions() -> None:
    """Raise ImportError, naming the remedy, if a library is missing or does not fit."""
    for name, (lowest, limit) in SUPPORTED.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found = None
        if found is None or not Version(lowest) <= Version(found) < Version(limit):
            raise ImportError(
                f'dino_mm needs {name} >={lowest}, <{limit}, but '
                + (f'{name} {found} is installed.' if found else f'{name} is not installed.')
                + ' `python tools/setup_env.py` in a checkout of dino_mm sets up an environment that fits.'
            )


def _history_statistic(owner: object, name: str) -> Callable:
    """Stand-in for ``getattr`` in checkpoints: a ``HistoryBuffer`` refers to its statistics by it, and to no more."""
    if owner is not HistoryBuffer or name not in ('min', 'max', 'mean', 'current'):
        raise pickle.UnpicklingError(f'A checkpoint may not look up {name!r} of {owner!r}.')
    return getattr(HistoryBuffer, name)


def _runner_types() -> dict[str, Any]:
    """What a checkpoint of mmengine's runner holds besides tensors, by the name it goes by: its log, plain data."""
    multiarray: Any = np.core.multiarray
    plain = [
        HistoryBuffer,
        deque,
        np.ndarray,
        np.dtype,
        multiarray._reconstruct,
        multiarray.scalar,
        *(type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)),
    ]
    return {f'{kind.__module__}.{kind.__qualname__}': kind for kind in plain} | {'builtins.getattr': _history_statistic}


#: Name -> type or function; anything else in a checkpoint is still refused.
RUNNER_TYPES = _runner_types()


def allow_mmengine_checkpoints() -> None:
    """Let ``torch.load(weights_only=True)``, torch 2.6's default, read what mmengine's runner saves."""
    if Version(torch.__version__) < Version('2.6'):
        return  # mmengine's own `torch.load` is not restricted there
    torch.serialization.add_safe_globals([(kind, name) for name, kind in RUNNER_TYPES.items()])
