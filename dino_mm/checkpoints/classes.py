"""Classes of a checkpoint and of a model: COCO's two numberings, and transfer to other classes."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from mmdet.datasets import CocoDataset
from torch import Tensor

from .errors import CheckpointError
from .names import Conversion

COCO_CLASSES: tuple[str, ...] = tuple(CocoDataset.METAINFO['classes'])
#: COCO's category id of each of the 80 classes, of which ids 1 to 90 leave ten out.
_UNUSED_IDS = {12, 26, 29, 30, 45, 66, 68, 69, 71, 83}
COCO_CATEGORY_IDS: tuple[int, ...] = tuple(i for i in range(1, 91) if i not in _UNUSED_IDS)
#: Rows of a head that is numbered by category id, 0 to 90.
NUM_CATEGORY_IDS = 91
#: Probability of an object that a new class starts with, Lin et al., Focal Loss, section 4.1.
PRIOR = 0.01

CLASS_BRANCH = 'bbox_head.cls_branches.'
LABEL_EMBEDDING = 'denoising.label_embedding.weight'


def class_tensors(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors with one row for each class."""
    return [name for name in tensors if name.startswith(CLASS_BRANCH) or name == LABEL_EMBEDDING]


def num_classes(tensors: Mapping[str, Tensor]) -> int:
    """Number of classes of a detector's tensors under our names.

    Raises:
        CheckpointError: None of them is a class branch's.
    """
    rows = (len(tensor) for name, tensor in tensors.items() if name.startswith(CLASS_BRANCH) and tensor.ndim)
    number = next(rows, None)
    if number is None:
        raise CheckpointError(f'There is no tensor under `{CLASS_BRANCH}`, which would tell the number of classes.')
    return number


def rows_of_categories(result: Conversion, own: Mapping[str, Tensor]) -> None:
    """Turn rows numbered by category id into COCO's 80 classes, in place, for a model of 80 classes."""
    if not any(name.startswith(CLASS_BRANCH) for name in result.tensors):
        return
    if num_classes(result.tensors) != NUM_CATEGORY_IDS or num_classes(own) != len(COCO_CLASSES):
        return
    rows = torch.tensor(COCO_CATEGORY_IDS)
    for name in class_tensors(result.tensors):
        result.tensors[name] = result.tensors[name][rows]


@dataclass(frozen=True)
class ClassTransfer:
    """Which of a checkpoint's classes a model's classes take over.

    Attributes:
        target: The model's classes.
        rows: For each, the checkpoint's row; None for a new class.
        source: The checkpoint's class of each row, '' where a row is no class.
    """

    target: tuple[str, ...]
    rows: tuple[int | None, ...]
    source: tuple[str, ...]

    def apply(self, tensors: dict[str, Tensor], own: Mapping[str, Tensor]) -> None:
        """Rearrange ``tensors`` in place; new classes have the rows of ``own``, their bias the focal prior."""
        for name in class_tensors(tensors):
            if name not in own:
                continue
            new = own[name].detach().clone()
            if name.endswith('.bias'):
                new.fill_(-math.log((1 - PRIOR) / PRIOR))
            for row, kept in enumerate(self.rows):
                if kept is not None:
                    new[row] = tensors[name][kept]
            tensors[name] = new

    def table(self) -> str:
        """One line for each class of the model, one for those of the checkpoint that no class takes over."""
        width = max(len(name) for name in self.target)
        lines = [
            f'{name:<{width}} <- ' + ('new' if row is None else f'{self.source[row]} (row {row})')
            for name, row in zip(self.target, self.rows, strict=True)
        ]
        unused = [name for row, name in enumerate(self.source) if name and row not in self.rows]
        return '\n'.join([*lines, f'not taken over: {", ".join(unused) or "none"}'])


def plan_transfer(
    target: Sequence[str], source: Sequence[str], renamed: Mapping[str, str] | None = None
) -> ClassTransfer:
    """Match classes by name, upper and lower case alike.

    Args:
        target: The model's classes.
        source: The checkpoint's class of each row; '' where a row is no class.
        renamed: The model's class -> the checkpoint's, where the names differ.

    Raises:
        CheckpointError: ``renamed`` names an unknown class.
    """
    renamed = dict(renamed or {})
    rows = {name.casefold(): row for row, name in reversed(list(enumerate(source))) if name}
    unknown = [f'{name!r} of the model' for name in renamed if name not in target]
    unknown += [f'{name!r} of the checkpoint' for name in renamed.values() if name.casefold() not in rows]
    if unknown:
        raise CheckpointError(
            f'`class_transfer.renamed` names {", ".join(unknown)}, which is no class of it. The model has '
            f'{", ".join(target)}; the checkpoint has {", ".join(filter(None, source))}.'
        )
    kept = tuple(rows.get(renamed.get(name, name).casefold()) for name in target)
    return ClassTransfer(tuple(target), kept, tuple(source))


def classes_of_rows(rows: int, known: Sequence[str] | None) -> tuple[str, ...]:
    """Class of each row of a head: as the checkpoint says, else COCO's by the number of rows.

    Raises:
        CheckpointError: Neither says.
    """
    if known is not None and len(known) == rows:
        return tuple(known)
    if rows == len(COCO_CLASSES):
        return COCO_CLASSES
    if rows == NUM_CATEGORY_IDS:
        by_id = dict(zip(COCO_CATEGORY_IDS, COCO_CLASSES, strict=True))
        return tuple(by_id.get(row, '') for row in range(rows))
    told = 'does not tell their names' if known is None else f'names {len(known)}'
    raise CheckpointError(
        f'The checkpoint has {rows} classes and {told}. State them: '
        "`default_hooks.loading.class_transfer=dict(classes=['...', ...])`."
    )
