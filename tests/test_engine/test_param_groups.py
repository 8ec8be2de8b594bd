"""Optimizer groups against truth tables."""

import copy
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.optim import AmpOptimWrapper, OptimWrapper, build_optim_wrapper
from torch import nn

from dino_mm.engine import param_groups
from dino_mm.registry import OPTIM_WRAPPER_CONSTRUCTORS

LR, DECAY = 1e-2, 1e-3


class Tower(nn.Module):
    """A layer and a norm, each with weight and bias."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)
        self.norm = norm


class Detector(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.backbone = Tower(nn.BatchNorm1d(4))
        self.neck = Tower(nn.GroupNorm(2, 4))
        self.head = Tower(nn.LayerNorm(4))
        self.scale = nn.Parameter(torch.ones(1))


class LayerNorm2d(nn.LayerNorm):
    """Such as timm's."""


def build(model: nn.Module, optimizer: Mapping[str, Any] | None = None, **paramwise: Any) -> OptimWrapper:
    return build_optim_wrapper(
        model,
        ConfigDict(
            dict(
                type='OptimWrapper',
                optimizer={'type': 'AdamW', 'lr': LR, 'weight_decay': DECAY, **(optimizer or {})},
                constructor='dino_mm.ParamGroupConstructor',
                paramwise_cfg=paramwise,
            )
        ),
    )


def multipliers(model: nn.Module, wrapper: OptimWrapper) -> dict[str, tuple[float, float]]:
    """Factors of learning rate and weight decay of every parameter in the optimizer."""
    names = {id(p): name for name, p in model.named_parameters()}
    return {
        names[id(p)]: (group['lr'] / LR, group['weight_decay'] / DECAY)
        for group in wrapper.optimizer.param_groups
        for p in group['params']
    }


def approx(expected: dict[str, tuple[float, float]]) -> dict[str, Any]:
    return {name: pytest.approx(pair) for name, pair in expected.items()}


def test_multipliers_by_name_and_by_norm_are_independent() -> None:
    model = Detector()
    wrapper = build(model, custom_keys=dict(backbone=dict(lr_mult=0.1)), norm_decay_mult=0.0)
    assert multipliers(model, wrapper) == approx(
        {
            'scale': (1, 1),
            'backbone.layer.weight': (0.1, 1),
            'backbone.layer.bias': (0.1, 1),
            'backbone.norm.weight': (0.1, 0),
            'backbone.norm.bias': (0.1, 0),
            'neck.layer.weight': (1, 1),
            'neck.layer.bias': (1, 1),
            'neck.norm.weight': (1, 0),
            'neck.norm.bias': (1, 0),
            'head.layer.weight': (1, 1),
            'head.layer.bias': (1, 1),
            'head.norm.weight': (1, 0),
            'head.norm.bias': (1, 0),
        }
    )


def test_the_longest_key_that_states_a_multiplier_gives_it() -> None:
    model = Detector()
    keys = {
        'backbone': dict(lr_mult=0.1, decay_mult=0.5),
        'backbone.norm': dict(decay_mult=1.0),
        'backbone.norm.bias': dict(lr_mult=0.2),
        'layer': dict(lr_mult=0.3),
    }
    got = multipliers(model, build(model, custom_keys=keys, norm_decay_mult=0.0))
    expected = {
        'backbone.layer.weight': (0.1, 0.5),  # `backbone` is longer than `layer`
        'backbone.norm.weight': (0.1, 1.0),  # a key's decay goes before that of norms
        'backbone.norm.bias': (0.2, 1.0),
        'neck.layer.weight': (0.3, 1.0),
        'neck.norm.weight': (1.0, 0.0),
    }
    assert {name: got[name] for name in expected} == approx(expected)


def test_equally_long_keys_go_by_the_alphabet() -> None:
    model = Detector()
    keys = dict(neck=dict(lr_mult=2.0), norm=dict(lr_mult=3.0), head=dict(lr_mult=4.0))
    got = multipliers(model, build(model, custom_keys=keys))
    assert [got[name][0] for name in ('neck.norm.bias', 'head.norm.bias', 'backbone.norm.bias')] == pytest.approx(
        [2, 4, 3]
    )


def test_equal_settings_share_a_group_in_the_order_of_the_model() -> None:
    model = Detector()
    wrapper = build(model, custom_keys=dict(backbone=dict(lr_mult=0.1)), norm_decay_mult=0.0)
    names = {id(p): name for name, p in model.named_parameters()}
    groups = [[names[id(p)] for p in group['params']] for group in wrapper.optimizer.param_groups]
    assert groups == [
        ['scale', 'neck.layer.weight', 'neck.layer.bias', 'head.layer.weight', 'head.layer.bias'],
        ['backbone.layer.weight', 'backbone.layer.bias'],
        ['backbone.norm.weight', 'backbone.norm.bias'],
        ['neck.norm.weight', 'neck.norm.bias', 'head.norm.weight', 'head.norm.bias'],
    ]


@pytest.mark.parametrize(
    'norm',
    [
        nn.BatchNorm1d(4),
        nn.BatchNorm2d(4),
        nn.SyncBatchNorm(4),
        nn.InstanceNorm2d(4, affine=True),
        nn.GroupNorm(2, 4),
        nn.LayerNorm(4),
        LayerNorm2d(4),
    ],
    ids=lambda norm: type(norm).__name__,
)
def test_kinds_of_norms(norm: nn.Module) -> None:
    model = Tower(norm)
    got = multipliers(model, build(model, norm_decay_mult=0.0))
    assert got == approx({'layer.weight': (1, 1), 'layer.bias': (1, 1), 'norm.weight': (1, 0), 'norm.bias': (1, 0)})


def test_frozen_parameters_are_left_out_and_their_keys_allowed() -> None:
    model = Detector()
    model.backbone.requires_grad_(False)
    got = multipliers(model, build(model, custom_keys=dict(backbone=dict(lr_mult=0.1))))
    assert set(got) == {name for name, p in model.named_parameters() if not name.startswith('backbone.')}


def test_a_parameter_of_two_modules_counts_once_under_its_first_name() -> None:
    model = nn.ModuleDict(dict(first=nn.Linear(4, 4), second=nn.Linear(4, 4)))
    model.second.weight = model.first.weight
    wrapper = build(model, custom_keys=dict(second=dict(lr_mult=0.1)))
    assert multipliers(model, wrapper) == approx(
        {'first.weight': (1, 1), 'first.bias': (1, 1), 'second.bias': (0.1, 1)}
    )
    assert sum(len(group['params']) for group in wrapper.optimizer.param_groups) == 3


def test_a_wrapped_model_gets_the_groups_of_the_model_in_it() -> None:
    class Wrapper(nn.Module):  # as DistributedDataParallel: the names would begin with `module.`
        def __init__(self, module: nn.Module) -> None:
            super().__init__()
            self.module = module

    class Part(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module_list = nn.ModuleList([nn.Linear(4, 4)])
            self.head = nn.Linear(4, 4)

    model = Part()
    keys = {'module': dict(lr_mult=0.1)}
    expected = multipliers(model, build(model, custom_keys=keys))
    assert multipliers(model, build(Wrapper(model), custom_keys=keys)) == approx(expected)
    assert [lr for lr, _ in expected.values()] == pytest.approx([0.1, 0.1, 1, 1])


def test_without_options_there_is_one_group() -> None:
    model = Detector()
    (group,) = build(model).optimizer.param_groups
    assert len(group['params']) == 13
    assert (group['lr'], group['weight_decay']) == (LR, DECAY)


def test_a_key_without_parameters_is_refused() -> None:
    message = r"the key 'backbon\.norm', which is in no parameter's name.*backbone, head, neck, scale"
    with pytest.raises(ValueError, match=message):
        build(Detector(), custom_keys={'backbon.norm': dict(lr_mult=0.1)})


@pytest.mark.parametrize(
    ('paramwise', 'message'),
    [
        (dict(bias_lr_mult=2.0), r'paramwise_cfg` has an option `bias_lr_mult`.*custom_keys, norm_decay_mult'),
        (dict(custom_keys=dict(head=dict(lr=0.1))), r"custom_keys\['head'\]` has an option `lr`.*lr_mult, decay_mult"),
    ],
)
def test_options_without_effect_are_refused(paramwise: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(Detector(), **paramwise)


@pytest.mark.parametrize('missing', ['lr', 'weight_decay'])
def test_what_is_multiplied_must_be_stated(missing: str) -> None:
    optimizer = {k: v for k, v in dict(type='AdamW', lr=LR, weight_decay=DECAY).items() if k != missing}
    constructor = OPTIM_WRAPPER_CONSTRUCTORS.get('dino_mm.ParamGroupConstructor')
    with pytest.raises(ValueError, match='State `lr` and `weight_decay`'):
        constructor(dict(optimizer=optimizer), dict(norm_decay_mult=0.0))


def test_a_step_moves_parameters_by_their_own_rates() -> None:
    model = Detector()
    wrapper = build(model, custom_keys=dict(backbone=dict(lr_mult=0.1)), norm_decay_mult=0.0)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    wrapper.step()
    for name, parameter in model.named_parameters():
        lr = LR * (0.1 if name.startswith('backbone') else 1)
        decay = 0 if '.norm.' in name else DECAY
        # AdamW's first step is the learning rate, for Adam divides the gradient by its own size.
        torch.testing.assert_close(parameter.detach(), before[name] * (1 - lr * decay) - lr, rtol=0, atol=1e-7)


@pytest.mark.skipif(not hasattr(torch, 'get_autocast_dtype'), reason='a CPU has no fused AdamW before torch 2.4')
@pytest.mark.parametrize('kind', ['AdamW', torch.optim.AdamW])
def test_adamw_is_fused_on_gpus(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here the CPU is taken for one; it has a fused AdamW as well, with the same steps up to rounding."""
    assert build(Detector(), optimizer=dict(type=kind)).optimizer.defaults['fused'] is None
    models, wrappers = [Detector() for _ in range(2)], []
    models[1].load_state_dict(models[0].state_dict())
    for model, on_gpus in zip(models, (False, True), strict=True):
        monkeypatch.setattr(param_groups, '_is_on_gpus', lambda _, on_gpus=on_gpus: on_gpus)
        wrappers.append(build(model, optimizer=dict(type=kind), norm_decay_mult=0.0))
        train(model, wrappers[-1])
    assert [{group['fused'] for group in wrapper.optimizer.param_groups} for wrapper in wrappers] == [{None}, {True}]
    compare_parameters(*models)
    for wrapper, other in (wrappers, wrappers[::-1]):  # resumed on the other kind of machine
        state = copy.deepcopy(other.optimizer.state_dict())
        wrapper.optimizer.load_state_dict(state)
    assert [{group['fused'] for group in wrapper.optimizer.param_groups} for wrapper in wrappers] == [{None}, {True}]
    for model, wrapper in zip(models, wrappers, strict=True):
        train(model, wrapper)
    compare_parameters(*models)


@pytest.mark.skipif(not hasattr(torch, 'get_autocast_dtype'), reason='a CPU has no fused AdamW before torch 2.4')
def test_training_resumes_with_channels_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fused kernels want parameters, gradients and averages in one layout; checkpoints may have another."""
    monkeypatch.setattr(param_groups, '_is_on_gpus', lambda _: True)
    models = [nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    models[1].to(memory_format=torch.channels_last)
    wrappers = [build(model) for model in models]
    train(models[0], wrappers[0])
    models[1].load_state_dict(models[0].state_dict())
    wrappers[1].optimizer.load_state_dict(copy.deepcopy(wrappers[0].optimizer.state_dict()))
    for parameter in models[1].parameters():
        state = wrappers[1].optimizer.state[parameter]
        assert state['exp_avg'].stride() == state['exp_avg_sq'].stride() == parameter.stride()
    for model, wrapper in zip(models, wrappers, strict=True):
        train(model, wrapper)
    compare_parameters(*models)


def train(model: nn.Module, wrapper: OptimWrapper) -> None:
    """Three steps with the same gradients every time."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        for parameter in model.parameters():
            grad = torch.randn(parameter.shape, generator=generator)
            parameter.grad = torch.empty_like(parameter).copy_(grad)  # in the parameter's layout, as autograd has it
        wrapper.step()


def compare_parameters(one: nn.Module, other: nn.Module) -> None:
    torch.testing.assert_close(one.state_dict(), other.state_dict(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize('option', ['fused', 'foreach'])
def test_the_config_says_whether_adamw_is_fused(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(param_groups, '_is_on_gpus', lambda _: True)
    defaults = build(Detector(), optimizer={'type': 'AdamW', option: False}).optimizer.defaults
    assert defaults[option] is False
    assert not defaults['fused']


def test_other_wrappers_are_built_with_their_options() -> None:
    cfg = ConfigDict(
        dict(
            type='OptimWrapper',
            optimizer=dict(type='SGD', lr=LR, weight_decay=DECAY, momentum=0.9),
            constructor='dino_mm.ParamGroupConstructor',
            clip_grad=dict(max_norm=0.1),
            accumulative_counts=3,
            paramwise_cfg=dict(norm_decay_mult=0.0),
        )
    )
    wrapper = build_optim_wrapper(Detector(), cfg)
    assert not isinstance(wrapper, AmpOptimWrapper)
    assert type(wrapper.optimizer) is torch.optim.SGD
    assert wrapper.clip_grad_kwargs == dict(max_norm=0.1)
    assert wrapper._accumulative_counts == 3
    assert {group['momentum'] for group in wrapper.optimizer.param_groups} == {0.9}
