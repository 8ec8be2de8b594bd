"""Assignments of least cost, which the host solves."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import linear_sum_assignment


class NotFiniteError(ValueError):
    """Costs are not finite.

    Args:
        layer, image: Index of the matrix.
    """

    def __init__(self, layer: int, image: int) -> None:
        super().__init__(f'The costs of layer {layer} and image {image} are not finite.')
        self.layer = layer
        self.image = image


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
    columns = np.full(costs.shape[:3], costs.shape[3])
    for layer, image in np.ndindex(*costs.shape[:2]):
        matrix = costs[layer, image, : counts[image]]
        if not np.isfinite(matrix).all():  # SciPy takes a positive infinity
            raise NotFiniteError(layer, image)
        rows, chosen = linear_sum_assignment(matrix)
        columns[layer, image, rows] = chosen
    return columns
