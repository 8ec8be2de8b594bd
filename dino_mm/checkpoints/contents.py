"""What lies in a checkpoint: weights, averaged weights, and how far the training had come."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from .errors import CheckpointError

#: Keys under which libraries keep the weights, and their exponential moving average.
WEIGHTS = ('state_dict', 'model', 'model_state', 'module', 'teacher')
AVERAGED = ('ema_state', 'ema_model', 'model_ema', 'state_dict_ema', 'ema')
#: What wrappers put before names.
WRAPPERS = re.compile(r'^(module\.|_orig_mod\.)+')


@dataclass
class Contents:
    """A checkpoint taken apart.

    Attributes:
        tensors: Name -> tensor, without wrappers' prefixes.
        averaged: Whether ``tensors`` are an exponential moving average.
        iteration: Iterations trained, where the checkpoint tells.
        epoch: Epochs trained, where it tells those instead.
        classes: Class names, where it tells.
        names: Name in ``tensors`` -> the checkpoint's, where a wrapper's prefix was taken off.
        others: Names of what lies among the weights and is no tensor.
    """

    tensors: dict[str, Tensor] = field(default_factory=dict)
    averaged: bool = False
    iteration: int | None = None
    epoch: int | None = None
    classes: tuple[str, ...] | None = None
    names: dict[str, str] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)


def take_apart(checkpoint: Mapping[str, Any], ema: bool = False, may_be_empty: bool = False) -> Contents:
    """Find weights and progress in a checkpoint as any of the known libraries write it.

    Args:
        checkpoint: What the file holds: a state dict, or one with more around it.
        ema: Take the exponential moving average of the weights.
        may_be_empty: Let a checkpoint without weights pass.

    Raises:
        CheckpointError: There are no weights, or with ``ema`` no averaged ones.
    """
    weights, averaged = _weights(checkpoint, ema)
    names = {WRAPPERS.sub('', name): name for name, value in weights.items() if isinstance(value, Tensor)}
    tensors = {name: weights[given] for name, given in names.items()}
    if not tensors and not may_be_empty:
        raise CheckpointError(
            f'The checkpoint holds no tensors where weights are looked for, only {_some(checkpoint)}.'
        )
    meta = checkpoint.get('meta')
    meta = meta if isinstance(meta, Mapping) else {}
    result = Contents(tensors, averaged, meta.get('iter'), meta.get('epoch'), _classes(meta), names)
    result.others = [name for name, value in weights.items() if not isinstance(value, Tensor)]
    if 'iteration' in checkpoint:  # detectron2 counts from zero and writes the last one done
        result.iteration = int(checkpoint['iteration']) + 1
    elif 'epoch' in checkpoint:
        result.epoch = int(checkpoint['epoch']) + 1
    return result


def _weights(checkpoint: Mapping[str, Any], ema: bool) -> tuple[Mapping[str, Any], bool]:
    if ema:
        if 'ema_state_dict' in checkpoint:  # mmengine writes the average where the weights are, and those apart
            return checkpoint['state_dict'], True
        for key in AVERAGED:
            if _is_state_dict(checkpoint.get(key)):
                return checkpoint[key], True
        raise CheckpointError(
            f'There are no averaged (EMA) weights in the checkpoint, it has {_some(checkpoint)}. '
            'Load it without asking for them.'
        )
    for key in (*WEIGHTS, *AVERAGED):
        if _is_state_dict(checkpoint.get(key)):
            return checkpoint[key], key in AVERAGED
    return checkpoint, False


def _is_state_dict(value: Any) -> bool:
    return isinstance(value, Mapping) and any(isinstance(entry, Tensor) for entry in value.values())


def _classes(meta: Mapping) -> tuple[str, ...] | None:
    dataset_meta = meta.get('dataset_meta') or {}
    names = dataset_meta.get('classes', dataset_meta.get('CLASSES', meta.get('CLASSES')))
    return tuple(names) if isinstance(names, list | tuple) else None


def _some(checkpoint: Mapping) -> str:
    names = ', '.join(map(str, list(checkpoint)[:6]))
    return f'{names} ...' if len(checkpoint) > 6 else names or 'nothing'
