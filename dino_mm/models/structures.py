"""The seams of the data path: what one part of DINO hands to the next.

Shapes use one vocabulary: ``bs, num_queries, dim, num_levels, num_tokens, num_classes, num_layers, num_gts``.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from mmdet.structures import DetDataSample
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from ..ops.transfer import to_device
from .box_ops import center_size


class FeatureLevels(NamedTuple):
    """Geometry of the feature maps whose pixels, one map after the other, are the tokens."""

    shapes: tuple[tuple[int, int], ...]
    """(height, width) of every level, known to the host."""
    shape_tensor: Tensor
    """The same as an integer tensor (num_levels, 2) on the model's device, as mmcv's op wants it."""
    start_index: Tensor
    """(num_levels,), index of each level's first token."""
    sizes: Tensor
    """(num_levels, 2) float32, (width, height) of every level."""
    valid_ratios: Tensor
    """(bs, num_levels, 2), part of the (width, height) that is image, not padding."""


class ImageSizes(NamedTuple):
    """Sizes of the images of a padded batch as a tensor, in place of data samples: an exported model's input."""

    sizes: Tensor
    """(bs, 2) int64, (height, width) of each image without padding."""
    batch_shape: tuple[int, int]
    """(height, width) of all with padding."""


class Tokens(NamedTuple):
    """The feature pyramid of a batch as one sequence of tokens."""

    features: Tensor
    """(bs, num_tokens, dim)."""
    positions: Tensor
    """(bs, num_tokens, dim), sine position plus learnt level embedding."""
    centers: Tensor
    """(bs, num_tokens, 2), centre (x, y) of each token, in [0, 1] of the image without padding."""
    padding_mask: Tensor | None
    """(bs, num_tokens), True on padding; None where no image of the batch is padded."""
    levels: FeatureLevels


class QuerySelection(NamedTuple):
    """The queries with which the decoder starts."""

    content: Tensor
    """(bs, num_queries, dim)."""
    reference: Tensor
    """(bs, num_queries, 4), cxcywh in [0, 1], detached where it comes from the encoder."""
    scores: Tensor | None = None
    """(bs, num_queries, num_classes), the encoder's logits of the selected tokens, if it selects."""
    boxes: Tensor | None = None
    """(bs, num_queries, 4), the encoder's boxes of the selected tokens, cxcywh in [0, 1]."""


class DenoisingQueries(NamedTuple):
    """Noised ground truth that the decoder learns to restore, in groups of positives, then negatives.

    ``num_dn = num_groups * 2 * num_slots``; image ``b`` uses the first ``counts[b]`` slots of every half group.
    """

    content: Tensor
    """(bs, num_dn, dim), embeddings of the noised labels, 0 in unused slots."""
    reference: Tensor
    """(bs, num_dn, 4), noised boxes, cxcywh in [0, 1]."""
    visible: Tensor
    """(num_dn, num_dn + num_queries) bool, which queries each of them may attend to. No other query sees them."""
    num_groups: int
    targets: 'Targets'
    """The objects that each group holds; of an image with very many, some."""


class DecoderStates(NamedTuple):
    """What the decoder hands to the head."""

    hidden_states: Tensor
    """(num_layers, bs, num_queries, dim), every layer's output after the decoder's norm."""
    references: list[Tensor]
    """num_layers + 1 boxes (bs, num_queries, 4), cxcywh in [0, 1]: the initial ones, then each layer's."""


class Predictions(NamedTuple):
    """What the branches predict, in one or more layers; float32 or wider."""

    scores: Tensor
    """(num_layers, bs, num_queries, num_classes) logits."""
    boxes: Tensor
    """(num_layers, bs, num_queries, 4), cxcywh in [0, 1] of the image without padding."""


class Targets(NamedTuple):
    """Ground truth of a batch, padded to the largest image, at least to one slot."""

    labels: Tensor
    """(bs, num_gts) int64, 0 in padding."""
    boxes: Tensor
    """(bs, num_gts, 4), cxcywh in [0, 1] of the image without padding; NaN where the annotation is unusable."""
    mask: Tensor
    """(bs, num_gts), True where there is an object."""
    counts: list[int]
    """Objects of each image."""
    samples: Sequence[DetDataSample]
    """The data samples that the targets come from; error messages name them."""

    @property
    def total(self) -> int:
        """Objects in the batch."""
        return sum(self.counts)


def collate_targets(samples: Sequence[DetDataSample], num_classes: int) -> Targets:
    """Pad the ground truth of a batch without waiting for the device.

    A label outside ``[0, num_classes)`` and a box that is not finite or has no area get NaN boxes. These make the
    matching cost NaN, and the matcher, which sees the costs on the host anyway, names image and box
    (:func:`describe_unusable_targets`): the check costs no host synchronisation of its own.

    Args:
        samples: Data samples with ``img_shape`` and ``gt_instances`` (``bboxes`` xyxy in pixels, ``labels``).
        num_classes: Number of classes of the head.
    """
    boxes = [sample.gt_instances.bboxes for sample in samples]
    labels = [sample.gt_instances.labels for sample in samples]
    counts = [len(b) for b in boxes]
    padded_boxes, padded_labels = pad_sequence(boxes, batch_first=True), pad_sequence(labels, batch_first=True).long()
    if not any(counts):  # one slot nevertheless, so that no code below meets an empty axis
        padded_boxes, padded_labels = padded_boxes.new_zeros(len(boxes), 1, 4), padded_labels.new_zeros(len(boxes), 1)
    device, (heights, widths) = padded_boxes.device, zip(*(sample.img_shape[:2] for sample in samples), strict=True)
    sizes, used = to_device([[widths, heights, widths, heights], counts], device)
    mask = torch.arange(padded_boxes.shape[1], device=device) < used[:, None]
    normalized = center_size(padded_boxes / sizes.t()[:, None])
    unusable = _unusable(padded_boxes, padded_labels, num_classes) & mask
    return Targets(
        labels=padded_labels.clamp(0, num_classes - 1),
        boxes=normalized.masked_fill(unusable[..., None], torch.nan),
        mask=mask,
        counts=counts,
        samples=samples,
    )


def _unusable(boxes: Tensor, labels: Tensor, num_classes: int) -> Tensor:
    """True for boxes (..., 4), xyxy, without area or not finite, and labels (...) outside the classes."""
    start, end = boxes.split(2, -1)
    sides = end - start  # not finite where an end is not
    has_area = ((sides > 0) & (sides < torch.inf)).all(-1)
    return ~(has_area & (labels == labels.clamp(0, num_classes - 1)))


def describe_unusable_targets(targets: Targets, num_classes: int) -> str | None:
    """One line for each unusable annotation, or None if there is none. Waits for the device: errors only."""
    lines = []
    for sample in targets.samples:
        gts = sample.gt_instances
        for i in _unusable(gts.bboxes, gts.labels, num_classes).nonzero().flatten().tolist():
            label, box = int(gts.labels[i]), gts.bboxes[i].tolist()
            fault = f'label {label} is outside [0, {num_classes})'
            if 0 <= label < num_classes:
                fault = f'box (x1, y1, x2, y2) = {box} is not finite or has no area'
            lines.append(f'{name_image(sample)}: ground truth {i}: {fault}')
    if not lines:
        return None
    return '\n'.join(
        [
            'Unusable ground truth:',
            *lines,
            "Correct or remove these annotations. Labels must fit `bbox_head.num_classes` and the data set's "
            '`metainfo.classes`; `FilterAnnotations` at the end of the pipeline drops boxes without area.',
        ]
    )


def name_image(sample: DetDataSample) -> str:
    """How messages call an image: its id, and its file where known."""
    name = f'image id {sample.metainfo.get("img_id", "unknown")}'
    path = sample.metainfo.get('img_path')
    return f'{name} ({path})' if path else name
