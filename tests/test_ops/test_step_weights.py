"""Weights that are cast at once give what autocast gives, bit by bit."""

from collections import Counter
from contextlib import nullcontext

import pytest
import torch
from conftest import make_samples, tiny_model_cfg
from torch import Tensor, nn

from dino_mm.benchmark.profiling import OperatorCounter
from dino_mm.models import DINO
from dino_mm.models.dense_heads import dino_head
from dino_mm.models.detectors import dino
from dino_mm.models.layers import attention
from dino_mm.ops.step_weights import as_autocast, step_weights, with_its_weights
from dino_mm.registry import MODELS

pytestmark = pytest.mark.skipif(not hasattr(torch, 'get_autocast_dtype'), reason='before torch 2.4 autocast casts')


class Network(nn.Module):
    """A convolution that is frozen, one that is not, a norm, a layer that runs twice, one that does not run."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3).requires_grad_(False)
        self.conv = nn.Conv2d(8, 8, 3)
        self.norm = nn.LayerNorm(8)
        self.shared = nn.Linear(8, 8)
        self.unused = nn.Linear(8, 8)
        self.attn = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, image: Tensor) -> Tensor:
        x = self.norm(self.conv(self.stem(image)).flatten(2).transpose(1, 2))
        x = self.shared(self.shared(x).relu())
        return self.attn(x, x, x, need_weights=False)[0]


def detect(network: nn.Module, image: Tensor) -> Tensor:
    """As the child of a model."""
    with step_weights(nn.ModuleList([network])):
        return network(image)


def run(network: nn.Module, image: Tensor, half: bool) -> tuple[list[Tensor | None], list[Counter[str]]]:
    """Output and gradients; operator calls of both passes."""
    with OperatorCounter() as forward, torch.autocast('cpu', torch.bfloat16):
        output = detect(network, image) if half else network(image)
    with OperatorCounter() as backward:
        output.float().square().sum().backward()
    return [output.detach(), *(p.grad for p in network.parameters())], [forward.calls, backward.calls]


def test_values_and_gradients_are_autocasts() -> None:
    image, results, calls = torch.randn(2, 3, 9, 9), [], []
    for half in (False, True):
        torch.manual_seed(0)
        result, counts = run(Network(), image, half)
        results.append(result)
        calls.append(counts)
    assert [grad is None for grad in results[0]] == [grad is None for grad in results[1]]
    assert {grad.dtype for grad in results[1][1:] if grad is not None} == {torch.float32}
    for one, other in zip(*results, strict=True):
        assert one is other is None or torch.equal(one, other)
    # Two of the stem, two of the convolution, two of the layer, four of the attention; the stem has no gradient.
    assert calls[0][0]['_to_copy'] - calls[1][0]['_to_copy'] == 10
    assert calls[0][1]['_to_copy'] - calls[1][1]['_to_copy'] == 8
    assert [count['_foreach_copy_'] for count in calls[1]] == [1, 1]
    assert calls[1][1]['convolution_backward'] == calls[0][1]['convolution_backward'] == 1


def test_without_autocast_or_compiled_weights_stay() -> None:
    model, image = nn.Sequential(Network()), torch.randn(1, 3, 9, 9)
    with step_weights(model):
        assert isinstance(model[0].shared.weight, nn.Parameter)
    model[0].attn.compile(backend='eager')
    with torch.autocast('cpu', torch.bfloat16), step_weights(model):
        assert model[0].shared.weight.dtype is torch.bfloat16
        assert model[0].attn.in_proj_weight.dtype is model[0].attn.out_proj.weight.dtype is torch.float32
    model = nn.Sequential(torch.compile(Network(), backend='eager'))
    with torch.autocast('cpu', torch.bfloat16), step_weights(model):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert as_autocast(image) is image


def test_afterwards_all_is_as_before() -> None:
    """After an error, and where contexts nest, too."""
    model = nn.Sequential(Network(), nn.Linear(2, 2))
    before = dict(model.named_parameters())
    with torch.autocast('cpu', torch.bfloat16):
        with step_weights(model):
            halves = model[0].conv.weight
            with step_weights(model):
                assert model[0].conv.weight is halves
            assert model[0].conv.weight is halves
        with pytest.raises(RuntimeError):
            detect(model[0], torch.ones(1))
    after = dict(model.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is parameter for name, parameter in before.items())


def test_what_is_called_again_has_the_weights_of_the_first_call() -> None:
    model, image = nn.Sequential(Network()), torch.randn(1, 3, 9, 9)
    assert with_its_weights(model[0]) is model[0]
    with torch.autocast('cpu', torch.bfloat16):
        with step_weights(model):
            again, expected = with_its_weights(model[0]), model[0](image)
        with OperatorCounter() as counter:
            assert torch.equal(again(image), expected)
        assert not counter.calls['_foreach_copy_']
        assert counter.calls['_to_copy'] < 10
    assert isinstance(model[0].conv.weight, nn.Parameter)


@pytest.mark.parametrize(('size', 'kernels'), [(1, 12), (200, 4), (10**9, 1)])
def test_weights_are_made_in_groups_whose_gradients_are_ready_together(
    size: int, kernels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The last layers' first, so that other processes need not wait for all."""
    monkeypatch.setattr('dino_mm.ops.step_weights.GROUP', size)
    image, network, ready = torch.randn(2, 3, 9, 9), Network(), []
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            parameter.register_hook(lambda grad, name=name: ready.append(name))
    _, calls = run(network, image, half=True)
    assert calls[0]['_foreach_copy_'] == kernels
    assert ready.index('conv.weight') > ready.index('attn.in_proj_weight') or kernels == 1


@pytest.mark.parametrize('num_cp', [0, 1])
def test_a_training_step_is_autocasts(num_cp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recomputed layers too."""
    cfg = tiny_model_cfg()
    cfg.encoder.num_cp = cfg.decoder.num_cp = num_cp
    shared, _ = training_step(cfg)
    for user in (attention, dino_head):
        monkeypatch.setattr(user, 'as_autocast', lambda x: x)
    # Weights that are stacked have gradients of their own there, and the cast ones are not shared with the decoder.
    monkeypatch.setattr(dino_head, 'run_branches', lambda parts, x: torch.stack([f(y) for f, y in zip(parts, x)]))  # noqa: B905
    half, casts = training_step(cfg)
    monkeypatch.setattr(dino, 'step_weights', lambda *args: nullcontext())
    plain, none = training_step(cfg)
    torch.testing.assert_close(half, plain, rtol=0, atol=0)
    # Inputs that are cast once have the sum of their gradients rounded, those that autocast casts each summand.
    exact, _ = training_step(cfg, torch.float32)
    errors = [
        torch.stack([(found[name] - value).norm() / value.norm().clamp(min=1e-6) for name, value in exact.items()])
        for found in (shared, plain)
    ]
    assert errors[0].median() < 1.1 * errors[1].median() < 0.1
    assert (casts, none) == (1, 0)


def training_step(cfg: dict, dtype: torch.dtype = torch.bfloat16) -> tuple[dict[str, Tensor], int]:
    """Losses and gradients under autocast, and how often the forward pass casts many tensors at once."""
    torch.manual_seed(0)
    model: DINO = MODELS.build(cfg)
    inputs, samples = make_samples((2, 1), sizes=((64, 96), (48, 64)))
    with OperatorCounter() as counter, torch.autocast('cpu', torch.bfloat16, dtype is torch.bfloat16):
        losses = model(inputs, samples, mode='loss')
    sum(losses.values()).backward()
    found = {k: v.detach() for k, v in losses.items()} | {k: p.grad for k, p in model.named_parameters()}
    return found, counter.calls['_foreach_copy_']
