"""Whether a score says how often a detection is correct, and which score is the best threshold."""

from typing import NamedTuple

import numpy as np

NUM_BINS = 10
#: DINO gives hundreds of detections an image with scores near 0. They would outnumber all that anybody looks at.
MIN_SCORE = 0.1


class Calibration(NamedTuple):
    """Scores compared with the share of correct detections, in bins of equal width."""

    counts: np.ndarray
    """(num_bins,) detections."""
    scores: np.ndarray
    """(num_bins,) mean score, NaN in an empty bin."""
    precisions: np.ndarray
    """(num_bins,) share of correct detections, NaN in an empty bin."""
    ece: float
    """Expected calibration error: mean distance of the two over the detections with a score of at least
    ``MIN_SCORE``; NaN if there are none."""
    bias: float
    """Mean score less share of correct ones, of the same detections: above 0, scores are too high."""


class Threshold(NamedTuple):
    """The score at which F1, over all classes, is highest."""

    score: float
    precision: float
    recall: float
    f1: float


def calibrate(scores: np.ndarray, correct: np.ndarray, num_bins: int = NUM_BINS) -> Calibration:
    """Compare scores (n,) in [0, 1] with ``correct`` (n,) bool.

    Source: Guo et al., On Calibration of Modern Neural Networks, ICML 2017, with precision in the place of accuracy.
    """
    bins = np.minimum((scores * num_bins).astype(int), num_bins - 1)
    counts = np.bincount(bins, minlength=num_bins)
    with np.errstate(invalid='ignore'):
        means = np.bincount(bins, scores, num_bins) / counts
        precisions = np.bincount(bins, correct, num_bins) / counts
    shown = scores >= MIN_SCORE
    if not shown.any():
        return Calibration(counts, means, precisions, float('nan'), float('nan'))
    inside = np.bincount(bins[shown], scores[shown] - correct[shown], num_bins)
    total = shown.sum()
    return Calibration(counts, means, precisions, float(np.abs(inside).sum() / total), float(inside.sum() / total))


def best_threshold(scores: np.ndarray, correct: np.ndarray, num_gts: int) -> Threshold:
    """Find the score threshold of the highest F1.

    Args:
        scores: (n,), n > 0.
        correct: (n,) bool.
        num_gts: Number of objects.
    """
    order = np.argsort(-scores, kind='stable')
    ordered, hits = scores[order], correct[order].cumsum()
    last = np.append(ordered[1:] != ordered[:-1], True)  # a threshold takes all detections of equal score
    hits, numbers, ordered = hits[last], np.flatnonzero(last) + 1, ordered[last]
    f1 = 2 * hits / (numbers + num_gts)
    best = int(f1.argmax())
    return Threshold(
        float(ordered[best]), float(hits[best] / numbers[best]), float(hits[best] / num_gts), float(f1[best])
    )
