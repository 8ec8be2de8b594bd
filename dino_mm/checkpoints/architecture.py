"""What a DINO's tensors say about it, and which of the shipped configs has exactly these tensors."""

import re
from collections.abc import Mapping

import torch
from mmengine.config import Config
from torch import Tensor

from ..registry import MODELS
from ..shipped import config_root
from .classes import CLASS_BRANCH, num_classes
from .conversion import Converted, convert_detector, recognise_detector

#: How many configs a message names.
NAMED = 3


def describe(converted: Converted) -> str:
    """The architecture of a detector, in words."""
    tensors = converted.conversion.tensors
    parts = [converted.title]
    encoder, decoder = _layers(tensors, 'encoder'), _layers(tensors, 'decoder')
    if encoder or decoder:
        parts.append(f'{encoder} encoder and {decoder} decoder layers')
    levels = tensors.get('level_embed')
    if levels is not None and levels.ndim == 2:
        parts.append(f'{levels.shape[0]} levels of {levels.shape[1]} channels')
    queries = tensors.get('query_selector.query_embedding.weight')
    if queries is not None and queries.ndim == 2:
        parts.append(f'{queries.shape[0]} queries')
    if any(name.startswith(CLASS_BRANCH) and tensor.ndim for name, tensor in tensors.items()):
        parts.append(f'{num_classes(tensors)} classes')
    return ', '.join(parts)


def _layers(tensors: Mapping[str, Tensor], part: str) -> int:
    numbers = [int(match[1]) for name in tensors if (match := re.match(rf'{part}\.layers\.(\d+)\.', name))]
    return max(numbers, default=-1) + 1


def fitting_configs(checkpoint: Mapping[str, Tensor], num_levels: int) -> list[str]:
    """Shipped configs whose models load a detector's checkpoint as it is, the number of classes apart.

    Args:
        checkpoint: The checkpoint's name -> tensor.
        num_levels: Its feature levels; configs of other numbers are not tried.

    Returns:
        Paths below ``configs/``; of several with the same architecture the first few in alphabetical order.
    """
    found: list[str] = []
    if recognise_detector(checkpoint) is None:
        return found  # not a whole one
    fits: dict[str, bool] = {}
    for path in sorted(config_root().glob('dino-*/*.py')):
        cfg = Config.fromfile(path).model
        if cfg.num_feature_levels != num_levels:
            continue
        architecture = repr((cfg.backbone, cfg.neck, cfg.num_queries, cfg.embed_dims, cfg.encoder, cfg.decoder))
        if architecture not in fits:
            with torch.device('meta'):
                model = MODELS.build(cfg)
            fits[architecture] = convert_detector(checkpoint, model).fits_but_for_classes(model)
        if fits[architecture]:
            found.append(f'{path.parent.name}/{path.name}')
        if len(found) == NAMED:
            break
    return found
