"""Assignments against SciPy's, however wrong the guesses are."""

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

from dino_mm.models.task_modules import assignment
from dino_mm.models.task_modules.assignment import NotFiniteError, assign

#: Rows of each image and columns: with shortlists, with guesses from the layer before, with neither.
SIZES = [([24, 24], 800), ([40, 17, 0, 1], 850), ([75, 3], 900), ([76, 100], 300), ([120, 3, 0], 130), ([30, 20], 90)]


def plain_assign(costs: NDArray, counts: list[int]) -> list[list[list[int]]]:
    columns = np.full(costs.shape[:3], costs.shape[3])
    for index in np.ndindex(*costs.shape[:2]):
        rows, chosen = linear_sum_assignment(costs[index][: counts[index[1]]])
        columns[index][rows] = chosen
    return columns.tolist()


def distances(num_layers: int, bs: int, num_rows: int, num_cols: int, spread: float, change: float = 0.03) -> NDArray:
    """Costs of points among points.

    The smaller the spread of the rows, the more they want the same columns; the greater the change from layer to layer,
    the less the columns of one tell about those of the next.
    """
    rows, cols = torch.rand(bs, num_rows, 3) * spread, torch.rand(bs, num_cols, 3)
    costs = torch.cdist(rows, cols) - torch.rand(bs, 1, num_cols)
    return (costs + change * torch.randn(num_layers, bs, num_rows, num_cols).cumsum(0)).numpy()


class Calls:
    """Notes the shapes of the matrices that SciPy gets."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.shapes: list[tuple[int, int]] = []

        def spy(matrix):
            self.shapes.append(matrix.shape)
            return linear_sum_assignment(matrix)

        monkeypatch.setattr(assignment, 'linear_sum_assignment', spy)


@pytest.mark.parametrize('spread', [1.0, 0.1, 0.0])
@pytest.mark.parametrize('change', [0.0, 0.03, 3.0])
@pytest.mark.parametrize(('counts', 'num_cols'), SIZES)
@pytest.mark.parametrize('dtype', [np.float32, np.float64])
def test_guesses_change_nothing(spread, change, counts, num_cols, dtype):
    costs = distances(3, len(counts), max(counts), num_cols, spread, change)
    costs += 1e-3 * torch.rand(costs.shape, dtype=torch.float64).numpy()  # no two assignments cost the same
    costs = costs.astype(dtype)
    assert assign(costs, counts).tolist() == plain_assign(costs, counts)


@pytest.mark.parametrize('wrong', [dict(MIN_RANK=1), dict(CHEAPEST=0), dict(PRICE_ROUNDS=0), dict(DISCOUNT=-20.0)])
@pytest.mark.parametrize('spread', [1.0, 0.1])
@pytest.mark.parametrize(('counts', 'num_cols'), SIZES)
def test_wrong_guesses_change_nothing(wrong, spread, counts, num_cols, monkeypatch):
    for name, value in wrong.items():
        monkeypatch.setattr(assignment, name, value)
    costs = distances(4, len(counts), max(counts), num_cols, spread)
    assert assign(costs, counts).tolist() == plain_assign(costs, counts)


@pytest.mark.parametrize('num_rows', [30, 80])
def test_equal_costs_are_assigned_at_the_least_sum(num_rows):
    """Which of several best assignments it is remains open."""
    costs = torch.randint(0, 4, (5, 2, num_rows, 900)).float().numpy()
    columns, best = assign(costs, [num_rows] * 2), np.array(plain_assign(costs, [num_rows] * 2))
    for index in np.ndindex(5, 2):
        assert len(set(columns[index])) == num_rows
        rows = np.arange(num_rows)
        assert costs[index][rows, columns[index]].sum() == costs[index][rows, best[index]].sum()


def test_most_columns_are_not_looked_at(monkeypatch):
    calls = Calls(monkeypatch)
    assign(distances(5, 2, 60, 900, spread=1.0, change=0.0), [60, 3])
    assert len(calls.shapes) == 10  # each matrix once, so that all are proven
    assert max(columns for rows, columns in calls.shapes if rows == 60) < 0.4 * 900
    assert max(columns for rows, columns in calls.shapes if rows == 3) < 0.1 * 900


def test_a_layer_tells_which_columns_the_next_one_needs(monkeypatch):
    calls = Calls(monkeypatch)
    assign(distances(6, 1, 150, 900, spread=0.5, change=0.002), [150])
    (first, *others) = calls.shapes
    assert first == (150, 900)
    assert len(others) <= 6  # five, but for one more trial
    assert all(rows == 150 and columns < 0.5 * 900 for rows, columns in others)


@pytest.mark.parametrize(('num_rows', 'num_dense'), [(100, 4), (150, 5)], ids=['proven guess', 'failed guess'])
def test_layers_that_tell_nothing_are_not_asked_again(num_rows, num_dense, monkeypatch):
    calls = Calls(monkeypatch)
    assign(np.concatenate([distances(1, 1, num_rows, 900, spread=0.1) for _ in range(6)]), [num_rows])
    assert len(calls.shapes) == 1 + assignment.MAX_TRIALS + num_dense
    assert calls.shapes[-num_dense:] == [(num_rows, 900)] * num_dense


def test_rows_that_want_the_same_columns_get_all(monkeypatch):
    """One matrix of two: its shortlist is shorter than its rows are many, and its last column the best."""
    calls = Calls(monkeypatch)
    same = distances(1, 1, 1, 800, spread=1.0).repeat(30, 2)
    same[..., -1] = same.min() - 1
    costs = np.concatenate([distances(1, 1, 30, 800, spread=1.0), same], 1)
    columns = assign(costs, [30, 30])
    assert calls.shapes[-1] == (30, 800)
    assert sorted(columns[0, 1]) == sorted(costs[0, 1, 0].argsort()[:30])


def test_a_shortlist_of_fewer_columns_than_rows(monkeypatch):
    """Two rows want one column; for the one that yields, the next best is on no shortlist of the best only."""
    monkeypatch.setattr(assignment, 'MIN_RANK', 1)
    calls = Calls(monkeypatch)
    costs = np.full((1, 1, 24, 800), 9.0)
    costs[0, 0, range(24), range(24)] = 0.0
    costs[0, 0, 1] = 100.0
    costs[0, 0, 1, [0, 100]] = 0.0, 2.0  # like row 0, row 1 wants column 0
    expected = [0, 100, *range(2, 24)]
    assert assign(costs, [24]).tolist() == [[expected]] == plain_assign(costs, [24])
    assert calls.shapes == [(24, 23), (24, 800)]


def own_columns(num_layers: int) -> NDArray:
    """Costs of 150 rows, each of which has a column of its own that costs nearly nothing."""
    costs = np.full((num_layers, 1, 150, 900), 9.0)
    costs[:, 0, range(150), range(150)] = 0.0
    return costs + torch.rand(costs.shape, dtype=torch.float64).numpy() / 1000


def test_columns_that_a_guess_lacks_are_added(monkeypatch):
    """Ten rows come to want the same ten columns, of which a guess takes the best three only."""
    costs = own_columns(2)
    costs[1, 0, :10, 300:310] = np.linspace(-2, -1, 10)
    calls = Calls(monkeypatch)
    assert assign(costs, [150]).tolist() == plain_assign(costs, [150])
    first, (_, few), (_, enough) = calls.shapes
    assert first == (150, 900)
    assert few < enough < 900


def test_prices_that_are_too_high_are_taken_back(monkeypatch):
    """Of two rows that want the same column neither does any more."""
    costs = own_columns(2)
    costs[:, 0, 1, :2] = 0.0, 5.0
    costs[1, 0, :2, 0] = 3.0
    costs[1, 0, :2, 200:202] = [[1.0, 1.1], [1.3, 1.2]]
    calls = Calls(monkeypatch)
    columns = assign(costs, [150]).tolist()
    assert [layer[0][:2] for layer in columns] == [[0, 1], [200, 201]]
    assert columns == plain_assign(costs, [150])
    first, once, again = calls.shapes
    assert once == again < first == (150, 900)


def test_where_one_price_is_too_high_others_are_lowered_as_well(monkeypatch):
    """A row that no longer pays for its column leaves it to the next row, which leaves its own to the next, ..."""
    costs = own_columns(2)
    first, rivals = np.arange(4), np.arange(10, 14)
    costs[:, 0, first, first] = -3.0
    costs[0, 0, rivals, first] = -1.0  # so these columns have a price of 1
    costs[1, 0, 0, [0, 500]] = 9.0, -3.0
    costs[1, 0, first[1:], first[:-1]] = -2.7
    calls = Calls(monkeypatch)
    assert assign(costs, [150]).tolist() == plain_assign(costs, [150])
    dense, *guessed = calls.shapes
    assert len(guessed) == 3
    assert max(guessed) < dense == (150, 900)


@pytest.mark.parametrize('num_rows', [3, 30, 80])
@pytest.mark.parametrize('threads', [False, True])
@pytest.mark.parametrize('wrong', [np.nan, -np.inf])
def test_costs_that_are_not_finite(num_rows, threads, wrong, monkeypatch):
    monkeypatch.setattr(assignment, 'MAX_COSTS_OF_ONE_THREAD', 0 if threads else 10**6)
    costs = distances(3, 2, num_rows, 900, spread=1.0)
    costs[2, 1, 2, 899] = wrong
    with pytest.raises(NotFiniteError, match='layer 2 and image 1') as error:
        assign(costs, [num_rows] * 2)
    assert (error.value.layer, error.value.image) == (2, 1)
    assert assign(costs, [num_rows, 2])[:, 1].tolist() == [x[1] for x in plain_assign(costs, [num_rows, 2])]  # padding


@pytest.mark.parametrize('counts', [[40, 3, 0, 39], [90, 3, 0, 80]])
@pytest.mark.parametrize('num_threads', [2, 9])
def test_threads_change_nothing(counts, num_threads, monkeypatch):
    costs = distances(4, 4, max(counts), 900, spread=0.5)
    expected = assign(costs, counts)
    monkeypatch.setattr(assignment, 'MAX_COSTS_OF_ONE_THREAD', 0)
    monkeypatch.setattr(torch, 'get_num_threads', lambda: num_threads)
    assert np.array_equal(assign(costs, counts), expected)


@pytest.mark.parametrize('num_rows', [30, 90])
def test_more_rows_than_columns(num_rows):
    costs, counts = distances(2, 2, num_rows, 7, spread=1.0), [num_rows, 5]
    columns = assign(costs, counts)
    assert columns.tolist() == plain_assign(costs, counts)
    assert sorted(columns[1, 0]) == [0, 1, 2, 3, 4, 5, 6, *[7] * (num_rows - 7)]
