"""What every timm backbone has to keep: shapes as declared, gradients everywhere, frozen stages, checkpointing."""

import math

import pytest
import timm
import torch
from mmengine.optim import build_optim_wrapper
from timm.layers import DropPath
from timm.models import build_model_with_cfg, register_model
from timm.models.focalnet import FocalNet
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dino_mm.models.backbones.timm_backbone import TIMMBackbone, normalize_channels
from dino_mm.registry import MODELS

LN = dict(type='LN', eps=1e-6)


def focalnet(pretrained: bool, kwargs: dict) -> FocalNet:
    sizes = dict(embed_dim=8, depths=(1, 1, 2, 1), focal_levels=(2, 2, 2, 2))
    return build_model_with_cfg(FocalNet, 'dino_mm_focalnet', pretrained, **sizes, **kwargs)


@register_model
def dino_mm_focalnet_pre_norm(pretrained: bool = False, **kwargs: object) -> FocalNet:
    return focalnet(pretrained, kwargs)


@register_model
def dino_mm_focalnet_post_norm(pretrained: bool = False, **kwargs: object) -> FocalNet:
    return focalnet(pretrained, dict(use_post_norm=True, use_overlap_down=True, layerscale_value=0.1, **kwargs))


#: Model, arguments, strides of all its maps, and how it rounds sizes that the stride does not divide.
HIERARCHICAL = [
    ('dino_mm_focalnet_pre_norm', dict(out_indices=(0, 1, 2, 3)), [4, 8, 16, 32], 'up'),
    ('dino_mm_focalnet_post_norm', dict(out_indices=(0, 1, 2, 3)), [4, 8, 16, 32], 'up'),
    ('test_convnext', dict(out_indices=(0, 1, 2, 3), ls_init_value=1.0), [4, 8, 16, 32], 'down'),
    ('test_resnet', dict(out_indices=(1, 2, 3, 4)), [4, 8, 16, 32], 'up'),
    ('test_efficientnet', dict(out_indices=(2, 3, 4)), [8, 16, 32], 'up'),
    ('mobilenetv3_small_050', dict(out_indices=(2, 3, 4)), [8, 16, 32], 'up'),
    ('test_vit', dict(out_indices=(1, 3), dynamic_img_size=True, dynamic_img_pad=True), [16, 16], 'up'),
]
SWIN = (
    'swin_tiny_patch4_window7_224',
    dict(out_indices=(1, 2), embed_dim=24, depths=(2, 2, 2, 2), strict_img_size=False),
    [8, 16],
    'up',
)
FAMILIES = [model[:2] for model in HIERARCHICAL]


def build(model_name: str, args: dict, **kwargs: object) -> TIMMBackbone:
    return MODELS.build(dict(type='dino_mm.TIMMBackbone', model_name=model_name, output_norm=LN, **args, **kwargs))


@pytest.mark.parametrize('size', [(64, 96), (35, 41)])
@pytest.mark.parametrize(('model_name', 'args', 'strides', 'rounds'), HIERARCHICAL)
def test_maps_are_as_declared(
    model_name: str, args: dict, strides: list[int], rounds: str, size: tuple[int, int]
) -> None:
    backbone = build(model_name, args).eval()
    outputs = backbone(torch.randn(1, 3, *size))
    assert backbone.strides == strides
    rounded = math.ceil if rounds == 'up' else math.floor
    for x, channels, stride in zip(outputs, backbone.out_channels, strides, strict=True):
        assert x.shape == (1, channels, rounded(size[0] / stride), rounded(size[1] / stride))
    assert all(x.isfinite().all() for x in outputs)


def test_swin_of_timm() -> None:
    model_name, args, strides, _ = SWIN
    backbone = build(model_name, args).eval()
    outputs = backbone(torch.randn(2, 3, 68, 100))
    assert backbone.strides == strides
    assert [tuple(x.shape) for x in outputs] == [(2, 48, 9, 13), (2, 96, 5, 7)]


@pytest.mark.parametrize('pruned', [False, True])
@pytest.mark.parametrize(('model_name', 'args'), [*FAMILIES, SWIN[:2]])
def test_every_parameter_gets_a_gradient(model_name: str, args: dict, pruned: bool) -> None:
    if pruned:
        args = dict(args, out_indices=args['out_indices'][:1])
    backbone = build(model_name, args).train()
    outputs = backbone(torch.randn(2, 3, 64, 96))
    torch.stack([(x * torch.randn_like(x)).sum() for x in outputs]).sum().backward()
    assert [name for name, p in backbone.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize(('model_name', 'args'), FAMILIES[:3])
def test_checkpointing_changes_memory_only(model_name: str, args: dict) -> None:
    results = []
    for with_cp in (False, True):
        torch.manual_seed(0)
        backbone = build(model_name, args, with_cp=with_cp, drop_path_rate=0.5).double().train()
        img = torch.randn(2, 3, 67, 97, dtype=torch.float64)
        saved: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda x, saved=saved: saved.append(x.numel()) or x, lambda x: x):
            outputs = backbone(img)
        torch.stack([x.square().sum() for x in outputs]).sum().backward()
        results.append(([*outputs, *(p.grad for p in backbone.parameters())], sum(saved)))
    (plain, kept), (checkpointed, kept_with_cp) = results
    for expected, actual in zip(plain, checkpointed, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)
    assert kept_with_cp < 0.5 * kept


#: Patterns of what frozen_stages=1 freezes: the stem and the first stage.
FROZEN = {
    'dino_mm_focalnet_pre_norm': ('body.model.stem.', 'body.model.layers.0.'),
    'test_convnext': ('body.model.stem.', 'body.model.stages.0.'),
    'test_resnet': ('body.model.conv1.', 'body.model.bn1.', 'body.model.layer1.'),
}


@pytest.mark.parametrize('model_name', FROZEN)
def test_frozen_stages(model_name: str) -> None:
    args = dict(FAMILIES)[model_name]
    backbone = build(model_name, args, frozen_stages=1, drop_path_rate=0.5).train()
    for name, parameter in backbone.named_parameters():
        assert parameter.requires_grad != name.startswith(FROZEN[model_name]), name
    for name, module in backbone.named_modules():
        if any(True for _ in module.parameters()):
            assert module.training != f'{name}.'.startswith(FROZEN[model_name]), name
    stem = {k: v.clone() for k, v in backbone.state_dict().items() if k.startswith(FROZEN[model_name])}
    wrapper = build_optim_wrapper(backbone, dict(optimizer=dict(type='SGD', lr=0.1, weight_decay=0.1)))
    outputs = backbone(torch.randn(2, 3, 64, 96))
    wrapper.backward(torch.stack([x.square().mean() for x in outputs]).sum())
    wrapper.step()
    for name, parameter in backbone.named_parameters():
        assert (parameter.grad is None) == name.startswith(FROZEN[model_name]), name
    after = backbone.state_dict()
    assert stem
    assert all(torch.equal(after[name], tensor) for name, tensor in stem.items())


def test_stem_alone_and_nothing_frozen() -> None:
    args = dict(FAMILIES)['test_convnext']
    assert all(p.requires_grad for p in build('test_convnext', args).parameters())
    stem = [n for n, p in build('test_convnext', args, frozen_stages=0).named_parameters() if not p.requires_grad]
    assert stem == [f'body.model.stem.{i}.{kind}' for i in (0, 1) for kind in ('weight', 'bias')]


def test_drop_path_in_frozen_stages_is_off() -> None:
    args = dict(FAMILIES)['dino_mm_focalnet_pre_norm']
    backbone = build('dino_mm_focalnet_pre_norm', args, frozen_stages=3, drop_path_rate=0.5).train()
    training = {name: m.training for name, m in backbone.named_modules() if isinstance(m, DropPath)}
    assert set(training.values()) == {False, True}
    assert all(on == name.startswith('body.model.layers.3.') for name, on in training.items())


@pytest.mark.parametrize(('model_name', 'args'), FAMILIES[:3])
def test_drop_path_only_in_training(model_name: str, args: dict) -> None:
    backbone = build(model_name, dict(args, out_indices=(3,)), drop_path_rate=0.5)
    rates = [m.drop_prob for m in backbone.modules() if isinstance(m, DropPath)]
    assert rates == sorted(rates)
    assert rates[-1] == 0.5
    img = torch.randn(1, 3, 32, 64).expand(8, -1, -1, -1)
    same, dropped = backbone.eval()(img)[0], backbone.train()(img)[0]
    torch.testing.assert_close(same, same[:1].expand_as(same))
    spread = dropped.amax(0) - dropped.amin(0)
    assert spread.max() > 0.1


@pytest.mark.parametrize('norm_eval', [False, True])
def test_norm_eval(norm_eval: bool) -> None:
    backbone = build('test_resnet', dict(out_indices=(2, 3, 4)), norm_eval=norm_eval).train()
    norms = [m for m in backbone.modules() if isinstance(m, _BatchNorm)]
    assert norms
    assert all(m.training != norm_eval for m in norms)
    assert backbone.body.model.conv1.training
    before = norms[0].running_mean.clone()
    backbone(torch.randn(2, 3, 64, 96))
    assert torch.equal(norms[0].running_mean, before) == norm_eval


def test_output_norm_is_over_channels_of_each_output() -> None:
    args = dict(model_name='test_convnext', out_indices=(1, 3))
    torch.manual_seed(0)
    plain = TIMMBackbone(**args).eval()
    assert not [name for name in plain.state_dict() if not name.startswith('body.model.')]
    normed = TIMMBackbone(**args, output_norm=dict(type='LN', eps=1e-2)).eval()
    assert list(normed.output_norms) == ['1', '3']
    normed.body.load_state_dict(plain.body.state_dict())
    img = torch.randn(2, 3, 64, 96)
    for x, y, norm in zip(plain(img), normed(img), normed.output_norms.values(), strict=True):
        nn.init.uniform_(norm.weight)
        nn.init.uniform_(norm.bias)
        y = normalize_channels(norm, x)
        centered = x - x.mean(1, keepdim=True)
        expected = centered / (centered.square().mean(1, keepdim=True) + 1e-2).sqrt()
        expected = expected * norm.weight[:, None, None] + norm.bias[:, None, None]
        torch.testing.assert_close(y, expected)
    grouped = TIMMBackbone(**args, output_norm=dict(type='GN', num_groups=2)).eval()
    assert torch.stack([x.mean().abs() for x in grouped(img)]).max() < 1e-5


def test_config_is_not_changed_and_builds_twice() -> None:
    cfg = dict(type='dino_mm.TIMMBackbone', model_name='test_convnext', out_indices=[1, 2], output_norm=dict(LN))
    first, second = MODELS.build(cfg), MODELS.build(cfg)
    assert cfg == dict(
        type='dino_mm.TIMMBackbone', model_name='test_convnext', out_indices=[1, 2], output_norm=dict(LN)
    )
    assert first.state_dict().keys() == second.state_dict().keys()


def test_weights_survive_init_weights() -> None:
    backbone = build('test_vit', dict(FAMILIES)['test_vit'])
    before = {k: v.clone() for k, v in backbone.state_dict().items()}
    backbone.init_weights()
    assert_equal(backbone.state_dict(), before)


def test_init_cfg_loads_a_checkpoint(tmp_path) -> None:
    source = build('test_convnext', dict(out_indices=(1, 2)))
    torch.save(dict(state_dict=source.state_dict()), tmp_path / 'backbone.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'backbone.pth'))
    target = build('test_convnext', dict(out_indices=(1, 2)), init_cfg=init_cfg)
    target.init_weights()
    assert_equal(target.state_dict(), source.state_dict())


@pytest.mark.parametrize(('name', 'last'), [('test_resnet', 4), ('test_efficientnet', 4), ('test_convnext', 3)])
def test_init_cfg_loads_a_classifier_of_timm(tmp_path, name: str, last: int) -> None:
    """Whatever the model: its own names, without the head, and every tensor of the backbone."""
    whole = timm.create_model(name)
    torch.save(whole.state_dict(), tmp_path / 'classifier.pth')
    init_cfg = dict(type='Pretrained', checkpoint=str(tmp_path / 'classifier.pth'))
    target = TIMMBackbone(name, (1, last), init_cfg=init_cfg)
    target.init_weights()
    expected = {f'body.model.{key}': tensor for key, tensor in whole.state_dict().items()}
    assert_equal(target.state_dict(), {key: expected[key] for key in target.state_dict()})


def test_pretrained_weights_from_a_file_of_timm(tmp_path) -> None:
    source = build('test_convnext', dict(out_indices=(0, 1, 2, 3))).body.model.state_dict()
    whole = source | {'head.norm.weight': torch.ones(64), 'head.norm.bias': torch.zeros(64)}
    torch.save(whole, tmp_path / 'timm.pth')
    target = build(
        'test_convnext',
        dict(out_indices=(1, 2, 3), pretrained_cfg_overlay=dict(file=str(tmp_path / 'timm.pth'))),
        pretrained=True,
    )
    assert_equal(target.body.model.state_dict(), source)


def assert_equal(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(model_name='convnext_tinny'), 'did you mean: convnext_tiny'),
        (dict(out_indices=(3, 1)), 'must be ascending'),
        (dict(out_indices=(1, 1)), 'must be ascending'),
        (dict(pretrained=True, init_cfg=dict(type='Pretrained', checkpoint='x.pth')), 'drop one of them'),
        (dict(frozen_stages=5), r'0 \(stem\) to 4'),
    ],
)
def test_errors_name_the_way_out(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TIMMBackbone(**dict(dict(model_name='test_convnext', out_indices=(0, 1, 2, 3)), **changes))
