"""Whether an exported file detects what the model does."""

from collections.abc import Callable, Iterator, Sequence
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
        undecided: The same, but the model itself has no opinion: they come and go with the last digits of the pixels.
            Two queries of nearly equal scores that change places begin with each other's learnt content.
        same, total: Of all of the model's detections, how many are the same.
    """

    logits: float
    boxes: float
    sure: int
    missed: int
    undecided: int
    same: int
    total: int

    def is_within(self, tolerance: Tolerance) -> bool:
        """Whether the file may stay."""
        return not self.missed and self.same >= tolerance.share * self.total

    def __str__(self) -> str:
        missed = f', {self.missed} on one side only' if self.missed else ''
        undecided = f', {self.undecided} undecided' if self.undecided else ''
        return (
            f'logits {self.logits:.1e}, boxes {self.boxes:.1e} of the image; {self.sure} detections above {SURE}'
            f'{missed}{undecided}; {self.same} of all {self.total} the same'
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
    expected = _predict(model, inputs, samples)
    # In sides of the image: the file's boxes are in its pixels.
    scales = [torch.tensor(sample.img_shape[:2]).flip(0).repeat(2) for sample in samples]
    outputs = (output.detach().cpu() for output in run(inputs, sizes_of(samples).to(inputs.device)))
    found = [_detections(*image) for image in zip(*outputs, scales, strict=True)]
    others: list[list[Detections]] = []  # of nearly the same pixels, if anybody asks
    logits = boxes = 0.0
    counts = torch.zeros(5, dtype=torch.int64)
    for i, (ours, theirs) in enumerate(zip(expected, found, strict=True)):
        for one, two, is_model in ((ours, theirs, True), (theirs, ours, False)):
            logit, box, are_same = _nearest(one, two, tolerance)
            sure = one.logits.sigmoid() > SURE
            missed = sure & ~are_same
            undecided = torch.zeros_like(missed)
            if missed.any():
                others = others or [_predict(model, pixels, samples) for pixels in _nearly(inputs)]
                has = torch.stack([_nearest(one, other[i], tolerance)[2] for other in others])
                undecided = missed & (~has.all(0) if is_model else has.any(0))
            counted = (are_same | sure) & ~undecided
            logits = max([logits, *logit[counted].tolist()])
            boxes = max([boxes, *box[counted].tolist()])
            numbers = (sure * is_model, missed & ~undecided, undecided, are_same * is_model)
            counts += torch.tensor([*(int(number.sum()) for number in numbers), len(sure) * is_model])
    return Comparison(logits, boxes, *counts.tolist())


def _predict(model: DINO, inputs: Tensor, samples: Sequence[DetDataSample]) -> list[Detections]:
    """What the model detects in each image."""
    results = model.predict(inputs, [sample.clone() for sample in samples], rescale=False)
    found = [(sample.pred_instances.cpu(), sample.img_shape[:2]) for sample in results]
    return [
        _detections(instances.bboxes, instances.scores, instances.labels, torch.tensor(shape).flip(0).repeat(2))
        for instances, shape in found
    ]


def _nearly(inputs: Tensor) -> Iterator[Tensor]:
    """``inputs`` with changes of less than a thousandth of a grey level, as other orders of summing have."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(8):
        yield inputs + 1e-5 * torch.randn(inputs.shape, generator=generator).to(inputs)


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
