"""What went wrong in a test: everything that a report shows, as numbers."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from dino_mm.datasets.coco_file import CocoFile, shorten
from dino_mm.datasets.coco_pictures import is_local, missing_pictures, read_sizes

from .calibration import Calibration, Threshold, best_threshold, calibrate
from .confusion import confusion_matrix
from .error_types import Errors, Kind, find_errors
from .matching import ImageMatches, evaluate, match_images
from .predictions import ReportError, read_predictions

#: The figures of ``COCOeval.stats`` that the report shows, by their place there.
SUMMARY = {
    'AP': (0, 'mean over IoU 0.50 to 0.95'),
    'AP50': (1, 'at IoU 0.50'),
    'AP75': (2, 'at IoU 0.75'),
    'AP small': (3, 'objects under 32 x 32 pixels'),
    'AP medium': (4, 'objects from 32 x 32 to 96 x 96 pixels'),
    'AP large': (5, 'objects over 96 x 96 pixels'),
    'AR': (8, 'recall with 100 detections, mean over IoU 0.50 to 0.95'),
}


@dataclass(frozen=True)
class ClassResult:
    """One class: number of objects, and AP from 0 to 1, NaN where there is no object of the size."""

    name: str
    num_gts: int
    ap: float
    ap50: float
    ap_small: float
    ap_medium: float
    ap_large: float


@dataclass(frozen=True, eq=False)
class Analysis:
    """What a test's predictions are worth, and where they are wrong.

    Attributes:
        file: The annotations.
        folder: Where the pictures are.
        classes: Names of the classes.
        summary: Figures from 0 to 1 by the names of ``SUMMARY``; NaN where there is no object of the size.
        per_class: In the order of ``classes``.
        precision: (num_ious, 101, num_classes) precision at recalls 0, 0.01, ... 1; -1 for classes without objects.
        ious: (num_ious,), 0.5 to 0.95.
        errors: Errors of all detections.
        costs: What each kind of these costs in AP50.
        threshold: The score of the highest F1 at IoU 0.5.
        images: Matches at IoU 0.5 of the detections from ``threshold`` on.
        shown_errors: Errors of these.
        confusion: Of these; see :func:`confusion_matrix`.
        calibration: Of all detections.
    """

    file: CocoFile
    folder: Path
    classes: tuple[str, ...]
    summary: dict[str, float]
    per_class: list[ClassResult]
    precision: np.ndarray
    ious: np.ndarray
    errors: Errors
    costs: dict[Kind, float]
    threshold: Threshold
    images: list[ImageMatches]
    shown_errors: Errors
    confusion: np.ndarray
    calibration: Calibration


def analyse(predictions: Path, file: CocoFile, folder: str | Path, classes: Sequence[str] | None = None) -> Analysis:
    """Compare predictions with the annotations.

    Args:
        predictions: File in COCO's result format.
        file: The annotations; sizes of images are corrected in place where their pictures have others.
        folder: Folder of the pictures that ``file_name`` is relative to.
        classes: Names of the classes; the file's own by default.

    Raises:
        ReportError: The predictions do not fit the annotations, there is nothing to compare with, or pictures are
            missing; one line.
        AnnotationError: The file lacks a class.
    """
    classes = tuple(classes or (category['name'] for category in file.categories))
    _require_objects(file, classes)
    rows = read_predictions(predictions, file, classes)
    _require_pictures(file, folder)
    evaluator = evaluate(file, classes, rows)
    every = match_images(evaluator, file)
    errors = find_errors(every)
    counted = errors.kinds != Kind.IGNORED
    scores, correct = errors.scores[counted], errors.kinds[counted] == Kind.CORRECT
    if not len(errors.truth_labels) or not len(scores):
        raise ReportError(f'{file.path} and {predictions}: only crowds are left to compare, so there is no AP.')
    threshold = best_threshold(scores, correct, len(errors.truth_labels))
    images = [image.above(threshold.score) for image in every]
    return Analysis(
        file,
        Path(folder),
        classes,
        {name: _value(evaluator.stats[place]) for name, (place, _) in SUMMARY.items()},
        _per_class(evaluator, classes, errors),
        evaluator.eval['precision'][:, :, :, 0, -1],
        evaluator.params.iouThrs,
        errors,
        errors.costs(),
        threshold,
        images,
        find_errors(images),
        confusion_matrix(images, len(classes)),
        calibrate(scores, correct),
    )


def _require_objects(file: CocoFile, classes: Sequence[str]) -> None:
    wanted = set(file.category_ids(classes))
    if not any(a['category_id'] in wanted and not a['iscrowd'] for a in file.annotations):
        raise ReportError(
            f'{file.path} has no boxes of the classes {shorten(classes)}, so there is nothing to compare predictions '
            'with: give the annotation file with the labels of the test images.'
        )


def _require_pictures(file: CocoFile, folder: str | Path) -> None:
    if not is_local(str(folder), None) or not Path(folder).is_dir():
        raise ReportError(f'There is no folder {folder}: give the folder of the pictures.')
    missing = missing_pictures(file, str(folder))
    if missing:
        names = shorten([image['file_name'] for image in missing])
        raise ReportError(f'{folder} lacks pictures of {file.path} ({names}): give the folder of the pictures.')
    unusable = read_sizes(file, str(folder), file.findings, every=True)
    if unusable:
        raise ReportError(
            f'{folder} has pictures that cannot be read (image ids {shorten(sorted(unusable, key=str))}): '
            'replace them; `dino-mm check` says more.'
        )


def _per_class(evaluator: Any, classes: Sequence[str], errors: Errors) -> list[ClassResult]:
    precision = evaluator.eval['precision'][..., -1]  # (num_ious, 101, num_classes, num_areas)
    result = []
    for label, name in enumerate(classes):
        by_area = [_mean(precision[:, :, label, area]) for area in range(4)]
        num_gts = int((errors.truth_labels == label).sum())
        result.append(ClassResult(name, num_gts, by_area[0], _mean(precision[0, :, label, 0]), *by_area[1:]))
    return result


def _mean(precision: np.ndarray) -> float:
    """Mean of the precisions, which are -1 without objects."""
    return _value(precision.mean())


def _value(number: float) -> float:
    """A figure of pycocotools, whose -1 means that there is none."""
    return float('nan') if number < 0 else float(number)
