"""The parts of a data set, and a validation set taken from the training images."""

import random
import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..datasets.coco_rules import Entry
from .errors import ProjectError

#: The split of a file that names none.
ALL = 'all'
#: Share of the images that a validation set takes.
VAL_SHARE = 0.2


@dataclass
class Part:
    """One split.

    Attributes:
        split: 'train', 'val', 'test' or :data:`ALL`.
        ann_file: COCO annotation file.
        pictures: Folder that its ``file_name`` is relative to.
        is_new: Whether the file was written for the project, into its ``annotations/``.
    """

    split: str
    ann_file: Path
    pictures: Path
    is_new: bool = False


def divide(
    images: Sequence[Entry], annotations: Sequence[Entry], seed: int, path: Path
) -> tuple[dict[str, list[Entry]], dict[str, list[Entry]]]:
    """Divide images into a training and a validation set, with the same share of images with boxes in both.

    Versions of one picture, which Roboflow names ``NAME.rf.HASH.jpg``, stay together.

    Args:
        images: COCO's.
        annotations: COCO's.
        seed: Of the random order.
        path: The file, for the error.

    Returns:
        ``images`` and ``annotations`` of training and of validation.

    Raises:
        ProjectError: Fewer than two pictures have boxes.
    """
    with_boxes = {annotation['image_id'] for annotation in annotations}
    groups: dict[str, list[Entry]] = defaultdict(list)
    for image in sorted(images, key=lambda image: image['file_name']):
        groups[re.sub(r'\.rf\.[^./]+(?=\.\w+$)', '', image['file_name'])].append(image)
    val: set[Any] = set()
    for has_boxes in (True, False):
        names = [
            name for name, group in groups.items() if any(image['id'] in with_boxes for image in group) == has_boxes
        ]
        if has_boxes and len(names) < 2:
            raise ProjectError(
                f'{path}: {len(names)} of {len(images)} images have boxes; training and validation need one each.'
            )
        random.Random(seed).shuffle(names)
        count = int(len(names) * VAL_SHARE + 0.5)
        for name in names[: max(1, count) if has_boxes else count]:
            val.update(image['id'] for image in groups[name])
    return tuple(  # type: ignore[return-value]
        dict(
            images=[image for image in images if (image['id'] in val) == wanted],
            annotations=[annotation for annotation in annotations if (annotation['image_id'] in val) == wanted],
        )
        for wanted in (False, True)
    )
