"""What every backbone promises; a new backbone joins by a line in the table."""

import copy
from dataclasses import dataclass

import pytest
import torch
from mmengine.config import ConfigDict
from timm.models import register_model
from timm.models.focalnet import _create_focalnet
from torch import nn

from dino_mm.registry import MODELS


@register_model
def focalnet_contract(pretrained=False, **kwargs):
    """A FocalNet smaller than any of timm's, whose sizes are not arguments."""
    sizes = dict(embed_dim=8, depths=(1, 1, 2, 1), focal_levels=(2, 2, 2, 2))
    return _create_focalnet('focalnet_tiny_lrf', pretrained, **sizes, **kwargs)


@dataclass(frozen=True)
class Case:
    """A small model of a family.

    Attributes:
        cfg: Its config; all is trained, nothing checkpointed, no path dropped.
        channels, strides: Of its outputs.
        odd, small: Sizes of its outputs for images of 250x333 and 64x33.
        frozen: Prefixes of the names of all that ``frozen_stages=1`` freezes.
        nested: Where in ``cfg`` the switches for freezing, checkpointing and dropping paths are.
        drops_paths: Whether the family knows ``drop_path_rate``.
    """

    cfg: dict
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    odd: tuple[tuple[int, int], ...]
    small: tuple[tuple[int, int], ...]
    frozen: tuple[str, ...]
    nested: str | None = None
    drops_paths: bool = True

    def build(self, **changes):
        """The model with ``changes`` of its config; weights are random, none is zero."""
        torch.manual_seed(0)
        backbone = MODELS.build(self.config(**changes))
        for parameter in backbone.parameters():
            nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.2)
        return backbone

    def config(self, **changes):
        cfg = ConfigDict(copy.deepcopy(self.cfg))
        (cfg[self.nested] if self.nested else cfg).update(changes)
        return cfg


UP = dict(odd=((32, 42), (16, 21), (8, 11)), small=((8, 5), (4, 3), (2, 2)), strides=(8, 16, 32))
DOWN = dict(odd=((31, 41), (15, 20), (7, 10)), small=((8, 4), (4, 2), (2, 1)), strides=(8, 16, 32))

CASES = {
    'resnet': Case(
        dict(type='mmdet.ResNet', depth=18, base_channels=4, out_indices=(1, 2, 3)),
        channels=(8, 16, 32),
        frozen=('conv1.', 'bn1.', 'layer1.'),
        drops_paths=False,
        **UP,
    ),
    'swin': Case(
        dict(
            type='dino_mm.SwinTransformer',
            embed_dims=8,
            depths=(2, 2, 2, 1),
            num_heads=(1, 2, 4, 8),
            window_size=4,
            out_indices=(1, 2, 3),
            drop_path_rate=0.0,
        ),
        channels=(16, 32, 64),
        frozen=('patch_embed.', 'stages.0.'),
        **UP,
    ),
    'focalnet': Case(
        dict(
            type='dino_mm.TIMMBackbone',
            model_name='focalnet_contract',
            out_indices=(1, 2, 3),
            output_norm=dict(type='LN'),
            drop_path_rate=0.0,
        ),
        channels=(16, 32, 64),
        frozen=('body.model.stem.', 'body.model.layers.0.'),
        **UP,
    ),
    'convnext': Case(
        dict(
            type='dino_mm.TIMMBackbone',
            model_name='convnext_tiny',
            dims=(8, 16, 32, 64),
            depths=(1, 1, 2, 1),
            out_indices=(1, 2, 3),
            output_norm=dict(type='LN', eps=1e-6),
        ),
        channels=(16, 32, 64),
        frozen=('body.model.stem.', 'body.model.stages.0.'),
        **DOWN,
    ),
    'vitdet': Case(
        dict(
            type='dino_mm.SimpleFeaturePyramid',
            backbone=dict(
                type='dino_mm.ViTDet',
                embed_dims=16,
                depth=3,
                num_heads=2,
                window_size=4,
                img_size=128,
                pretrain_img_size=64,
                global_attn_indexes=(1,),
            ),
            in_channels=16,
            out_channels=8,
        ),
        channels=(8, 8, 8, 8),
        strides=(8, 16, 32, 64),
        odd=((30, 40), (15, 20), (7, 10), (4, 5)),
        small=((8, 4), (4, 2), (2, 1), (1, 1)),
        frozen=('net.patch_embed.', 'net.pos_embed', 'net.blocks.0.'),
        nested='backbone',
    ),
    'internimage': Case(
        dict(
            type='dino_mm.InternImage',
            channels=8,
            depths=(1, 1, 2, 1),
            groups=(1, 2, 4, 8),
            out_indices=(1, 2, 3),
        ),
        channels=(16, 32, 64),
        frozen=('patch_embed.', 'stages.0.'),
        **UP,
    ),
}


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    return request.param


@pytest.fixture(params=[name for name, case in CASES.items() if case.drops_paths])
def dropping(request):
    return CASES[request.param]


def image(height, width, bs=2):
    return torch.randn(bs, 3, height, width, generator=torch.Generator().manual_seed(1))


def project(outputs):
    """A scalar that every value of the outputs has a share in."""
    generator = torch.Generator().manual_seed(2)
    return sum((x * torch.randn(x.shape, generator=generator)).sum() for x in outputs)


@torch.no_grad()
def evaluate(backbone, img):
    backbone.eval()
    return backbone(img)


def assert_close(actual, expected):
    """Up to float32's rounding of the largest value."""
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 * expected.abs().max().item())


def train_step(backbone, img):
    """The projection of the outputs, and the gradients by name."""
    backbone.train()
    loss = project(backbone(img))
    loss.backward()
    return loss.detach(), {name: parameter.grad for name, parameter in backbone.named_parameters()}


def test_channels_and_strides(case):
    outputs = evaluate(case.build(), image(128, 192))
    expected = [(2, c, 128 // s, 192 // s) for c, s in zip(case.channels, case.strides, strict=True)]
    assert [tuple(x.shape) for x in outputs] == expected


@pytest.mark.parametrize(('size', 'field'), [((250, 333), 'odd'), ((64, 33), 'small')])
def test_any_size(case, size, field):
    """Sizes round as the family's do; an image's features do not depend on the others of its batch."""
    backbone = case.build()
    img = image(*size)
    outputs, second = evaluate(backbone, img), evaluate(backbone, img[1:])
    assert tuple(tuple(x.shape[-2:]) for x in outputs) == getattr(case, field)
    for together, alone in zip(outputs, second, strict=True):
        assert together.isfinite().all()
        assert_close(together[1:], alone)


def test_every_parameter_has_a_gradient(case):
    backbone = case.build()
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    _, gradients = train_step(backbone, image(64, 96))
    assert [
        name for name, grad in gradients.items() if grad is None or not grad.isfinite().all() or not grad.any()
    ] == []


def test_checkpointing_changes_nothing_but_runs_blocks_again(case):
    steps, calls = [], []
    for with_cp in (False, True):
        backbone = case.build(with_cp=with_cp)
        counter = []
        for module in backbone.modules():
            module.register_forward_pre_hook(lambda module, args, counter=counter: counter.append(module))
        steps.append(train_step(backbone, image(64, 96)))
        calls.append(len(counter))
    assert calls[1] > 1.2 * calls[0]
    (loss, gradients), (loss_with_cp, gradients_with_cp) = steps
    assert_close(loss_with_cp, loss)
    for name, gradient in gradients.items():
        assert_close(gradients_with_cp[name], gradient)


def test_frozen_stages_are_frozen_from_the_start(case):
    """Optimizers and DistributedDataParallel are made before `train` is called for the first time."""
    backbone = MODELS.build(case.config(frozen_stages=1))
    expected = {name for name, _ in backbone.named_parameters() if name.startswith(case.frozen)}
    assert all(any(name.startswith(prefix) for name in expected) for prefix in case.frozen)
    assert frozen(backbone) == expected
    for mode in (False, True):
        backbone.train(mode)
        assert frozen(backbone) == expected
        # mmdet leaves the mode of its frozen convolution, to which it means nothing.
        active = [name for name, m in backbone.named_modules() if m.training and not isinstance(m, nn.Conv2d)]
        assert [name for name in active if f'{name}.'.startswith(case.frozen)] == []
        assert bool(active) == mode


def test_frozen_stages_get_no_gradient_and_all_others_do(case):
    _, gradients = train_step(case.build(frozen_stages=1), image(64, 96))
    without = {name for name, gradient in gradients.items() if gradient is None}
    assert without == {name for name in gradients if name.startswith(case.frozen)}


def frozen(backbone):
    return {name for name, parameter in backbone.named_parameters() if not parameter.requires_grad}


def test_paths_are_dropped_in_training_only(dropping):
    backbone = dropping.build(drop_path_rate=0.5)
    img = image(64, 96)
    with torch.no_grad():
        backbone.train()
        first, second = project(backbone(img)), project(backbone(img))
    assert first != second
    third, fourth = project(evaluate(backbone, img)), project(evaluate(backbone, img))
    assert third == fourth
    assert third == project(evaluate(dropping.build(drop_path_rate=0.0), img))


def test_training_without_dropped_paths_is_evaluation(case):
    backbone = case.build()
    img = image(64, 96)
    backbone.train()
    with torch.no_grad():  # attention takes another kernel, with another rounding, where gradients are wanted
        training = backbone(img)
    for x, y in zip(training, evaluate(backbone, img), strict=True):
        assert torch.equal(x, y)


def test_builds_on_the_meta_device(case):
    real = MODELS.build(case.config()).state_dict()
    with torch.device('meta'):
        meta = MODELS.build(case.config()).state_dict()
    assert all(tensor.is_meta for tensor in meta.values())
    assert {name: tensor.shape for name, tensor in meta.items()} == {name: x.shape for name, x in real.items()}


def test_config_is_left_as_it_was(case):
    cfg = case.config()
    first, second = MODELS.build(cfg).state_dict(), MODELS.build(cfg).state_dict()
    assert cfg == case.config()
    assert list(first) == list(second)


@pytest.mark.parametrize('mode', [True, pytest.param(False, marks=pytest.mark.slow)])
def test_compiles_without_graph_breaks(case, mode):
    """As a whole, in evaluation and in training."""
    torch._dynamo.reset()
    backbone = case.build()
    backbone.train(mode)  # some return None
    found = torch._dynamo.explain(backbone)(image(64, 96))
    torch._dynamo.reset()
    assert (found.graph_count, found.graph_break_count) == (1, 0), found.break_reasons
