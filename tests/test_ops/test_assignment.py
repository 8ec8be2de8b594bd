"""Assignments against every possible one, with padding, with more rows than columns, with costs that are no numbers."""

from itertools import permutations

import numpy as np
import pytest
from numpy.typing import NDArray

from dino_mm.ops.assignment import NotFiniteError, assign


def make_costs(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def least_cost(cost: NDArray) -> list[int]:
    """The column of each row, of all ways to give rows columns of their own; the number of columns for none."""
    rows, columns = cost.shape
    slots = range(max(rows, columns))
    padded = np.zeros((len(slots), len(slots)))
    padded[:rows, :columns] = cost
    best = min(permutations(slots), key=lambda chosen: padded[slots, chosen].sum())
    return [min(column, columns) for column in best[:rows]]


@pytest.mark.parametrize(('counts', 'num_cols'), [([3, 1, 0], 6), ([5, 2, 4], 3), ([4, 4, 4], 4)])
def test_rows_get_the_columns_that_cost_least(counts: list[int], num_cols: int) -> None:
    costs = make_costs(2, 3, max(counts), num_cols)
    columns = assign(costs, counts)
    for layer, image in np.ndindex(2, 3):
        expected = least_cost(costs[layer, image, : counts[image]])
        padding = [num_cols] * (max(counts) - counts[image])
        assert columns[layer, image].tolist() == expected + padding


def test_rows_want_the_same_columns() -> None:
    """The best ones, which all rows like best, are all given away."""
    costs = np.repeat(make_costs(1, 1, 1, 900), 30, 2)
    columns = assign(costs, [30])
    assert sorted(columns[0, 0]) == sorted(costs[0, 0, 0].argsort()[:30])


@pytest.mark.parametrize('wrong', [np.nan, -np.inf, np.inf])
def test_costs_that_are_not_finite_are_named(wrong: float) -> None:
    costs = make_costs(3, 2, 5, 40)
    costs[2, 1, 3, 39] = wrong
    with pytest.raises(NotFiniteError, match='layer 2 and image 1') as error:
        assign(costs, [5, 5])
    assert (error.value.layer, error.value.image) == (2, 1)
    costs[2, 1, 3, 39] = 0.0
    expected = assign(costs, [5, 3])
    costs[2, 1, 3, 39] = wrong
    assert assign(costs, [5, 3]).tolist() == expected.tolist()  # in padding it does not count
