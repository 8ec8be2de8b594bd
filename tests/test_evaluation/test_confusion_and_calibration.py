"""Confusion matrix by hand and against supervision; calibration of scores whose worth is known."""

import math
from pathlib import Path

import numpy as np
import pytest
from report_cases import CLASSES, Case, noisy_case, write_case

from dino_mm.evaluation.calibration import MIN_SCORE, best_threshold, calibrate
from dino_mm.evaluation.confusion import confusion_matrix
from dino_mm.evaluation.matching import ImageMatches, evaluate, match_images
from dino_mm.evaluation.predictions import read_predictions


def matches(case: Case, lowest: float = 0.0) -> list[ImageMatches]:
    file = case.file()
    evaluator = evaluate(file, CLASSES, read_predictions(case.predictions, file, CLASSES))
    return [image.above(lowest) for image in match_images(evaluator, file)]


def test_truth_table(tmp_path: Path) -> None:
    a, b, c, d, free = (0, 0, 40, 40), (60, 0, 40, 40), (120, 0, 40, 40), (0, 60, 40, 40), (60, 60, 40, 40)
    truth = [(0, 'cat', a), (0, 'cat', b), (0, 'dog', c), (0, 'owl', d), (1, 'owl', a)]
    rows = [
        (0, 'dog', a, 0.95),  # of another class and better than the next, which is nevertheless joined first
        (0, 'cat', (2, 0, 40, 40), 0.9),
        (0, 'owl', b, 0.8),
        (0, 'dog', c, 0.7),
        (0, 'dog', (121, 0, 40, 40), 0.6),  # a duplicate
        (0, 'cat', free, 0.5),
        (0, 'owl', d, 0.2),  # below the lowest score
        (1, 'dog', (1, 0, 40, 40), 0.9),
    ]
    expected = [
        # cat, dog, owl, not found
        [1, 0, 1, 0],
        [0, 1, 0, 0],
        [0, 1, 0, 1],
        [1, 2, 0, 0],
    ]
    case = write_case(tmp_path, truth, rows, num_images=2)
    assert confusion_matrix(matches(case, 0.3), 3).tolist() == expected


def test_what_lies_in_a_crowd_is_not_counted(tmp_path: Path) -> None:
    crowd = [(0, 'dog', (60, 60, 100, 90))]
    rows = [(0, 'dog', (70, 70, 20, 20), 0.8), (0, 'cat', (110, 70, 20, 20), 0.7)]
    case = write_case(tmp_path, [(0, 'owl', (0, 0, 20, 20))], rows, crowd)
    expected = np.zeros((4, 4), int)
    expected[2, 3] = expected[3, 0] = 1
    assert (confusion_matrix(matches(case), 3) == expected).all()


@pytest.mark.parametrize('lowest', [0.0, 0.3, 0.7, 1.1])
def test_matrix_is_that_of_supervision(lowest: float, tmp_path: Path) -> None:
    supervision = pytest.importorskip('supervision')
    images = matches(noisy_case(tmp_path), lowest)
    tensors: tuple[list, list] = ([], [])
    for image in images:
        for part, boxes, columns in zip(
            tensors,
            (image.boxes, image.truth_boxes),
            ((image.labels, image.scores), (image.truth_labels,)),
            strict=True,
        ):
            corners = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)
            part.append(np.column_stack([corners, *columns]).astype(np.float32))
    expected = supervision.ConfusionMatrix.from_tensors(*tensors, list(CLASSES), conf_threshold=lowest)
    assert (confusion_matrix(images, 3) == expected.matrix).all()


def test_scores_that_tell_the_truth_have_no_error() -> None:
    scores = np.repeat([0.25, 0.75], [400, 400])
    correct = np.concatenate([np.arange(400) < 100, np.arange(400) < 300])
    result = calibrate(scores, correct)
    assert result.ece == pytest.approx(0)
    assert result.bias == pytest.approx(0)
    assert result.counts.tolist() == [0, 0, 400, 0, 0, 0, 0, 400, 0, 0]
    assert result.precisions[[2, 7]].tolist() == [0.25, 0.75]
    assert np.isnan(result.precisions[0])


def test_error_by_hand() -> None:
    # 30 at 0.9, a third correct: 17 too many. 10 at 0.3, all correct: 7 too few. 60 below the lowest score count not.
    scores = np.repeat([0.9, 0.3, 0.05], [30, 10, 60])
    correct = np.concatenate([np.arange(30) < 10, np.ones(10, bool), np.zeros(60, bool)])
    result = calibrate(scores, correct)
    assert result.ece == pytest.approx((17 + 7) / 40)
    assert result.bias == pytest.approx((17 - 7) / 40)
    assert result.counts.tolist() == [60, 0, 0, 10, 0, 0, 0, 0, 0, 30]


@pytest.mark.parametrize('power', [1, 2])
def test_random_scores_of_known_worth(power: int) -> None:
    """A detection of score s is correct with probability s^power; the mean of s - s^power from 0.1 to 1 is expected."""
    rng = np.random.default_rng(0)
    scores = rng.uniform(0, 1, 200_000)
    result = calibrate(scores, rng.uniform(0, 1, len(scores)) < scores**power)
    expected = ((1 - 0.1**2) / 2 - (1 - 0.1 ** (power + 1)) / (power + 1)) / 0.9
    assert result.ece == pytest.approx(expected, abs=0.005)
    assert result.bias == pytest.approx(expected, abs=0.005)


def test_edges_of_bins() -> None:
    result = calibrate(np.array([0.0, MIN_SCORE, 1.0]), np.array([False, False, True]))
    assert result.counts.tolist() == [1, 1, 0, 0, 0, 0, 0, 0, 0, 1]
    assert result.ece == pytest.approx(0.05)
    empty = calibrate(np.array([0.01]), np.array([True]))
    assert math.isnan(empty.ece)
    assert empty.counts.sum() == 1


def test_best_threshold_by_hand() -> None:
    # F1 after each score: 2/5, 4/6, 4/7 ...; the two of 0.5 are taken together.
    scores = np.array([0.9, 0.8, 0.5, 0.5, 0.1])
    correct = np.array([True, True, False, True, False])
    best = best_threshold(scores, correct, 4)
    assert best == (0.5, 0.75, 0.75, 0.75)
    assert best_threshold(scores[::-1], correct[::-1], 4) == best
