"""Which class is taken for which."""

from collections.abc import Sequence

import numpy as np

from .matching import MATCH_IOU, ImageMatches


def confusion_matrix(images: Sequence[ImageMatches], num_classes: int) -> np.ndarray:
    """Count pairs of true and detected class.

    Pairs with an IoU of at least 0.5 are joined, those of one class first, then the others, by falling IoU; each object
    and each detection once. Detections that match nothing but a crowd of their class are not counted.

    Args:
        images: Matches of the detections that count; see :meth:`ImageMatches.above`.
        num_classes: Number of classes.

    Returns:
        (num_classes + 1, num_classes + 1) int, rows true, columns detected. The last row is background that was
        detected, the last column objects that were not.
    """
    matrix = np.zeros((num_classes + 1, num_classes + 1), int)
    for image in images:
        real = np.flatnonzero(~image.crowd)
        truth = image.truth_labels[real]
        pairs = _join(image.ious[:, real] * ~image.ignored[:, None], image.labels[:, None] == truth)
        for detection, target in pairs:
            matrix[truth[target], image.labels[detection]] += 1
        joined = np.array(pairs, int).reshape(-1, 2)
        left_over = ~image.ignored
        left_over[joined[:, 0]] = False
        matrix[-1, :-1] += np.bincount(image.labels[left_over], minlength=num_classes)
        matrix[:-1, -1] += np.bincount(np.delete(truth, joined[:, 1]), minlength=num_classes)
    return matrix


def _join(ious: np.ndarray, same: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of (detection, object) of two tables (num_dets, num_gts)."""
    detections, targets = np.nonzero(ious >= MATCH_IOU)
    order = np.lexsort((-ious[detections, targets], ~same[detections, targets]))
    pairs: dict[int, int] = {}
    used: set[int] = set()
    for detection, target in zip(detections[order].tolist(), targets[order].tolist(), strict=True):
        if detection not in pairs and target not in used:
            pairs[detection] = target
            used.add(target)
    return list(pairs.items())
