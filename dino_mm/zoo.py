"""Models by name: which there are, their configs, and themselves, with weights of the zoo or of a file.

The list is read from the metafiles. Nothing heavy is imported before a model is built.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .settings import reading
from .shipped import config_root, find_config

if TYPE_CHECKING:
    import torch
    from mmengine.config import Config

    from .checkpoints.contents import Contents
    from .models import DINO

#: In place of a checkpoint: the weights that the metafile names.
ZOO = 'zoo'
PREFIX = 'dino_'


class ZooModel(NamedTuple):
    """What a metafile says of a model.

    Attributes:
        name: File name of its config, without ending.
        box_ap: Box AP on COCO val2017 as reported by detrex; None if it reports none.
        weights: Address of its checkpoint; None if none is published.
    """

    name: str
    box_ap: float | None
    weights: str | None


@cache
def zoo_models() -> dict[str, ZooModel]:
    """All models of the zoo, by name, family by family."""
    return {model.name: model for model in _read_metafiles()}


def _read_metafiles() -> Iterator[ZooModel]:
    import yaml  # needed by mmengine too

    loader = getattr(yaml, 'CSafeLoader', yaml.SafeLoader)  # the one in C is ten times as fast
    root = config_root().parent
    for metafile in yaml.load((root / 'model-index.yml').read_text(), loader)['Import']:
        for entry in yaml.load((root / metafile).read_text(), loader)['Models']:
            results = entry.get('Results', [])
            box_ap = next((result['Metrics']['box AP'] for result in results), None)
            yield ZooModel(entry['Name'], box_ap, entry.get('Weights'))


def list_models(pattern: str = '*') -> list[str]:
    """Names of the zoo's models, for :func:`get_model`.

    Args:
        pattern: As of files, such as ``'swin*'``; the ``dino_`` that all begin with may be left out.
    """
    return [
        name
        for name in zoo_models()
        if any(fnmatch.fnmatchcase(form, pattern.lower()) for form in (name, name.removeprefix(PREFIX)))
    ]


def get_config(name: str | Path) -> Config:
    """A shipped config, or that of a file.

    Args:
        name: As :func:`dino_mm.cfg` takes it, or the path of a file.

    Raises:
        UnknownConfigError: Neither.
        SettingError: A setting is wrong, or the file is no config.
    """
    from mmengine.config import Config

    path = find_config(name)
    with reading(path):
        return Config.fromfile(path)


def get_model(
    name: str | Path,
    checkpoint: str | Path | None = None,
    num_classes: int | None = None,
    classes: Sequence[str] | None = None,
    device: str | torch.device | None = None,
) -> DINO:
    """A detector that is ready for inference, as mmdet's ``init_detector`` makes it.

    It has ``cfg`` and ``dataset_meta``, so that ``inference_detector`` and visualisers take it. As with
    ``init_detector``, the config's default scope becomes that of the process.

    Args:
        name: A model of :func:`list_models`, another shipped config, or the path of a config file.
        checkpoint: Path or address of any DINO's checkpoint; ``'zoo'`` is the one that the zoo names. Files are opened
            safely: tensors and plain values, no code. A training's folder stands for its best checkpoint. None leaves
            the weights as the constructor draws them.
        num_classes: Number of classes; by default the checkpoint's, without one the config's.
        classes: Their names, which state their number too. Classes that the checkpoint has by the same name keep its
            weights, the others start anew. By default the checkpoint's names, or the config's.
        device: Where it runs; by default on a GPU if there is one.

    Raises:
        UnknownConfigError: There is no such config; names the closest ones.
        CheckpointError: The checkpoint cannot be opened or does not fit; the message says the way out.
        ValueError: ``classes`` and ``num_classes`` contradict one another.
    """
    from mmengine.device import get_device
    from mmengine.registry import init_default_scope

    from .checkpoints.contents import take_apart
    from .checkpoints.files import open_checkpoint
    from .registry import MODELS

    config = get_config(name)
    if classes is not None and num_classes not in (None, len(classes)):
        raise ValueError(f'`num_classes` is {num_classes}, but `classes` names {len(classes)}.')
    contents = None
    if checkpoint is not None:
        contents = take_apart(open_checkpoint(weights_of(name) if checkpoint == ZOO else str(checkpoint)))
    names = tuple(classes) if classes is not None else _class_names(config, contents, num_classes)
    init_default_scope(config.get('default_scope', 'mmdet'))
    config.model.bbox_head.num_classes = len(names)
    model = MODELS.build(config.model)
    if contents is not None:
        _load(model, contents, classes)
    model.cfg, model.dataset_meta = config, _dataset_meta(config, names)
    return model.to(device or get_device()).eval()


def weights_of(name: str | Path) -> str:
    """Address of the checkpoint that the zoo names for a model.

    Raises:
        UnknownConfigError: There is no such model.
        CheckpointError: The zoo has no weights of it.
    """
    from .checkpoints.errors import CheckpointError

    stem = Path(find_config(name)).stem
    model = zoo_models().get(stem)
    if model is None or model.weights is None:
        with_weights = ', '.join(other.name for other in zoo_models().values() if other.weights)
        raise CheckpointError(f'The zoo has no weights of {stem}; it has those of {with_weights}.')
    return model.weights


def _class_names(config: Config, contents: Contents | None, wanted: int | None) -> tuple[str, ...]:
    """Names of a model's classes: the checkpoint's, else those of the config's data set or COCO's, else numbers.

    Raises:
        CheckpointError: The checkpoint has another number of classes than is ``wanted``.
    """
    from .checkpoints.classes import COCO_CLASSES, classes_of_rows
    from .checkpoints.errors import CheckpointError

    number = config.model.bbox_head.num_classes if wanted is None else wanted
    if contents is not None:
        number = _num_rows(config, contents)
        if wanted not in (None, number):
            raise CheckpointError(
                f'The checkpoint has {number} classes, `num_classes` is {wanted}. To keep the classes that both have, '
                "by name, and start the others anew, give their names in place of the number: `classes=('...', ...)`."
            )
        with suppress(CheckpointError):  # nobody names its rows
            return classes_of_rows(number, contents.classes)
    stated = _stated_meta(config).get('classes', COCO_CLASSES)
    return tuple(stated) if len(stated) == number else tuple(f'class {i}' for i in range(number))


def _num_rows(config: Config, contents: Contents) -> int:
    """The number of classes of a checkpoint for the model of ``config``."""
    import torch

    from .checkpoints.classes import num_classes
    from .checkpoints.conversion import convert_detector
    from .registry import MODELS

    with torch.device('meta'):
        model = MODELS.build(config.model)
    return num_classes(convert_detector(contents.tensors, model).conversion.tensors)


def _stated_meta(config: Config) -> dict[str, Any]:
    """What the config says of its data set."""
    dataset = config.get('test_dataloader', {}).get('dataset', {})
    return dict(dataset.get('metainfo') or {})


def _dataset_meta(config: Config, classes: tuple[str, ...]) -> dict[str, Any]:
    """What visualisers read: the names, and colours."""
    from mmdet.datasets import CocoDataset

    for meta in (_stated_meta(config), dict(CocoDataset.METAINFO)):
        if tuple(meta.get('classes', ())) == classes and 'palette' in meta:
            return meta
    return dict(classes=classes, palette='random')


def _load(model: DINO, contents: Contents, classes: Sequence[str] | None) -> None:
    """Load a checkpoint into a model of its classes, or of those that are named."""
    from mmengine.logging import print_log

    from .checkpoints.classes import classes_of_rows, num_classes, plan_transfer
    from .checkpoints.conversion import compare, convert_detector
    from .checkpoints.loading import check_detector, report

    converted, own = convert_detector(contents.tensors, model), model.state_dict()
    tensors = converted.conversion.tensors
    if classes is not None:
        source = classes_of_rows(num_classes(tensors), contents.classes)
        if source != tuple(classes):
            transfer = plan_transfer(classes, source)
            transfer.apply(tensors, own)
            converted.differences = compare(converted.conversion, own)
            print_log(f'Classes of the model and of the checkpoint:\n{transfer.table()}', logger='current')
    check_detector(converted, model, contents.tensors)
    report(converted)
    model.load_state_dict({**own, **tensors})
