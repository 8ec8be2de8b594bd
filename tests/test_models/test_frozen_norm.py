"""Frozen batch norms give what torch's give, and keep less."""

import copy

import pytest
import torch
from conftest import tiny_model_cfg
from torch import Tensor, nn

from dino_mm.models.backbones.frozen_norm import BatchNorm2d, use_frozen_norms
from dino_mm.registry import MODELS


def make_norm(dtype: torch.dtype = torch.float32) -> nn.BatchNorm2d:
    """torch's, with statistics and weights of its own, frozen."""
    norm = nn.BatchNorm2d(8).eval().requires_grad_(False)
    for tensor in (norm.running_mean, norm.weight, norm.bias):
        nn.init.normal_(tensor)
    nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return norm.to(dtype)


def ours(norm: nn.BatchNorm2d) -> nn.BatchNorm2d:
    holder = nn.Sequential(copy.deepcopy(norm))
    use_frozen_norms(holder)
    assert type(holder[0]) is BatchNorm2d
    return holder[0]


def run(norm: nn.Module, x: Tensor, grad: Tensor) -> list[Tensor]:
    """Output, the gradient of the input, those of the parameters that have one."""
    x = x.clone().requires_grad_()
    output = norm(x)
    output.backward(grad)
    return [output.detach(), x.grad, *(p.grad for p in norm.parameters() if p.grad is not None)]


@pytest.mark.parametrize('memory_format', [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize('dtype', [torch.float64, torch.float32, torch.bfloat16])
def test_values_and_gradients_are_torchs(dtype: torch.dtype, memory_format: torch.memory_format) -> None:
    norm = make_norm(torch.promote_types(dtype, torch.float32))  # as under autocast
    x = torch.randn(2, 8, 5, 7, dtype=dtype).contiguous(memory_format=memory_format)
    grad = torch.randn_like(x)
    torch.testing.assert_close(run(ours(norm), x, grad), run(norm, x, grad), rtol=0, atol=0)


def test_gradients_are_those_of_differences() -> None:
    x = torch.randn(2, 8, 3, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(ours(make_norm(torch.float64)), x)


@pytest.mark.parametrize('trained', ['mode', 'weight', 'bias'])
def test_norms_that_learn_are_torchs(trained: str) -> None:
    norm = make_norm()
    if trained == 'mode':
        norm.train()
    else:
        norm.get_parameter(trained).requires_grad_()
    x, grad = torch.randn(2, 2, 8, 5, 7)
    torch.testing.assert_close(run(ours(norm), x, grad), run(norm, x, grad), rtol=0, atol=0)


def test_the_input_is_not_kept() -> None:
    kept: list[tuple[int, ...]] = []
    x = torch.randn(2, 8, 5, 7, requires_grad=True)
    for norm in (make_norm(), ours(make_norm())):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
            norm(x * 1)
        assert (x.shape in kept) is (type(norm) is nn.BatchNorm2d)
        kept.clear()


def test_compiled_it_is_torchs() -> None:
    norm, x, grad = make_norm(), *torch.randn(2, 2, 8, 5, 7)
    compiled = torch.compile(ours(norm), backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(run(compiled, x, grad), run(norm, x, grad))


def test_a_detector_has_them_under_the_same_names() -> None:
    model = MODELS.build(tiny_model_cfg())
    norms = {name: module for name, module in model.backbone.named_modules() if isinstance(module, nn.BatchNorm2d)}
    assert len(norms) == 20
    assert {type(module) for module in norms.values()} == {BatchNorm2d}
    assert set(norms['bn1'].state_dict()) == set(nn.BatchNorm2d(1).state_dict())
