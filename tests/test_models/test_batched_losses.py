"""Matching and losses of all layers and images at once equal plain ones, gradients included; memory is bounded."""

from collections.abc import Sequence
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from mmdet.models.losses import L1Loss
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dino_mm.models.layers.denoising import CDNGenerator
from dino_mm.models.losses.focal_loss import FocalLoss
from dino_mm.models.losses.giou_loss import NormalizedGIoULoss
from dino_mm.models.losses.set_criterion import LOSSES, SetCriterion
from dino_mm.models.structures import Predictions, collate_targets
from dino_mm.models.task_modules.hungarian_matcher import HungarianMatcher

NUM_CLASSES, SIDE = 6, 200
Losses = dict[str, Tensor]


def make_samples(counts: list[int]) -> list[DetDataSample]:
    samples = []
    for count in counts:
        corner = torch.rand(count, 2, dtype=torch.float64) * 150
        boxes = torch.cat([corner, corner + 1 + torch.rand(count, 2, dtype=torch.float64) * 49], 1)
        gts = InstanceData(bboxes=boxes, labels=torch.randint(NUM_CLASSES, (count,)))
        samples.append(DetDataSample(metainfo=dict(img_shape=(SIDE, SIDE)), gt_instances=gts))
    return samples


def make_predictions(num_layers: int, bs: int, num_queries: int) -> tuple[Tensor, Tensor]:
    """Logits and boxes that take gradients."""
    scores = torch.randn(num_layers, bs, num_queries, NUM_CLASSES, dtype=torch.float64) * 3
    boxes = torch.rand(num_layers, bs, num_queries, 4, dtype=torch.float64) * 0.5 + 0.1
    return scores.requires_grad_(), boxes.requires_grad_()


def make_criterion() -> SetCriterion:
    losses = FocalLoss(gamma=2.0, alpha=0.25), L1Loss(loss_weight=5.0), NormalizedGIoULoss(loss_weight=2.0)
    return SetCriterion(NUM_CLASSES, *losses, HungarianMatcher())


def targets_of(sample: DetDataSample) -> tuple[Tensor, Tensor]:
    """Labels, and boxes as cxcywh in [0, 1], of one image."""
    boxes = sample.gt_instances.bboxes / SIDE
    return sample.gt_instances.labels, torch.cat([(boxes[:, :2] + boxes[:, 2:]) / 2, boxes[:, 2:] - boxes[:, :2]], 1)


def plain_giou(a: Tensor, b: Tensor) -> Tensor:
    """Of cxcywh boxes pair by pair; 1e-6 is added to what is divided by."""
    (a_low, a_high), (b_low, b_high) = ((x[..., :2] - x[..., 2:] / 2, x[..., :2] + x[..., 2:] / 2) for x in (a, b))
    inter = (torch.minimum(a_high, b_high) - torch.maximum(a_low, b_low)).clamp(min=0).prod(-1)
    hull = (torch.maximum(a_high, b_high) - torch.minimum(a_low, b_low)).prod(-1)
    union = a[..., 2:].prod(-1) + b[..., 2:].prod(-1) - inter
    return inter / (union + 1e-6) - (hull - union) / (hull + 1e-6)


def plain_match(scores: Tensor, boxes: Tensor, labels: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Queries of one image in one layer, and their objects."""
    p = scores.detach().sigmoid()[:, labels]
    cost_class = 0.25 * (1 - p) ** 2 * -(p + 1e-8).log() - 0.75 * p**2 * -(1 - p + 1e-8).log()
    apart = boxes.detach()[:, None], targets[None]
    cost = 2 * cost_class + 5 * (apart[0] - apart[1]).abs().sum(-1) - 2 * plain_giou(*apart)
    return tuple(torch.from_numpy(index) for index in linear_sum_assignment(cost))


def plain_image_losses(scores: Tensor, boxes: Tensor, labels: Tensor, targets: Tensor) -> Losses:
    """Sums over the queries of one image in one layer; ``boxes`` and ``targets`` are pairs, all queries have labels."""
    positive = F.one_hot(labels, NUM_CLASSES + 1)[:, :-1].double()
    p = scores.sigmoid()
    weight = positive * 0.25 * (1 - p) ** 2 + (1 - positive) * 0.75 * p**2
    return {
        'loss_cls': (weight * F.binary_cross_entropy_with_logits(scores, positive, reduction='none')).sum(),
        'loss_bbox': 5 * (boxes - targets).abs().sum(),
        'loss_iou': 2 * (1 - plain_giou(boxes, targets)).sum(),
    }


def plain_matched(scores: Tensor, boxes: Tensor, samples: list[DetDataSample]) -> list[Losses]:
    """One entry for each layer."""
    layers = []
    for layer_scores, layer_boxes in zip(scores, boxes, strict=True):
        images = []
        for s, b, sample in zip(layer_scores, layer_boxes, samples, strict=True):
            labels, targets = targets_of(sample)
            queries, objects = plain_match(s, b, labels, targets)
            every = torch.full((len(s),), NUM_CLASSES)
            every[queries] = labels[objects]
            images.append(plain_image_losses(s, b[queries], every, targets[objects]))
        layers.append(add_up(images))
    return layers


def plain_denoised(scores: Tensor, boxes: Tensor, samples: list[DetDataSample], num_groups: int) -> list[Losses]:
    slots = max(len(sample.gt_instances) for sample in samples)
    layers = []
    for layer_scores, layer_boxes in zip(scores, boxes, strict=True):
        parts = []
        for (s, b, sample), group in product(zip(layer_scores, layer_boxes, samples, strict=True), range(num_groups)):
            labels, targets = targets_of(sample)
            first = group * 2 * slots
            every = torch.full((2 * slots,), NUM_CLASSES)
            every[: len(labels)] = labels
            restored = b[first : first + len(labels)]
            parts.append(plain_image_losses(s[first : first + 2 * slots], restored, every, targets))
        layers.append(add_up(parts))
    return layers


def add_up(parts: list[Losses]) -> Losses:
    return {name: torch.stack([part[name] for part in parts]).sum() for name in parts[0]}


def stack(layers: list[Losses], divisor: int) -> Tensor:
    """As the criterion gives them, (3, num_layers)."""
    return torch.stack([torch.stack([layer[name] for layer in layers]) for name in LOSSES]) / divisor


def weigh(parts: Sequence[Tensor]) -> Tensor:
    """A sum in which each loss of each layer has a weight of its own."""
    losses = torch.cat([part.flatten() for part in parts])
    return (losses * torch.linspace(0.5, 2, len(losses), dtype=torch.float64)).sum()


@pytest.mark.parametrize('num_groups', [0, 1, 20])
@pytest.mark.parametrize('num_queries', [1, 40, 800])
@pytest.mark.parametrize('counts', [[1], [0, 1], [5, 0, 3], [40, 0, 24], [300, 2]])
def test_losses_and_gradients(counts: list[int], num_queries: int, num_groups: int) -> None:
    """Of two decoder layers with denoising queries, and of the encoder."""
    samples, num_dn, bs = make_samples(counts), num_groups * 2 * max(counts), len(counts)
    decoder = scores, boxes = make_predictions(2, bs, num_dn + num_queries)
    encoder = make_predictions(1, bs, num_queries)
    targets = collate_targets(samples, NUM_CLASSES)
    ours = make_criterion()(Predictions(*decoder), Predictions(*encoder), targets, num_groups)

    matched = plain_matched(scores[:, :, num_dn:], boxes[:, :, num_dn:], samples) + plain_matched(*encoder, samples)
    expected = [stack(matched, max(sum(counts), 1)), torch.zeros(3, 2, dtype=torch.float64)]
    if num_groups:
        denoised = plain_denoised(scores[:, :, :num_dn], boxes[:, :, :num_dn], samples, num_groups)
        expected[1] = stack(denoised, sum(counts) * num_groups)
    torch.testing.assert_close(list(ours), expected, rtol=1e-9, atol=1e-9)
    grads, expected_grads = (torch.autograd.grad(weigh(losses), [*decoder, *encoder]) for losses in (ours, expected))
    torch.testing.assert_close(grads, expected_grads, rtol=1e-9, atol=1e-9)


def test_losses_and_gradients_without_objects_and_without_encoder() -> None:
    """Only the background of the matching queries costs, and every prediction has a gradient."""
    samples, predictions = make_samples([0, 0]), make_predictions(3, 2, 40)
    losses, dn_losses = make_criterion()(Predictions(*predictions), None, collate_targets(samples, NUM_CLASSES), 0)
    expected = stack(plain_matched(*predictions, samples), 1)
    torch.testing.assert_close(losses, expected, rtol=1e-9, atol=1e-9)
    assert losses[1:].tolist() == [[0, 0, 0], [0, 0, 0]]
    assert dn_losses.tolist() == [[0, 0, 0]] * 3
    grads = torch.autograd.grad(weigh([losses, dn_losses]), predictions)
    weights = torch.linspace(0.5, 2, 18, dtype=torch.float64)[:3]
    (score_grad,) = torch.autograd.grad((expected[0] * weights).sum(), predictions[:1])
    torch.testing.assert_close(grads[0], score_grad, rtol=1e-9, atol=1e-9)
    assert torch.equal(grads[1], torch.zeros_like(grads[1]))


class NewBytes(TorchDispatchMode):
    """Sizes of the storage of all tensors that operators make while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        known = {leaf.untyped_storage().data_ptr() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        made = [leaf.untyped_storage() for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        self.sizes += [storage.nbytes() for storage in made if storage.data_ptr() not in known]
        return result


def loss_bytes(num_boxes: int, num_queries: int) -> int:
    """Of matching and all losses, forward and backward."""
    samples, (scores, boxes) = make_samples([num_boxes] * 2), make_predictions(2, 2, num_queries)
    targets, criterion = collate_targets(samples, NUM_CLASSES), make_criterion()
    with NewBytes() as new:
        losses, _ = criterion(Predictions(scores, boxes), None, targets, 0)
        losses.sum().backward()
    return sum(new.sizes)


def denoising_bytes(num_dn_queries: int, num_queries: int) -> int:
    """Of making the denoising queries of ten objects and their mask."""
    targets = collate_targets(make_samples([10, 7]), NUM_CLASSES)
    generator = CDNGenerator(NUM_CLASSES, embed_dims=8, num_dn_queries=num_dn_queries)
    with NewBytes() as new:
        generator(targets, num_queries)
    return sum(new.sizes)


def test_memory_of_matching_and_losses_grows_with_boxes_times_queries_at_most() -> None:
    num_boxes, num_queries = 20, 200
    base = loss_bytes(num_boxes, num_queries)
    assert base > 2 * 2 * num_boxes * num_queries * 8  # the costs alone
    assert loss_bytes(2 * num_boxes, num_queries) <= 2 * base
    assert loss_bytes(num_boxes, 2 * num_queries) <= 2 * base
    assert loss_bytes(4 * num_boxes, 4 * num_queries) <= 16 * base


def test_memory_of_denoising_grows_with_its_queries_times_all_at_most() -> None:
    base = denoising_bytes(100, 300)
    all_queries = 200 + 300
    assert base > all_queries**2  # the mask
    for num_dn_queries, num_queries in [(200, 300), (100, 600), (400, 1200), (1000, 300)]:
        growth = (num_dn_queries / 100) * (2 * num_dn_queries + num_queries) / all_queries
        assert denoising_bytes(num_dn_queries, num_queries) <= growth * base
