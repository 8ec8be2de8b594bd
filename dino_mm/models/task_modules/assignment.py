"""Assignments of least cost where columns are many more than rows, as queries are more than objects."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment

#: Of more costs the assignments are solved by threads; of fewer, these take more time to start than they save.
MAX_COSTS_OF_ONE_THREAD = 1_500_000
#: Sizes of which shortlists save time: fewer rows are assigned sooner than that, more compete too much, and the fewer
#: columns there are, the more.
MIN_ROWS, MAX_ROWS, MIN_COLUMNS = 24, 100, 800
#: Columns of equal number modulo GROUPS are a group. A row puts on the shortlist what costs it no more than the best
#: columns of so many groups, more where more rows compete: with fewer it proves too short too often, more take longer.
GROUPS, MIN_RANK, ROWS_PER_RANK = 16, 3, 25


class NotFiniteError(ValueError):
    """Costs are not finite.

    Args:
        problem: Index of the matrix.
    """

    def __init__(self, problem: int) -> None:
        super().__init__(f'The costs of matrix {problem} are not finite.')
        self.problem = problem


def assign(costs: NDArray, counts: Sequence[int]) -> NDArray[np.int64]:
    """Assign the rows of each matrix to columns, all of them together at the least cost.

    SciPy looks at every column again and again, though few are good for any row. So it is given a shortlist of columns
    first, and all only where the shortlist's assignment does not prove to be the best of all.

    Args:
        costs: (num_problems, num_rows, num_cols).
        counts: Rows of each matrix that count; the others are padding.

    Returns:
        (num_problems, num_rows), the column of each row. ``num_cols`` stands for "none": in padding, and for rows
        that find no column where there are more rows.

    Raises:
        NotFiniteError: Costs are not finite.

    Source: Volgenant, Linear and semi-assignment problems: a core oriented approach, 1996.
    """
    num_problems, num_rows, num_cols = costs.shape
    everything = np.ones((num_problems, num_cols), bool)
    suitable = MIN_ROWS <= num_rows <= MAX_ROWS and num_cols >= MIN_COLUMNS
    if not suitable or costs.size > MAX_COSTS_OF_ONE_THREAD:
        return _solve(costs, counts, everything)
    mask = np.arange(num_rows) < np.array(counts)[:, None]
    shortlists = _shortlists(costs, mask)
    columns = _solve(costs, counts, shortlists)
    (unproven,) = np.nonzero(~_proven(costs, columns, shortlists, mask))
    if len(unproven):
        columns[unproven] = _solve(costs[unproven], [counts[i] for i in unproven], everything)
    return columns


def _solve(costs: NDArray, counts: Sequence[int], allowed: NDArray[np.bool_]) -> NDArray[np.int64]:
    """See :func:`assign`; rows get no other columns than those ``allowed``, (num_problems, num_cols)."""
    num_cols = costs.shape[2]
    columns = np.full(costs.shape[:2], num_cols)

    def solve(problem: int) -> None:
        candidates = np.flatnonzero(allowed[problem])
        matrix = costs[problem, : counts[problem]]
        try:
            rows, chosen = linear_sum_assignment(matrix[:, candidates] if len(candidates) < num_cols else matrix)
        except ValueError:
            raise NotFiniteError(problem) from None
        columns[problem, rows] = candidates[chosen]

    if costs.size <= MAX_COSTS_OF_ONE_THREAD:
        for problem in range(len(costs)):
            solve(problem)
    else:
        with ThreadPoolExecutor(torch.get_num_threads()) as pool:
            list(pool.map(solve, range(len(costs))))  # a list, for the errors
    return columns


# From here on torch does what takes long: it uses all threads.


def _shortlists(costs: NDArray, mask: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """(num_problems, num_cols): True for columns that are good for some row, or whose costs are not finite."""
    # Groups in two halves first, for reductions are fast over rows as long as a CPU's vectors.
    width = 2 * GROUPS
    best = torch.from_numpy(costs[..., : costs.shape[2] // width * width]).unflatten(2, (-1, width)).amin(2)
    rank = MIN_RANK + mask.shape[1] // ROWS_PER_RANK
    limits = np.partition(best.unflatten(2, (2, GROUPS)).amin(2).numpy(), rank - 1)[..., rank - 1]
    limits[~mask] = -np.inf
    excess = (torch.from_numpy(costs) - torch.from_numpy(limits)[..., None]).amin(1)
    return ~(excess.numpy() > 0)


def _proven(
    costs: NDArray, columns: NDArray[np.int64], shortlists: NDArray[np.bool_], mask: NDArray[np.bool_]
) -> NDArray[np.bool_]:
    """Whether assignments that are the best of their shortlists are the best of all columns, (num_problems,).

    They are if columns can have prices such that no row would rather have, at these prices, another column. Of the
    columns that are assigned these are the lowest prices at which no row would rather have that of another row; all
    others are free. What remains to be seen is that no row would rather have a column off the shortlist.
    """
    num_rows, num_cols = costs.shape[1:]
    index = torch.from_numpy(columns.clip(max=num_cols - 1))[:, None].expand(-1, num_rows, -1)
    # Costs of each row at the column of each row, in float64 as SciPy takes them.
    pairs = torch.from_numpy(costs).gather(2, index).double()
    own = pairs.diagonal(dim1=1, dim2=2).clone()
    gains = pairs.neg_().add_(own[..., None]).masked_fill_(torch.from_numpy(~mask)[..., None], -torch.inf)
    prices, bids = torch.zeros_like(own), torch.empty_like(gains)
    for _ in range(num_rows):  # the longest chain of rows of which each drives up the price of the next one's column
        risen = torch.add(gains, prices[..., None], out=bids).amax(1)
        if (risen <= prices).numpy()[mask].all():
            break
        prices = risen
    barred = torch.from_numpy(np.where(shortlists, costs.dtype.type(np.inf), costs.dtype.type(0)))
    off_shortlist = (torch.from_numpy(costs) + barred[:, None]).amin(2)
    content = (own + prices < off_shortlist).numpy() & (columns < num_cols)
    return (content | ~mask).all(1)
