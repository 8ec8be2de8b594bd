"""Box arithmetic in which DINO differs from mmdet's."""

import torch
from mmdet.models.layers.transformer.utils import inverse_sigmoid
from torch import Tensor

#: Boxes are kept this far from 0 and 1 in logit space. mmdet's heads use 1e-5; a checkpoint trained with one does
#: not give the same boxes with the other.
REFERENCE_EPS = 1e-3

#: Added to areas in the denominators. In units of the image, not of pixels: for a box of 8 x 8 pixels in an image of
#: 800 x 1333 it changes the IoU by 1.7 %, so it is part of the definition, not only a guard against 0 / 0.
AREA_EPS = 1e-6


def generalized_iou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """GIoU of boxes (..., 4), xyxy in [0, 1] of the image, broadcast against each other.

    Source: Rezatofighi et al., Generalized Intersection over Union, algorithm 1.
    """
    area1 = (boxes1[..., 2:] - boxes1[..., :2]).prod(-1)
    area2 = (boxes2[..., 2:] - boxes2[..., :2]).prod(-1)
    top_left = torch.maximum(boxes1[..., :2], boxes2[..., :2])
    bottom_right = torch.minimum(boxes1[..., 2:], boxes2[..., 2:])
    intersection = (bottom_right - top_left).clamp(min=0).prod(-1)
    union = area1 + area2 - intersection
    hull_top_left = torch.minimum(boxes1[..., :2], boxes2[..., :2])
    hull_bottom_right = torch.maximum(boxes1[..., 2:], boxes2[..., 2:])
    hull = (hull_bottom_right - hull_top_left).clamp(min=0).prod(-1)
    return intersection / (union + AREA_EPS) - (hull - union) / (hull + AREA_EPS)


def box_logits(boxes: Tensor) -> Tensor:
    """Logits of ``boxes`` (..., 4) in [0, 1], cut off at ``REFERENCE_EPS``."""
    return inverse_sigmoid(boxes, eps=REFERENCE_EPS)


def refine_boxes(delta: Tensor, reference: Tensor) -> Tensor:
    """Move ``reference`` (..., 4), cxcywh in [0, 1], by ``delta`` (..., 4) in logit space."""
    return (delta + box_logits(reference)).sigmoid()
