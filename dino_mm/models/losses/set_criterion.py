"""DINO's losses, each computed in one pass over all layers."""

import torch
from mmdet.structures.bbox import bbox_cxcywh_to_xyxy
from mmdet.utils import reduce_mean
from torch import Tensor, nn

from ..structures import Targets
from ..task_modules.hungarian_matcher import HungarianMatcher

LayerLosses = dict[str, Tensor]
"""``loss_cls``, ``loss_bbox`` and ``loss_iou``, each (num_layers,)."""


class SetCriterion(nn.Module):
    """Classification, L1 and GIoU losses of matched queries and of denoising queries.

    Sums over queries and images are divided by the number of objects of the batch, averaged over the processes.
    The loss modules are mmdet's interface with ``reduction_override='none'``: boxes reach ``loss_bbox`` as cxcywh and
    ``loss_iou`` as xyxy, both in [0, 1] of the image.

    Args:
        num_classes: Number of classes; also the label of "no object".
        loss_cls: Classification loss of logits (n, num_classes) and labels (n,), such as :class:`FocalLoss`.
        loss_bbox: Loss of boxes, such as mmdet's ``L1Loss``.
        loss_iou: Overlap loss, such as :class:`NormalizedGIoULoss`.
        matcher: Assigns queries to objects.
        loss_dn_cls: Classification loss of the denoising queries; None is ``loss_cls``.

    Source: DINO, section 3.3; DETR, section 3.1.
    """

    def __init__(
        self,
        num_classes: int,
        loss_cls: nn.Module,
        loss_bbox: nn.Module,
        loss_iou: nn.Module,
        matcher: HungarianMatcher,
        loss_dn_cls: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.num_classes = num_classes
        self.loss_cls = loss_cls
        self.loss_dn_cls = loss_dn_cls or loss_cls
        self.loss_bbox = loss_bbox
        self.loss_iou = loss_iou
        self.matcher = matcher

    def num_boxes(self, targets: Targets, like: Tensor) -> Tensor:
        """Objects of the batch, averaged over the processes, at least 1: what all losses are divided by."""
        return reduce_mean(like.new_tensor(targets.total)).clamp(min=1)

    def matched(self, scores: Tensor, boxes: Tensor, targets: Targets, num_boxes: Tensor) -> LayerLosses:
        """Losses of the queries that the matcher pairs with objects.

        Args:
            scores: (num_layers, bs, num_queries, num_classes) logits.
            boxes: (num_layers, bs, num_queries, 4) cxcywh in [0, 1].
            targets: Ground truth of the batch.
            num_boxes: See :meth:`num_boxes`.
        """
        num_queries = scores.shape[2]
        match = self.matcher(scores, boxes, targets)
        paired = match < num_queries
        # One more column takes the label of every slot without partner, then goes.
        labels = match.new_full((*scores.shape[:2], num_queries + 1), self.num_classes)
        labels = labels.scatter(2, match, targets.labels.expand_as(match))[..., :-1]
        index = match.clamp(max=num_queries - 1)[..., None].expand(-1, -1, -1, 4)
        boxes = boxes.gather(2, index)
        return self._losses(self.loss_cls, scores, labels, boxes, targets.boxes, paired, num_boxes)

    def denoised(
        self, scores: Tensor, boxes: Tensor, targets: Targets, num_boxes: Tensor, num_groups: int
    ) -> LayerLosses:
        """Losses of the denoising queries: positives restore their object, all others are background.

        Args:
            scores: (num_layers, bs, num_dn, num_classes) logits.
            boxes: (num_layers, bs, num_dn, 4) cxcywh in [0, 1].
            targets: Ground truth of the batch.
            num_boxes: See :meth:`num_boxes`; every group restores all objects.
            num_groups: Number of denoising groups; 0 gives losses of 0 that every parameter still takes part in.
        """
        if num_groups == 0:
            zero = scores.flatten(1).sum(1) + boxes.flatten(1).sum(1)
            return {'loss_cls': zero, 'loss_bbox': zero, 'loss_iou': zero}
        num_layers, bs = scores.shape[:2]
        positives = boxes.view(num_layers, bs, num_groups, 2, -1, 4)[:, :, :, 0]
        paired = targets.mask[None, :, None].expand(positives.shape[:-1])
        restored = torch.where(targets.mask, targets.labels, self.num_classes)
        labels = torch.stack([restored, torch.full_like(restored, self.num_classes)], 1)
        labels = labels[None, :, None].expand(num_layers, -1, num_groups, -1, -1)
        boxes, num_boxes = targets.boxes[:, None], num_boxes * num_groups
        return self._losses(self.loss_dn_cls, scores, labels, positives, boxes, paired, num_boxes)

    def _losses(
        self,
        loss_cls: nn.Module,
        scores: Tensor,
        labels: Tensor,
        boxes: Tensor,
        target_boxes: Tensor,
        paired: Tensor,
        num_boxes: Tensor,
    ) -> LayerLosses:
        """Sum each loss over everything but layers; ``boxes`` (num_layers, ..., 4) count where ``paired``."""
        target_boxes = target_boxes.to(boxes).expand_as(boxes)
        classified = loss_cls(scores.reshape(-1, self.num_classes), labels.reshape(-1), reduction_override='none')
        loss_bbox = self.loss_bbox(boxes, target_boxes, reduction_override='none')
        loss_iou = self.loss_iou(
            bbox_cxcywh_to_xyxy(boxes).flatten(0, -2),
            bbox_cxcywh_to_xyxy(target_boxes).flatten(0, -2),
            reduction_override='none',
        )
        num_layers = len(scores)
        return {
            'loss_cls': classified.view(num_layers, -1).sum(1) / num_boxes,
            'loss_bbox': (loss_bbox * paired[..., None]).flatten(1).sum(1) / num_boxes,
            'loss_iou': (loss_iou.view(paired.shape) * paired).flatten(1).sum(1) / num_boxes,
        }
