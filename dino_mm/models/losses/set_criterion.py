"""DINO's losses, each computed in one pass over all layers, matching and denoising queries together."""

from collections.abc import Sequence
from typing import Any

import torch
from mmdet.utils import reduce_mean
from torch import Tensor, nn

from ...ops.transfer import to_device
from ..box_ops import corners
from ..structures import Predictions, Targets
from ..task_modules.hungarian_matcher import HungarianMatcher

LOSSES = ('loss_cls', 'loss_bbox', 'loss_iou')
"""Rows of what the criterion gives."""


class SetCriterion(nn.Module):
    """Classification, L1 and GIoU losses of matching queries and of denoising queries.

    Sums over queries and images are divided by the number of objects of the batch, those of denoising queries by the
    number of objects that these were made from, all groups counted; numbers of objects are averaged over the processes.
    The loss modules are mmdet's interface with ``reduction_override='none'``: boxes reach ``loss_bbox`` as cxcywh and
    ``loss_iou`` as xyxy, both in [0, 1] of the image.

    Args:
        num_classes: Number of classes; also the label of "no object".
        loss_cls: Classification loss of logits (n, num_classes) and labels (n,), such as :class:`FocalLoss`.
        loss_bbox: Loss of boxes, such as mmdet's ``L1Loss``.
        loss_iou: Overlap loss, such as :class:`NormalizedGIoULoss`.
        matcher: Assigns queries to objects.
        loss_dn_cls: Classification loss of the denoising queries; None is ``loss_cls``.

    Attributes:
        nan_where_not_finite: Give gradients of NaN where a loss is not finite, and losses of NaN where the matcher
            meets predictions that are not, instead of its error. Whoever sets it skips such steps:
            :class:`dino_mm.SkipNotFiniteHook` does. An error would end one process, and leave the others waiting for
            its gradients.
        not_finite: What the error would have said about the last batch; None where there was none.

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
        self.loss_dn_cls = loss_dn_cls
        self.loss_bbox = loss_bbox
        self.loss_iou = loss_iou
        self.matcher = matcher
        self.nan_where_not_finite = False
        self.not_finite: str | None = None

    def forward(
        self,
        decoder: Predictions,
        encoder: Predictions | None,
        targets: Targets,
        num_dn_groups: int,
        dn_targets: Targets | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Losses of the matching queries of all layers, the encoder last, and of the decoder's denoising queries.

        A matching query restores the object that the matcher pairs it with, a positive denoising query the one that it
        was made from; all others are background.

        Args:
            decoder: Predictions of all decoder layers, the ``num_dn_groups * 2 * num_dn_gts`` denoising queries first.
            encoder: Predictions of the selected tokens, as one layer; None where the encoder selects none.
            targets: Ground truth of the batch.
            num_dn_groups: Groups of denoising queries; without any, their losses are 0, and still have gradients.
            dn_targets: The objects, ``num_dn_gts`` in the fullest image, that each group holds; None: all.

        Returns:
            ``LOSSES`` of the matching queries, (3, num_layers), and of the denoising queries, (3, num_layers).
        """
        dn_targets = targets if dn_targets is None else dn_targets
        num_dn = num_dn_groups * 2 * dn_targets.boxes.shape[1]
        matching = [Predictions(decoder.scores[:, :, num_dn:], decoder.boxes[:, :, num_dn:])]
        matching += [] if encoder is None else [encoder]
        boxes = torch.cat([layers.boxes for layers in matching])
        match = self._match([layers.scores for layers in matching], boxes, targets)

        labels = self._labels(match, boxes.shape[2], targets, dn_targets, num_dn_groups)
        scores = [decoder.scores] if encoder is None else [decoder.scores, encoder.scores]
        loss_cls, dn_loss_cls = self._class_losses(scores, labels, num_dn)
        positives = _positives(decoder.boxes[:, :, :num_dn], dn_targets, num_dn_groups)
        box_losses, dn_box_losses = self._box_losses(boxes, match, positives, targets, dn_targets)

        totals = to_device([[targets.total, dn_targets.total]], boxes.device, boxes.dtype)[0]
        num_boxes, num_restored = reduce_mean(totals).clamp(min=1)
        num_dn_boxes = num_restored * max(num_dn_groups, 1)
        losses = torch.cat([loss_cls[None], box_losses]) / num_boxes
        dn_losses = torch.cat([dn_loss_cls[None], dn_box_losses]) / num_dn_boxes
        if self.not_finite:
            return losses * torch.nan, dn_losses * torch.nan
        return _SpreadNaN.apply(losses, dn_losses) if self.nan_where_not_finite else (losses, dn_losses)

    def _match(self, scores: Sequence[Tensor], boxes: Tensor, targets: Targets) -> Tensor:
        """What the matcher says, see there; no pairs where predictions are not finite and losses shall be NaN."""
        self.not_finite = None
        try:
            return self.matcher(scores, boxes, targets)
        except FloatingPointError as error:
            if not self.nan_where_not_finite:
                raise
            self.not_finite = str(error)
            num_layers, bs, num_queries, _ = boxes.shape
            return torch.full((num_layers, bs, targets.boxes.shape[1]), num_queries, device=boxes.device)

    def _labels(
        self, match: Tensor, num_queries: int, targets: Targets, dn_targets: Targets, num_dn_groups: int
    ) -> Tensor:
        """Class that each query should predict, (num_layers, bs, num_dn + num_queries)."""
        num_layers, bs, _ = match.shape
        num_dn = num_dn_groups * 2 * dn_targets.boxes.shape[1]
        # One more column takes the label of every slot without partner, then goes.
        labels = match.new_full((num_layers, bs, num_dn + num_queries + 1), self.num_classes)
        labels.scatter_(2, match + num_dn, targets.labels.expand_as(match))
        restored = torch.where(dn_targets.mask, dn_targets.labels, self.num_classes)
        _positives(labels[..., :num_dn], dn_targets, num_dn_groups).copy_(restored)
        return labels[..., :-1]

    def _class_losses(self, scores: list[Tensor], labels: Tensor, num_dn: int) -> tuple[Tensor, Tensor]:
        """Losses of the matching queries, the encoder's last, and of the decoder's denoising queries: (num_layers,)."""
        decoder, num_layers = scores[0], len(scores[0])
        loss, *encoder = _classify(self.loss_cls, scores, [labels[:num_layers], labels[num_layers:, :, num_dn:]])
        dn_loss, loss = loss.split([num_dn, decoder.shape[2] - num_dn], 2)
        if self.loss_dn_cls is not None:
            (dn_loss,) = _classify(self.loss_dn_cls, [decoder[:, :, :num_dn]], [labels[:num_layers, :, :num_dn]])
        return torch.cat([part.flatten(1).sum(1) for part in (loss, *encoder)]), dn_loss.flatten(1).sum(1)

    def _box_losses(
        self, boxes: Tensor, match: Tensor, positives: Tensor, targets: Targets, dn_targets: Targets
    ) -> tuple[Tensor, Tensor]:
        """L1 and GIoU losses, (2, num_layers) of ``boxes`` and of ``positives``, see :func:`_positives`."""
        num_queries, num_layers, num_pairs = boxes.shape[2], len(positives), match.numel()
        matched = boxes.gather(2, match.clamp(max=num_queries - 1)[..., None].expand(-1, -1, -1, 4))
        # Pairs: objects of all images in all layers of the matching queries, then in all groups of all layers.
        pred = torch.cat([matched.view(-1, 4), positives.reshape(-1, 4)])
        target = torch.cat([
            targets.boxes.expand_as(matched).reshape(-1, 4),
            dn_targets.boxes.expand_as(positives).reshape(-1, 4),
        ]).to(boxes)  # fmt: skip
        counts = torch.cat([
            (match < num_queries).view(-1),
            dn_targets.mask.expand(positives.shape[:-1]).reshape(-1),
        ])  # fmt: skip
        loss_bbox = self.loss_bbox(pred, target, reduction_override='none')
        loss_iou = self.loss_iou(corners(pred), corners(target), reduction_override='none')
        losses = torch.stack([loss_bbox.sum(1), loss_iou]) * counts
        loss, dn_loss = losses.split([num_pairs, len(pred) - num_pairs], 1)
        return loss.view(2, len(match), -1).sum(2), dn_loss.view(2, num_layers, -1).sum(2)


class _SpreadNaN(torch.autograd.Function):
    """Losses as they are; all gradients are NaN if one loss is not finite. The device is not asked which it is."""

    @staticmethod
    def forward(ctx: Any, *losses: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(torch.stack([loss.sum() for loss in losses]).sum() * 0 + 1)
        return tuple(loss.view_as(loss) for loss in losses)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        (factor,) = ctx.saved_tensors
        return tuple(grad * factor for grad in grads)


def _positives(dn_queries: Tensor, targets: Targets, num_groups: int) -> Tensor:
    """View of the positive ones of (num_layers, bs, num_dn, ...): (num_layers, num_groups, bs, num_gts, ...)."""
    return dn_queries.unflatten(2, (num_groups, 2, targets.boxes.shape[1]))[:, :, :, 0].transpose(1, 2)


def _classify(loss_cls: nn.Module, scores: Sequence[Tensor], labels: Sequence[Tensor]) -> list[Tensor]:
    """Loss of every query of each ``scores``: (num_layers, bs, num_queries), or with classes as one more dimension."""
    parts = list(zip(scores, labels, strict=False))  # without an encoder, its labels are none
    logits = torch.cat([part.flatten(0, 2) for part, _ in parts])
    loss = loss_cls(logits, torch.cat([part.flatten() for _, part in parts]), reduction_override='none')
    losses = loss.split([part.numel() for _, part in parts])
    return [part.unflatten(0, of.shape) for part, (_, of) in zip(losses, parts, strict=True)]
