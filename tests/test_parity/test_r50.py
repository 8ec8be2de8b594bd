"""DINO R50 4-scale equals detrex's: outputs, losses, gradients, post-processing, in float64."""

import re

import numpy as np
import parity
import pytest
import torch
from mmengine.config import Config
from parity import golden
from torch import Tensor

import dino_mm
from dino_mm.models import DINO
from dino_mm.registry import MODELS


@pytest.fixture(scope='module')
def model() -> DINO:
    cfg = Config.fromfile(dino_mm.cfg('dino-resnet/dino_r50_4scale_12ep.py')).model
    cfg.backbone.init_cfg = None
    return parity.fill_by_rule(MODELS.build(cfg).double())


def test_state_dict_is_the_references(model: DINO) -> None:
    keys = golden('keys/dino_r50_4scale.json')
    ours = {
        parity.detrex_name(k): list(v.shape) for k, v in model.state_dict().items() if 'num_batches_tracked' not in k
    }
    assert ours == {k: v for k, v in keys['tensors'].items() if k not in keys['aliases']}
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert trainable == keys['num_trainable_parameters'] == 47640908


@pytest.mark.parametrize(
    ('name', 'size', 'num_arrays'),
    [
        ('eval/dino_r50_4scale.npz', (256, 320), 23),
        ('eval/dino_r50_4scale__250x333.npz', (250, 333), 24),
        ('edge/eval_std.npz', (40, 1024), 7),
    ],
)
def test_inference(model: DINO, name: str, size: tuple[int, int], num_arrays: int) -> None:
    expected = golden(name)
    inputs, samples = parity.batch([parity.image(2022, *size)])
    model.eval()
    with torch.no_grad():
        feats = model.extract_feat(inputs)
        tokens = model.pre_transformer(feats, samples)
        memory = model.forward_encoder(tokens)
        selection, _ = model.pre_decoder(memory, tokens)
        states = model.forward_decoder(memory, tokens, selection)
        logits, boxes = model.bbox_head(*states)
        results = model.bbox_head.predict(*states, samples)[0]

    actual = {
        **{f'neck_{i}': feat for i, feat in enumerate(feats)},
        **{f'hs_{i}': state for i, state in enumerate(states.hidden_states)},
        **{f'ref_{i}': reference for i, reference in enumerate(states.references[1:])},
        'memory': memory,
        'enc_topk_scores': selection.scores[0].max(-1).values,
        'init_boxes': selection.reference[0],
        'pred_logits': logits[-1],
        'pred_logits_every9': logits[-1][:, ::9],
        'pred_logits_max': logits[-1].max(-1).values,
        'pred_boxes': boxes[-1],
        'ref_boxes': torch.cat(states.references[1:]),
        'det_scores': results.scores,
        'det_labels': results.labels,
    }
    assert len(results) == len(expected['det_labels'])
    assert sum(check(actual[key], expected, key) for key in actual) == num_arrays
    # Pixels, of values up to 1024 rounded to float32 by the reference.
    np.testing.assert_allclose(results.bboxes, expected['det_boxes'], atol=2e-4)


def check(actual: Tensor, expected: dict, key: str) -> bool:
    """Compare with all or with samples of the golden ``key``, whichever is there; whether one was."""
    known = {
        key: actual,
        f'{key}__sample': flat_sample(actual, 2048),
        f'sample_{key}': flat_sample(actual, 64),
    }
    found = [name for name in known if name in expected]
    for name in found:
        np.testing.assert_allclose(known[name], expected[name], rtol=0, atol=1e-5, err_msg=name)
    return bool(found)


def flat_sample(tensor: Tensor, count: int) -> Tensor:
    return tensor.flatten()[torch.linspace(0, tensor.numel() - 1, count, dtype=torch.float64).long()]


CASES = [
    ('train/dino_r50_4scale.json', 'both'),
    ('train/dino_r50_4scale.json', 'img2_empty'),
    ('train/dino_r50_4scale.json', 'all_empty'),
    ('edge/train_std.json', None),
]


@pytest.mark.slow
@pytest.mark.parametrize(('name', 'case'), CASES)
def test_training_step(model: DINO, name: str, case: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = golden(name)[case] if case else golden(name)
    sizes = expected['image_sizes_hw']
    seeds = (3001, 3002) if case else (3001, 3003)
    inputs, samples = parity.batch([parity.image(s, *size) for s, size in zip(seeds, sizes, strict=True)])
    parity.add_gts(samples, expected['gt_boxes_xyxy_px'], expected['gt_classes'])
    monkeypatch.setattr(model.denoising, 'label_noise_ratio', 0.0)
    monkeypatch.setattr(model.denoising, 'box_noise_scale', 0.0)
    matches = record_matches(model, monkeypatch)
    model.train()
    model.zero_grad()
    losses = model.loss(inputs, samples)
    sum(losses.values()).backward()

    assert {loss_name(k): pytest.approx(v, rel=1e-5, abs=1e-12) for k, v in expected['losses'].items()} == {
        k: v.item() for k, v in losses.items()
    }
    norms = {parity.detrex_name(k): p.grad.norm().item() for k, p in model.named_parameters() if p.requires_grad}
    reference = {
        k.replace('transformer.decoder.class_embed', 'class_embed'): v for k, v in expected['grad_norm'].items()
    }
    reference = {k.replace('transformer.decoder.bbox_embed', 'bbox_embed'): v for k, v in reference.items()}
    assert norms == {k: pytest.approx(v, rel=1e-4, abs=1e-9) for k, v in reference.items()}
    check_matching(matches[0], expected['matching'], expected['gt_classes'])


def loss_name(name: str) -> str:
    """Our name of one of detrex's losses."""
    kind, dn, layer = re.match(r'loss_(class|bbox|giou)(_dn)?(?:_(\d|enc))?$', name).groups()
    prefix = {None: '', 'enc': 'enc_'}.get(layer, f'd{layer}.')
    return f'{prefix}{"dn_" if dn else ""}loss_{dict(**{"class": "cls"}, giou="iou").get(kind, kind)}'


def record_matches(model: DINO, monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    matches: list[Tensor] = []
    matcher = model.bbox_head.criterion.matcher

    def recording(*args):
        matches.append(matcher(*args))
        return matches[-1]

    monkeypatch.setattr(model.bbox_head.criterion, 'matcher', recording)
    return matches


def check_matching(match: Tensor, expected: list, gt_classes: list) -> None:
    """``expected`` lists the last layer first, then the others, then the encoder."""
    order = [5, 0, 1, 2, 3, 4, 6]
    for layer, images in zip(order, expected, strict=True):
        for image, (queries, gts) in enumerate(images):
            pairs = dict(zip(gts, queries, strict=True))
            ours = match[layer, image, : len(gt_classes[image])].tolist()
            assert ours == [pairs[i] for i in range(len(ours))], (layer, image)


def test_post_processing(model: DINO) -> None:
    expected = golden('edge/post.npz')
    (height, width), (out_height, out_width) = expected['image_size'], expected['output_size']
    img_meta = dict(
        img_shape=(height, width),
        ori_shape=(out_height, out_width),
        scale_factor=(width / out_width, height / out_height),
    )
    logits, boxes = torch.from_numpy(expected['in_logits']), torch.from_numpy(expected['in_boxes'])
    results = model.bbox_head.predict_by_feat(logits[None], boxes[None], [img_meta], rescale=True)[0]
    assert len(results) == 296
    np.testing.assert_allclose(results.bboxes, expected['det_boxes'], atol=1e-4)
    np.testing.assert_allclose(results.scores, expected['det_scores'], rtol=1e-6)
    np.testing.assert_array_equal(results.labels, expected['det_labels'])
