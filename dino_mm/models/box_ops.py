"""Box arithmetic in which DINO differs from mmdet's."""

import math

import torch
from torch import Tensor

#: Boxes are kept this far from 0 and 1 in logit space. mmdet's heads use 1e-5; a checkpoint trained with one does
#: not give the same boxes with the other.
REFERENCE_EPS = 1e-3

#: Added to areas in the denominators. In units of the image, not of pixels: for a box of 8 x 8 pixels in an image of
#: 800 x 1333 it changes the IoU by 1.7 %, so it is part of the definition, not only a guard against 0 / 0.
AREA_EPS = 1e-6


def corners(boxes: Tensor) -> Tensor:
    """Boxes (..., 4), cxcywh to xyxy, in four operators (mmdet's: nine)."""
    center, size = boxes.split(2, -1)
    half_size = size * 0.5
    return torch.cat([center - half_size, center + half_size], -1)


def center_size(boxes: Tensor) -> Tensor:
    """Boxes (..., 4), xyxy to cxcywh, in five operators, as the ground truth of a batch is small (mmdet's: eight)."""
    start, end = boxes.split(2, -1)
    return torch.cat([(start + end) * 0.5, end - start], -1)


def generalized_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """GIoU of boxes (..., 4), xyxy in [0, 1] of the image, as many dimensions each, broadcast against each other.

    Source: Rezatofighi et al., Generalized Intersection over Union, algorithm 1.
    """
    assert boxes1.dim() == boxes2.dim()
    # Both directions at once; in place, as the pairs of all queries and objects are many.
    starts1, ends1 = boxes1.movedim(-1, 0).split(2)
    starts2, ends2 = boxes2.movedim(-1, 0).split(2)
    sides1, sides2 = ends1 - starts1, ends2 - starts2
    shared = torch.minimum(ends1, ends2).sub_(torch.maximum(starts1, starts2))
    # What two intervals span together is the sum of their lengths less what they share, or plus the gap between them.
    hull_sides = (sides1 + sides2).sub_(shared)
    hull = torch.addcmul(shared.new_full((), AREA_EPS), *hull_sides)
    del hull_sides
    intersection = torch.mul(*shared.clamp_(min=0))
    del shared
    union = (torch.mul(*sides1) + AREA_EPS + torch.mul(*sides2)).sub_(intersection)
    return intersection.div_(union).addcdiv_(union, hull).sub_(1)


def box_logits(boxes: Tensor) -> Tensor:
    """Logits of ``boxes`` (..., 4) in [0, 1], cut off at ``REFERENCE_EPS``."""
    share, rest = _shares(boxes)
    return (share / rest).log()


def cut_off(boxes: Tensor) -> Tensor:
    """``box_logits(boxes).sigmoid()``, without either."""
    share, rest = _shares(boxes)
    return share / (share + rest)


def _shares(boxes: Tensor) -> tuple[Tensor, Tensor]:
    return boxes.clamp(REFERENCE_EPS, 1.0), (1 - boxes).clamp(REFERENCE_EPS, 1.0)


def wavelengths(num_feats: int, device: torch.device, temperature: float = 10000) -> Tensor:
    """The ``num_feats / 2`` lengths of a sine encoding, from 1 to ``temperature``."""
    # float32 whatever is encoded: its rounding is part of trained models.
    steps = torch.arange(0, num_feats, 2, device=device, dtype=torch.float32)
    return temperature ** (steps / num_feats)


def sine_encoding(coordinates: Tensor, wavelengths: Tensor) -> Tensor:
    """Sines and cosines in turns: (..., n) to (..., n * 2 * num_wavelengths)."""
    angles = coordinates[..., None] / wavelengths
    return torch.stack([angles.sin(), angles.cos()], -1).flatten(-3)


def encode_boxes(boxes: Tensor, wavelengths: Tensor) -> Tensor:
    """The sine encoding of y, x, width and height of boxes (..., 4), cxcywh in [0, 1].

    Source: DAB-DETR, section 4.2; the order of the coordinates is that of its code.
    """
    x, y, width, height = boxes.unbind(-1)
    return sine_encoding(torch.stack([y, x, width, height], -1) * (2 * math.pi), wavelengths)


def refine_boxes(delta: Tensor, reference: Tensor) -> Tensor:
    """Move ``reference`` (..., 4), cxcywh in [0, 1], by ``delta`` (..., 4) in logit space."""
    return (delta + box_logits(reference)).sigmoid()
