"""Checkpoints of mmengine's runner as plain data, which opens anywhere, and back to what the runner resumes from.

mmengine writes its log as objects of its own and of numpy. ``torch.load``, which reads nothing but plain data unless
told otherwise (``weights_only``, the default from torch 2.6 on), refuses them.
"""

import logging
import pickle
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import torch
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer, print_log
from mmengine.runner import Runner

#: What stands for a history or an array is a dict with one of these as its only key.
HISTORY, ARRAY = 'mmengine.HistoryBuffer', 'numpy.ndarray'
#: ``torch.load`` makes these of a file as they were.
AS_THEY_ARE = (torch.Tensor, torch.Size, torch.dtype, torch.device, type(None))
#: Of these it makes no subclasses, such as mmengine's ConfigDict or an enumeration.
CONTAINERS: tuple[type[Any], ...] = (Counter, OrderedDict, dict, list, tuple, set)
VALUES: tuple[type[Any], ...] = (bool, int, float, complex, str, bytes)


class PlainCheckpointHook(Hook):
    """Writes checkpoints as plain data, with all that other hooks have added to them.

    :class:`LoadCheckpointHook` registers it, since it is that one which reads them.
    """

    priority = 'LOWEST'

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Rewrite ``checkpoint`` in place."""
        to_plain(checkpoint)


def to_plain(checkpoint: dict[str, Any]) -> None:
    """Put plain data in the place of all else in ``checkpoint``; what has none is left out, with a warning each.

    Histories and arrays become dicts, so that :func:`from_plain` can tell them from tensors. In ``meta``, which
    inferencers read, arrays become lists.
    """
    for key in list(checkpoint):
        try:
            checkpoint[key] = _plain(checkpoint[key], (key,))
        except _NotPlainError as error:
            _leave_out(error)
            del checkpoint[key]


def from_plain(checkpoint: dict[str, Any]) -> None:
    """Undo :func:`to_plain` but for ``meta``; other checkpoints stay as they are."""
    for key in checkpoint.keys() - {'meta', 'state_dict'}:
        checkpoint[key] = _restored(checkpoint[key])


def restore_dataset_meta(checkpoint: dict[str, Any], own: Any) -> None:
    """Put the run's own description of its data set into ``meta`` if the checkpoint has the plain form of it.

    mmengine warns of other data where the two differ in type alone.
    """
    meta = checkpoint.get('meta')
    if isinstance(meta, dict) and 'dataset_meta' in meta:
        plain = dict(meta=dict(dataset_meta=own))
        to_plain(plain)
        if pickle.dumps(plain['meta'].get('dataset_meta')) == pickle.dumps(meta['dataset_meta']):
            meta['dataset_meta'] = own


class _NotPlainError(Exception):
    """A value that has no plain form."""

    def __init__(self, value: Any, path: tuple) -> None:
        super().__init__()
        self.type, self.path = type(value), path


def _plain(value: Any, path: tuple) -> Any:
    """The plain form of ``value``; the value itself where it is plain."""
    if isinstance(value, AS_THEY_ARE):
        return value
    if isinstance(value, np.ndarray):
        return _plain(value.tolist(), path) if path[0] == 'meta' else {ARRAY: _tensor(value, path)}
    if isinstance(value, np.generic) and not isinstance(value.item(), np.generic):
        return _plain(value.item(), path)
    if isinstance(value, HistoryBuffer) and path[0] != 'meta':
        return {HISTORY: [*(_tensor(array, path) for array in value.data), value.max_length]}
    for kind in VALUES:
        if isinstance(value, kind):
            return value if type(value) is kind else kind(value)
    for kind in CONTAINERS:
        if isinstance(value, kind):
            items = _plain_items(value, path) if isinstance(value, dict) else [_plain(one, path) for one in value]
            # A state dict has attributes: only what has to change is made anew.
            return value if type(value) is kind and _are_same(value, items) else kind(items)
    raise _NotPlainError(value, path)


def _plain_items(value: dict, path: tuple) -> dict:
    plain = {}
    for key, one in value.items():
        try:
            plain[_plain(key, path)] = _plain(one, (*path, key))
        except _NotPlainError as error:
            _leave_out(error)
    return plain


def _are_same(value: Any, items: Any) -> bool:
    """Whether ``items`` are the very objects in ``value``."""
    pairs = [(value, items)] if not isinstance(value, dict) else [(value, items), (value.values(), items.values())]
    return len(value) == len(items) and all(a is b for old, new in pairs for a, b in zip(old, new, strict=True))


def _tensor(array: np.ndarray, path: tuple) -> Any:
    """``array`` as a tensor, or as a list where torch has no such type: text, objects."""
    try:
        return torch.from_numpy(array.copy())
    except (TypeError, ValueError):
        return _plain(array.tolist(), path)


def _leave_out(error: _NotPlainError) -> None:
    where = ''.join(f'[{key!r}]' for key in error.path)
    print_log(
        f'A checkpoint is written without its entry {where}: {error.type.__module__}.{error.type.__qualname__} is not '
        'plain data, and a file that has it opens nowhere by default. Let it be numbers, text, tensors, arrays, or '
        'dicts and lists of them.',
        logger='current',
        level=logging.WARNING,
    )


def _restored(value: Any) -> Any:
    if isinstance(value, dict) and value.keys() == {HISTORY}:
        history, counts, max_length = value[HISTORY]
        return HistoryBuffer(_array(history), _array(counts), max_length)
    if isinstance(value, dict) and value.keys() == {ARRAY}:
        return _array(value[ARRAY])
    if isinstance(value, dict):
        for key in value:
            value[key] = _restored(value[key])
    elif type(value) in (list, tuple):
        return type(value)(_restored(one) for one in value)
    return value


def _array(plain: torch.Tensor | list) -> np.ndarray:
    # mmengine resumes onto the model's device.
    return plain.cpu().numpy() if isinstance(plain, torch.Tensor) else np.array(plain)
