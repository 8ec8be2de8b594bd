"""Contrastive denoising: noised ground truth as additional queries, which the decoder learns to restore or reject."""

import warnings

import torch
import torch.nn.functional as F
from mmengine.model import BaseModule
from torch import Tensor, nn

from dino_mm.registry import MODELS

from ...ops.tracing import is_compiling
from ..box_ops import center_size, cut_off
from ..structures import DenoisingQueries, Targets


def noise_labels(labels: Tensor, draw: Tensor, replacement: Tensor, probability: float) -> Tensor:
    """Replace ``labels`` by ``replacement`` where ``draw``, uniform in [0, 1), is below ``probability``."""
    return torch.where(draw < probability, replacement, labels)


def noise_boxes(boxes: Tensor, draw: Tensor, scale: float) -> Tensor:
    """Shift the two corners of each box, by less than half its size for positives, by more for negatives.

    Args:
        boxes: (bs, num_groups, 2, num_slots, 4) cxcywh in [0, 1]; positives at index 0 of dimension 2, negatives at 1.
        draw: Same shape, uniform in [-1, 1): how far each coordinate of the corners moves, and which way.
        scale: 1 lets a positive's corner move up to half the box's size, a negative's up to the whole.

    Returns:
        Boxes of the same shape and format, clipped to [0, 1].

    Source: DINO, section 3.3.
    """
    is_negative = torch.arange(2, device=boxes.device, dtype=boxes.dtype).view(2, 1, 1)
    center, size = boxes.split(2, -1)
    half_size = size * 0.5
    corners = torch.cat([center - half_size, center + half_size], -1)
    shift = draw + is_negative.copysign(draw)
    corners = corners + shift * torch.cat([half_size, half_size], -1) * scale
    return center_size(corners.clamp(0.0, 1.0))


def visible_queries(num_groups: int, group_size: int, num_queries: int, device: torch.device) -> Tensor:
    """What a denoising query sees, (num_dn, num_dn + num_queries): its own group, and the matching queries.

    No query sees a denoising query of another group, so ground truth cannot leak; matching queries see none at all.
    """
    group = torch.arange(num_groups * group_size, device=device) // group_size
    return F.pad(group[:, None] == group, (0, num_queries), value=True)


def draw_objects(targets: Targets, most: int) -> Targets:
    """``most`` objects of each image that has more, drawn evenly and without replacement, and all of the others.

    They stay in their order, so that padding comes last.
    """
    draw = torch.rand(targets.mask.shape, device=targets.mask.device).masked_fill(~targets.mask, -1)
    drawn = draw.topk(most).indices.sort().values
    return targets._replace(
        labels=targets.labels.gather(1, drawn),
        boxes=targets.boxes.gather(1, drawn[..., None].expand(-1, -1, 4)),
        mask=targets.mask.gather(1, drawn),
        counts=[min(count, most) for count in targets.counts],
    )


@MODELS.register_module()
class CDNGenerator(BaseModule):
    """Makes the denoising queries of a batch.

    There are as many groups as fit into ``num_dn_queries`` objects of the fullest image, at least one; a group holds
    every object twice, lightly noised (to be restored) and strongly noised (to be rejected).

    Memory and time grow with the objects of the fullest image, so they are bounded: of an image with more than
    ``max_dn_queries / 2`` objects so many are drawn anew in every step. The matching queries learn all of them.

    Args:
        num_classes: Number of classes; handed down by the detector.
        embed_dims: Width ``dim``; handed down by the detector.
        num_dn_queries: Positive denoising queries to aim at, 100 in DINO.
        label_noise_ratio: Twice the probability that a label is replaced by a random one. 0 switches it off.
        box_noise_scale: Scale of the box noise, see :func:`noise_boxes`. 0 switches it off.
        max_dn_queries: Denoising queries of an image, positive and negative, at most. COCO, with fewer than a hundred
            objects in an image, never meets the 2000.

    Raises:
        ValueError: A number is out of its range; ``max_dn_queries`` has no room for ``num_dn_queries`` objects.

    Source: DINO, section 3.3; DN-DETR for the groups.
    """

    def __init__(
        self,
        num_classes: int,
        embed_dims: int,
        num_dn_queries: int = 100,
        label_noise_ratio: float = 0.5,
        box_noise_scale: float = 1.0,
        max_dn_queries: int = 2000,
    ) -> None:
        super().__init__()
        if num_dn_queries < 1:
            raise ValueError(
                f'denoising.num_dn_queries must be at least 1, not {num_dn_queries}; '
                'write `denoising=None` to train without denoising.'
            )
        if label_noise_ratio < 0 or box_noise_scale < 0:
            raise ValueError(
                'denoising.label_noise_ratio and denoising.box_noise_scale must not be negative, '
                f'not {label_noise_ratio} and {box_noise_scale}; 0 switches a noise off.'
            )
        if max_dn_queries < 2 * num_dn_queries:
            raise ValueError(
                f'denoising.max_dn_queries is {max_dn_queries}, too few for the {num_dn_queries} objects of '
                f'`denoising.num_dn_queries`, as each takes two: set at least {2 * num_dn_queries}, or lower the other.'
            )
        self.num_classes = num_classes
        self.num_dn_queries = num_dn_queries
        self.label_noise_ratio = label_noise_ratio
        self.box_noise_scale = box_noise_scale
        self.max_dn_queries = max_dn_queries
        self.has_warned = False
        self.label_embedding = nn.Embedding(num_classes, embed_dims)

    def forward(self, targets: Targets, num_queries: int) -> DenoisingQueries:
        """Make the queries; none (``num_dn = 0``) if no image of the batch has an object.

        Args:
            targets: Ground truth of the batch.
            num_queries: Matching queries that the decoder gets besides.
        """
        targets = self.choose(targets)
        slots = max(targets.counts)
        num_groups = max(1, self.num_dn_queries // slots) if slots else 0
        # Views, as objects are few: repeating them would take longer than all arithmetic on them.
        labels = targets.labels[:, None, None].expand(-1, num_groups, 2, -1)
        boxes = targets.boxes[:, None, None].expand(-1, num_groups, 2, -1, -1)
        labels, boxes = self.add_noise(labels, boxes)

        mask = targets.mask[:, None, None].expand(labels.shape).flatten(1)[..., None]
        content = self.label_embedding(labels.flatten(1)).mul_(mask)
        reference = cut_off(boxes.flatten(1, 3)).masked_fill(~mask, 0.5)
        return DenoisingQueries(
            content,
            reference,
            visible_queries(num_groups, 2 * slots, num_queries, boxes.device),
            num_groups,
            targets,
        )

    def choose(self, targets: Targets) -> Targets:
        """The objects to make queries of: all, without a random draw, where ``max_dn_queries`` suffices."""
        fullest, most = max(targets.counts), self.max_dn_queries // 2
        if fullest <= most:
            return targets
        if not (self.has_warned or is_compiling()):  # a graph cannot warn
            self.has_warned = True
            warnings.warn(
                f'An image has {fullest} boxes, and denoising.max_dn_queries={self.max_dn_queries} has room for '
                f'{most}: so many are drawn from it anew in every step. More would take more memory. Said once.',
                stacklevel=2,
            )
        return draw_objects(targets, most)

    def add_noise(self, labels: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Noise ``labels`` (bs, num_groups, 2, num_slots) and ``boxes`` (..., 4), both draws anew for every entry."""
        if self.label_noise_ratio > 0:
            replacement = torch.randint(self.num_classes, labels.shape, device=labels.device)
            draw = torch.rand(labels.shape, dtype=boxes.dtype, device=labels.device)
            labels = noise_labels(labels, draw, replacement, self.label_noise_ratio / 2)
        if self.box_noise_scale > 0:
            draw = boxes.new_empty(boxes.shape).uniform_(-1, 1)
            boxes = noise_boxes(boxes, draw, self.box_noise_scale)
        return labels, boxes
