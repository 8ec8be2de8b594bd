"""One-to-one assignment of queries to objects, for all layers and images of a batch at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from dino_mm.registry import TASK_UTILS

from ...ops.transfer import to_device
from ..box_ops import coordinates, corners, generalized_iou, l1_distance
from ..structures import Targets, describe_unusable_targets
from .assignment import NotFiniteError, assign

#: Pairs of a query and an object, in all layers and images, of which the costs are computed at once. Of more they are
#: computed layer by layer, which bounds the memory and suits a CPU's caches; of fewer, few operators are done sooner.
MAX_PAIRS = 1_000_000


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
            FloatingPointError: Predictions are not finite.
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
        """Weighted cost of each pair, (num_layers, bs, num_gts, num_queries); NaN for unusable annotations.

        Queries come last, as they are more: so it is made, and so SciPy takes it, without turning it round.
        """
        if boxes[..., 0].numel() * targets.boxes.shape[1] <= MAX_PAIRS:
            return self._cost_at_once(scores, boxes, targets)
        layers = (layer[None] for part in scores for layer in part)
        return torch.cat([self._cost_at_once([s], b[None], targets) for s, b in zip(layers, boxes, strict=True)])

    def _cost_at_once(self, scores: Sequence[Tensor], boxes: Tensor, targets: Targets) -> Tensor:
        """See :meth:`cost`."""
        # In place, one part after another, from the one that takes the most: these are the only tensors that grow with
        # boxes times queries.
        boxes, target_boxes = coordinates(boxes)[..., None, :], coordinates(targets.boxes.to(boxes))[..., None]
        giou = generalized_iou(corners(boxes), corners(target_boxes))
        cost = l1_distance(boxes * self.cost_bbox, target_boxes * self.cost_bbox).sub_(giou, alpha=self.cost_giou)
        del giou
        return self._add_class_cost(cost, scores, targets.labels)

    def _add_class_cost(self, cost: Tensor, scores: Sequence[Tensor], labels: Tensor) -> Tensor:
        """Add the focal costs of the objects' classes."""
        images = torch.arange(len(labels), device=labels.device)[:, None]
        logits = [layers.transpose(2, 3) for layers in scores]
        # Looking up costs takes longer than looking up logits, so that it pays for many more objects than classes only.
        if labels.shape[1] < 2 * logits[0].shape[2]:
            return self._add_focal_cost(cost, torch.cat([layers[:, images, labels] for layers in logits]))
        costs = torch.cat([self._add_focal_cost(torch.zeros_like(layers), layers.clone()) for layers in logits])
        return cost.add_(costs[:, images, labels])

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
        f'The predictions of layer {layer} for image {image} of the batch are not finite: training has diverged. '
        'Lower the learning rate, check `clip_grad` and the inputs; under AMP try bfloat16.'
    )
