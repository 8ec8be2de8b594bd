"""Losses, gradients, matching and post-processing equal detrex's, in float64."""

import copy
import re
from functools import partial

import numpy as np
import parity
import pytest
import torch
import zoo
from mmdet.structures import DetDataSample
from parity import golden
from torch import Tensor

from dino_mm.benchmark.device_parity import use_channels_last
from dino_mm.engine.compilation import compile_detector
from dino_mm.models import DINO
from dino_mm.models.layers import tokens
from dino_mm.registry import MODELS

R50 = 'configs/dino-resnet/dino_r50_4scale_12ep.py'
SWIN = 'configs/dino-swin/dino_swin_tiny_224_4scale_12ep.py'
ARCHS = {R50: 'dino_r50_4scale', SWIN: 'dino_swin_tiny_224_4scale'}


@pytest.fixture(scope='module')
def model(request: pytest.FixtureRequest) -> DINO:
    """The config's model with the rule's weights, nothing left to chance."""
    cfg = zoo.load(request.param).copy().model
    if request.param == SWIN:
        cfg.backbone.drop_path_rate = 0.0
    model = MODELS.build(cfg).double()
    model.load_state_dict(parity.rule_state(ARCHS[request.param]))
    return model


CASES = [
    (R50, 'train/dino_r50_4scale.json', 'both'),
    (R50, 'train/dino_r50_4scale.json', 'img2_empty'),
    (R50, 'train/dino_r50_4scale.json', 'all_empty'),
    (R50, 'edge/train_std.json', None),
    (SWIN, 'train/dino_swin_tiny_224_4scale.json', 'both'),
]


@pytest.mark.slow
@pytest.mark.parametrize(('model', 'name', 'case'), CASES, indirect=['model'])
def test_training_step(
    model: DINO, name: str, case: str | None, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    expected, inputs, samples = read(model, name, case, monkeypatch)
    matches = record_matches(model, monkeypatch)
    check(train(model, inputs, samples), expected, request.node.callspec.params['model'])
    check_matching(matches[0], expected['matching'], expected['gt_classes'])


@pytest.mark.slow
@pytest.mark.parametrize(('model', 'name', 'case'), CASES[:1], indirect=['model'])
def test_training_step_in_other_ways(
    model: DINO, name: str, case: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Channels last in memory, then compiled too."""
    model = copy.deepcopy(model)
    expected, inputs, samples = read(model, name, case, monkeypatch)
    for change in (use_channels_last, partial(compile_detector, backend='aot_eager')):
        change(model)
        check(train(model, inputs, samples), expected, request.node.callspec.params['model'])


NEEDS_GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
#: What the scores of the query selection may differ by on another device: positions are made in float32.
SCORE_NOISE = 1e-5


@pytest.mark.slow
@pytest.mark.parametrize('model', [R50], indirect=True)
@pytest.mark.parametrize('device', ['cpu', pytest.param('cuda', marks=NEEDS_GPU)])
def test_other_rounding_reaches_the_losses_by_the_ranks_of_the_queries_only(
    model: DINO, device: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    """Ranks at scores that are equal up to rounding change places, and with them contents. Ranks given, nothing does.

    On a CPU, noise on the positions stands for the rounding of another device.
    """
    expected, inputs, samples = read(model, *CASES[0][1:], monkeypatch)
    select, scores, ranks = model.query_selector.select, [], []
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(model.query_selector, 'select', lambda x: scores.append(x) or ranks.append(select(x)) or ranks[0])
        model.train().loss(inputs, samples)
    if device == 'cpu':
        encode, generator = tokens.sine_positions, torch.Generator().manual_seed(0)
        monkeypatch.setattr(tokens, 'sine_positions', lambda *args: add_noise(encode(*args), generator))

    def select_as_before(own: Tensor) -> Tensor:
        finite = scores[0].isfinite()
        torch.testing.assert_close(own.cpu()[finite], scores[0][finite], rtol=0, atol=SCORE_NOISE)
        ranks.append(select(own).cpu())
        return ranks[0].to(own.device)

    monkeypatch.setattr(model.query_selector, 'select', select_as_before)
    matches = record_matches(model, monkeypatch)
    request.addfinalizer(model.cpu)
    model.to(device)
    found = train(model, inputs.to(device), [sample.to(device) for sample in samples])
    # The gradient of a sampling point jumps where the point crosses from one pixel to the next: one did, by 2e-4.
    check(found, expected, R50, gradient_tolerance=1e-3)
    check_matching(matches[0], expected['matching'], expected['gt_classes'])
    moved = [torch.nonzero(a != b).flatten().tolist() for a, b in zip(*ranks, strict=True)]
    assert moved == [[768, 769], []] or device == 'cuda'


def add_noise(positions: Tensor, generator: torch.Generator) -> Tensor:
    return positions + 3e-6 * torch.randn(positions.shape, generator=generator)


def read(
    model: DINO, name: str, case: str | None, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict, Tensor, list[DetDataSample]]:
    """A golden and its batch; the denoising queries get no noise."""
    expected = golden(name)[case] if case else golden(name)
    seeds = (3001, 3002) if case else (3001, 3003)
    images = [parity.image(s, *size) for s, size in zip(seeds, expected['image_sizes_hw'], strict=True)]
    inputs, samples = parity.batch(images)
    parity.add_gts(samples, expected['gt_boxes_xyxy_px'], expected['gt_classes'])
    monkeypatch.setattr(model.denoising, 'label_noise_ratio', 0.0)
    monkeypatch.setattr(model.denoising, 'box_noise_scale', 0.0)
    return expected, inputs, samples


def train(model: DINO, inputs: Tensor, samples: list[DetDataSample]) -> tuple[dict[str, float], dict[str, float]]:
    """Losses, and norms of the gradients by the names of parameters."""
    model.train()
    model.zero_grad()
    losses = model(inputs, samples, mode='loss')  # with frozen norms in the convolutions, as a training runs it
    sum(losses.values()).backward()
    norms = {k: p.grad.norm().item() for k, p in model.named_parameters() if p.requires_grad}
    return {k: v.item() for k, v in losses.items()}, norms


def check(
    found: tuple[dict[str, float], dict[str, float]], expected: dict, config: str, gradient_tolerance: float = 1e-4
) -> None:
    """Compare losses and norms of gradients with a golden."""
    losses, norms = found
    assert {loss_name(k): pytest.approx(v, rel=1e-5, abs=1e-12) for k, v in expected['losses'].items()} == losses
    names = zoo.detrex_names(config, ARCHS[config])
    reference = {
        k.replace('transformer.decoder.class_embed', 'class_embed'): v for k, v in expected['grad_norm'].items()
    }
    reference = {k.replace('transformer.decoder.bbox_embed', 'bbox_embed'): v for k, v in reference.items()}
    assert {names[k]: v for k, v in norms.items()} == {
        k: pytest.approx(v, rel=gradient_tolerance, abs=1e-9) for k, v in reference.items()
    }


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


@pytest.mark.parametrize('model', [R50], indirect=True)
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
