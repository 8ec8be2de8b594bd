"""Whether an exported file detects what the model does."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from mmdet.structures import DetDataSample
from torch import Tensor

from ..models.detectors.dino import DINO
from .pictures import sizes_of

#: Images (bs, 3, height, width) and their sizes (bs, 2) -> boxes, scores, labels, as of ``ExportNetwork``.
Run = Callable[[Tensor, Tensor], Sequence[Tensor]]
#: Detections above it must be the same ones.
SURE = 0.3


class Tolerance(NamedTuple):
    """How far detections may differ."""

    logits: float
    boxes: float
    """In sides of the image."""
    share: float
    """Of all detections, how many must be the same. Below ``SURE``, queries of nearly equal scores change places."""


FULL, HALF = Tolerance(1e-3, 1e-4, 0.9), Tolerance(0.3, 0.02, 0.5)


class Detections(NamedTuple):
    """Of one image; boxes (n, 4) in sides of the image, logits (n,), labels (n,)."""

    boxes: Tensor
    logits: Tensor
    labels: Tensor


class Comparison(NamedTuple):
    """The detections of one batch, of model and file.

    Attributes:
        logits, boxes: The largest differences among those that are the same, and those above ``SURE``.
        sure: The model's detections above ``SURE``.
        missed: Detections above ``SURE`` of one side that the other does not have.
        same, total: Of all of the model's detections, how many are the same.
    """

    logits: float
    boxes: float
    sure: int
    missed: int
    same: int
    total: int

    def is_within(self, tolerance: Tolerance) -> bool:
        """Whether the file may stay."""
        return not self.missed and self.same >= tolerance.share * self.total

    def __str__(self) -> str:
        missed = f', {self.missed} on one side only' if self.missed else ''
        return (
            f'logits {self.logits:.1e}, boxes {self.boxes:.1e} of the image; {self.sure} detections above {SURE}'
            f'{missed}; {self.same} of all {self.total} the same'
        )


@torch.no_grad()
def compare(
    model: DINO, run: Run, inputs: Tensor, samples: Sequence[DetDataSample], tolerance: Tolerance
) -> Comparison:
    """Compare a file with the model's own ``predict``, on one batch.

    Args:
        model: The detector.
        run: Runs the file.
        inputs: (bs, 3, height, width).
        samples: Their data samples.
        tolerance: What counts as the same.
    """
    expected = model.predict(inputs, [sample.clone() for sample in samples], rescale=False)
    found_boxes, found_scores, found_labels = (
        output.detach().cpu() for output in run(inputs, sizes_of(samples).to(inputs.device))
    )
    logits = boxes = 0.0
    counts = [0, 0, 0, 0]
    for i, sample in enumerate(expected):
        height, width = sample.img_shape[:2]
        scale = torch.tensor([width, height, width, height])
        theirs = sample.pred_instances.cpu()
        ours = _detections(theirs.bboxes, theirs.scores, theirs.labels, scale)
        other = _detections(found_boxes[i], found_scores[i], found_labels[i], scale)
        for one, two, is_model in ((ours, other, True), (other, ours, False)):
            logit, box, are_same = _nearest(one, two, tolerance)
            sure = one.logits.sigmoid() > SURE
            counted = are_same | sure
            logits = max([logits, *logit[counted].tolist()])
            boxes = max([boxes, *box[counted].tolist()])
            numbers = (sure * is_model, sure & ~are_same, are_same * is_model, torch.ones_like(sure) * is_model)
            counts = [count + int(number.sum()) for count, number in zip(counts, numbers, strict=True)]
    return Comparison(logits, boxes, *counts)


def _detections(boxes: Tensor, scores: Tensor, labels: Tensor, scale: Tensor) -> Detections:
    has_area = (boxes[:, 2:] > boxes[:, :2]).all(1)
    logits = scores.double().logit(1e-12)
    return Detections((boxes.double() / scale)[has_area], logits[has_area], labels[has_area])


def _nearest(one: Detections, two: Detections, tolerance: Tolerance) -> tuple[Tensor, Tensor, Tensor]:
    """For each detection of ``one``, differences of logit and box to the nearest of ``two``, and if they are small."""
    if not len(two.labels):
        far = torch.full_like(one.logits, torch.inf)
        return far, far, far < 0
    logits = (one.logits[:, None] - two.logits).abs()
    boxes = (one.boxes[:, None] - two.boxes).abs().amax(-1)
    distance = torch.maximum(logits / tolerance.logits, boxes / tolerance.boxes)
    distance = distance.masked_fill(one.labels[:, None] != two.labels, torch.inf)
    least, index = distance.min(1)
    rows = torch.arange(len(index))
    return logits[rows, index], boxes[rows, index], least <= 1
