"""Weights that are cast at once give what autocast gives, bit by bit."""

from collections import Counter

import pytest
import torch
from conftest import make_samples, tiny_model_cfg
from torch import Tensor, nn

from dino_mm.benchmark.profiling import OperatorCounter
from dino_mm.models import DINO
from dino_mm.models.detectors import dino
from dino_mm.models.layers import transformer
from dino_mm.ops.half_weights import call_with_half_weights
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


def run(network: nn.Module, image: Tensor, half: bool) -> tuple[list[Tensor | None], list[Counter[str]]]:
    """Output and gradients; operator calls of both passes."""
    with OperatorCounter() as forward, torch.autocast('cpu', torch.bfloat16):
        output = call_with_half_weights(network, image) if half else network(image)
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


def test_without_autocast_or_compiled_the_module_is_called_as_it_is() -> None:
    network, image = Network(), torch.randn(1, 3, 9, 9)
    with OperatorCounter() as counter:
        expected = call_with_half_weights(network, image)
    assert torch.equal(expected, network(image))
    network.compile(backend='eager')
    with OperatorCounter() as compiled, torch.autocast('cpu', torch.bfloat16):
        call_with_half_weights(network, image)
    assert counter.calls['_foreach_copy_'] == compiled.calls['_foreach_copy_'] == 0


@pytest.mark.parametrize('num_cp', [0, 1])
def test_a_training_step_is_autocasts(num_cp: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Recomputed layers too."""
    cfg = tiny_model_cfg()
    cfg.encoder.num_cp = cfg.decoder.num_cp = num_cp
    half, casts = training_step(cfg)
    for module in (dino, transformer):
        monkeypatch.setattr(module, 'call_with_half_weights', lambda part, *args: part(*args))
    plain, none = training_step(cfg)
    torch.testing.assert_close(half, plain, rtol=0, atol=0)
    # Backbone, neck, a layer of the encoder, two of the decoder.
    assert (casts, none) == (5, 0)


def training_step(cfg: dict) -> tuple[dict[str, Tensor], int]:
    """Losses and gradients under autocast, and how often the forward pass casts many tensors at once."""
    torch.manual_seed(0)
    model: DINO = MODELS.build(cfg)
    inputs, samples = make_samples((2, 1), sizes=((64, 96), (48, 64)))
    with OperatorCounter() as counter, torch.autocast('cpu', torch.bfloat16):
        losses = model.loss(inputs, samples)
    sum(losses.values()).backward()
    found = {k: v.detach() for k, v in losses.items()} | {k: p.grad for k, p in model.named_parameters()}
    return found, counter.calls['_foreach_copy_']
