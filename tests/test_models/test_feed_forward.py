"""A feed-forward network in pieces equals mmcv's, and stands back where somebody has a hand in it."""

import weakref
from collections.abc import Callable

import pytest
import torch
from mmcv.cnn.bricks.transformer import FFN
from test_linear import Names, with_grads
from torch import Tensor, nn

from dino_mm.models.layers import feed_forward
from dino_mm.models.layers import linear as linear_module
from dino_mm.models.layers.feed_forward import run_ffn
from dino_mm.models.layers.linear import use_fast_linear

DIM, HIDDEN = 16, 32


def make_ffn(dropout: float = 0.0) -> FFN:
    torch.manual_seed(0)
    ffn = FFN(DIM, HIDDEN, ffn_drop=dropout)
    use_fast_linear(ffn)
    return ffn


def in_pieces(output: Tensor) -> bool:
    """Whether :class:`FeedForward` made ``output``, of which ``run_ffn`` gives no view."""
    return 'FeedForward' in type(output.grad_fn).__name__


@pytest.mark.parametrize('rows', [1, 4, 5, 18, 100])
def test_pieces_of_any_size_equal_mmcvs(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_forward, 'PIECE_BYTES', rows * HIDDEN * 8)
    ffn = make_ffn().double()
    x = torch.randn(2, 9, DIM, dtype=torch.float64, requires_grad=True)
    actual = with_grads(run_ffn(ffn, x), x, *ffn.parameters())
    expected = with_grads(ffn(x), x, *ffn.parameters())
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)
    assert in_pieces(run_ffn(ffn, x))


@pytest.mark.parametrize('as_convolution', [True, False])
def test_pieces_equal_mmcvs_as_convolutions_too(as_convolution: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(linear_module, 'LINEAR_AS_CONVOLUTION', as_convolution)
    monkeypatch.setattr(feed_forward, 'PIECE_BYTES', 5 * HIDDEN * 4)
    ffn = make_ffn()
    x = torch.randn(2, 9, DIM, requires_grad=True)
    with Names() as ran:
        actual = with_grads(run_ffn(ffn, x), x, *ffn.parameters())
    expected = with_grads(ffn(x), x, *ffn.parameters())
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-5)
    assert ('convolution_backward' in ran.names) == as_convolution
    assert actual[0].is_contiguous()


def test_hidden_layers_are_small_and_only_kept_for_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_forward, 'PIECE_BYTES', 6 * HIDDEN * 4)
    monkeypatch.setattr(linear_module, 'LINEAR_AS_CONVOLUTION', False)
    ffn, x, kept = make_ffn(), torch.randn(2, 9, DIM), []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.shape)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run_ffn(ffn, x)
    assert kept == [(2, 9, DIM), (HIDDEN, DIM), (DIM, HIDDEN), *[(6, HIDDEN)] * 3]


def test_hidden_layers_are_not_kept_without_gradients(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed_forward, 'PIECE_BYTES', 6 * HIDDEN * 4)
    monkeypatch.setattr(linear_module, 'LINEAR_AS_CONVOLUTION', False)
    ffn, x, made, alive = make_ffn(), torch.randn(2, 9, DIM), [], []
    make_hidden = feed_forward.Products.linear

    def spy(*args: Tensor) -> Tensor:
        alive.append(sum(hidden() is not None for hidden in made))
        hidden = make_hidden(*args)
        assert hidden.shape == (6, HIDDEN)
        made.append(weakref.ref(hidden))
        return hidden

    monkeypatch.setattr(feed_forward.Products, 'linear', staticmethod(spy))
    with torch.no_grad():
        run_ffn(ffn, x)
    assert len(made) == 3
    assert max(alive) == 1


def test_gradients_may_be_taken_twice() -> None:
    ffn, x = make_ffn(), torch.randn(2, 9, DIM, requires_grad=True)
    output = run_ffn(ffn, x).sum()
    first = torch.autograd.grad(output, (x, *ffn.parameters()), retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(output, (x, *ffn.parameters())), first, rtol=0, atol=0)


def test_tokens_may_lie_anyhow_and_be_none() -> None:
    ffn = make_ffn().double()
    strided = torch.randn(9, 2, DIM, dtype=torch.float64).transpose(0, 1).requires_grad_()
    for x in (strided, strided[:, :0]):
        actual = with_grads(run_ffn(ffn, x), *ffn.parameters())
        torch.testing.assert_close(actual, with_grads(ffn(x), *ffn.parameters()), rtol=0, atol=1e-12)


def replace_linear(ffn: FFN) -> None:
    class Adapted(nn.Linear):
        """As an adapter of somebody else's would be."""

    ffn.layers[1] = Adapted(HIDDEN, DIM)


CHANGES: dict[str, Callable[[FFN], object]] = {
    'frozen': lambda ffn: ffn.layers[1].requires_grad_(False),
    'a hook': lambda ffn: ffn.layers[0][0].register_forward_hook(lambda module, args, output: output),
    'a hook before': lambda ffn: ffn.layers[1].register_forward_pre_hook(lambda module, args: None),
    'a gradient hook': lambda ffn: ffn.layers[1].register_full_backward_hook(lambda module, ins, outs: None),
    'another layer': replace_linear,
    'another activation': lambda ffn: setattr(ffn.layers[0], '1', nn.GELU()),
    'a parametrization': lambda ffn: nn.utils.parametrizations.weight_norm(ffn.layers[1]),
}


@pytest.mark.parametrize('change', CHANGES)
def test_changed_networks_run_as_they_are(change: str) -> None:
    ffn, x = make_ffn(), torch.randn(2, 9, DIM, requires_grad=True)
    assert in_pieces(run_ffn(ffn, x))
    CHANGES[change](ffn)
    output = run_ffn(ffn, x)
    assert not in_pieces(output)
    torch.testing.assert_close(output, ffn(x))


def test_dropout_runs_where_it_is_active() -> None:
    ffn, x = make_ffn(dropout=0.5), torch.randn(2, 9, DIM, requires_grad=True)
    assert not torch.equal(run_ffn(ffn, x), run_ffn(ffn, x))
    ffn.eval()
    assert in_pieces(run_ffn(ffn, x))


def test_autocast_keeps_its_precision() -> None:
    ffn, x = make_ffn(), torch.randn(2, 9, DIM)
    with torch.autocast('cpu', torch.bfloat16):
        output, expected = run_ffn(ffn, x), ffn(x)
    assert not in_pieces(output)
    torch.testing.assert_close(output, expected, rtol=1e-2, atol=1e-2)


def test_a_trace_has_the_networks_own_operators() -> None:
    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.ffn = make_ffn()

        def forward(self, x: Tensor) -> Tensor:
            return run_ffn(self.ffn, x)

    traced = torch.jit.trace(Network(), torch.randn(2, 9, DIM))
    assert [node.kind() for node in traced.inlined_graph.nodes()].count('aten::linear') == 2
