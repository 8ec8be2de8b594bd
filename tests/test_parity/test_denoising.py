"""The denoising queries equal detrex's ``prepare_for_cdn``, with and without noise."""

import numpy as np
import parity
import pytest
import torch

from dino_mm.models.layers.denoising import CDNGenerator, noise_boxes, noise_labels
from dino_mm.models.structures import Targets, collate_targets

CASES = [(dn, gts) for dn in (100, 300) for gts in ((3, 5), (3, 0), (1, 1))]
NUM_CLASSES, NUM_QUERIES = 80, 900


def make_targets(counts: tuple[int, int]) -> Targets:
    truth = parity.golden('train/dino_r50_4scale.json')['both']
    _, samples = parity.batch([np.zeros((*size, 3), np.uint8) for size in truth['image_sizes_hw']])
    boxes = [b[:n] for b, n in zip(truth['gt_boxes_xyxy_px'], counts, strict=True)]
    labels = [c[:n] for c, n in zip(truth['gt_classes'], counts, strict=True)]
    return collate_targets(parity.add_gts(samples, boxes, labels), NUM_CLASSES)


def reference_noise(generator: CDNGenerator, targets: Targets, labels, boxes):
    """Noise from draws in the reference's order, made for objects without padding, put into the padded layout."""
    torch.manual_seed(0)
    slots, num_groups = labels.shape[3], labels.shape[1]
    total = targets.total * 2 * num_groups
    draw = torch.rand(total)
    chosen = (draw < 0.25).nonzero().flatten()
    replacement = torch.zeros(total, dtype=torch.long)
    replacement[chosen] = torch.randint_like(chosen, 0, NUM_CLASSES)
    sign = torch.randint_like(torch.zeros(total, 4), low=0, high=2) * 2 - 1
    part = torch.rand(total, 4)

    def padded(flat):
        flat = flat.view(num_groups, 2, targets.total, *flat.shape[1:])
        out = flat.new_zeros(2, num_groups, 2, slots, *flat.shape[3:])
        for image, (start, count) in enumerate([(0, targets.counts[0]), (targets.counts[0], targets.counts[1])]):
            out[image, :, :, :count] = flat[:, :, start : start + count]
        return out

    labels = noise_labels(labels, padded(draw), padded(replacement), 0.25)
    return labels, noise_boxes(boxes, padded(sign * part), generator.box_noise_scale)


@pytest.mark.parametrize('noise', ['noise', 'clean'])
@pytest.mark.parametrize(('num_dn', 'counts'), CASES)
def test_queries_equal_the_references(num_dn: int, counts: tuple[int, int], noise: str, monkeypatch) -> None:
    name = f'dn{num_dn}_gt{counts[0]}-{counts[1]}_{noise}'
    expected, meta = parity.golden(f'cdn/{name}.npz'), parity.golden('cdn/meta.json')[name]
    targets = make_targets(counts)
    scale = 1.0 if noise == 'noise' else 0.0
    generator = CDNGenerator(NUM_CLASSES, 8, num_dn, label_noise_ratio=0.5 * scale, box_noise_scale=scale)
    if noise == 'noise':
        monkeypatch.setattr(
            generator, 'add_noise', lambda labels, boxes: reference_noise(generator, targets, labels, boxes)
        )
    # Row i of this embedding is i + 1, so a content query shows its class, and 0 the padding.
    generator.label_embedding.weight.data = torch.arange(1.0, NUM_CLASSES + 1)[:, None].expand(-1, 8).clone()

    queries = generator(targets, NUM_QUERIES)

    assert queries.num_groups == meta['dn_meta']['dn_num']
    assert queries.content.shape[1] == meta['pad_size'] == queries.num_groups * meta['dn_meta']['single_padding']
    np.testing.assert_array_equal(queries.content[..., 0].detach() - 1, expected['input_query_label_class'])
    shape = expected['attn_mask_shape']
    mask = np.unpackbits(expected['attn_mask_packed'])[: np.prod(shape)].reshape(shape).astype(bool)
    num_dn = len(queries.visible)
    np.testing.assert_array_equal(queries.visible, ~mask[:num_dn])
    assert (mask[num_dn:, :num_dn]).all()
    assert not mask[num_dn:, num_dn:].any()
    reference = torch.from_numpy(expected['input_query_bbox'])
    np.testing.assert_allclose(queries.reference, reference.sigmoid(), atol=1e-6)
    # Near 0 and 1 a float32 ulp of the coordinate is up to 1e-4 of its logit.
    np.testing.assert_allclose(queries.reference.logit(), reference, atol=2e-4)


def test_more_objects_than_denoising_queries_give_one_group() -> None:
    _, samples = parity.batch([np.zeros((64, 64, 3), np.uint8)])
    parity.add_gts(samples, [[[1, 2, 30, 40]] * 130], [[0] * 130])
    queries = CDNGenerator(NUM_CLASSES, 8, 100)(collate_targets(samples, NUM_CLASSES), NUM_QUERIES)
    assert queries.num_groups == 1
    assert queries.content.shape == (1, 260, 8)


def test_no_objects_give_no_queries_but_a_gradient() -> None:
    generator = CDNGenerator(NUM_CLASSES, 8, 100)
    queries = generator(make_targets((0, 0)), NUM_QUERIES)
    assert queries.num_groups == 0
    assert queries.content.shape == (2, 0, 8)
    queries.content.sum().backward()
    assert generator.label_embedding.weight.grad.abs().sum() == 0
