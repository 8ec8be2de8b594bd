"""Detections of one picture as plain arrays."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Detections(NamedTuple):
    """Of one picture, the best first: ``boxes`` (n, 4) xyxy in pixels, ``scores`` (n,), ``labels`` (n,)."""

    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
