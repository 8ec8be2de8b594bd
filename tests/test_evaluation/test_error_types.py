"""Kinds of errors by their definitions, and what they cost."""

import math
from pathlib import Path

import numpy as np
import pytest
from report_cases import Case, noisy_case, write_case

from dino_mm.evaluation.error_types import ERRORS, Errors, Kind, average_precision, find_errors
from dino_mm.evaluation.matching import evaluate, match_images
from dino_mm.evaluation.predictions import read_predictions

OBJECT = (50, 40, 40, 40)
#: Moved by d to the right, a square of 40 has an IoU of (40 - d) / (40 + d).
NEAR, BESIDE, APART = (54, 40, 40, 40), (70, 40, 40, 40), (86, 40, 40, 40)  # IoU 0.82, 0.33, 0.05


def errors_of(case: Case, lowest: float = 0.0) -> Errors:
    file = case.file()
    classes = [category['name'] for category in file.categories]
    evaluator = evaluate(file, classes, read_predictions(case.predictions, file, classes))
    return find_errors([image.above(lowest) for image in match_images(evaluator, file)])


def counts(errors: Errors) -> dict[Kind, int]:
    return {kind: errors.count(kind) for kind in Kind if errors.count(kind)}


# Detections of the image with the one object, a cat, and the counts of each kind.
BUILT = {
    'correct': ([('cat', NEAR)], {Kind.CORRECT: 1}),
    'wrong class': ([('dog', NEAR)], {Kind.WRONG_CLASS: 1}),
    'badly placed': ([('cat', BESIDE)], {Kind.BADLY_PLACED: 1}),
    'both': ([('dog', BESIDE)], {Kind.BOTH: 1, Kind.MISSED: 1}),
    'duplicate': ([('cat', OBJECT), ('cat', NEAR)], {Kind.CORRECT: 1, Kind.DUPLICATE: 1}),
    'background': ([('cat', APART)], {Kind.BACKGROUND: 1, Kind.MISSED: 1}),
    'missed': ([], {Kind.MISSED: 1}),
    'badly placed beside a found object': ([('cat', NEAR), ('cat', BESIDE)], {Kind.CORRECT: 1, Kind.BADLY_PLACED: 1}),
    'two classes': ([('cat', NEAR), ('dog', NEAR)], {Kind.CORRECT: 1, Kind.WRONG_CLASS: 1}),
    'two of the wrong class': ([('dog', NEAR), ('owl', NEAR)], {Kind.WRONG_CLASS: 2}),
}


@pytest.mark.parametrize('name', list(BUILT))
def test_each_kind_is_counted(name: str, tmp_path: Path) -> None:
    detections, expected = BUILT[name]
    rows = [(0, *item, 0.9 - 0.1 * i) for i, item in enumerate(detections)]
    # A second image keeps the file from being empty, and has an object that is found.
    case = write_case(
        tmp_path, [(0, 'cat', OBJECT), (1, 'owl', OBJECT)], [*rows, (1, 'owl', OBJECT, 0.99)], num_images=2
    )
    assert counts(errors_of(case)) == {**expected, Kind.CORRECT: expected.get(Kind.CORRECT, 0) + 1}


def test_an_iou_of_a_half_is_a_match_and_of_a_tenth_is_not_background(tmp_path: Path) -> None:
    truth = [(0, 'cat', (0, 0, 40, 40)), (1, 'cat', (0, 0, 40, 40))]
    case = write_case(tmp_path, truth, [(0, 'cat', (0, 0, 40, 20), 0.9), (1, 'cat', (0, 0, 40, 4), 0.8)], num_images=2)
    assert counts(errors_of(case)) == {Kind.CORRECT: 1, Kind.BADLY_PLACED: 1}


def test_crowds_are_neither_missed_nor_matched(tmp_path: Path) -> None:
    truth, crowd = [(0, 'cat', (0, 0, 20, 20))], [(0, 'dog', (60, 60, 100, 90))]
    inside, other_class = (70, 70, 20, 20), (110, 70, 20, 20)
    rows = [(0, 'cat', (0, 0, 20, 20), 0.9), (0, 'dog', inside, 0.8), (0, 'cat', other_class, 0.7)]
    errors = errors_of(write_case(tmp_path, truth, rows, crowd))
    assert counts(errors) == {Kind.CORRECT: 1, Kind.IGNORED: 1, Kind.BACKGROUND: 1}
    assert errors.truth_labels.size == 1


def test_below_a_threshold_objects_are_missed(tmp_path: Path) -> None:
    case = write_case(tmp_path, [(0, 'cat', OBJECT)], [(0, 'cat', NEAR, 0.3), (0, 'cat', APART, 0.6)])
    assert counts(errors_of(case)) == {Kind.CORRECT: 1, Kind.BACKGROUND: 1}
    assert counts(errors_of(case, 0.5)) == {Kind.BACKGROUND: 1, Kind.MISSED: 1}
    assert counts(errors_of(case, 0.9)) == {Kind.MISSED: 1}


# Of the noisy case: what the package of TIDE's authors, tidecv 1.0.1, counts and by how many points AP50 rises.
TIDE_AP50 = 21.189598588666914
TIDE = {
    Kind.WRONG_CLASS: (14, 5.146479543384665),
    Kind.BADLY_PLACED: (54, 27.576626117098943),
    Kind.BOTH: (16, 1.4583096983238306),
    Kind.DUPLICATE: (16, 0.5746505946100626),
    Kind.BACKGROUND: (27, 1.972581908426271),
    Kind.MISSED: (20, 6.300678759091522),
}


def test_counts_and_costs_are_those_of_tide(tmp_path: Path) -> None:
    errors = errors_of(noisy_case(tmp_path))
    assert list(TIDE) == list(ERRORS)
    assert errors.ap50() == pytest.approx(TIDE_AP50 / 100, abs=1e-12)
    assert {kind: errors.count(kind) for kind in TIDE} == {kind: count for kind, (count, _) in TIDE.items()}
    assert errors.costs() == pytest.approx({kind: cost / 100 for kind, (_, cost) in TIDE.items()}, abs=1e-12)


@pytest.mark.parametrize('crowds', [False, True])
def test_ap50_is_that_of_pycocotools(crowds: bool, tmp_path: Path) -> None:
    file = noisy_case(tmp_path, crowds).file()
    classes = [category['name'] for category in file.categories]
    evaluator = evaluate(file, classes, read_predictions(tmp_path / 'predictions.bbox.json', file, classes))
    assert find_errors(match_images(evaluator, file)).ap50() == pytest.approx(evaluator.stats[1], abs=1e-12)


def test_one_object_becomes_correct_once(tmp_path: Path) -> None:
    """Two detections of the wrong class on one object: without the error, the better one is correct, the other gone."""
    case = write_case(tmp_path, [(0, 'cat', OBJECT)], [(0, 'dog', NEAR, 0.9), (0, 'owl', NEAR, 0.8)])
    errors = errors_of(case)
    assert errors.ap50() == 0.0
    assert errors.ap50(Kind.WRONG_CLASS) == 1.0
    assert errors.costs()[Kind.WRONG_CLASS] == 1.0


def test_average_precision_by_hand() -> None:
    # Precision 1 up to recall 0.5, of 51 recalls, then 2/3 up to recall 1.
    scores, correct = np.array([0.9, 0.8, 0.7]), np.array([True, False, True])
    assert average_precision(scores, correct, 2) == pytest.approx((51 + 50 * 2 / 3) / 101)
    assert average_precision(scores[:1], correct[:1], 2) == pytest.approx(51 / 101)
    assert average_precision(scores, correct, 0) == average_precision(scores[:0], correct[:0], 2) == 0.0
    nothing = Errors(*(np.zeros(0, kind) for kind in (int, int, float, int, int, bool, bool)))
    assert math.isnan(nothing.ap50())
