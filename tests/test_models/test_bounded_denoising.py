"""Denoising of images with very many objects: bounded, drawn evenly, with losses of what was drawn."""

import itertools
import warnings
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from conftest import make_samples
from mmengine.config import Config
from test_matcher_and_losses import NUM_CLASSES, make_batch, make_criterion, naive_box, naive_focal, naive_giou

from dino_mm.benchmark.memory import LiveBytes
from dino_mm.models.layers.denoising import CDNGenerator, draw_objects
from dino_mm.models.structures import Predictions, Targets, collate_targets
from dino_mm.registry import MODELS


def make_targets(*counts: int) -> Targets:
    return collate_targets(make_samples(counts)[1], num_classes=5)


def make_generator(max_dn_queries: int, num_dn_queries: int = 2) -> CDNGenerator:
    return CDNGenerator(5, 8, num_dn_queries, max_dn_queries=max_dn_queries)


@pytest.mark.filterwarnings('ignore:An image has')
def test_queries_and_their_memory_are_bounded() -> None:
    peaks = {}
    for count, cap in itertools.product((20, 3000), (40, 6000)):
        targets, generator = make_targets(count, 3), make_generator(cap)
        with LiveBytes() as live:
            queries = generator(targets, 900)
        num_dn = min(2 * count, cap)
        assert queries.content.shape == (2, num_dn, 8)
        assert queries.visible.shape == (num_dn, num_dn + 900)
        assert queries.targets.counts == [num_dn // 2, 3]
        peaks[count, cap] = live.peak
    assert peaks[3000, 6000] > 6000 * 6900  # the mask alone
    # A number to draw by for each object, and some more while they are sorted.
    assert peaks[3000, 40] < peaks[20, 40] + 2 * 3000 * 32


def test_objects_are_drawn_evenly_and_without_replacement() -> None:
    targets = make_targets(5, 2)
    targets = targets._replace(labels=torch.tensor([[0, 1, 2, 3, 4], [3, 1, 0, 0, 0]]))
    pairs: Counter[tuple[int, ...]] = Counter()
    for _ in range(2000):
        drawn = draw_objects(targets, 2)
        pairs[tuple(drawn.labels[0].tolist())] += 1
        assert drawn.labels[1].tolist() == [3, 1]
    assert set(pairs) == set(itertools.combinations(range(5), 2))  # in their order
    assert all(abs(count - 200) < 4.5 * (2000 * 0.1 * 0.9) ** 0.5 for count in pairs.values()), pairs


def test_what_is_drawn_belongs_together() -> None:
    targets = make_targets(7, 2, 0)
    drawn = draw_objects(targets, 3)
    assert drawn.counts == [3, 2, 0]
    assert drawn.mask.tolist() == [[True] * 3, [True, True, False], [False] * 3]
    where = (targets.boxes[0, :, None] == drawn.boxes[0]).all(-1).nonzero()
    assert where[:, 1].tolist() == sorted(where[:, 1].tolist())
    assert targets.labels[0, where[:, 0]].tolist() == drawn.labels[0].tolist()
    assert torch.equal(drawn.boxes[1], targets.boxes[1, :3])
    assert drawn.samples is targets.samples


def test_draws_repeat_with_the_seed() -> None:
    targets, generator = make_targets(50), make_generator(20)
    generator.has_warned = True
    drawn = []
    for seed in (3, 3, 4):
        torch.manual_seed(seed)
        drawn.append([generator(targets, 9).targets.boxes for _ in range(2)])
    assert torch.equal(drawn[0][0], drawn[1][0])
    assert torch.equal(drawn[0][1], drawn[1][1])
    assert not torch.equal(drawn[0][0], drawn[0][1])
    assert not torch.equal(drawn[0][0], drawn[2][0])


def test_where_all_fit_nothing_is_drawn(tiny_cfg: Config) -> None:
    """Losses, gradients and the random numbers that come after are the same, to the last digit."""
    results = []
    for cap in (2 * 7, 2000):
        tiny_cfg.denoising.max_dn_queries = cap
        torch.manual_seed(0)
        model = MODELS.build(tiny_cfg)
        losses = model.loss(*make_samples((7, 2)))
        sum(losses.values()).backward()
        grads = {name: p.grad for name, p in model.named_parameters()}
        results.append({**{k: v.detach() for k, v in losses.items()}, **grads, 'next': torch.rand(1)})
    torch.testing.assert_close(*results, rtol=0, atol=0)


def test_the_warning_is_given_once_and_tells_the_numbers() -> None:
    targets, generator = make_targets(9, 30), make_generator(20)
    with pytest.warns(UserWarning, match=r'has 30 boxes, and denoising\.max_dn_queries=20 has room for 10'):
        generator(targets, 5)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        generator(targets, 5)
        make_generator(20)(make_targets(10), 5)


@pytest.mark.parametrize(('cap', 'num_dn'), [(1, 1), (0, 1), (199, 100)])
def test_a_cap_without_room_is_refused(cap: int, num_dn: int) -> None:
    with pytest.raises(ValueError, match=rf'max_dn_queries is {cap}, too few .* set at least {2 * num_dn},'):
        make_generator(cap, num_dn)


@pytest.mark.parametrize('counts', [[6, 1], [0, 5]])
def test_losses_of_what_was_drawn_equal_naive_loops(counts: list[int]) -> None:
    groups, slots = 3, 2
    num_dn = groups * 2 * slots
    samples, scores, boxes = make_batch(counts, num_dn + 4)
    targets = collate_targets(samples, NUM_CLASSES)
    drawn = draw_objects(targets, slots)
    matched, losses = make_criterion()(Predictions(scores, boxes), None, targets, groups, drawn)

    all_boxes = [[naive_box(sample, i) for i in range(len(sample.gt_instances))] for sample in samples]
    total = sum(min(count, slots) for count in counts) * groups
    for layer in range(len(scores)):
        expected = [0.0, 0.0, 0.0]
        for (image, count), q in itertools.product(enumerate(counts), range(num_dn)):
            half, slot = divmod(q, slots)
            label = target = None
            if half % 2 == 0 and slot < count:
                target = drawn.boxes[image, slot].tolist()
                object_ = min(range(count), key=lambda i: abs(all_boxes[image][i][0] - target[0]))
                assert all_boxes[image][object_] == pytest.approx(target, abs=1e-12)
                label = int(samples[image].gt_instances.labels[object_])
                box = boxes[layer, image, q].tolist()
                expected[1] += 5 * sum(abs(u - v) for u, v in zip(box, target, strict=True)) / total
                expected[2] += 2 * (1 - naive_giou(box, target)) / total
            for c in range(NUM_CLASSES):
                expected[0] += 1.5 * naive_focal(scores[layer, image, q, c].item(), c == label) / total
        assert losses[:, layer].tolist() == pytest.approx(expected, rel=1e-9)
    # The matching queries learn all objects.
    alone, _ = make_criterion()(Predictions(scores[:, :, num_dn:], boxes[:, :, num_dn:]), None, targets, 0)
    torch.testing.assert_close(matched, alone, rtol=1e-12, atol=0)


def test_gradients_are_those_of_a_batch_without_the_others() -> None:
    groups, slots = 2, 3
    num_dn = groups * 2 * slots
    samples, *predictions = make_batch([8, 2], num_dn + 4)
    scores, boxes = (tensor.requires_grad_() for tensor in predictions)
    targets = collate_targets(samples, NUM_CLASSES)
    drawn, grads = draw_objects(targets, slots), []
    for arguments in ((targets, groups, drawn), (drawn, groups)):
        _, losses = make_criterion()(Predictions(scores, boxes), None, *arguments)
        grads.append(torch.autograd.grad((losses * torch.tensor([[1.0], [2.0], [3.0]])).sum(), (scores, boxes)))
    torch.testing.assert_close(*grads, rtol=1e-12, atol=0)
    assert all(grad[:, :, :num_dn].abs().sum() > 0 for grad in grads[0])


@pytest.fixture
def _fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures('_fresh_dynamo')
@pytest.mark.filterwarnings('ignore:An image has')
def test_a_crowded_training_step_runs_and_compiles(tiny_cfg: Config) -> None:
    """Without a graph break, though it would warn; every parameter gets a gradient."""
    tiny_cfg.denoising.max_dn_queries = 12
    model = MODELS.build(tiny_cfg).double()
    inputs, samples = make_samples((30, 1))
    totals = []
    for compiled in (False, True):
        model.denoising.has_warned = False
        if compiled:
            model.forward_transformer = torch.compile(model.forward_transformer, fullgraph=True, backend='eager')
        torch.manual_seed(1)
        model.zero_grad()
        losses = model.loss(inputs.double(), samples)
        sum(losses.values()).backward()
        totals.append({name: loss.detach() for name, loss in losses.items()})
        assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    torch.testing.assert_close(*totals, rtol=1e-9, atol=1e-9)
