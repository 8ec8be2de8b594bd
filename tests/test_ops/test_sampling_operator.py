"""Deformable sampling as an operator of torch: what compilers rely on, and what mmcv's kernels are given."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from sampling_cases import Inputs, direction_of, make_inputs, make_levels, output_and_grads
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from dino_mm.models.structures import FeatureLevels
from dino_mm.ops import sampling_operator
from dino_mm.ops.deformable_sampling import by_pytorch, sample_levels

SHAPES = ((4, 5), (2, 3))
CASES = {
    'float64': dict(),
    'float32': dict(dtype=torch.float32),
    'one image, one head': dict(bs=1, num_heads=1, num_points=1),
    'no queries': dict(num_queries=0),
}


def arguments(inputs: Inputs, levels: FeatureLevels) -> tuple[Tensor, ...]:
    value, locations, weights = inputs
    return value, levels.shape_tensor, levels.start_index, locations, weights


def strided(inputs: Inputs) -> Inputs:
    """The same numbers, no tensor contiguous."""
    value, locations, weights = inputs
    return (
        value.transpose(1, 2).contiguous().transpose(1, 2),
        locations.movedim(-1, 0).contiguous().movedim(0, -1),
        torch.cat([weights, weights], -1)[..., : weights.shape[-1]],
    )


@pytest.mark.parametrize('is_strided', [False, True])
@pytest.mark.parametrize('case', CASES.values(), ids=CASES.keys())
def test_torch_finds_both_passes_in_order(case: dict, is_strided: bool) -> None:
    """Schema, gradients, shapes, types and strides for compilers, sizes that are symbols."""
    levels = make_levels(*SHAPES)
    inputs = make_inputs(levels, **case)
    inputs = tuple(x.detach().requires_grad_() for x in (strided(inputs) if is_strided else inputs))
    torch.library.opcheck(sampling_operator.sample.default, arguments(inputs, levels))
    grad = torch.randn((*inputs[1].shape[:2], inputs[0].shape[2:].numel()), dtype=inputs[0].dtype)
    detached = arguments(tuple(x.detach() for x in inputs), levels)
    torch.library.opcheck(sampling_operator.sample_backward.default, (grad, *detached))


@pytest.mark.parametrize('half', [torch.bfloat16, torch.float16])
def test_it_is_float32_under_autocast(half: torch.dtype) -> None:
    """Whatever the inputs; float64 stays."""
    levels = make_levels(*SHAPES)
    value, locations, weights = make_inputs(levels, dtype=torch.float32)
    expected = sample_levels(value.to(half).float(), locations, weights, levels)
    with torch.autocast('cpu', dtype=half):
        found = sampling_operator.sample(*arguments((value.to(half), locations, weights), levels))
        double = sampling_operator.sample(*arguments(make_inputs(levels), levels))
    assert double.dtype == torch.float64
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_it_has_one_derivative() -> None:
    """And says so, rather than give a wrong second."""
    levels = make_levels(*SHAPES)
    inputs = [x.requires_grad_() for x in make_inputs(levels)]
    output = sampling_operator.sample(*arguments(inputs, levels))
    (grad,) = torch.autograd.grad(output, inputs[0], direction_of(output).requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match='sample_levels_backward'):
        grad.sum().backward()


class Sampler(nn.Module):
    """Sampling, and something before and after it."""

    def forward(self, value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        levels = FeatureLevels((), shapes, starts, shapes, shapes)
        return sample_levels(value * 2, locations, weights.softmax(-1), levels) + 1


def operators(graph: torch.fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == 'call_function']


def test_a_graph_has_it_whole_and_all_sizes_share_it() -> None:
    graphs: list[torch.fx.GraphModule] = []

    def backend(graph: torch.fx.GraphModule, example: Any) -> Any:
        graphs.append(graph)
        return graph

    torch._dynamo.reset()
    compiled = torch.compile(Sampler(), fullgraph=True, dynamic=True, backend=backend)
    for shapes, queries, bs in ((SHAPES, 5, 7), (((7, 3), (4, 2)), 9, 7), (((3, 9), (2, 5)), 6, 4)):
        levels = make_levels(*shapes)
        inputs = make_inputs(levels, num_queries=queries, bs=bs)
        found, expected = (
            output_and_grads(lambda *x, sampler=sampler: sampler(*arguments(x[:3], x[3])), inputs, levels)
            for sampler in (compiled, Sampler())
        )
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert len(graphs) == 1
    assert len([name for name in operators(graphs[0].graph) if 'sample_levels' in name]) == 1
    assert not [name for name in operators(graphs[0].graph) if 'grid_sample' in name]


def test_an_exported_program_has_it_whole() -> None:
    levels = make_levels(*SHAPES)
    num_tokens, num_queries = torch.export.Dim('num_tokens', min=2), torch.export.Dim('num_queries', min=2)
    sizes = ({1: num_tokens}, None, None, {1: num_queries}, {1: num_queries})
    with torch.no_grad():
        program = torch.export.export(Sampler(), arguments(make_inputs(levels), levels), dynamic_shapes=sizes)
        assert operators(program.graph).count('dino_mm.sample_levels.default') == 1
        for shapes, queries in ((SHAPES, 5), (((7, 3), (4, 2)), 9)):
            levels = make_levels(*shapes)
            inputs = arguments(make_inputs(levels, num_queries=queries), levels)
            torch.testing.assert_close(program.module()(*inputs), Sampler()(*inputs), rtol=0, atol=1e-12)


class Kernels:
    """In place of mmcv's; keeps what it is given."""

    def __init__(self) -> None:
        self.calls: list[tuple] = []

    def ms_deform_attn_forward(self, *tensors: Tensor, im2col_step: int) -> Tensor:
        self.calls.append((tensors, im2col_step))
        value, _, _, locations, _ = tensors
        return value.new_empty(len(value), locations.shape[1], 8)

    def ms_deform_attn_backward(self, *tensors: Tensor, im2col_step: int) -> None:
        self.calls.append((tensors, im2col_step))


@pytest.mark.parametrize('num_queries', [6, 0])
def test_what_kernels_of_a_gpu_are_given(num_queries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Contiguous tensors in the order of mmcv's interface, and nothing to do where there is no query."""
    kernels = Kernels()
    monkeypatch.setattr(sampling_operator, 'ext_module', kernels)
    monkeypatch.setattr(sampling_operator, 'check_kernels', lambda device: None)
    levels = make_levels(*SHAPES)
    inputs = arguments(strided(make_inputs(levels, num_queries=num_queries)), levels)
    with FakeTensorMode(allow_non_fake_inputs=True):
        value, shapes, starts, locations, weights = (
            torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device='cuda') for x in inputs
        )
        output = sampling_operator.run_forward(value, shapes, starts, locations, weights)
        grad = torch.empty(8, num_queries, 2, device='cuda', dtype=torch.float64).permute(2, 1, 0)
        grads = sampling_operator.run_backward(grad, value, shapes, starts, locations, weights)
    assert output.shape == (2, num_queries, 8)
    assert [x.shape for x in grads] == [value.shape, locations.shape, weights.shape]
    assert [x.device.type for x in (output, *grads)] == ['cuda'] * 4
    assert len(kernels.calls) == (2 if num_queries else 0)
    for tensors, step in kernels.calls:
        assert step == 64
        assert all(x.is_contiguous() for x in tensors)
        assert [x.shape for x in tensors[:5]] == [x.shape for x in inputs]
    if num_queries:
        (_, backward) = kernels.calls
        assert backward[0][5].shape == grad.shape
        assert [id(x) for x in backward[0][6:]] == [id(x) for x in grads]


class ProbedKernels:
    """In place of mmcv's: those of another GPU, or ones that run."""

    def __init__(self, kind: str) -> None:
        self.kind, self.calls = kind, 0

    def ms_deform_attn_forward(
        self, value: Tensor, shapes: Tensor, starts: Tensor, locations: Tensor, weights: Tensor, im2col_step: int
    ) -> Tensor:
        self.calls += 1
        if self.kind == 'raise':
            raise RuntimeError('CUDA error: no kernel image is available for execution on the device\nCompile with ...')
        output = by_pytorch(value, locations, weights, FeatureLevels(((1, 1),), shapes, starts, shapes, shapes))
        return output if self.kind == 'run' else torch.zeros_like(output)


@pytest.fixture
def fresh_check() -> Iterator[None]:
    sampling_operator.check_kernels.cache_clear()
    yield
    sampling_operator.check_kernels.cache_clear()


@pytest.mark.parametrize(
    ('kind', 'said'),
    [('silent', r'they give wrong numbers'), ('raise', r'CUDA error: no kernel image is available for .* device')],
)
@pytest.mark.usefixtures('fresh_check')
def test_kernels_of_another_gpu_end_the_program_in_one_line(
    kind: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """mmcv's print an error and give zeros, with which a training would go on."""
    monkeypatch.setattr(sampling_operator, 'ext_module', ProbedKernels(kind))
    monkeypatch.setattr(torch.cuda, 'get_device_name', lambda device: 'GPU 9000')
    with pytest.raises(RuntimeError, match=rf'^mmcv.s kernels .* GPU 9000 \({said}\).* DINO_MM_DEFORMABLE=pytorch\.$'):
        sampling_operator.check_kernels(torch.device('cpu'))


@pytest.mark.usefixtures('fresh_check')
def test_kernels_that_run_are_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = ProbedKernels('run')
    monkeypatch.setattr(sampling_operator, 'ext_module', kernels)
    for _ in range(3):
        sampling_operator.check_kernels(torch.device('cpu'))
    assert kernels.calls == 1


def test_old_torch_has_a_function_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    levels = make_levels(*SHAPES)
    inputs = make_inputs(levels)
    expected = output_and_grads(sample_levels, inputs, levels)
    monkeypatch.setattr(sampling_operator, 'sample', sampling_operator.Sample.apply)
    monkeypatch.setattr(sampling_operator, 'sample_backward', sampling_operator.run_backward)
    for one, other in zip(output_and_grads(sample_levels, inputs, levels), expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
