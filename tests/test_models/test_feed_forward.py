"""A feed-forward network that is computed again for the gradients equals mmcv's, and keeps next to nothing."""

from collections.abc import Callable

import pytest
import torch
from conftest import make_samples
from mmcv.cnn.bricks.transformer import FFN
from mmengine.config import Config
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dino_mm.benchmark.profiling import OperatorCounter
from dino_mm.models.layers import transformer
from dino_mm.models.layers.transformer import DINOEncoderLayer, run_ffn
from dino_mm.models.structures import FeatureLevels, Tokens
from dino_mm.ops.recomputation import is_cheaper_to_compute_again
from dino_mm.registry import MODELS

DIM, HIDDEN = 16, 128


def make_ffn(dropout: float = 0.0) -> FFN:
    torch.manual_seed(0)
    return FFN(DIM, HIDDEN, ffn_drop=dropout).double()


def make_query() -> Tensor:
    torch.manual_seed(1)
    return torch.randn(2, 9, DIM, dtype=torch.float64, requires_grad=True)


def with_grads(output: Tensor, *leaves: Tensor) -> tuple[Tensor, ...]:
    weight = torch.linspace(0.5, 1.5, output.numel()).view(output.shape).to(output)
    return output, *torch.autograd.grad((output * weight).sum(), leaves)


def kept_bytes(run: Callable[[], object]) -> int:
    """Of the tensors, each counted once, that ``run`` keeps for the gradients."""
    kept: dict[int, Tensor] = {}

    def keep(tensor: Tensor) -> Tensor:
        kept[id(tensor.untyped_storage())] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in kept.values()}
    return sum(storages.values())


@pytest.mark.parametrize('recompute', [False, True])
@pytest.mark.parametrize('dropout', [0.0, 0.3])
def test_values_and_gradients_are_mmcvs(dropout: float, recompute: bool) -> None:
    ffn, x = make_ffn(dropout), make_query()
    torch.manual_seed(2)
    expected = with_grads(ffn(x), x, *ffn.parameters())
    torch.manual_seed(2)
    actual = with_grads(run_ffn(ffn, x, recompute), x, *ffn.parameters())
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize('dtype', [torch.bfloat16, torch.float16])
def test_half_precision_is_that_of_the_first_time(dtype: torch.dtype) -> None:
    ffn, x = make_ffn().float(), make_query().detach().float().requires_grad_()

    def run(recompute: bool) -> tuple[Tensor, ...]:
        with torch.autocast('cpu', dtype):
            output = run_ffn(ffn, x, recompute)
        return with_grads(output, x, *ffn.parameters())

    torch.testing.assert_close(run(True), run(False), rtol=0, atol=0)


def test_the_activation_in_place_costs_no_copies() -> None:
    ffn, x = make_ffn(), make_query()
    with OperatorCounter() as counter:
        run_ffn(ffn, x).sum().backward()
    assert counter.calls['relu_'] == 1
    assert not counter.calls.keys() & {'as_strided', 'clone', 'copy_'}


def changed(change: str) -> FFN:
    """A network that does more than it was built for."""
    ffn = make_ffn()
    if change == 'hook':
        ffn.layers[0][0].register_forward_hook(lambda module, args, output: output * 2)
    elif change == 'other layer':
        ffn.layers[0][1] = torch.nn.GELU()
    elif change == 'other class':
        ffn.layers[1] = type('Adapted', (torch.nn.Linear,), dict(forward=lambda self, x: x @ self.weight.t() + 1))(
            HIDDEN, DIM, dtype=torch.float64
        )
    else:
        ffn.add_identity = False
    return ffn


@pytest.mark.parametrize('change', ['hook', 'other layer', 'other class', 'no identity'])
def test_a_changed_network_runs_as_it_is(change: str) -> None:
    ffn, x = changed(change), make_query()
    parameters = [p for name, p in ffn.named_parameters() if change != 'other class' or name != 'layers.1.bias']
    expected = with_grads(ffn(x), x, *parameters)
    torch.testing.assert_close(with_grads(run_ffn(ffn, x, True), x, *parameters), expected, rtol=0, atol=1e-12)


def test_gradients_are_those_of_finite_differences_and_may_be_taken_twice() -> None:
    ffn, x = FFN(3, 4, ffn_drop=0.0).double(), torch.randn(1, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x, *_: run_ffn(ffn, x, True), (x, *ffn.parameters()))
    output = run_ffn(ffn, x, True).sum()
    first = torch.autograd.grad(output, x, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(output, x), first, rtol=0, atol=0)


def test_hidden_layers_are_not_kept() -> None:
    """But the query and the parameters: (num_tokens * dim + 2 * dim * hidden + hidden + dim) numbers."""
    ffn, x = make_ffn(), make_query()
    hidden, query, parameters = 2 * 9 * HIDDEN * 8, x.nbytes, sum(parameter.nbytes for parameter in ffn.parameters())
    assert kept_bytes(lambda: run_ffn(ffn, x, True)) <= query + parameters
    assert kept_bytes(lambda: run_ffn(ffn, x)) > hidden


def layer_bytes() -> int:
    """What an encoder layer keeps of 48 tokens on a GPU, which need not be there."""
    with FakeTensorMode(), torch.device('cuda'):
        layer, ones = DINOEncoderLayer(DIM, 2, 1, 4, HIDDEN, 0.0), torch.ones(1, 48, 1, 2)
        levels = FeatureLevels(
            shapes=((6, 8),),
            shape_tensor=ones.new_ones(1, 2, dtype=torch.long),
            start_index=ones.new_zeros(1, dtype=torch.long),
            sizes=ones.new_ones(1, 2),
            valid_ratios=ones.new_ones(1, 1, 2),
        )
        query = torch.ones(1, 48, DIM)
        return kept_bytes(lambda: layer(query, ones, Tokens(query, query, ones[:, :, 0], None, levels)))


@pytest.mark.filterwarnings("ignore:Deformable attention runs mmcv's PyTorch code")
def test_a_gpu_keeps_no_hidden_layer_of_the_encoder(monkeypatch: pytest.MonkeyPatch) -> None:
    spared = layer_bytes()
    monkeypatch.setattr(transformer, 'is_cheaper_to_compute_again', lambda x: False)
    hidden, bias = 48 * HIDDEN * 4, HIDDEN * 4  # the bias is kept to compute the hidden layer with
    assert layer_bytes() == spared + hidden - bias


def test_a_cpu_keeps_hidden_layers() -> None:
    assert not is_cheaper_to_compute_again(torch.ones(1))


def training_step(cfg: Config, compiled: bool = False) -> dict[str, Tensor]:
    """Losses, and gradients by parameter name, of a model in float64."""
    torch.manual_seed(0)
    model = MODELS.build(cfg).double()
    if compiled:
        torch._dynamo.reset()
        model.forward_transformer = torch.compile(model.forward_transformer, fullgraph=True, backend='aot_eager')
    inputs, samples = make_samples((2, 1), sizes=((64, 96), (48, 64)))
    torch.manual_seed(1)
    losses = model.loss(inputs.double(), samples)
    sum(losses.values()).backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {**{k: v.detach() for k, v in losses.items()}, **grads}


@pytest.mark.parametrize('num_cp', [0, 1])
def test_a_training_step_is_the_same(num_cp: int, tiny_cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny_cfg.encoder.update(dropout=0.3, num_cp=num_cp)
    expected = training_step(tiny_cfg)
    monkeypatch.setattr(transformer, 'is_cheaper_to_compute_again', lambda x: True)
    torch.testing.assert_close(training_step(tiny_cfg), expected, rtol=0, atol=0)


@pytest.mark.slow
@pytest.mark.parametrize('num_cp', [0, 1])
def test_a_compiled_training_step_is_the_same(num_cp: int, tiny_cfg: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(transformer, 'is_cheaper_to_compute_again', lambda x: True)
    tiny_cfg.encoder.num_cp = num_cp
    tiny_cfg.denoising.update(label_noise_ratio=0, box_noise_scale=0)
    expected = training_step(tiny_cfg)
    torch.testing.assert_close(training_step(tiny_cfg, compiled=True), expected, rtol=0, atol=1e-8)
