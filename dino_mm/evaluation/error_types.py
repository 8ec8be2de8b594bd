"""Why detections are wrong and objects missed, and what each kind of error costs.

Source: Bolya et al., TIDE: A General Toolbox for Identifying Object Detection Errors, ECCV 2020. Counts and costs are
those of its authors' package, except that detections in crowd regions and classes without objects count nowhere, as in
COCO's AP.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from .matching import MATCH_IOU, ImageMatches

#: A false detection that overlaps every object by this IoU at most shows background.
BACKGROUND_IOU = 0.1


class Kind(IntEnum):
    """What a detection is; ``MISSED`` is what an object is."""

    IGNORED = -1
    CORRECT = 0
    WRONG_CLASS = 1
    BADLY_PLACED = 2
    BOTH = 3
    DUPLICATE = 4
    BACKGROUND = 5
    MISSED = 6


#: Every error with its name and its definition.
ERRORS = {
    Kind.WRONG_CLASS: ('wrong class', f'IoU of at least {MATCH_IOU:g} with an object of another class'),
    Kind.BADLY_PLACED: (
        'badly placed',
        f'right class, but an IoU between {BACKGROUND_IOU:g} and {MATCH_IOU:g} with the object',
    ),
    Kind.BOTH: (
        'wrong class and badly placed',
        f'an IoU between {BACKGROUND_IOU:g} and {MATCH_IOU:g} with an object of another class',
    ),
    Kind.DUPLICATE: ('duplicate', 'an object that a better scored detection has found already'),
    Kind.BACKGROUND: ('background', f'an IoU of at most {BACKGROUND_IOU:g} with every object'),
    Kind.MISSED: ('missed', 'an object that no detection found, not even in the wrong class or badly placed'),
}


@dataclass(frozen=True, eq=False)
class Errors:
    """All detections and objects of a data set, those in and of crowds apart, with what is wrong.

    Attributes:
        kinds: (num_dets,) values of :class:`Kind`.
        labels: (num_dets,).
        scores: (num_dets,).
        targets: (num_dets,) the object that a detection of the wrong class or badly placed would have found; else -1.
        truth_labels: (num_gts,) labels of the objects.
        found: (num_gts,) bool.
        missed: (num_gts,) bool, not found and no ``targets`` of any detection.
    """

    kinds: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    targets: np.ndarray
    truth_labels: np.ndarray
    found: np.ndarray
    missed: np.ndarray

    def count(self, kind: Kind) -> int:
        """How often an error was made."""
        return int(self.missed.sum() if kind == Kind.MISSED else (self.kinds == kind).sum())

    def ap50(self, without: Kind | None = None) -> float:
        """AP at IoU 0.5, from 0 to 1, as it would be without one kind of error; NaN without objects.

        Objects once missed are not counted. A detection of the wrong class or badly placed becomes correct, if its
        object was not found and no better detection would find it. All others of the kind are removed.
        """
        kept, correct, labels = self.kinds != Kind.IGNORED, self.kinds == Kind.CORRECT, self.labels
        counted = np.ones(len(self.truth_labels), bool)
        if without == Kind.MISSED:
            counted = ~self.missed
        elif without is not None:
            mended = (self.kinds == without) & self._best_of_targets()
            kept = kept & ((self.kinds != without) | mended)
            correct = correct | mended
            labels = labels.copy()
            labels[mended] = self.truth_labels[self.targets[mended]]
        values = []
        for label in np.unique(self.truth_labels):
            own = kept & (labels == label)
            total = int((counted & (self.truth_labels == label)).sum())
            if total or own.any():
                values.append(average_precision(self.scores[own], correct[own], total))
        return float(np.mean(values)) if values else float('nan')

    def costs(self) -> dict[Kind, float]:
        """By how much AP at IoU 0.5 would rise without each kind of error alone (dAP), not below 0."""
        now = self.ap50()
        return {kind: max(self.ap50(kind) - now, 0.0) for kind in ERRORS}

    def _best_of_targets(self) -> np.ndarray:
        """(num_dets,) bool, whether a detection is the best of those that would have found an object not found."""
        result = np.zeros(len(self.kinds), bool)
        candidates = np.flatnonzero(self.targets >= 0)
        candidates = candidates[~self.found[self.targets[candidates]]]
        order = candidates[np.argsort(-self.scores[candidates], kind='stable')]
        result[order[np.unique(self.targets[order], return_index=True)[1]]] = True
        return result


def average_precision(scores: np.ndarray, correct: np.ndarray, num_gts: int) -> float:
    """COCO's AP of one class: mean over 101 recalls of the best precision at that recall or a higher one.

    Args:
        scores: (n,).
        correct: (n,) bool.
        num_gts: Objects of the class; without any the AP is 0.
    """
    if not num_gts or not len(scores):
        return 0.0
    hits = correct[np.argsort(-scores, kind='mergesort')].cumsum()
    precision = np.maximum.accumulate((hits / np.arange(1, len(hits) + 1))[::-1])[::-1]
    index = np.searchsorted(hits / num_gts, np.linspace(0, 1, 101), side='left')
    return float(np.append(precision, 0.0)[index].mean())


def find_errors(images: Sequence[ImageMatches]) -> Errors:
    """Tell each wrong detection's kind of error, and the objects missed; see :data:`ERRORS`."""
    parts, start = [], 0
    for image in images:
        real = np.flatnonzero(~image.crowd)
        kinds, targets = _classify(image, real)
        found = image.found()[real]
        missed = ~found
        missed[targets[targets >= 0]] = False
        targets = np.where(targets >= 0, targets + start, -1)
        parts.append((kinds, image.labels, image.scores, targets, image.truth_labels[real], found, missed))
        start += len(real)
    return Errors(*(np.concatenate(part) for part in zip(*parts, strict=True)))


def classify(image: ImageMatches) -> np.ndarray:
    """(num_dets,) values of :class:`Kind` for an image's detections."""
    return _classify(image, np.flatnonzero(~image.crowd))[0]


def _classify(image: ImageMatches, real: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Kinds (num_dets,), and targets (num_dets,) among the objects ``real``, which are no crowds."""
    kinds = np.where(image.matched >= 0, Kind.CORRECT, Kind.BACKGROUND)
    kinds[image.ignored] = Kind.IGNORED
    targets = np.full(len(kinds), -1)
    false = np.flatnonzero(kinds == Kind.BACKGROUND)
    if not len(false) or not len(real):
        return kinds, targets
    ious = image.ious[np.ix_(false, real)]
    same = image.labels[false][:, None] == image.truth_labels[real]
    own, other, taken = ious * same, ious * ~same, ious * same * image.found()[real]
    conditions = {
        Kind.BADLY_PLACED: (own.max(1) >= BACKGROUND_IOU) & (own.max(1) < MATCH_IOU),
        Kind.WRONG_CLASS: other.max(1) >= MATCH_IOU,
        Kind.DUPLICATE: taken.max(1) >= MATCH_IOU,
        Kind.BACKGROUND: ious.max(1) <= BACKGROUND_IOU,
    }
    kinds[false] = np.select(list(conditions.values()), list(conditions), Kind.BOTH)
    for kind, overlap in ((Kind.BADLY_PLACED, own), (Kind.WRONG_CLASS, other)):
        chosen = kinds[false] == kind
        targets[false[chosen]] = overlap.argmax(1)[chosen]
    return kinds, targets
