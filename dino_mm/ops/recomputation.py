"""What is computed again for the gradients rather than kept."""

from torch import Tensor


def is_cheaper_to_compute_again(x: Tensor) -> bool:
    """Whether the hidden layer of a feed-forward network is to be computed again from ``x``.

    A product is done soon and memory is scarce, except on a CPU, where it is the other way round.
    """
    return not x.is_cpu
