"""Sampling on a CPU gives what mmcv's PyTorch code gives, and leaves traces to it."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch
from sampling_cases import Inputs, direction_of, make_inputs, make_levels, output_and_grads
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from dino_mm.models.structures import FeatureLevels
from dino_mm.ops import sparse_sampling
from dino_mm.ops.deformable_sampling import sample_levels

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
WHERE = ('anywhere', 'far outside', 'centres', 'borders', 'offsets from centres')


def plain(value: Tensor, locations: Tensor, weights: Tensor, levels: FeatureLevels) -> Tensor:
    return multi_scale_deformable_attn_pytorch(value, levels.shapes, locations, weights)


def assert_equals_plain(inputs: Inputs, levels: FeatureLevels) -> None:
    """In output and gradients, relative to the largest number where that is above 1."""
    names = ('output', 'value', 'locations', 'weights')
    ours, theirs = (output_and_grads(function, inputs, levels) for function in (sample_levels, plain))
    for name, one, other in zip(names, ours, theirs, strict=True):
        assert one.shape == other.shape
        assert one.dtype == other.dtype
        scale = max(1.0, other.abs().max().item())
        difference = (one - other).abs().max().item()
        assert difference <= TOLERANCE[other.dtype] * scale, f'{name}: {difference}, of {scale}'


@settings(max_examples=80, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=5),
    where=st.sampled_from(WHERE),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    sizes=st.fixed_dictionaries(
        dict(
            bs=st.integers(1, 3),
            num_queries=st.sampled_from([1, 2, 7, 90]),
            num_heads=st.integers(1, 4),
            num_points=st.integers(1, 9),
            head_dim=st.sampled_from([1, 3, 4, 16, 32]),
        )
    ),
    seed=st.integers(0, 2**16),
)
def test_equals_plain_code(shapes, where: str, dtype: torch.dtype, sizes: dict, seed: int) -> None:
    torch.manual_seed(seed)
    levels = make_levels(*shapes)
    assert_equals_plain(make_inputs(levels, where=where, dtype=dtype, **sizes), levels)


@pytest.mark.parametrize('dtype', [torch.float64, torch.float32])
@pytest.mark.parametrize('where', WHERE)
def test_equals_plain_code_on_odd_large_maps(where: str, dtype: torch.dtype) -> None:
    """Pixel centres and borders of such sizes are rounded; the gradients show on which side a sample falls."""
    levels = make_levels((37, 67), (19, 34), (1, 133), (1, 1))
    assert_equals_plain(make_inputs(levels, num_queries=300, num_heads=8, where=where, dtype=dtype), levels)


def test_one_level_as_deformable_convolution_has_it() -> None:
    levels = make_levels((20, 27))
    inputs = make_inputs(levels, num_queries=540, num_heads=4, num_points=9, head_dim=16, dtype=torch.float32)
    assert_equals_plain(inputs, levels)


def test_by_hand() -> None:
    """Value 10 * row + column, linear in the place: what is read is the place; half of it half a pixel outside."""
    levels = make_levels((2, 3))
    value = torch.tensor([0.0, 1, 2, 10, 11, 12]).view(1, 6, 1, 1)
    places = torch.tensor([[0.0, 0], [2, 1], [0.25, 0.5], [1.5, 0], [2.5, 1], [5, 0]])
    locations = ((places + 0.5) / torch.tensor([3.0, 2])).view(1, 6, 1, 1, 1, 2)
    output = sample_levels(value, locations, torch.ones(1, 6, 1, 1, 1), levels)
    torch.testing.assert_close(output.flatten(), torch.tensor([0.0, 12, 5.25, 1.5, 6, 0]), rtol=0, atol=1e-5)


def test_gradcheck() -> None:
    torch.manual_seed(3)
    levels = make_levels((3, 4), (1, 2))
    inputs = tuple(x.requires_grad_() for x in make_inputs(levels, num_queries=2, num_points=2))
    assert torch.autograd.gradcheck(lambda *x: sample_levels(*x, levels), inputs)


@pytest.mark.parametrize('num_queries', [0, 6])
def test_strides_do_not_matter_and_inputs_are_left_alone(num_queries: int) -> None:
    """Locations whose axes already come first in memory included."""
    levels = make_levels((4, 5), (2, 3))
    value, locations, weights = make_inputs(levels, num_queries=num_queries)
    strided = (
        value.transpose(1, 2).contiguous().transpose(1, 2),
        locations.movedim(-1, 0).contiguous().movedim(0, -1),
        torch.cat([weights, weights], -1)[..., : weights.shape[-1]],
    )
    ours, theirs = (output_and_grads(sample_levels, x, levels) for x in (strided, (value, locations, weights)))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    assert all(torch.equal(one, other) for one, other in zip(strided, (value, locations, weights), strict=True))


def test_training_after_inference_of_the_same_shapes() -> None:
    """What layers share was made in inference mode then."""
    levels = make_levels((7, 3), (2, 5))
    inputs = make_inputs(levels)
    with torch.inference_mode():
        expected = sample_levels(*inputs, levels)
    assert_equals_plain(inputs, levels)
    torch.testing.assert_close(sample_levels(*inputs, levels), expected.clone(), rtol=0, atol=0)


def test_gradient_without_strides() -> None:
    levels = make_levels((4, 5), (2, 3))
    ours, theirs = (tuple(x.requires_grad_() for x in make_inputs(levels)) for _ in range(2))
    theirs = tuple(x.detach().clone().requires_grad_() for x in ours)
    sample_levels(*ours, levels).sum().backward()
    plain(*theirs, levels).sum().backward()
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=1e-12)


def test_only_asked_gradients() -> None:
    """As with a frozen backbone, or where the locations are constant."""
    levels = make_levels((4, 5), (2, 3))
    inputs = make_inputs(levels)
    everything = output_and_grads(sample_levels, inputs, levels)[1:]
    for asked, expected in enumerate(everything):
        leaves = [x.detach().requires_grad_(i == asked) for i, x in enumerate(inputs)]
        output = sample_levels(*leaves, levels)
        output.backward(direction_of(output))
        torch.testing.assert_close(leaves[asked].grad, expected, rtol=0, atol=0)


@pytest.mark.parametrize('nowhere', [float('nan'), float('inf'), -float('inf')])
def test_a_location_that_is_no_number_shows_in_the_output(nowhere: float) -> None:
    """And neither reads nor writes outside of the values, nor touches other queries."""
    levels = make_levels((4, 5), (2, 3))
    value, locations, weights = make_inputs(levels, bs=1)
    expected = sample_levels(value, locations, weights, levels)
    locations[0, 2, :, 0, 0, 1] = nowhere
    output, *grads = output_and_grads(sample_levels, (value, locations, weights), levels)
    assert output[0, 2].isnan().all()
    others = torch.tensor([0, 1, 3, 4])
    torch.testing.assert_close(output[:, others], expected[:, others], rtol=0, atol=0)
    assert all(grad[:, others].isfinite().all() for grad in grads[1:])


@pytest.mark.parametrize('far', [1e5, 1e12, 1e30])
@pytest.mark.parametrize('sign', [-1, 1])
def test_locations_beyond_all_integers_read_nothing(far: float, sign: int) -> None:
    levels = make_levels((4, 5), (2, 3))
    value, locations, weights = make_inputs(levels, dtype=torch.float32)
    output, *grads = output_and_grads(sample_levels, (value, torch.full_like(locations, sign * far), weights), levels)
    assert not any(x.any() for x in (output, *grads))


class Sampler(nn.Module):
    """Traced, compiled or exported in the tests below."""

    def __init__(self, levels: FeatureLevels) -> None:
        super().__init__()
        self.levels = levels

    def forward(self, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        return sample_levels(value, locations, weights, self.levels)


def trace(module: nn.Module, inputs: Inputs) -> nn.Module:
    return torch.jit.trace(module, inputs)


def export(module: nn.Module, inputs: Inputs) -> nn.Module:
    return torch.export.export(module, inputs).module()


def compile_whole(module: nn.Module, inputs: Inputs) -> nn.Module:
    return torch.compile(module, fullgraph=True, backend='aot_eager')


@pytest.mark.parametrize('through', [trace, export, compile_whole])
def test_tracers_see_through(through) -> None:
    levels = make_levels((4, 5), (2, 3))
    inputs = make_inputs(levels, dtype=torch.float32)
    with torch.no_grad():
        seen = through(Sampler(levels).eval(), inputs)
        for example in (inputs, make_inputs(levels, dtype=torch.float32)):
            torch.testing.assert_close(seen(*example), sample_levels(*example, levels), rtol=0, atol=1e-5)


def test_meta_tensors_have_shapes() -> None:
    levels = make_levels((4, 5), (2, 3), device='meta')
    inputs = (x.to('meta') for x in make_inputs(make_levels((4, 5), (2, 3))))
    assert sample_levels(*inputs, levels).shape == (2, 5, 8)


def test_half_precision() -> None:
    levels = make_levels((4, 5), (2, 3))
    inputs = make_inputs(levels)
    output = sample_levels(*(x.bfloat16() for x in inputs), levels)
    assert output.dtype == torch.bfloat16
    torch.testing.assert_close(output.double(), sample_levels(*inputs, levels), rtol=0, atol=0.1)


@pytest.mark.parametrize('use_reentrant', [True, False])
def test_checkpointing_changes_nothing(use_reentrant: bool) -> None:
    levels = make_levels((4, 5), (2, 3))
    inputs = make_inputs(levels)
    saving = output_and_grads(lambda *x: checkpoint(sample_levels, *x, use_reentrant=use_reentrant), inputs, levels)
    for one, other in zip(saving, output_and_grads(sample_levels, inputs, levels), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_backward_keeps_the_inputs_alone() -> None:
    """No sampled value, no matrix."""
    levels = make_levels((40, 50), (20, 30))
    inputs = [x.requires_grad_() for x in make_inputs(levels)]
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.data_ptr()) or x, lambda x: x):
        sample_levels(*inputs, levels)
    assert sorted(kept) == sorted(x.data_ptr() for x in (*inputs, levels.shape_tensor, levels.start_index))


class Operators(TorchDispatchMode):
    """Collects the names of all operators that run."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


def operators_of(bs: int, levels: FeatureLevels) -> tuple[list[str], list[str]]:
    inputs = make_inputs(levels, bs=bs)
    with Operators() as forward:
        output = sparse_sampling.sample(*inputs, levels.shapes)
    with Operators() as backward:
        sparse_sampling.gradients(output, *inputs, levels.shapes)
    return forward.names, backward.names


def test_operators() -> None:
    """One product each way, no sampled map, nothing that waits for the host; and not many in all."""
    levels = make_levels((4, 5), (2, 3), (1, 1), (1, 2))
    for bs in (1, 4):
        operators_of(bs, levels)  # makes the geometry, once for all layers
        forward, backward = operators_of(bs, levels)
        assert forward.count('_embedding_bag_forward_only') == backward.count('sparse_sampled_addmm') == 1
        waits = {'grid_sampler_2d', 'grid_sampler_2d_backward', '_local_scalar_dense', 'nonzero', 'item', 'sort'}
        assert not waits & {*forward, *backward}
        assert len(forward) <= 60  # of which 16 copy values, level by level
        assert len(backward) <= 108  # of which 32 copy values, and those up to there find the samples anew
