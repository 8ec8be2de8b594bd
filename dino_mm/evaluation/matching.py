"""Which detection found which object: COCO's matching, image by image."""

import contextlib
import io
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from pycocotools import mask

from dino_mm.datasets.coco_file import CocoFile
from dino_mm.datasets.coco_rules import Entry

from .coco_metric import Truth, find_evaluator

MATCH_IOU = 0.5


@dataclass(frozen=True, eq=False)
class ImageMatches:
    """The objects and the detections of an image, and which belong together at an IoU of 0.5.

    Attributes:
        image: The image's entry in the annotation file.
        truth_boxes: (num_gts, 4), left, top, width, height in pixels.
        truth_labels: (num_gts,) indices of classes.
        crowd: (num_gts,) bool; a crowd is not to be found, and what lies in it is not counted.
        boxes: (num_dets, 4), as ``truth_boxes``, by falling score.
        labels: (num_dets,).
        scores: (num_dets,).
        matched: (num_dets,) index of the object found, -1 for none.
        ignored: (num_dets,) bool, in a crowd of its class.
        ious: (num_dets, num_gts); with a crowd, the part of the detection inside.
    """

    image: Entry
    truth_boxes: np.ndarray
    truth_labels: np.ndarray
    crowd: np.ndarray
    boxes: np.ndarray
    labels: np.ndarray
    scores: np.ndarray
    matched: np.ndarray
    ignored: np.ndarray
    ious: np.ndarray

    def above(self, score: float) -> 'ImageMatches':
        """The same with the detections of at least ``score``; better ones match first, so that matches stay."""
        kept = self.scores >= score
        names = ('boxes', 'labels', 'scores', 'matched', 'ignored', 'ious')
        return replace(self, **{name: getattr(self, name)[kept] for name in names})

    def found(self) -> np.ndarray:
        """(num_gts,) bool, which objects were found."""
        result = np.zeros(len(self.truth_labels), bool)
        result[self.matched[self.matched >= 0]] = True
        return result


def evaluate(file: CocoFile, classes: Sequence[str], predictions: list[Entry]) -> Any:
    """Run pycocotools' ``COCOeval`` as :class:`CheckedCocoMetric` does, at 1, 10 and 100 detections a class and image.

    Args:
        file: The annotations; sizes of images are those of their pictures.
        classes: Names of the classes.
        predictions: See :func:`read_predictions`; the evaluator keeps them, with ids of its own.

    Returns:
        The evaluator after ``evaluate``, ``accumulate`` and ``summarize``; its category ids are labels + 1.
    """
    sizes = {image['id']: (image['width'], image['height']) for image in file.images if image['width'] is not None}
    truth = Truth(file, classes, sizes)
    with contextlib.redirect_stdout(io.StringIO()):  # tables that the report shows better
        evaluator = find_evaluator('pycocotools')(truth, truth.loadRes(predictions), 'bbox')
        evaluator.evaluate()
        evaluator.accumulate()
        evaluator.summarize()
    return evaluator


def match_images(evaluator: Any, file: CocoFile) -> list[ImageMatches]:
    """The matches of an evaluator at IoU 0.5, boxes of all sizes, in the order of the file's images."""
    num_images, num_areas = len(evaluator.params.imgIds), len(evaluator.params.areaRng)
    by_image: list[list[dict]] = [[] for _ in range(num_images)]
    for index, found in enumerate(evaluator.evalImgs):  # by category, then area, of which the first is all, then image
        block, image = divmod(index, num_images)
        if found is not None and block % num_areas == 0:
            by_image[image].append(found)
    return [
        _join(image, evaluator.cocoGt.imgToAnns.get(number, []), evaluator.cocoDt.anns, found)
        for (number, image), found in zip(enumerate(file.images, 1), by_image, strict=True)
    ]


def _join(image: Entry, truth: list[Entry], detections: dict[int, Entry], found: list[dict]) -> ImageMatches:
    """Put the classes of an image together."""
    truth_boxes = np.array([a['bbox'] for a in truth], float).reshape(-1, 4)
    crowd = np.array([bool(a['iscrowd']) for a in truth], bool)
    index = {a['id']: i for i, a in enumerate(truth)}
    items = [detections[i] for part in found for i in part['dtIds']]
    boxes = np.array([d['bbox'] for d in items], float).reshape(-1, 4)
    matched = np.array([index.get(int(i), -1) for part in found for i in part['dtMatches'][0]], int)
    ignored = np.array([i for part in found for i in part['dtIgnore'][0]], bool)
    ious = np.zeros((len(boxes), len(truth_boxes)))
    if ious.size:
        ious = np.asarray(mask.iou(boxes, truth_boxes, crowd.astype(np.uint8).tolist()))
    scores = np.array([d['score'] for d in items], float)
    order = np.argsort(-scores, kind='stable')
    return ImageMatches(
        image,
        truth_boxes,
        np.array([a['category_id'] - 1 for a in truth], int),
        crowd,
        boxes[order],
        np.array([d['category_id'] - 1 for d in items], int)[order],
        scores[order],
        np.where(ignored, -1, matched)[order],
        ignored[order],
        ious[order],
    )
