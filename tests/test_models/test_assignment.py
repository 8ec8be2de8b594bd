"""Assignments against SciPy's, however short the shortlists are."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from dino_mm.models.task_modules import assignment
from dino_mm.models.task_modules.assignment import NotFiniteError, assign


def plain_assign(costs: NDArray, counts: list[int]) -> list[list[int]]:
    columns = [[costs.shape[2]] * costs.shape[1] for _ in costs]
    for chosen, matrix, count in zip(columns, costs, counts, strict=True):
        for row, column in zip(*linear_sum_assignment(matrix[:count]), strict=True):
            chosen[row] = column
    return columns


def distances(num_problems: int, num_rows: int, num_cols: int, spread: float) -> NDArray:
    """Costs of points among points: the smaller the spread of the rows, the more they want the same columns."""
    rows, cols = torch.rand(num_problems, num_rows, 3) * spread, torch.rand(num_problems, num_cols, 3)
    return (torch.cdist(rows, cols) - torch.rand(num_problems, 1, num_cols)).numpy()


class Calls:
    """Counts the problems that are solved, and how many columns they may use."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.columns: list[list[int]] = []
        solve = assignment._solve

        def spy(costs, counts, allowed):
            self.columns.append(allowed[: len(costs)].sum(1).tolist())
            return solve(costs, counts, allowed)

        monkeypatch.setattr(assignment, '_solve', spy)


@pytest.mark.parametrize('spread', [1.0, 0.3, 0.03, 0.0])
@pytest.mark.parametrize(('counts', 'num_cols'), [([24, 24], 800), ([40, 17, 0, 1], 850), ([100, 99, 3], 900)])
@pytest.mark.parametrize('min_rank', [1, 2, assignment.MIN_RANK])
@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_shortlists_change_nothing(spread, counts, num_cols, min_rank, dtype, monkeypatch):
    monkeypatch.setattr(assignment, 'MIN_RANK', min_rank)
    costs = distances(len(counts), max(counts), num_cols, spread).astype(dtype)
    assert assign(costs, counts).tolist() == plain_assign(costs, counts)


def test_equal_costs_are_assigned_at_the_least_sum():
    """Which of several best assignments it is remains open."""
    costs = torch.randint(0, 4, (20, 30, 900)).float().numpy()
    columns = assign(costs, [30] * 20)
    for matrix, chosen, best in zip(costs, columns, plain_assign(costs, [30] * 20), strict=True):
        assert len(set(chosen)) == 30
        assert matrix[range(30), chosen].sum() == matrix[range(30), best].sum()


def test_most_columns_are_not_looked_at(monkeypatch):
    calls = Calls(monkeypatch)
    assign(distances(10, 60, 900, spread=1.0), [60] * 9 + [3])
    ((*columns, few),) = calls.columns  # solved once, so that all are proven
    assert max(columns) < 0.4 * 900
    assert few < 0.1 * 900


def test_rows_that_want_the_same_columns_get_all(monkeypatch):
    """One matrix of two: its shortlist is shorter than its rows are many, and its last column the best."""
    calls = Calls(monkeypatch)
    costs = np.concatenate([distances(1, 30, 800, spread=1.0), distances(1, 1, 800, spread=1.0).repeat(30, 1)])
    costs[1, :, -1] = costs.min() - 1
    columns = assign(costs, [30, 30])
    (first, second), again = calls.columns
    assert second < 30 < first
    assert again == [800]
    assert sorted(columns[1]) == sorted(costs[1, 0].argsort()[:30])


def test_a_complete_assignment_of_the_shortlist_need_not_be_the_best(monkeypatch):
    """Two rows want one column; for the one that yields, the next best is on no shortlist of the best only."""
    monkeypatch.setattr(assignment, 'MIN_RANK', 1)
    costs = np.full((1, 24, 800), 9.0)
    costs[0, range(24), range(24)] = 0.0
    costs[0, 1] = 100.0
    costs[0, 1, [0, 100]] = 0.0, 2.0  # like row 0, row 1 wants column 0
    calls = Calls(monkeypatch)
    expected = [0, 100, *range(2, 24)]
    assert assign(costs, [24]).tolist() == [expected] == plain_assign(costs, [24])
    assert [len(columns) for columns in calls.columns] == [1, 1]
    assert calls.columns[1] == [800]


@pytest.mark.parametrize('num_rows', [3, 30])
@pytest.mark.parametrize('threads', [False, True])
@pytest.mark.parametrize('wrong', [np.nan, -np.inf])
def test_costs_that_are_not_finite(num_rows, threads, wrong, monkeypatch):
    monkeypatch.setattr(assignment, 'MAX_COSTS_OF_ONE_THREAD', 0 if threads else 10**6)
    costs = distances(3, num_rows, 900, spread=1.0)
    costs[1, 2, 899] = wrong
    with pytest.raises(NotFiniteError, match='matrix 1') as error:
        assign(costs, [num_rows] * 3)
    assert error.value.problem == 1
    assert assign(costs, [num_rows, 2, num_rows])[1].tolist() == plain_assign(costs[1:2], [2])[0]  # padding may be


def test_threads_change_nothing(monkeypatch):
    costs, counts = distances(5, 40, 900, spread=0.5), [40, 3, 0, 39, 40]
    expected = assign(costs, counts)
    monkeypatch.setattr(assignment, 'MAX_COSTS_OF_ONE_THREAD', 0)
    assert np.array_equal(assign(costs, counts), expected)


def test_more_rows_than_columns():
    costs, counts = distances(2, 30, 7, spread=1.0), [30, 5]
    columns = assign(costs, counts)
    assert columns.tolist() == plain_assign(costs, counts)
    assert sorted(columns[0]) == [0, 1, 2, 3, 4, 5, 6, *[7] * 23]
