"""What an exported file says of itself, so that it can be run without dino_mm and without the config."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from mmengine.config import ConfigDict

from ..models.detectors.dino import DINO
from .errors import ExportError

#: Sides that fixed sizes and least sizes are multiples of; the coarsest map of most models has this stride.
STRIDE = 32
DYNAMIC = ('batch', 'size')


class Description(NamedTuple):
    """What a user of the file must know; :meth:`entries` are its metadata."""

    classes: tuple[str, ...]
    mean: list[float]
    """Of the channels in their order in the network's input, in units of 8 bits."""
    std: list[float]
    channels: str
    """'RGB' or 'BGR'."""
    resize: dict[str, Any] | None
    """``shorter`` edge and limit of the ``longer`` one in pixels, as of ``ResizeShortestEdge``; None: another rule."""
    divisor: int
    """What padding makes sides multiples of."""
    least: int
    """Sides below are padded to this: smaller maps have fewer pixels than the model has queries."""
    height: int | None
    """Of the input; None is any."""
    width: int | None
    batch: int | None
    half: bool

    def entries(self) -> dict[str, str]:
        """Name -> value as JSON."""
        return {name: json.dumps(value) for name, value in self._asdict().items()}


def describe(model: DINO, size: tuple[int, int] | None, dynamic: tuple[str, ...], half: bool) -> Description:
    """Describe an export.

    Args:
        model: As ``get_model`` makes it, with ``cfg`` and ``dataset_meta``.
        size: (height, width) of the input, if it is fixed; None is what the config resizes pictures to at most.
        dynamic: Of ``DYNAMIC``, what changes from call to call.
        half: Whether it computes in half precision.

    Raises:
        ExportError: The config normalises or resizes in a way that has no description.
    """
    preprocessor = model.cfg.model.data_preprocessor
    resize = _resizing(model.cfg)
    if preprocessor.get('mean') is None or len(preprocessor.mean) != 3:
        raise ExportError('`data_preprocessor` of the config must state `mean` and `std` of three channels.')
    divisor, least = preprocessor.get('pad_size_divisor', 1), least_side(model)
    height = width = None
    if 'size' not in dynamic:
        if size is None and resize is None:
            raise ExportError(
                "The config's test pipeline has no `dino_mm.ResizeShortestEdge` that would say a size: give --size "
                'HEIGHTxWIDTH, or --dynamic size.'
            )
        height, width = size or (resize['shorter'], resize['longer'])  # type: ignore[index]
        if min(height, width) < least:
            raise ExportError(
                f'--size {height}x{width}: {model.num_queries} queries need sides of at least {least} pixels.'
            )
    return Description(
        tuple(model.dataset_meta['classes']),
        [float(value) for value in preprocessor.mean],
        [float(value) for value in preprocessor.std],
        'RGB' if preprocessor.get('bgr_to_rgb') else 'BGR',
        resize,
        divisor,
        least,
        height,
        width,
        None if 'batch' in dynamic else 1,
        half,
    )


def least_side(model: DINO) -> int:
    """The least side of a square image whose maps have a pixel for every query."""
    side = 2 * STRIDE
    while _num_tokens(model, side) < model.num_queries:
        side += STRIDE
    return side


def _num_tokens(model: DINO, side: int) -> int:
    """Fewer than the pixels of all maps of a square image; the finest map has stride 8, or 4 with five maps."""
    finest = 4 if model.num_feature_levels > 4 else 8
    return sum(max(side // (finest * 2**level), 1) ** 2 for level in range(model.num_feature_levels))


def _resizing(config: ConfigDict) -> dict[str, Any] | None:
    """The rule by which the test pipeline resizes, if it is ours."""
    for transform in _transforms(config.get('test_dataloader', {}).get('dataset', {})):
        if str(transform.get('type')).rpartition('.')[2] == 'ResizeShortestEdge':
            shorter, longer = transform['scale']
            return dict(shorter=shorter, longer=longer, backend=transform.get('backend', 'pillow'))
    return None


def _transforms(dataset: dict) -> Iterator[dict]:
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    yield from dataset.get('pipeline', [])
