"""The images of a test with the most errors, with their true boxes and the detections."""

import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dino_mm.evaluation.error_types import ERRORS, Errors, Kind, find_errors
from dino_mm.evaluation.matching import ImageMatches
from dino_mm.evaluation.report import Analysis

from .contact_sheet import Mark, Rectangle, draw_tile
from .dataset_summary import read_picture

NUM_WORST = 24


@dataclass(frozen=True)
class WorstImage:
    """An image with errors: its file, what is wrong in words, and the picture as JPEG."""

    file_name: str
    caption: str
    jpeg: bytes


def worst_images(analysis: Analysis, count: int = NUM_WORST) -> list[WorstImage]:
    """The ``count`` images with the most errors, worst first, among equals those with the highest scores of errors."""
    found = [(image, find_errors([image])) for image in analysis.images]
    wrong = [(image, errors) for image, errors in found if _badness(errors)[0]]
    wrong.sort(key=lambda pair: _badness(pair[1]), reverse=True)
    return [
        WorstImage(image.image['file_name'], _caption(errors), _draw(analysis, image, errors))
        for image, errors in wrong[:count]
    ]


def _badness(errors: Errors) -> tuple[int, float]:
    false = errors.kinds > Kind.CORRECT
    return int(false.sum() + errors.missed.sum()), float(errors.scores[false].sum())


def _caption(errors: Errors) -> str:
    counts = [(errors.count(kind), name) for kind, (name, _) in ERRORS.items()]
    return ', '.join(f'{name} {count}' for count, name in counts if count)


def _draw(analysis: Analysis, image: ImageMatches, errors: Errors) -> bytes:
    picture = read_picture(Path(analysis.folder, image.image['file_name']))
    stream = io.BytesIO()
    draw_tile(picture, _marks(image, errors, analysis.classes)).save(stream, 'JPEG', quality=85)
    return stream.getvalue()


def _marks(image: ImageMatches, errors: Errors, classes: Sequence[str]) -> list[Mark]:
    """Detections by rising score, then objects, as :func:`draw_tile` wants them."""
    marks = []
    for i in range(len(image.scores) - 1, -1, -1):
        kind = Kind(errors.kinds[i])
        why = f', {ERRORS[kind][0]}' if kind in ERRORS else ''
        text = f'{classes[image.labels[i]]} {image.scores[i]:.2f}{why}'
        marks.append(Mark(_rectangle(image.boxes[i]), text, is_truth=False))
    missed = np.zeros(len(image.crowd), bool)
    missed[~image.crowd] = errors.missed
    for box, label, is_missed, is_crowd in zip(image.truth_boxes, image.truth_labels, missed, image.crowd, strict=True):
        note = ', missed' if is_missed else ', crowd' if is_crowd else ''
        marks.append(Mark(_rectangle(box), f'{classes[label]}{note}', is_truth=True))
    return marks


def _rectangle(box: np.ndarray) -> Rectangle:
    left, top, width, height = box.tolist()
    return Rectangle(left, top, left + width, top + height)
