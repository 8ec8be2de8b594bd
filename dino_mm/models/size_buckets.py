"""Batches of few sizes."""

from collections.abc import Sequence

from mmdet.models.data_preprocessors import BatchFixedSizePad
from mmdet.structures import SampleList
from torch import Tensor

from dino_mm.registry import MODELS


@MODELS.register_module()
class PadToBuckets(BatchFixedSizePad):
    """Pads each batch of a training to the smallest of a few sizes, one of ``data_preprocessor.batch_augments``.

    For programs that are compiled for each size anew. Tests, which have no batch augments, round sizes up by
    ``data_preprocessor.pad_size_divisor``.

    Args:
        sizes: (height, width) of batches.
    """

    def __init__(self, sizes: Sequence[tuple[int, int]]) -> None:
        super().__init__(size=(0, 0))
        self.sizes = sorted(map(tuple, sizes), key=lambda size: size[0] * size[1])

    def forward(self, inputs: Tensor, data_samples: SampleList | None = None) -> tuple[Tensor, SampleList | None]:
        """Pad images (bs, 3, height, width) at the bottom and right, and tell the samples.

        Raises:
            ValueError: The batch is larger than all sizes.
        """
        height, width = inputs.shape[-2:]
        fitting = [size for size in self.sizes if height <= size[0] and width <= size[1]]
        if not fitting:
            raise ValueError(
                f'No size of `PadToBuckets` holds a batch of {height} x {width} pixels (height x width): add one to '
                f'`sizes`, which are {", ".join("{} x {}".format(*size) for size in self.sizes)}.'
            )
        self.size = fitting[0]
        return super().forward(inputs, data_samples)
