"""Assignments of least cost where columns are many more than rows, as queries are more than objects.

SciPy looks at every column again and again, though few are good for any row; and the more rows want the same columns,
the longer it takes to find out which of them yields. So the columns to look at are guessed, and where rows are many
also what their competition makes the columns cost. A guess need not be right, for the result is checked.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

#: Of more costs the assignments are solved by threads; of fewer, these take more time to start than they save.
MAX_COSTS_OF_ONE_THREAD = 1_500_000
#: Sizes of which shortlists save time: fewer rows are assigned sooner than that, more compete too much, and the fewer
#: columns there are, the more.
MIN_ROWS, MAX_ROWS, MIN_COLUMNS = 24, 75, 800
#: Columns of equal number modulo GROUPS are a group. A row puts on the shortlist what costs it no more than the best
#: columns of so many groups, more where more rows compete: with fewer it proves too short too often, more take longer.
GROUPS, MIN_RANK, ROWS_PER_RANK = 16, 3, 25
#: Of the columns that the layer before does without, so many that cost a row least may be needed in this one.
CHEAPEST = 3
#: Prices rise in so many rounds at most, by which most have come most of the way. Then they are lowered by a part of
#: their mean: those that are too high for the next layer cost a trial.
PRICE_ROUNDS, DISCOUNT = 6, 0.4
#: A guess is tried so many times, each time with what was missing.
MAX_TRIALS = 3
#: Part of a layer's columns that has to be those of the layer before, or the layers after it are not guessed.
ALIKE = 0.8


class NotFiniteError(ValueError):
    """Costs are not finite.

    Args:
        layer, image: Index of the matrix.
    """

    def __init__(self, layer: int, image: int) -> None:
        super().__init__(f'The costs of layer {layer} and image {image} are not finite.')
        self.layer = layer
        self.image = image


class Guess(NamedTuple):
    """What is thought of the columns of a matrix before it is solved."""

    candidates: NDArray[np.bool_]
    """(num_cols,), True for those that rows may be assigned to."""
    prices: NDArray[np.float64]
    """(num_cols,), what the rows that want a column make it cost besides."""


def assign(costs: NDArray, counts: Sequence[int]) -> NDArray[np.int64]:
    """Assign the rows of each matrix to columns, all of them together at the least cost.

    Args:
        costs: (num_layers, bs, num_rows, num_cols).
        counts: Rows that count of each image; the others are padding.

    Returns:
        (num_layers, bs, num_rows), the column of each row. ``num_cols`` stands for "none": in padding, and for rows
        that find no column where there are more rows.

    Raises:
        NotFiniteError: Costs are not finite.
    """
    num_layers, bs, num_rows, num_cols = costs.shape
    columns = np.full(costs.shape[:3], num_cols)
    shortlists = None
    if MIN_ROWS <= num_rows <= MAX_ROWS and num_cols >= MIN_COLUMNS:
        shortlists = _shortlists(costs, np.arange(num_rows) < np.array(counts)[:, None])

    def solve(image: int, layers: Sequence[int]) -> None:
        before = None  # costs and columns of the layer before, as long as they tell something about the next
        for layer in layers:
            cost = costs[layer, image, : counts[image]]
            guess = None
            if shortlists is not None:
                guess = Guess(shortlists[layer, image], np.zeros(num_cols))
            elif before is not None:
                guess = _guess(cost, *before)
            try:
                proven = None if guess is None else _try(cost, guess)
                chosen = _solve(cost) if proven is None else proven
            except ValueError:
                raise NotFiniteError(layer, image) from None
            columns[layer, image, : len(cost)] = chosen
            first = layer == layers[0] and MAX_ROWS < len(cost) <= num_cols
            alike = before is not None and proven is not None and _share(chosen, before[1], num_cols) >= ALIKE
            before = (cost, chosen) if first or alike else None

    threads = torch.get_num_threads() if costs.size > MAX_COSTS_OF_ONE_THREAD else 1
    # With more threads than images, the layers of an image are several series.
    parts = np.array_split(range(num_layers), max(threads // bs, 1))
    images, layers = zip(*((image, part.tolist()) for part in parts for image in range(bs)), strict=True)
    if threads == 1:
        list(map(solve, images, layers))
    else:
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(solve, images, layers))  # a list, for the errors
    return columns


def _share(columns: NDArray[np.int64], others: NDArray[np.int64], num_cols: int) -> float:
    """Part of the columns that are among the others; ``np.isin`` takes seven times as long."""
    known = np.zeros(num_cols, bool)
    known[others] = True
    return known[columns].mean()


def _solve(cost: NDArray) -> NDArray[np.int64]:
    """The column of each row, among all columns; ``num_cols`` for none."""
    columns = np.full(len(cost), cost.shape[1])
    rows, chosen = linear_sum_assignment(cost)
    columns[rows] = chosen
    return columns


def _try(cost: NDArray, guess: Guess) -> NDArray[np.int64] | None:
    """The column of each row, or None if the guess is of no use.

    - Columns left out change nothing if they cost no row less than some candidate that stays free. For there are
      prices at which each row likes its own column best (the dual solution), and free columns have none.
    - Prices change nothing if every column that has one is assigned: this assignment then pays all prices, and no other
      pays more.

    Args:
        cost: (num_rows, num_cols), no more rows than columns.
        guess: What to begin with; tells nothing afterwards.

    Source: Volgenant, Linear and semi-assignment problems: a core oriented approach, 1996.
    """
    candidates, prices = guess
    for _ in range(MAX_TRIALS):
        (few,) = np.nonzero(candidates)
        part = cost[:, few]
        _, chosen = linear_sum_assignment(part + prices[few])
        free = np.ones(len(few), bool)
        free[chosen] = False
        missing = (cost < part[:, free].min(1, initial=np.inf)[:, None]).any(0) & ~candidates
        too_high = few[free & (prices[few] > 0)]
        if not missing.any() and not too_high.size:
            return few[chosen]
        candidates |= missing
        if too_high.size:  # others are likely to be too high as well
            prices /= 2
            prices[too_high] = 0
    return None


def _shortlists(costs: NDArray, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(num_layers, bs, num_cols): True for columns that are good for some row, or whose costs are not finite.

    torch does what takes long: it uses all threads.
    """
    # Groups in two halves first, for reductions are fast over rows as long as a CPU's vectors.
    width = 2 * GROUPS
    best = torch.from_numpy(costs[..., : costs.shape[-1] // width * width]).unflatten(-1, (-1, width)).amin(-2)
    rank = MIN_RANK + mask.shape[1] // ROWS_PER_RANK
    limits = np.partition(best.unflatten(-1, (2, GROUPS)).amin(-2).numpy(), rank - 1)[..., rank - 1]
    limits[:, ~mask] = -np.inf
    excess = (torch.from_numpy(costs) - torch.from_numpy(limits)[..., None]).amin(-2)
    return ~(excess.numpy() > 0)


def _guess(cost: NDArray, before: NDArray, assigned: NDArray[np.int64]) -> Guess:
    """What to expect of costs, (num_rows, num_cols), if those of the layer ``before`` have ``assigned`` columns."""
    guess = Guess(np.zeros(cost.shape[1], bool), np.zeros(cost.shape[1]))
    guess.candidates[assigned], guess.prices[assigned] = True, _prices(before[:, assigned])
    others = cost.copy()
    others[:, assigned] = np.inf
    for _ in range(CHEAPEST):
        cheapest = others.argmin(1)  # a cost that is not a number comes first, and SciPy objects to it
        guess.candidates[cheapest], others[np.arange(len(cost)), cheapest] = True, np.inf
    return guess


def _prices(cost: NDArray) -> NDArray:
    """Prices of columns, (num_rows,): almost the lowest at which no row would rather have the column of another.

    Args:
        cost: (num_rows, num_rows), of each row at the columns of all; its own is on the diagonal.
    """
    gains = cost.diagonal()[:, None] - cost
    prices = np.zeros(len(cost), cost.dtype)
    for _ in range(PRICE_ROUNDS):
        risen = (gains + prices[:, None]).max(0)
        if (risen == prices).all():
            break
        prices = risen
    return (prices - DISCOUNT * prices.mean()).clip(min=0)
