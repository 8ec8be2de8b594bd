"""Every architecture of the zoo: detrex's checkpoint loads as it is and gives detrex's numbers, in float64."""

from functools import lru_cache, partial

import numpy as np
import parity
import pytest
import torch
import zoo
from parity import flat_sample, golden
from torch import Tensor

from dino_mm.benchmark.device_parity import use_channels_last
from dino_mm.engine.compilation import compile_detector
from dino_mm.models import DINO
from dino_mm.registry import MODELS

#: Architecture -> the first config that has it.
CONFIGS = {entry.arch: entry.config for entry in reversed(zoo.ENTRIES)}
#: Of the default run; each of the others takes up to a minute.
QUICK = (
    'dino_r50_4scale',
    'dino_r50_5scale',
    'dino_swin_tiny_224_4scale',
    'dino_focal_tiny_lrf_fl3_4scale',
    'dino_convnext_tiny_384_4scale',
    'dino_internimage_tiny_4scale',
    'dino_vitdet_base_4scale',
)
#: A billion parameters, 8 GB: built without memory of its own, it takes over the tensors of the rule.
BILLION = 'dino_eva_01_4scale'
#: With a golden of an image whose sides divide by nothing.
ODD = ('dino_r50_4scale', 'dino_r50_5scale', 'dino_swin_tiny_224_4scale')


@lru_cache(maxsize=1)
def load(arch: str) -> DINO:
    """A model with the rule's weights, loaded as the checkpoint that detrex would save."""
    if arch == BILLION:
        with torch.device('meta'):
            model = MODELS.build(zoo.load(CONFIGS[arch]).model)
        model.load_state_dict(parity.rule_state(arch), assign=True)
        return model
    model = MODELS.build(zoo.load(CONFIGS[arch]).model).double()
    model.load_state_dict(parity.rule_state(arch))
    return model


def marked(arch: str, *values: object) -> object:
    return pytest.param(arch, *values, marks=() if arch in QUICK else pytest.mark.slow, id='-'.join(map(str, values)))


CASES = [(arch, f'eval/{arch}.npz', (256, 320)) for arch in CONFIGS]
CASES += [(arch, f'eval/{arch}__250x333.npz', (250, 333)) for arch in ODD]
CASES += [('dino_r50_4scale', 'edge/eval_std.npz', (40, 1024))]


# Sorted, so that the cases of a model follow each other and it is loaded once.
@pytest.mark.parametrize(('arch', 'name', 'size'), [marked(*case) for case in sorted(CASES)])
def test_inference(arch: str, name: str, size: tuple[int, int]) -> None:
    model, expected = load(arch), golden(name)
    inputs, samples = parity.batch([parity.image(2022, *size)])
    model.eval()
    with torch.no_grad():
        maps = model.backbone(inputs)
        feats = model.neck(maps)
        tokens = model.pre_transformer(feats, samples)
        memory = model.forward_encoder(tokens)
        selection, _ = model.pre_decoder(memory, tokens)
        states = model.forward_decoder(memory, tokens, selection)
        logits, boxes = model.bbox_head(*states)
        results = model.bbox_head.predict(*states, samples)[0]

    keys = backbone_keys(expected)
    assert len(keys) == len(maps) or name.startswith('edge')
    actual = {
        **dict(zip(keys, maps, strict=False)),
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
    checked = {key for key, tensor in actual.items() if check(tensor, expected, key)}
    # Attention, FFN and heads of every layer, the neck and the backbone: nothing that the golden has is left out.
    stated = {key.removeprefix('sample_').removesuffix('__sample') for key in expected if key.startswith('sample_')}
    assert checked >= {key for key in stated if not key.startswith('pos_')}
    assert checked >= {'init_boxes', 'pred_boxes', 'enc_topk_scores', 'det_scores', 'det_labels'}
    # Pixels, of values up to 1024 rounded to float32 by the reference.
    assert check(results.bboxes, expected, 'det_boxes', atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize('arch', [arch for arch in QUICK if arch != 'dino_r50_5scale'])
def test_inference_in_other_ways(arch: str) -> None:
    """Channels last in memory, then compiled too: one model of each family, as its detections are."""
    model, expected = load(arch).eval(), golden(f'eval/{arch}.npz')
    inputs, samples = parity.batch([parity.image(2022, 256, 320)])
    for change in (use_channels_last, partial(compile_detector, backend='aot_eager')):
        change(model)
        with torch.no_grad():
            found = model(inputs, samples, mode='predict')[0].pred_instances
        assert check(found.scores, expected, 'det_scores')
        assert check(found.labels, expected, 'det_labels')
        assert check(found.bboxes, expected, 'det_boxes', atol=2e-4)
    load.cache_clear()  # what is compiled stays so


def backbone_keys(expected: dict) -> list[str]:
    """Names of the backbone's maps in a golden, from the finest to the coarsest."""
    return sorted(key.removeprefix('sample_') for key in expected if key.startswith('sample_bb_'))


def check(actual: Tensor, expected: dict, key: str, atol: float = 1e-5) -> bool:
    """Compare with all or with samples of the golden ``key``, whichever is there; whether one was."""
    samples = [name for name in (f'{key}__sample', f'sample_{key}') if name in expected]
    for name in samples:
        values = flat_sample(actual, expected[name].size)
        np.testing.assert_allclose(values, expected[name].ravel(), rtol=0, atol=atol, err_msg=name)
    if key in expected:
        np.testing.assert_allclose(actual, expected[key], rtol=0, atol=atol, err_msg=key)
    return bool(samples) or key in expected
