"""Generalized IoU as a loss."""

from torch import Tensor, nn

from dino_mm.registry import MODELS

from ..box_ops import generalized_iou


@MODELS.register_module()
class NormalizedGIoULoss(nn.Module):
    """``1 - GIoU`` of aligned boxes in [0, 1]; mmdet's ``GIoULoss`` works in pixels with another epsilon.

    Args:
        loss_weight: Weight of the loss.
    """

    def __init__(self, loss_weight: float = 1.0) -> None:
        super().__init__()
        self.loss_weight = loss_weight

    def forward(self, pred: Tensor, target: Tensor, reduction_override: str = 'mean') -> Tensor:
        """Loss of ``pred`` and ``target``, (num_boxes, 4) xyxy: (num_boxes,), or reduced by 'mean' or 'sum'."""
        loss = self.loss_weight * (1 - generalized_iou(pred, target))
        return loss if reduction_override == 'none' else getattr(loss, reduction_override)()
