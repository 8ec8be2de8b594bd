"""What an exported file says of itself, so that it can be run without dino_mm and without the config."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from mmengine.config import ConfigDict

from ..datasets.transforms import ResizeShortestEdge
from ..models.detectors.dino import DINO
from .errors import ExportError

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
    queries: int
    """Maps must have as many pixels: pictures that are smaller are padded."""
    strides: list[int]
    """Pixels of the input per pixel of each map."""
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
    strides = _strides(model)
    height = width = None
    if 'size' not in dynamic:
        if size is None and resize is None:
            raise ExportError(
                "The config's test pipeline has no `dino_mm.ResizeShortestEdge` that would say a size: give --size "
                'HEIGHTxWIDTH, or --dynamic size.'
            )
        height, width = size or (resize['shorter'], resize['longer'])  # type: ignore[index]
        if num_tokens(height, width, strides) < model.num_queries:
            raise ExportError(
                f'--size {height}x{width}: feature maps have fewer pixels than the {model.num_queries} queries that '
                'the model chooses among them. Give a larger size, or fewer `num_queries`.'
            )
    return Description(
        tuple(model.dataset_meta['classes']),
        [float(value) for value in preprocessor.mean],
        [float(value) for value in preprocessor.std],
        'RGB' if preprocessor.get('bgr_to_rgb') else 'BGR',
        resize,
        preprocessor.get('pad_size_divisor', 1),
        model.num_queries,
        strides,
        height,
        width,
        None if 'batch' in dynamic else 1,
        half,
    )


def num_tokens(height: int, width: int, strides: Sequence[int]) -> int:
    """The least number of pixels of all maps of an image."""
    return sum(max(height // stride, 1) * max(width // stride, 1) for stride in strides)


@torch.no_grad()
def _strides(model: DINO) -> list[int]:
    """Pixels of the image per pixel of each map."""
    image = next(model.parameters()).new_zeros(1, 3, 256, 256)
    return [round(256 / feature.shape[2]) for feature in model.extract_feat(image)]


def _resizing(config: ConfigDict) -> dict[str, Any] | None:
    """The rule by which the test pipeline resizes, if it is ours."""
    for transform in _transforms(config.get('test_dataloader', {}).get('dataset', {})):
        if _is_shortest_edge(transform):
            shorter, longer = transform['scale']
            return dict(shorter=shorter, longer=longer, backend=transform.get('backend', 'pillow'))
    return None


def _is_shortest_edge(transform: dict) -> bool:
    """Whether it is ours, by either of its names; in our configs it is called `Resize`, for sahi's sake."""
    scope, _, name = str(transform.get('type')).rpartition('.')
    scope = scope or transform.get('_scope_', '')
    return name == ResizeShortestEdge.__name__ or (scope, name) == ('dino_mm', 'Resize')


def _transforms(dataset: dict) -> Iterator[dict]:
    while 'dataset' in dataset:
        dataset = dataset['dataset']
    yield from dataset.get('pipeline', [])
