"""A linear layer that runs as a convolution gives what ``F.linear`` gives."""

import pytest
import torch
import torch.nn.functional as F
from mmcv.cnn.bricks.transformer import FFN
from torch import Tensor, nn

from dino_mm.benchmark.profiling import OperatorCounter
from dino_mm.models.layers.attention import SelfAttention
from dino_mm.models.layers.transformer import DINODecoder, DINOEncoder, run_ffn
from dino_mm.ops import linear as module
from dino_mm.ops.linear import Linear, linear, use_fast_linear
from dino_mm.ops.recomputation import run_again_for_gradients


@pytest.fixture(params=[True, False])
def as_convolution(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """Whichever way this machine's processor suggests."""
    monkeypatch.setattr(module, 'AS_CONVOLUTION', request.param)
    return request.param


def with_grads(output: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    weight = torch.linspace(0.5, 1.5, output.numel()).view(output.shape).to(output)
    return output, *torch.autograd.grad((output * weight).sum(), leaves)


def scale(x: Tensor) -> float:
    """What rounding is relative to, where sums cancel."""
    return x.abs().mean().item() if x.numel() else 0.0


@pytest.mark.parametrize('bias', [True, False])
@pytest.mark.parametrize('shape', [(2, 7, 12), (1, 1, 12), (3, 300, 12), (1, 0, 12), (2, 3, 4, 12), (5, 12)])
def test_linear_is_f_linear(as_convolution: bool, shape: tuple[int, ...], bias: bool) -> None:
    torch.manual_seed(0)
    x, weight, offset = torch.randn(shape), torch.randn(20, 12), torch.randn(20) if bias else None
    inputs = (x, weight, offset)
    leaves = [leaf.requires_grad_() for leaf in inputs if leaf is not None]
    with OperatorCounter() as ran:
        ours = with_grads(linear(*inputs), *leaves)
    exact = with_grads(F.linear(*(leaf if leaf is None else leaf.double() for leaf in inputs)), *leaves)
    for actual, expected in zip(ours, exact, strict=True):
        torch.testing.assert_close(actual.double(), expected.double(), rtol=0, atol=4e-6 * scale(expected))
    assert ('convolution' in ran.calls) == (as_convolution and x.numel() > 0)
    assert ours[0].is_contiguous()


@pytest.mark.parametrize('dtype', [torch.float64, torch.bfloat16])
def test_only_float32_runs_as_convolution(as_convolution: bool, dtype: torch.dtype) -> None:
    x, weight = torch.randn(2, 5, 12, dtype=dtype), torch.randn(20, 12, dtype=dtype)
    with OperatorCounter() as ran:
        ours = linear(x, weight, None)
    assert torch.equal(ours, F.linear(x, weight))
    assert 'convolution' not in ran.calls


def test_a_trace_has_plain_operators(as_convolution: bool) -> None:
    layer = Linear(12, 20)
    x = torch.randn(2, 5, 12)
    kinds = {node.kind() for node in torch.jit.trace(layer, x).inlined_graph.nodes()}
    assert 'aten::linear' in kinds
    assert not any('conv' in kind for kind in kinds)


def test_ffn_equals_mmcvs_gradients_included(as_convolution: bool) -> None:
    torch.manual_seed(0)
    theirs, ours = FFN(16, 32, ffn_drop=0.0), FFN(16, 32, ffn_drop=0.0)
    ours.load_state_dict(theirs.state_dict())
    use_fast_linear(ours)
    x = torch.randn(2, 9, 16, requires_grad=True)
    expected = with_grads(theirs(x), x, *theirs.parameters())
    with OperatorCounter() as ran:
        actual = with_grads(run_ffn(ours, x), x, *ours.parameters())
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert ('convolution' in ran.calls) == as_convolution
    assert not ran.calls.keys() & {'as_strided', 'clone', 'copy_'}  # what to write to a view would cost
    assert actual[0].is_contiguous()


def test_self_attention_equals_torchs(as_convolution: bool) -> None:
    torch.manual_seed(0)
    ours, query, query_pos = SelfAttention(16, 4), torch.randn(2, 9, 16), torch.randn(2, 9, 16)
    use_fast_linear(ours)
    located = query + query_pos
    expected = query + ours.attn(located, located, query, need_weights=False)[0]
    torch.testing.assert_close(ours(query, query_pos), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('kind', [DINOEncoder, DINODecoder])
def test_all_layers_of_encoder_and_decoder_are_fast(kind: type[nn.Module]) -> None:
    layers = [m for m in kind(16, 2, num_layers=2, num_heads=4).layers.modules() if isinstance(m, nn.Linear)]
    assert len(layers) >= 12
    assert {type(layer) for layer in layers} == {Linear}


@pytest.mark.parametrize('kind', [DINOEncoder, DINODecoder])
def test_fast_layers_are_still_computed_again_on_a_gpu(kind: type[nn.Module]) -> None:
    ffn = kind(16, 2, num_layers=1, num_heads=4).layers[0].ffn
    x = torch.randn(9, 16, requires_grad=True)
    again = run_again_for_gradients(ffn, x)
    assert again is not None
    torch.testing.assert_close(again, ffn(x))
