"""Matcher and losses equal naive loops over layers, images and boxes."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmdet.models.losses import FocalLoss as MMDetFocalLoss
from mmdet.models.losses import L1Loss
from mmdet.structures import DetDataSample
from mmengine.structures import InstanceData
from scipy.optimize import linear_sum_assignment

from dino_mm.models.box_ops import generalized_iou
from dino_mm.models.losses.focal_loss import FocalLoss
from dino_mm.models.losses.giou_loss import NormalizedGIoULoss
from dino_mm.models.losses.set_criterion import LOSSES, SetCriterion
from dino_mm.models.structures import Predictions, collate_targets
from dino_mm.models.task_modules.hungarian_matcher import HungarianMatcher

NUM_CLASSES, SIZE = 4, (80, 100)


def make_batch(counts, num_queries, num_layers=2, seed=0):
    generator = torch.Generator().manual_seed(seed)
    rand = lambda *shape: torch.rand(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    samples = []
    for count in counts:
        top_left = rand(count, 2) * 40
        boxes = torch.cat([top_left, top_left + 1 + rand(count, 2) * 35], 1)
        labels = torch.randint(NUM_CLASSES, (count,), generator=generator)
        sample = DetDataSample(metainfo=dict(img_id=7, img_shape=SIZE, img_path='a/b.jpg'))
        sample.gt_instances = InstanceData(bboxes=boxes, labels=labels)
        samples.append(sample)
    scores = rand(num_layers, len(counts), num_queries, NUM_CLASSES) * 6 - 3
    boxes = rand(num_layers, len(counts), num_queries, 4) * 0.5 + 0.1
    return samples, scores, boxes


def naive_box(sample, i):
    x1, y1, x2, y2 = sample.gt_instances.bboxes[i].tolist()
    height, width = SIZE
    return [(x1 + x2) / 2 / width, (y1 + y2) / 2 / height, (x2 - x1) / width, (y2 - y1) / height]


def naive_giou(a, b):
    ax1, ay1, ax2, ay2 = a[0] - a[2] / 2, a[1] - a[3] / 2, a[0] + a[2] / 2, a[1] + a[3] / 2
    bx1, by1, bx2, by2 = b[0] - b[2] / 2, b[1] - b[3] / 2, b[0] + b[2] / 2, b[1] + b[3] / 2
    inter = max(0, min(ax2, bx2) - max(ax1, bx1)) * max(0, min(ay2, by2) - max(ay1, by1))
    union = a[2] * a[3] + b[2] * b[3] - inter
    hull = (max(ax2, bx2) - min(ax1, bx1)) * (max(ay2, by2) - min(ay1, by1))
    return inter / (union + 1e-6) - (hull - union) / (hull + 1e-6)


def naive_cost(logits, box, label, target):
    p = 1 / (1 + math.exp(-logits[label]))
    positive = 0.25 * (1 - p) ** 2 * -math.log(p + 1e-8)
    negative = 0.75 * p**2 * -math.log(1 - p + 1e-8)
    distance = sum(abs(u - v) for u, v in zip(box, target, strict=True))
    return 2 * (positive - negative) + 5 * distance - 2 * naive_giou(box, target)


def naive_focal(logit, positive):
    p = 1 / (1 + math.exp(-logit))
    return 0.25 * (1 - p) ** 2 * -math.log(p) if positive else 0.75 * p**2 * -math.log(1 - p)


def naive_pairs(samples, scores, boxes, layer, image):
    gts = samples[image].gt_instances
    cost = [
        [
            naive_cost(
                scores[layer, image, q].tolist(),
                boxes[layer, image, q].tolist(),
                int(gts.labels[g]),
                naive_box(samples[image], g),
            )
            for g in range(len(gts))
        ]
        for q in range(scores.shape[2])
    ]
    return list(zip(*linear_sum_assignment(cost), strict=True)) if len(gts) else []


def make_criterion():
    return SetCriterion(
        NUM_CLASSES,
        FocalLoss(gamma=2.0, alpha=0.25, loss_weight=1.5),
        L1Loss(loss_weight=5.0),
        NormalizedGIoULoss(loss_weight=2.0),
        HungarianMatcher(),
    )


@settings(max_examples=25, deadline=None)
@given(
    counts=st.lists(st.integers(0, 7), min_size=1, max_size=3),
    num_queries=st.integers(1, 9),
    seed=st.integers(0, 1000),
)
def test_matching_and_losses_equal_naive_loops(counts, num_queries, seed):
    samples, scores, boxes = make_batch(counts, num_queries, seed=seed)
    targets = collate_targets(samples, NUM_CLASSES)
    criterion = make_criterion()
    match = criterion.matcher([scores], boxes, targets)
    losses, _ = criterion(Predictions(scores, boxes), None, targets, 0)
    num_boxes = max(1, sum(counts))
    for layer in range(len(scores)):
        expected = {'loss_cls': 0.0, 'loss_bbox': 0.0, 'loss_iou': 0.0}
        for image, sample in enumerate(samples):
            pairs = naive_pairs(samples, scores, boxes, layer, image)
            partner = {g: q for q, g in pairs}
            assert match[layer, image].tolist() == [partner.get(g, num_queries) for g in range(match.shape[2])]
            label = {q: int(sample.gt_instances.labels[g]) for q, g in pairs}
            for q in range(num_queries):
                for c in range(NUM_CLASSES):
                    logit = scores[layer, image, q, c].item()
                    expected['loss_cls'] += 1.5 * naive_focal(logit, label.get(q) == c) / num_boxes
            for q, g in pairs:
                box, target = boxes[layer, image, q].tolist(), naive_box(sample, g)
                distance = sum(abs(u - v) for u, v in zip(box, target, strict=True))
                expected['loss_bbox'] += 5 * distance / num_boxes
                expected['loss_iou'] += 2 * (1 - naive_giou(box, target)) / num_boxes
        assert dict(zip(LOSSES, losses[:, layer].tolist(), strict=True)) == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_denoising_queries_may_have_a_classification_loss_of_their_own():
    samples, scores, boxes = make_batch([2, 1], 12 + 5)
    targets = collate_targets(samples, NUM_CLASSES)
    both = make_criterion()
    own = SetCriterion(
        NUM_CLASSES,
        both.loss_cls,
        both.loss_bbox,
        both.loss_iou,
        both.matcher,
        loss_dn_cls=FocalLoss(gamma=2.0, alpha=0.25, loss_weight=3.0),
    )
    (matched, denoised), expected = (c(Predictions(scores, boxes), None, targets, 3) for c in (own, both))
    torch.testing.assert_close(matched, expected[0])
    torch.testing.assert_close(denoised, expected[1] * torch.tensor([2, 1, 1])[:, None])


@pytest.mark.parametrize('counts', [[2, 3], [0, 2], [1, 1]])
def test_denoising_losses_equal_naive_loops(counts):
    groups, slots = 3, max(counts)
    num_dn = groups * 2 * slots
    samples, scores, boxes = make_batch(counts, num_dn + 4)
    targets = collate_targets(samples, NUM_CLASSES)
    _, losses = make_criterion()(Predictions(scores, boxes), None, targets, groups)
    num_boxes = sum(counts) * groups
    for layer in range(len(scores)):
        expected = {'loss_cls': 0.0, 'loss_bbox': 0.0, 'loss_iou': 0.0}
        for image, sample in enumerate(samples):
            for q in range(num_dn):
                half, slot = divmod(q, slots)
                positive = half % 2 == 0 and slot < counts[image]
                label = int(sample.gt_instances.labels[slot]) if positive else None
                for c in range(NUM_CLASSES):
                    expected['loss_cls'] += 1.5 * naive_focal(scores[layer, image, q, c].item(), c == label) / num_boxes
                if positive:
                    box, target = boxes[layer, image, q].tolist(), naive_box(sample, slot)
                    distance = sum(abs(u - v) for u, v in zip(box, target, strict=True))
                    expected['loss_bbox'] += 5 * distance / num_boxes
                    expected['loss_iou'] += 2 * (1 - naive_giou(box, target)) / num_boxes
        assert dict(zip(LOSSES, losses[:, layer].tolist(), strict=True)) == pytest.approx(expected, rel=1e-9)


def test_giou_of_known_boxes():
    a = torch.tensor([[0.0, 0.0, 0.5, 0.5], [0.0, 0.0, 0.2, 0.2]], dtype=torch.float64)
    b = torch.tensor([[0.25, 0.0, 0.75, 0.5], [0.8, 0.8, 1.0, 1.0]], dtype=torch.float64)
    giou = generalized_iou(a, b)
    assert giou[0].item() == pytest.approx(0.125 / (0.375 + 1e-6), rel=1e-12)
    assert giou[1].item() == pytest.approx(-(1 - 0.08) / (1 + 1e-6), rel=1e-12)


@pytest.mark.parametrize(
    ('box', 'label', 'fault'),
    [
        ([1, 2, 1, 9], 0, 'has no area'),
        ([1, 2, float('nan'), 9], 0, 'is not finite or has no area'),
        ([1, 2, 5, 9], NUM_CLASSES, f'label {NUM_CLASSES} is outside [0, {NUM_CLASSES})'),
        ([1, 2, 5, 9], -1, f'label -1 is outside [0, {NUM_CLASSES})'),
    ],
)
def test_unusable_ground_truth_names_image_and_box(box, label, fault):
    samples, scores, boxes = make_batch([2, 1], 5)
    samples[1].gt_instances.bboxes[0] = torch.tensor(box)
    samples[1].gt_instances.labels[0] = label
    with pytest.raises(ValueError, match='Unusable ground truth') as error:
        HungarianMatcher()([scores], boxes, collate_targets(samples, NUM_CLASSES))
    assert 'image id 7 (a/b.jpg): ground truth 0' in str(error.value)
    assert fault in str(error.value)
    assert str(error.value).count('ground truth 0') == 1


@pytest.mark.parametrize('wrong', [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize('where', ['boxes', 'scores'])
def test_predictions_that_are_not_finite_are_named(wrong, where):
    """One number is enough; a class that no object has, too."""
    samples, scores, boxes = make_batch([2, 1], 5)
    samples[1].set_metainfo(dict(img_id=8, img_path='c.jpg'))
    samples[1].gt_instances.labels[:] = 0
    (boxes if where == 'boxes' else scores)[1, 1, 4, 3] = wrong
    with pytest.raises(FloatingPointError, match=r'layer 1 for image id 8 \(c\.jpg\) are not finite'):
        HungarianMatcher()([scores], boxes, collate_targets(samples, NUM_CLASSES))


@pytest.mark.parametrize('counts', [(2, 1), (0, 0)])
def test_all_gradients_are_nan_where_a_number_is_not_finite(counts):
    """As the criterion gives them on request; else losses and gradients are the same to the last digit."""
    samples, scores, boxes = make_batch(counts, 9)
    targets = collate_targets(samples, NUM_CLASSES)
    results = {}
    for spreads, wrong in ((False, None), (True, None), (True, math.nan), (True, math.inf)):
        inputs = [scores.clone(), boxes.clone()]
        if wrong is not None:
            inputs[0][0, 0, 8, 3] = wrong
        inputs = [one.requires_grad_() for one in inputs]
        criterion = make_criterion()
        criterion.nan_where_not_finite = spreads
        losses, dn_losses = criterion(Predictions(*inputs), None, targets, 0)
        (losses.sum() + dn_losses.sum()).backward()
        results[spreads, wrong] = [losses.detach(), *(one.grad for one in inputs)]
        assert (criterion.not_finite is not None) == (wrong is not None and sum(counts) > 0)
    for plain, spread in zip(results[False, None], results[True, None], strict=True):
        assert torch.equal(plain, spread)
    for wrong in (math.nan, math.inf):
        losses, *gradients = results[True, wrong]
        assert not losses.isfinite().all()
        assert all(gradient.isnan().any() for gradient in gradients[: 1 + (sum(counts) > 0)])


@pytest.mark.parametrize(('gamma', 'alpha'), [(2.0, 0.25), (1.5, 0.6), (0.0, 0.5)])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
def test_focal_loss_equals_mmdets(gamma, alpha, dtype):
    """Values and gradients, from -100 to 100, for objects and background; mmdet's keeps the classes apart."""
    logits = torch.cat([torch.randn(200, 7) * 3, torch.linspace(-100, 100, 140).view(20, 7)]).to(dtype)
    labels = torch.randint(0, 8, (220,))
    weights = torch.rand(220, dtype=dtype)
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    arguments = dict(gamma=gamma, alpha=alpha, loss_weight=1.5)
    loss = FocalLoss(**arguments)(ours, labels, reduction_override='none')
    expected = MMDetFocalLoss(use_sigmoid=True, **arguments)(theirs, labels, reduction_override='none').sum(1)
    tolerance = dict(rtol=1e-12, atol=1e-12) if dtype is torch.float64 else dict(rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss, expected, **tolerance)
    (loss * weights).sum().backward()
    (expected * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, **tolerance)
    assert loss.dtype == dtype


def test_focal_loss_has_the_gradient_of_finite_differences():
    logits = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 2, 3, 3, 1])
    assert torch.autograd.gradcheck(lambda x: FocalLoss()(x, labels, reduction_override='none'), logits)


def test_focal_loss_keeps_one_tensor_for_the_backward_pass():
    kept = []
    logits = torch.randn(50, 7, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        FocalLoss()(logits, torch.zeros(50, dtype=torch.long), reduction_override='sum')
    assert kept == [(50, 7)]
