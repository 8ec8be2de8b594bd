"""A file of predictions in COCO's result format, read and verified."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dino_mm.datasets.coco_file import CocoFile, shorten
from dino_mm.datasets.coco_rules import NUMBER, AnnotationError, Entry, Id, IdIndex, is_box

#: How a test writes the one format that a report reads.
HOW = '`dino-mm test CONFIG CHECKPOINT --report DIR` makes both the predictions and the report'


class ReportError(AnnotationError):
    """A report cannot be made of what was given; the message is one line with the way out."""


def read_predictions(path: Path, file: CocoFile, classes: Sequence[str]) -> list[Entry]:
    """Read predictions in COCO's result format: a list of image_id, category_id, bbox and score.

    Args:
        path: The ``.bbox.json`` that an evaluator writes if its ``outfile_prefix`` is set.
        file: The annotations that the predictions belong to.
        classes: Names of the classes.

    Returns:
        ``image_id`` and ``category_id`` as the file of annotations has them, ``bbox`` (left, top, width, height;
        pixels), ``score`` in [0, 1].

    Raises:
        ReportError: There are no predictions, or they are not of this data set, or not in this format.
    """
    rows = _load(path)
    images = IdIndex(image['id'] for image in file.images)
    categories = IdIndex(file.category_ids(classes))
    faults: dict[str, list[object]] = {}
    result = []
    for number, row in enumerate(rows):
        fault = _fault(row)
        if fault is not None:
            faults.setdefault(fault, []).append(number)
            continue
        image, category = images.find(row['image_id']), categories.find(row['category_id'])
        if image is None:
            faults.setdefault('image', []).append(row['image_id'])
        elif category is None:
            faults.setdefault('category', []).append(row['category_id'])
        else:
            result.append(_prediction(row, image, category))
    for fault, cases in faults.items():
        raise ReportError(_describe(path, file, fault, cases))
    return result


def _prediction(row: Entry, image: Id, category: Id) -> Entry:
    return dict(image_id=image, category_id=category, bbox=row['bbox'], score=row['score'])


def _load(path: Path) -> list[Any]:
    if path.suffix in ('.pkl', '.pickle'):
        raise ReportError(
            f"{path} is a pickle: it has no names of classes and may run code. A report reads COCO's result format; "
            f'{HOW}.'
        )
    try:
        rows = json.loads(path.read_bytes())
    except OSError as error:
        raise ReportError(f'{path} cannot be read ({error.strerror}): {HOW}.') from None
    except (ValueError, RecursionError) as error:
        raise ReportError(f'{path} is no JSON file ({error}): write it again; {HOW}.') from None
    if not isinstance(rows, list):
        raise ReportError(f"{path} holds a {type(rows).__name__}, not a list of predictions in COCO's result format.")
    if not rows:
        raise ReportError(
            f'{path} holds no predictions, so there is nothing to report: look whether the test had any images, and '
            'whether `test_cfg.max_per_img` is above 0.'
        )
    return rows


def _fault(row: Any) -> str | None:
    """What is wrong with an entry by itself."""
    if not isinstance(row, dict) or not {'image_id', 'category_id', 'score'} <= row.keys():
        return 'entry'
    if not is_box(row.get('bbox')):
        return 'box'
    score = row['score']
    return None if type(score) in NUMBER and math.isfinite(score) and 0 <= score <= 1 else 'score'


def _describe(path: Path, file: CocoFile, fault: str, cases: list[object]) -> str:
    distinct = shorten(list(dict.fromkeys(cases)))
    count = f'{path}: {len(cases)} predictions'
    names = shorten([repr(category['name']) for category in file.categories])
    return {
        'entry': f'{count} are no objects with image_id, category_id, bbox and score (entries {distinct}).',
        'box': f'{count} have no `bbox` of four finite numbers (entries {distinct}): write left, top, width, height.',
        'score': f'{count} have a `score` that is no number from 0 to 1 (entries {distinct}).',
        'image': f'{count} name images that {file.path} does not have (image_id {distinct}): give the annotation file '
        'of the test.',
        'category': f'{count} name categories that are none of the classes (category_id {distinct}): {file.path} has '
        f'{names}; give the annotation file and the classes of the test.',
    }[fault]
