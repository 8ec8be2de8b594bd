"""``dino_mm.predict``: from pictures and videos to boxes, scores, labels and names."""

import copy
import difflib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import chain, islice
from typing import Any

import numpy as np
import torch
from mmcv.transforms import Compose
from mmdet.utils import get_test_pipeline_cfg
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import TRANSFORMS, DefaultScope
from mmengine.structures import InstanceData
from numpy.typing import NDArray
from torch import nn

from .detections import Detections
from .sources import Frame, Given, Source, SourceError, find_sources, read_frames

REPLACED = ('mmdet.LoadImageFromNDArray', 'mmdet.InferencerLoader')
"""What mmdet's functions write over the first step of a model's config when they are given arrays."""


@dataclass(frozen=True, eq=False)
class Prediction:
    """What was found on a picture, or on a frame of a video; the best first.

    Attributes:
        source: Path or address of the picture or video, number of the webcam, 'array 0' of an array.
        image: (height, width, 3), uint8, BGR, upright.
        boxes: (n, 4) xyxy in pixels of ``image``, float32.
        scores: (n,) in [0, 1], float32.
        labels: (n,) positions in the model's classes, int64.
        names: The n names of the labels.
        frame: Number of the frame in its video, from 0 on; None of a picture.
    """

    source: str
    image: NDArray[np.uint8]
    boxes: NDArray[np.float32]
    scores: NDArray[np.float32]
    labels: NDArray[np.int64]
    names: list[str]
    frame: int | None = None


def predict(
    model: nn.Module,
    sources: Given | Sequence[Given],
    score_thr: float = 0.3,
    classes: Sequence[str] | None = None,
    batch_size: int = 1,
    amp: bool = False,
    tiles: int | None = None,
    overlap: float = 0.2,
    on_error: Callable[[SourceError], None] | None = None,
) -> Iterator[Prediction]:
    """Detect objects, picture by picture and frame by frame, as the results are asked for.

    Without tiles, the boxes are those of mmdet's ``inference_detector``. Pictures of one batch are padded to one size,
    which changes boxes by fractions of a pixel.

    Example:
        ``for found in dino_mm.predict(model, 'folder'): print(found.source, found.names, found.boxes)``

    Args:
        model: Of :func:`dino_mm.get_model` or mmdet's ``init_detector``.
        sources: A picture, video, folder, pattern, address, number of a webcam, array (height, width, 3) of uint8 in
            BGR, or several of them.
        score_thr: The least score.
        classes: Names of the only classes to keep; all by default.
        batch_size: Pictures, or tiles, that go through the model together.
        amp: Run in half precision, float16 on a GPU and bfloat16 on a CPU.
        tiles: Side in pixels of square tiles, through sahi, for small objects on large pictures: the model sees each
            tile, and the whole picture. Pictures that fit into a tile are not cut.
        overlap: Part of a tile that its neighbour shares.
        on_error: Is called with what cannot be read, and the rest goes on. Without it the error is raised.

    Raises:
        SourceError: There is no such file, or no picture in a folder; later, without ``on_error``, a picture or video
            cannot be read.
        ValueError: A number is out of range, or the model has no class of that name.
        ImportError: ``tiles`` needs sahi, which is not installed.
    """
    detector = Detector(model, score_thr, classes, batch_size, amp, tiles, overlap)
    found = find_sources(sources)
    names = detector.classes
    return (as_prediction(frame, detections, names) for frame, detections in detector.run(found, on_error or _raise))


def as_prediction(frame: Frame, detections: Detections, classes: Sequence[str]) -> Prediction:
    """Add where they come from and what they are called."""
    names = [classes[label] for label in detections.labels]
    return Prediction(frame.source.name, frame.image, *detections, names, frame.number)


class Detector:
    """A model with all that turns its input and output into plain arrays; arguments as of :func:`predict`."""

    def __init__(
        self,
        model: Any,
        score_thr: float = 0.3,
        classes: Sequence[str] | None = None,
        batch_size: int = 1,
        amp: bool = False,
        tiles: int | None = None,
        overlap: float = 0.2,
    ) -> None:
        check_numbers(score_thr, batch_size, tiles, overlap)
        self.model = model
        self.score_thr, self.batch_size, self.amp = score_thr, batch_size, amp
        stated: Any = self.model.dataset_meta['classes']
        self.classes: tuple[str, ...] = (stated,) if isinstance(stated, str) else tuple(stated)
        self.kept = None if classes is None else find_labels(classes, self.classes)
        self._load, self._prepare = _pipeline(self.model.cfg)
        self._tiled = None
        if tiles is not None:
            from .tiling import TiledDetector

            self._tiled = TiledDetector(self.detect, self.classes, score_thr, tiles, overlap, batch_size)

    def run(
        self, sources: Iterable[Source], on_error: Callable[[SourceError], None]
    ) -> Iterator[tuple[Frame, Detections]]:
        """Every frame that can be read, in order, with its detections."""
        frames = chain.from_iterable(read_frames(source, self.load, on_error) for source in sources)
        if self._tiled is not None:
            for frame in frames:
                yield frame, self._tiled(frame.image)
            return
        while batch := list(islice(frames, self.batch_size)):
            yield from zip(batch, self.detect([frame.image for frame in batch]), strict=True)

    def load(self, path: str) -> NDArray[np.uint8]:
        """A picture as the model's test pipeline reads it: (height, width, 3), BGR."""
        return np.ascontiguousarray(self._load(dict(img_path=path))['img'])

    def detect(self, images: Sequence[NDArray[np.uint8]]) -> list[Detections]:
        """Detections of a batch of pictures (height, width, 3), BGR, of any sizes."""
        batch = pseudo_collate([self._prepare(dict(img=image, img_id=0)) for image in images])
        device = next(self.model.parameters()).device.type
        with torch.no_grad(), torch.autocast(device) if self.amp else nullcontext():
            samples = self.model.test_step(batch)
        return [self._select(sample.pred_instances) for sample in samples]

    def _select(self, instances: InstanceData) -> Detections:
        """Those with the score and the classes that are asked for."""
        boxes, scores, labels = (getattr(instances, name).detach().cpu() for name in ('bboxes', 'scores', 'labels'))
        kept = scores >= self.score_thr
        if self.kept is not None:
            kept &= torch.isin(labels, torch.tensor(self.kept))
        return Detections(boxes[kept].float().numpy(), scores[kept].float().numpy(), labels[kept].numpy())


def find_labels(wanted: Sequence[str], classes: Sequence[str]) -> list[int]:
    """Positions of names in the model's classes.

    Raises:
        ValueError: The model has no class of that name; names the nearest.
    """
    if isinstance(wanted, str):
        raise ValueError(f'`classes` is the text {wanted!r}, not a list of names; write [{wanted!r}].')
    lower = {name.lower(): name for name in classes}
    for name in wanted:
        if name not in classes:
            close = [lower[match] for match in difflib.get_close_matches(name.lower(), lower, 3)]
            hint = f'did you mean {" or ".join(close)}?' if close else f'it has {", ".join(classes)}.'
            raise ValueError(f'The model has no class {name!r}; {hint}')
    return [classes.index(name) for name in wanted]


def check_numbers(score_thr: float, batch_size: int, tiles: int | None, overlap: float) -> None:
    """Raise ValueError if a number is out of range."""
    if not 0 <= score_thr <= 1:
        raise ValueError(f'The score threshold is {score_thr}; it can be from 0 to 1.')
    if batch_size < 1:
        raise ValueError(f'The batch size is {batch_size}; it has to be 1 at least.')
    if tiles is not None and tiles < 1:
        raise ValueError(f'The side of tiles is {tiles} pixels; it has to be 1 at least.')
    if not 0 <= overlap < 1:
        raise ValueError(f'The overlap of tiles is {overlap}; it can be from 0 to less than 1.')


def _pipeline(config: Config) -> tuple[Callable[[dict], dict], Compose]:
    """The config's test pipeline in two: what reads a file, and what takes the array from there on."""
    steps = copy.deepcopy(get_test_pipeline_cfg(config))
    with DefaultScope.overwrite_default_scope(config.get('default_scope', 'mmdet')):
        if steps[0].type in REPLACED:
            steps[0].type = 'LoadImageFromFile'
        load = TRANSFORMS.build({**steps[0], 'to_float32': False})
        steps[0].type = 'mmdet.LoadImageFromNDArray'
        return load, Compose(steps)


def _raise(error: SourceError) -> None:
    raise error
