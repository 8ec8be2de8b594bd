"""One-to-one assignment of queries to objects, for all layers and images of a batch at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dino_mm.registry import TASK_UTILS

from ...ops.assignment import NotFiniteError, assign
from ...ops.transfer import to_device
from ..box_ops import corners, generalized_iou
from ..structures import Targets, describe_unusable_targets, name_image


@TASK_UTILS.register_module()
class HungarianMatcher:
    """Minimum-cost matching of predictions and objects.

    The costs of every layer, the encoder's included, and of every image are one padded tensor; copying it to the host
    is the only point of a training step at which the host waits for the device.

    Args:
        cost_class: Weight of the focal classification cost.
        cost_bbox: Weight of the L1 distance of cxcywh boxes in [0, 1].
        cost_giou: Weight of the negative generalized IoU.
        alpha: Balance of the focal cost.
        gamma: Exponent of the focal cost.

    Source: DETR, section 3.1; Deformable DETR for the focal cost.
    """

    def __init__(
        self,
        cost_class: float = 2.0,
        cost_bbox: float = 5.0,
        cost_giou: float = 2.0,
        alpha: float = 0.25,
        gamma: float = 2.0,
    ) -> None:
        self.cost_class = cost_class
        self.cost_bbox = cost_bbox
        self.cost_giou = cost_giou
        self.alpha = alpha
        self.gamma = gamma

    @torch.no_grad()
    def __call__(self, scores: Sequence[Tensor], boxes: Tensor, targets: Targets) -> Tensor:
        """Match.

        Args:
            scores: Logits (num_layers, bs, num_queries, num_classes), the layers in one tensor or more: so nothing is
                copied but the classes that count.
            boxes: (num_layers, bs, num_queries, 4) cxcywh in [0, 1].
            targets: Ground truth of the batch.

        Returns:
            (num_layers, bs, num_gts) int64 on the device of ``boxes``: the query of each object. ``num_queries``
            stands for "none": in padding, and for objects that find no query where there are more objects.

        Raises:
            ValueError: An annotation is unusable; names image and box.
            FloatingPointError: Predictions are not finite, infinite ones included; names layer and image.
        """
        num_layers, bs, num_queries, _ = boxes.shape
        if not targets.total:
            return torch.full((num_layers, bs, targets.boxes.shape[1]), num_queries, device=boxes.device)
        costs = self.cost(scores, boxes, targets).cpu().numpy()
        try:
            match = assign(costs, targets.counts)
        except NotFiniteError as error:
            raise _not_finite(error.layer, error.image, targets, scores[0].shape[-1]) from None
        return to_device([match], boxes.device)[0]

    def cost(self, scores: Sequence[Tensor], boxes: Tensor, targets: Targets) -> Tensor:
        """Weighted cost of each pair, (num_layers, bs, num_gts, num_queries).

        It is NaN for unusable annotations, and for all of an image with a logit that is not finite. Queries come last,
        as they are more: so it is made, and so SciPy takes it, without turning it round.
        """
        # A sigmoid hides an infinite logit, and most classes have no part in a cost.
        boxes = boxes + torch.cat([layers.sum((2, 3)) for layers in scores]).mul_(0)[..., None, None]
        target_boxes = targets.boxes.to(boxes)
        cost = torch.cdist(target_boxes.expand(len(boxes), -1, -1, -1), boxes, p=1).mul_(self.cost_bbox)
        giou = generalized_iou(corners(boxes)[..., None, :, :], corners(target_boxes)[None, ..., None, :])
        cost.sub_(giou, alpha=self.cost_giou)
        del giou
        images = torch.arange(len(targets.labels), device=boxes.device)[:, None]
        logits = torch.cat([layers.transpose(2, 3)[:, images, targets.labels] for layers in scores])
        return self._add_focal_cost(cost, logits)

    def _add_focal_cost(self, cost: Tensor, logits: Tensor) -> Tensor:
        """Add what the focal loss would be for an object of that class, less for background; overwrites ``logits``."""
        p = logits.sigmoid_()
        q = 1 - p
        log_p = (p + 1e-8).log_()
        cost.addcmul_(log_p, q**self.gamma, value=-self.alpha * self.cost_class)
        del log_p
        return cost.addcmul_(q.add_(1e-8).log_(), p.pow_(self.gamma), value=(1 - self.alpha) * self.cost_class)


def _not_finite(layer: int, image: int, targets: Targets, num_classes: int) -> ArithmeticError | ValueError:
    """The error that says which input is at fault, the annotations or the predictions."""
    unusable = describe_unusable_targets(targets, num_classes)
    if unusable is not None:
        return ValueError(unusable)
    return FloatingPointError(
        f'The predictions of layer {layer} for {name_image(targets.samples[image])} are not finite. Look at the '
        'picture; lower the learning rate, check `clip_grad`; under AMP try bfloat16.'
    )
