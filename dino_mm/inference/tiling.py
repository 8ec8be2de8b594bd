"""Detection tile by tile, through sahi."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

try:
    from sahi.models.base import DetectionModel
    from sahi.predict import get_sliced_prediction
    from sahi.prediction import ObjectPrediction
except ImportError as error:
    raise ImportError(
        f"Tiles need sahi, which cannot be imported ({error}). Install it with `pip install 'sahi>=0.12.8'`."
    ) from error

from .detections import Detections

LOW_SCORE = 0.1
"""Below it, merging would make boxes of noise grow; sahi's own limit."""


class TiledDetector:
    """Detects on overlapping tiles and on the whole picture; sahi merges what lies over one another.

    sahi's own rule is kept. Boxes of one class that share half of the smaller one become one box. If scores below 0.1
    are asked for, the best box suppresses those of its class with an IoU of 0.5 (NMS).

    Args:
        detect: Detections of a batch of pictures.
        classes: Names of the model's classes.
        score_thr: The least score.
        side: Of a tile, in pixels.
        overlap: Part of a tile that its neighbour shares.
        batch_size: Tiles that go through the model together.
    """

    def __init__(
        self,
        detect: Callable[[Sequence[NDArray[np.uint8]]], list[Detections]],
        classes: Sequence[str],
        score_thr: float,
        side: int,
        overlap: float,
        batch_size: int,
    ) -> None:
        self.detect, self.side = detect, side
        self._model = _SahiModel(detect, classes, score_thr)
        merge = ('NMS', 'IOU') if score_thr < LOW_SCORE else ('GREEDYNMM', 'IOS')
        self._options: dict[str, Any] = dict(
            postprocess_type=merge[0],
            postprocess_match_metric=merge[1],
            slice_height=side,
            slice_width=side,
            overlap_height_ratio=overlap,
            overlap_width_ratio=overlap,
            batch_size=batch_size,
            verbose=0,
        )

    def __call__(self, image: NDArray[np.uint8]) -> Detections:
        """Detections of one picture (height, width, 3), BGR."""
        if max(image.shape[:2]) <= self.side:
            return self.detect([image])[0]
        found = get_sliced_prediction(image, self._model, **self._options).object_prediction_list
        found = sorted(found, key=lambda one: -one.score.value)
        boxes = np.array([one.bbox.to_xyxy() for one in found], np.float32).reshape(-1, 4)
        scores = np.array([one.score.value for one in found], np.float32)
        labels = np.array([one.category.id for one in found], np.int64)
        return Detections(boxes, scores, labels)


class _SahiModel(DetectionModel):
    """What sahi asks of a model: its detections as sahi's objects. Pictures pass through it in BGR."""

    def __init__(self, detect: Callable, classes: Sequence[str], score_thr: float) -> None:
        self._classes = classes
        names = {str(label): name for label, name in enumerate(classes)}
        super().__init__(model=detect, confidence_threshold=score_thr, category_mapping=names, device='cpu')

    def set_model(self, model: Any, **kwargs: Any) -> None:
        self.model = model

    def perform_inference(self, image: NDArray[np.uint8]) -> None:
        self._original_predictions = self.model([image])

    def perform_batch_inference(self, images: list[NDArray[np.uint8]]) -> None:
        self._original_predictions = self.model(images)

    def _create_object_prediction_list_from_original_predictions(
        self,
        shift_amount_list: Any = None,
        full_shape_list: Any = None,
    ) -> None:
        """Every picture's detections, each with where its tile lies: (x, y) and the whole (height, width)."""
        count = len(self._original_predictions)
        shifts, shapes = _each(shift_amount_list or [0, 0], count), _each(full_shape_list, count)
        self._object_prediction_list_per_image = [
            [
                ObjectPrediction(
                    bbox=box,
                    category_id=label,
                    score=score,
                    category_name=self._classes[label],
                    shift_amount=shift,
                    full_shape=shape,
                )
                for box, score, label in zip(*(column.tolist() for column in detections), strict=True)
            ]
            for detections, shift, shape in zip(self._original_predictions, shifts, shapes, strict=True)
        ]


def _each(value: Any, count: int) -> list:
    """One value for each of ``count`` pictures; sahi gives a single one without a list around it."""
    return value if value and isinstance(value[0], list) else [value] * count
