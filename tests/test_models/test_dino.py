"""The detector: parts can be exchanged, gradients reach everything, bad configs and inputs are named."""

import copy
import re
import subprocess
import sys

import pytest
import torch
from conftest import make_samples, tiny_model_cfg
from mmengine.config import Config
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import init_default_scope
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dino_mm.models import DINO
from dino_mm.registry import MODELS

LOSSES = ('loss_cls', 'loss_bbox', 'loss_iou')


def build(cfg: Config) -> DINO:
    return MODELS.build(cfg)


def test_config_is_left_as_it_is_and_builds_twice(tiny_cfg: Config) -> None:
    before = copy.deepcopy(tiny_cfg.to_dict())
    shapes = [{k: v.shape for k, v in build(tiny_cfg).state_dict().items()} for _ in range(2)]
    assert tiny_cfg.to_dict() == before
    assert shapes[0] == shapes[1]


@pytest.mark.parametrize(
    ('denoising', 'selector', 'counts'),
    [
        ('keep', 'dino_mm.MixedQuerySelector', (2, 1)),
        ('keep', 'dino_mm.MixedQuerySelector', (3, 0)),
        ('keep', 'dino_mm.MixedQuerySelector', (0, 0)),
        ('keep', 'dino_mm.PureQuerySelector', (2, 1)),
        ('keep', 'dino_mm.PureQuerySelector', (0, 0)),
        ('keep', None, (2, 1)),
        ('keep', None, (0, 0)),
        (None, 'dino_mm.MixedQuerySelector', (2, 1)),
        (None, 'dino_mm.MixedQuerySelector', (0, 0)),
        (None, None, (2, 0)),
    ],
)
def test_losses_are_finite_and_every_parameter_gets_a_gradient(denoising, selector, counts, tiny_cfg: Config) -> None:
    if denoising is None:
        tiny_cfg.denoising = None
    tiny_cfg.query_selector = selector and dict(type=selector)
    model = build(tiny_cfg)
    model.init_weights()
    inputs, samples = make_samples(counts)
    losses = model.loss(inputs, samples)

    names = [f'{p}{n}' for p in ('d0.', '') for n in LOSSES]
    names += [f'{p}dn_{n}' for p in ('d0.', '') for n in LOSSES] if denoising else []
    names += [f'enc_{n}' for n in LOSSES] if selector else []
    assert sorted(losses) == sorted(names)
    sum(losses.values()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
    if not any(counts):
        assert all(v.item() == 0 for k, v in losses.items() if 'cls' not in k or 'dn' in k)
        assert losses['loss_cls'].item() > 0


def test_padded_tokens_are_neither_seen_nor_selected(tiny_cfg: Config) -> None:
    """Other content in the padding of image 1 changes nothing in its predictions."""
    model = build(tiny_cfg).double().eval()
    inputs, samples = make_samples((1, 1), sizes=((64, 96), (64, 64)))
    with torch.no_grad():
        feats = model.extract_feat(inputs.double())
        first = model.forward_transformer(feats, samples)
        for feat in feats:
            feat[1, :, :, feat.shape[-1] * 64 // 96 :] = 7.0
        second = model.forward_transformer(feats, samples)
    for a, b in zip(first['references'], second['references'], strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    torch.testing.assert_close(first['hidden_states'], second['hidden_states'], rtol=0, atol=1e-12)


def test_fewer_tokens_than_queries_take_all_tokens(tiny_cfg: Config) -> None:
    tiny_cfg.num_queries = 100
    model = build(tiny_cfg)
    inputs, samples = make_samples((2,), sizes=((32, 64),))
    num_tokens = 4 * 8 + 2 * 4 + 1 * 2
    feats = model.extract_feat(inputs)
    with torch.no_grad():
        assert model.forward_transformer(feats, samples)['hidden_states'].shape == (2, 1, num_tokens, 16)
    losses = model.loss(inputs, samples)
    assert all(v.isfinite() for v in losses.values())
    assert len(model.eval().predict(inputs, samples)[0].pred_instances) <= 10


def test_predictions_are_mmdets(tiny_cfg: Config) -> None:
    model = build(tiny_cfg).eval()
    inputs, samples = make_samples((1, 0), ori_scale=2)
    with torch.no_grad():
        first = [s.pred_instances for s in model.predict(inputs, samples)]
        again = [s.pred_instances for s in model.predict(inputs, samples, rescale=False)]
        scores, boxes = model(inputs, samples, mode='tensor')
    assert scores.shape == (2, 2, 12, 5)
    assert boxes.shape == (2, 2, 12, 4)
    for rescaled, plain, layer_scores in zip(first, again, scores[-1], strict=True):
        assert rescaled.scores.tolist() == sorted(rescaled.scores.tolist(), reverse=True)
        torch.testing.assert_close(rescaled.scores, layer_scores.sigmoid().flatten().topk(10).values)
        torch.testing.assert_close(rescaled.bboxes, plain.bboxes * 2)
        assert set(rescaled.labels.tolist()) <= set(range(5))


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('mode', ['loss', 'predict'])
def test_hooks_of_every_module_are_called_and_change_nothing(mode: str, dtype: torch.dtype, tiny_cfg: Config) -> None:
    model = build(tiny_cfg).train(mode == 'loss')
    batch = make_samples((2, 1), sizes=((96, 128), (70, 100)))

    def run() -> list[Tensor]:
        torch.manual_seed(0)
        with torch.autocast('cpu', dtype, enabled=dtype is torch.bfloat16):
            output = model(*batch, mode=mode)
        return list(output.values()) if mode == 'loss' else [sample.pred_instances.scores for sample in output]

    expected = run()
    called = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda module, args, output, name=name: called.add(name))
    found = run()
    own = {name for name, module in model.named_modules() if next(module.parameters(recurse=False), None) is not None}
    # Multi-head attention takes the weights of its last product without calling it; learnt queries are a table.
    own = {name for name in own if not name.endswith(('attn.out_proj', 'query_embedding'))}
    if mode == 'predict':
        heads = re.compile(r'bbox_head\.cls_branches\.0|denoising\.')  # for losses alone
        own = {name for name in own if not heads.match(name)}
    assert sorted(own - called) == []
    assert {'bbox_head', 'encoder.layers.0.self_attn', 'decoder.layers.0.self_attn.attn'} <= called
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5 if dtype is torch.float32 else 0.05)


def test_loss_is_the_same_in_eval_mode_without_noise(tiny_cfg: Config) -> None:
    tiny_cfg.backbone.norm_eval = True
    tiny_cfg.denoising.update(label_noise_ratio=0, box_noise_scale=0)
    model = build(tiny_cfg)
    inputs, samples = make_samples((2, 1))
    training = model.train().loss(inputs, samples)
    assert {k: v.item() for k, v in model.eval().loss(inputs, samples).items()} == {
        k: pytest.approx(v.item(), rel=1e-5) for k, v in training.items()
    }


@pytest.mark.parametrize(
    ('change', 'error', 'words'),
    [
        ({'num_feature_levels': 4}, ValueError, ['3 feature maps', 'expects 4', 'neck.num_outs']),
        ({'neck.num_outs': 4}, ValueError, ['4 feature maps', 'expects 3', 'num_feature_levels']),
        ({'neck.out_channels': 32}, ValueError, ['of 32 channels', 'of 16', 'neck.out_channels']),
        ({'positional_encoding.num_feats': 16}, ValueError, ['positional_encoding.num_feats', '8', 'Remove']),
        ({'denoising.num_dn_querys': 5}, TypeError, ['denoising', 'num_dn_querys', 'Did you mean `num_dn_queries`']),
        ({'denoising.num_dn_queries': 0}, ValueError, ['denoising.num_dn_queries', 'denoising=None']),
        ({'denoising.box_noise_scale': -1}, ValueError, ['box_noise_scale', 'negative']),
        ({'encoder.embed_dims': 32}, ValueError, ['encoder.embed_dims', '16', 'Remove']),
        ({'bbox_head.num_clases': 3}, TypeError, ['bbox_head', 'num_clases', 'Did you mean `num_classes`']),
        ({'test_cfg.max_per_image': 5}, TypeError, ['`test_cfg`', 'max_per_image', 'Did you mean `max_per_img`']),
        ({'test_cfg.nms': {}}, TypeError, ['`test_cfg` has an unknown key `nms`. DINOHead takes: max_per_img.']),
        (
            {'train_cfg.asigner': {}},
            TypeError,
            ['`train_cfg`', 'asigner', 'Did you mean `assigner`', 'takes: assigner.'],
        ),
    ],
)
def test_bad_configs_are_named(change: dict, error: type, words: list[str], tiny_cfg: Config) -> None:
    cfg = Config(dict(model=tiny_cfg))
    cfg.merge_from_dict({f'model.{key}': value for key, value in change.items()})
    with pytest.raises(error) as caught:
        build(cfg.model)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_neck_without_num_outs_is_checked_when_it_runs(tiny_cfg: Config) -> None:
    model = build(tiny_cfg)
    with pytest.raises(ValueError, match='gives 2 feature maps'):
        model.pre_transformer(model.extract_feat(make_samples((1,))[0])[:2])


def test_channels_of_the_backbone_are_checked_when_it_runs(tiny_cfg: Config) -> None:
    tiny_cfg.neck.in_channels[-1] = 7
    model = build(tiny_cfg)
    with pytest.raises(ValueError, match=r'maps of \[8, 16, 32\] channels, the neck expects \[8, 16, 7\]\. Set `model'):
        model.extract_feat(make_samples((1,))[0])


def test_unusable_ground_truth_is_named_by_the_loss(tiny_cfg: Config) -> None:
    inputs, samples = make_samples((2, 1))
    samples[1].gt_instances.labels[0] = 5
    with pytest.raises(ValueError, match=r'image id 1 \(1\.jpg\): ground truth 0: label 5 is outside \[0, 5\)'):
        build(tiny_cfg).loss(inputs, samples)


def test_scoped_type_builds_from_mmdets_scope_without_imports(tmp_path) -> None:
    """In a process that knows nothing of dino_mm; unscoped types inside the config mean mmdet's."""
    tiny = tmp_path / 'tiny.py'
    Config(dict(model=tiny_model_cfg(), default_scope='mmdet')).dump(tiny)
    code = f"""
import sys
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
cfg = Config.fromfile({str(tiny)!r})
assert 'dino_mm' not in sys.modules
init_default_scope(cfg.default_scope)
model = MODELS.build(cfg.model)
print(type(model).__module__, type(model.neck).__module__, type(model.bbox_head).__module__)
"""
    out = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True, cwd=tmp_path)
    assert out.stdout.split()[-3:] == [
        'dino_mm.models.detectors.dino',
        'mmdet.models.necks.channel_mapper',
        'dino_mm.models.dense_heads.dino_head',
    ]


def test_own_part_replaces_ours(tiny_cfg: Config) -> None:
    """A project's own class takes the place of a part, by its registered name."""
    from dino_mm.models import CDNGenerator

    @ROOT_MODELS.register_module(name='QuietGenerator', force=True)
    class QuietGenerator(CDNGenerator):
        def add_noise(self, labels, boxes):
            return labels, boxes

    init_default_scope('mmdet')
    tiny_cfg.denoising = dict(type='mmengine.QuietGenerator', num_dn_queries=4)
    model = build(tiny_cfg)
    assert type(model.denoising) is QuietGenerator
    assert model.denoising.num_classes == 5
    assert all(v.isfinite() for v in model.loss(*make_samples((2, 1))).values())


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_autocast_keeps_boxes_and_losses_in_float32(dtype: torch.dtype, tiny_cfg: Config) -> None:
    tiny_cfg.denoising.update(label_noise_ratio=0, box_noise_scale=0)
    model = build(tiny_cfg)
    inputs, samples = make_samples((2, 1), sizes=((64, 96), (64, 64)))
    full = model.loss(inputs, samples)
    with torch.autocast('cpu', dtype=dtype):
        states = model.forward_transformer(model.extract_feat(inputs), samples)
        scores, boxes = model.bbox_head(**states)
        losses = model.loss(inputs, samples)
    assert all(reference.dtype is torch.float32 for reference in states['references'])
    assert scores.dtype is boxes.dtype is torch.float32
    sum(losses.values()).backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    for name, value in losses.items():
        assert value.dtype is torch.float32
        assert value.item() == pytest.approx(full[name].item(), rel=0.1, abs=0.02), name


@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')
@torch.no_grad()
def test_a_trace_serves_other_sizes_and_batches(tiny_cfg: Config) -> None:
    model = build(tiny_cfg).eval()

    class Network(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            return model.bbox_head(**model.forward_transformer(model.extract_feat(images)))

    traced = torch.jit.trace(Network(), torch.randn(1, 3, 64, 96), check_trace=False)
    for size in ((1, 64, 96), (1, 96, 128), (2, 80, 64)):
        images = torch.randn(size[0], 3, *size[1:])
        torch.testing.assert_close(traced(images), Network()(images), rtol=1e-5, atol=1e-5)


class CountWaits(TorchDispatchMode):
    """Counts the operators at which a GPU would make the host wait."""

    WAITING = ('_local_scalar_dense', 'nonzero', 'masked_select', 'unique', 'equal.default', 'is_nonzero')

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func)
        masked = 'index' in name and any(
            isinstance(i, torch.Tensor) and i.dtype is torch.bool for a in args if isinstance(a, list) for i in a
        )
        if masked or any(word in name for word in self.WAITING):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_a_training_step_copies_to_the_host_once(tiny_cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(tiny_cfg)
    copies = []
    to_host = torch.Tensor.cpu
    monkeypatch.setattr(torch.Tensor, 'cpu', lambda tensor: copies.append(tensor.shape) or to_host(tensor))
    inputs, samples = make_samples((3, 0, 2), sizes=((64, 96), (64, 64), (32, 96)))
    with CountWaits() as waits:
        losses = model.loss(inputs, samples)
        sum(losses.values()).backward()
    assert waits.found == []
    assert copies == [(3, 3, 3, 12)]  # layers and encoder, images, objects of the fullest image, queries
