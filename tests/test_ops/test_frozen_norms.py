"""Frozen norms that are folded into the convolutions before them: same numbers, less memory, and when they are not."""

import copy
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from conftest import make_samples, tiny_model_cfg
from mmengine.config import ConfigDict
from mmengine.model.efficient_conv_bn_eval import turn_on_efficient_conv_bn_eval
from torch import Tensor, nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.nn.modules.module import _global_forward_hooks, register_module_forward_hook
from torch.utils.checkpoint import checkpoint

from dino_mm.benchmark.comparison import Setting
from dino_mm.benchmark.memory import training_peak
from dino_mm.benchmark.profiling import OperatorCounter
from dino_mm.engine.compilation import compile_detector
from dino_mm.models import DINO
from dino_mm.ops.frozen_norms import CAN_FOLD
from dino_mm.registry import MODELS

pytestmark = pytest.mark.skipif(not CAN_FOLD, reason='before torch 2.7 norms run by themselves')
#: Norms of a ResNet of 18 layers: its own, two in each of eight blocks, three on the way past them.
NUM_NORMS = 1 + 2 * 8 + 3


@pytest.fixture(autouse=True)
def _no_hooks_stay() -> Iterator[None]:
    yield
    _global_forward_hooks.clear()


def model_cfg(**backbone: object) -> ConfigDict:
    """A tiny detector whose norms are frozen."""
    cfg = ConfigDict(tiny_model_cfg())
    cfg.backbone.update(dict(norm_cfg=dict(type='BN', requires_grad=False), norm_eval=True) | backbone)
    if backbone.get('depth') == 50:
        cfg.neck.in_channels = [32, 64, 128]
    return cfg


def build(dtype: torch.dtype = torch.float64, **backbone: object) -> DINO:
    """In training, with numbers of its own."""
    torch.manual_seed(0)
    model = MODELS.build(model_cfg(**backbone)).to(dtype).train()
    for norm in norms(model):
        nn.init.normal_(norm.running_mean, std=0.1)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
        nn.init.normal_(norm.weight, 1.0, 0.1)
        nn.init.normal_(norm.bias, std=0.1)
    return model


def norms(model: DINO) -> list[nn.BatchNorm2d]:
    return [module for module in model.backbone.modules() if isinstance(module, nn.BatchNorm2d)]


def step(model: DINO) -> tuple[dict[str, Tensor], int]:
    """Losses and gradients of a training step, and how many norms ran by themselves."""
    torch.manual_seed(1)
    model.zero_grad()
    inputs, samples = make_samples((2, 1), sizes=((64, 96), (48, 64)))
    with OperatorCounter() as counter:
        losses = model(inputs.to(model.level_embed), samples, mode='loss')
    sum(losses.values()).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()} | grads, counter.calls['native_batch_norm']


def plain_step(model: DINO) -> dict[str, Tensor]:
    """The same with norms that run by themselves."""
    found, model._frozen_norms = model._frozen_norms, ()
    numbers, _ = step(model)
    model._frozen_norms = found
    return numbers


@pytest.mark.parametrize(
    'backbone',
    [
        dict(),
        dict(depth=50),
        dict(depth=50, style='caffe', frozen_stages=2),
        dict(avg_down=True),
        dict(type='mmdet.ResNeXt', depth=50, groups=4, base_width=2),
        dict(depth=50, plugins=[dict(cfg=dict(type='ContextBlock', ratio=0.5), position='after_conv2')]),
    ],
    ids=lambda options: '-'.join(map(str, options)) or 'as it is',
)
def test_a_training_step_is_the_same(backbone: dict) -> None:
    model = build(**backbone)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = plain_step(model)
    for _ in range(2):  # what the first step has kept serves the second
        kept = [norm._kept for norm in model.train()._frozen_norms]
        actual, num_norms = step(model)
        assert num_norms == 0
        torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    assert kept == [norm._kept for norm in model._frozen_norms]
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)
    assert all(type(p) is nn.Parameter for p in model.parameters())


def test_the_maps_before_them_are_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    setting = Setting('', height=256, width=320, batch=2)
    peaks = [training_peak(model_cfg(depth=50), setting).step]
    monkeypatch.setattr('dino_mm.models.detectors.dino.frozen_norms', lambda backbone: [])
    peaks.append(training_peak(model_cfg(depth=50), setting).step)
    assert peaks[0] < 0.8 * peaks[1]


def test_channels_last() -> None:
    model = build()
    expected = plain_step(model)
    model.channels_last = True
    model.backbone.to(memory_format=torch.channels_last)
    actual, num_norms = step(model)
    assert num_norms == 0
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)
    assert all(norm.scale().stride() == norm.conv.weight.stride() for norm in model._frozen_norms)


@pytest.mark.skipif(not hasattr(torch, 'get_autocast_dtype'), reason='before torch 2.4 autocast casts')
def test_under_autocast_they_are_as_exact() -> None:
    """Weights are rounded once, after they are scaled."""
    model = build(torch.float32)
    exact = plain_step(model)
    with torch.autocast('cpu', torch.bfloat16):
        halves = [plain_step(model), step(model)[0]]
    names = [name for name in exact if name.startswith('backbone') and name.endswith('weight')]
    errors = [
        torch.stack([(half[name] - exact[name]).norm() / exact[name].norm() for name in names]).median()
        for half in halves
    ]
    assert errors[1] < 1.1 * errors[0] < 0.2


def look(model: DINO) -> None:
    model.backbone.layer1[0].conv1.register_forward_hook(lambda *args: None)


def look_at_gradients(model: DINO) -> None:
    model.backbone.layer1[0].conv1.register_full_backward_hook(lambda *args: None)


def learn(model: DINO) -> None:
    model.backbone.layer1[0].bn1.weight.requires_grad_()


def replace(model: DINO) -> None:
    model.backbone.layer1[0].bn1 = copy.deepcopy(model.backbone.layer1[0].bn1)


def look_at_all(model: DINO) -> None:
    register_module_forward_hook(lambda *args: None)


def adapt(model: DINO) -> None:
    """As LoRA does: the output of the convolution, and something."""
    block = model.backbone.layer1[0]
    block.conv1 = Adapted(block.conv1)


class Adapted(nn.Module):
    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x) + 0.0


def use_mmengines(model: DINO) -> None:
    turn_on_efficient_conv_bn_eval(model, 'backbone')


def compute_again(model: DINO) -> None:
    for block in model.backbone.layer2:
        block.with_cp = True


def checkpoint_a_stage(model: DINO, use_reentrant: bool) -> None:
    run = model.backbone.layer2.forward
    model.backbone.layer2.forward = lambda x: checkpoint(run, x, use_reentrant=use_reentrant)


def wrap_blocks(model: DINO) -> None:
    apply_activation_checkpointing(model.backbone, check_fn=lambda module: module is model.backbone.layer2[1])


@pytest.mark.parametrize(
    ('change', 'expected'),
    [
        (look, 1),
        (look_at_gradients, 1),
        (look_at_all, NUM_NORMS),
        (learn, 1),
        (replace, 1),
        (adapt, 1),
        (use_mmengines, 0),
        (compute_again, 5),
        (partial(checkpoint_a_stage, use_reentrant=True), 5),
        (partial(checkpoint_a_stage, use_reentrant=False), 5),
        (wrap_blocks, 2),
    ],
)
def test_norms_that_run_by_themselves(change: Callable[[DINO], None], expected: int) -> None:
    model = build()
    numbers = plain_step(model)
    change(model)
    actual, num_norms = step(model)
    assert num_norms == expected
    actual = {
        name.replace('conv1.conv.', 'conv1.').replace('_checkpoint_wrapped_module.', ''): x
        for name, x in actual.items()
    }
    torch.testing.assert_close({name: actual[name] for name in numbers}, numbers, rtol=1e-9, atol=1e-9)


def test_compiled_parts_are_left_as_they_are() -> None:
    model = build()
    expected = plain_step(model)
    compile_detector(model, backend='eager')
    actual, num_norms = step(model)
    assert num_norms == NUM_NORMS - 1  # all but the one before the stages
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_norms_that_learn_do() -> None:
    model = build(norm_eval=False, norm_cfg=dict(type='BN', requires_grad=True))
    means = [norm.running_mean.clone() for norm in norms(model)]
    _, num_norms = step(model)
    assert num_norms == NUM_NORMS
    assert not any(torch.equal(norm.running_mean, mean) for norm, mean in zip(norms(model), means, strict=True))


def load(model: DINO) -> None:
    model.load_state_dict({name: 1.5 * value for name, value in model.state_dict().items()})


def assign(model: DINO) -> None:
    model.load_state_dict({name: 1.5 * value for name, value in model.state_dict().items()}, assign=True)


def set_behind_torch(model: DINO) -> None:
    for norm in norms(model):
        norm.running_var.data.fill_(3.0)
    model.eval().train()


def set_in_place(model: DINO) -> None:
    for norm in norms(model):
        norm.bias.detach().add_(0.1)


def set_anew(model: DINO) -> None:
    for norm in norms(model):
        norm.running_mean = norm.running_mean + 0.1


def set_eps(model: DINO) -> None:
    for norm in norms(model):
        norm.eps = 0.5


def refine(model: DINO) -> None:
    model.double()


@pytest.mark.parametrize('change', [load, assign, set_behind_torch, set_in_place, set_anew, set_eps, refine])
def test_numbers_that_change_count(change: Callable[[DINO], None]) -> None:
    model = build(torch.float32 if change is refine else torch.float64)
    before, _ = step(model)
    change(model)
    actual, num_norms = step(model)
    assert num_norms == 0
    assert not torch.allclose(actual['loss_cls'], before['loss_cls'].double(), rtol=1e-9)
    torch.testing.assert_close(actual, plain_step(model), rtol=1e-9, atol=1e-9)


def test_a_copy_keeps_nothing_of_the_model() -> None:
    """Versions of its tensors begin anew."""
    model = build()
    step(model)
    twin = copy.deepcopy(model)
    load(twin)
    torch.testing.assert_close(step(twin)[0], plain_step(twin), rtol=1e-9, atol=1e-9)


def test_parameters_stay_what_they_are_within_a_step() -> None:
    model, seen = build(), []
    state = model.state_dict()
    model.neck.register_forward_hook(lambda *args: seen.append(copy.deepcopy(model).state_dict()))
    assert step(model)[1] == 0
    torch.testing.assert_close(seen[0], state, rtol=0, atol=0)


def test_detections_and_copies() -> None:
    """Without gradients, norms run by themselves; a copy has norms of its own."""
    model = build()
    step(model)
    twin = copy.deepcopy(model)
    assert {id(norm.conv) for norm in twin._frozen_norms} <= {id(module) for module in twin.modules()}
    torch.testing.assert_close(step(twin)[0], step(model)[0], rtol=0, atol=0)
    inputs, samples = make_samples((1,))
    with OperatorCounter() as counter, torch.no_grad():
        model.eval()(inputs.double(), samples, mode='predict')
    assert counter.calls['native_batch_norm'] == NUM_NORMS
    assert not model._frozen_norms


def test_after_an_error_all_is_as_before() -> None:
    model = build()
    samples = make_samples((1,))[1]
    with pytest.raises(RuntimeError):
        model(torch.ones(1, 7, 8, 8).double(), samples, mode='loss')
    assert all(norm.is_plain() for norm in model._frozen_norms)
    assert step(model)[1] == 0
