"""All back-ends of deformable sampling give the same numbers, and the choice between them says what it lacks."""

import importlib.util
import itertools
import sys
import types
from collections.abc import Iterator

import pytest
import torch
from sampling_cases import Inputs, make_inputs, make_levels, output_and_grads
from torch import Tensor

from dino_mm.models.structures import FeatureLevels
from dino_mm.ops import deformable_sampling
from dino_mm.ops.deformable_sampling import BACKENDS, backend_for, sample_levels, use_backend

SHAPES = (((4, 3),), ((3, 4), (2, 2), (1, 1)))
SIZES = (
    dict(bs=1, num_queries=3),
    dict(bs=3, num_queries=2, num_heads=3, num_points=1, head_dim=8),
    dict(bs=2, num_queries=0),
)
#: Of each precision the distance from the exact result that rounding explains.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 8e-2}


@pytest.fixture(autouse=True)
def _no_choice() -> Iterator[None]:
    use_backend(None)
    yield
    use_backend(None)


def place(name: str) -> str:
    """A device that is here and that the back-end is for; skips the test if there is none."""
    backend = BACKENDS[name]
    if not backend.is_here:
        pytest.skip(f'{name} {backend.way_to_get}')
    if torch.cuda.is_available() and 'cuda' in backend.devices:
        return 'cuda'
    if name == 'mmcv':
        pytest.skip(f'{name} needs a GPU')
    return 'cpu'  # deformops, which has PyTorch code for CPUs: what is passed to it and what comes back


def by_hand(value: Tensor, locations: Tensor, weights: Tensor, levels: FeatureLevels) -> Tensor:
    """Sample by sample, pixel by pixel."""
    output = value.new_zeros(*weights.shape[:3], value.shape[-1])
    for index in itertools.product(*map(range, weights.shape)):
        image, query, head, level, _ = index
        height, width = levels.shapes[level]
        x, y = locations[index] * locations.new_tensor([width, height]) - 0.5
        for column in (int(x.floor()), int(x.floor()) + 1):
            for row in (int(y.floor()), int(y.floor()) + 1):
                if 0 <= column < width and 0 <= row < height:
                    share = (1 - (x - column).abs()) * (1 - (y - row).abs())
                    token = int(levels.start_index[level]) + row * width + column
                    sample = share * weights[index] * value[image, token, head]
                    output[image, query, head] = output[image, query, head] + sample
    return (output + 0 * (value.sum() + locations.sum() + weights.sum())).flatten(2)


def moved(inputs: Inputs, device: str, dtype: torch.dtype) -> Inputs:
    return tuple(x.to(device, dtype) for x in inputs)


def results(name: str, inputs: Inputs, levels: FeatureLevels) -> list[Tensor]:
    """Output and gradients of a back-end, or ``by_hand``, in float64 on the CPU."""
    function = by_hand if name == 'by_hand' else BACKENDS[name].sample
    return [x.double().cpu() for x in output_and_grads(function, inputs, levels)]


PRECISIONS = [
    pytest.param(name, dtype, id=f'{name}-{str(dtype)[6:]}') for name, of in BACKENDS.items() for dtype in of.dtypes
]


@pytest.mark.parametrize(('name', 'dtype'), PRECISIONS)
def test_parity(name: str, dtype: torch.dtype) -> None:
    """Values and gradients are those of sums by hand in float64, for what is left of the inputs in this precision."""
    device = place(name)
    # Half precision has no numbers for places that far.
    wheres = ('anywhere',) if torch.finfo(dtype).bits == 16 else ('anywhere', 'far outside')
    for shapes, sizes, where in itertools.product(SHAPES, SIZES, wheres):
        value, locations, weights = make_inputs(make_levels(*shapes), where=where, **sizes)
        # All precisions have these numbers; none is at a pixel's centre, where the gradient jumps.
        locations = (locations * 16).floor() / 16 + 1 / 32
        inputs = moved((value, locations, weights), device, dtype)
        found = results(name, inputs, make_levels(*shapes, device=device))
        expected = results('by_hand', moved(inputs, 'cpu', torch.float64), make_levels(*shapes))
        for what, one, other in zip(('output', 'value', 'locations', 'weights'), found, expected, strict=True):
            case = f'{what} of {shapes}, {sizes}, {where}'
            assert one.shape == other.shape, case
            limit = TOLERANCE[dtype] * max(1.0, *other.abs().flatten().tolist(), 0.0)
            assert (one - other).abs().le(limit).all(), f'{case}: {one}, expected {other}'


@pytest.mark.parametrize(('name', 'dtype'), PRECISIONS)
def test_nothing_is_read_beyond_the_edges(name: str, dtype: torch.dtype) -> None:
    """A pixel's distance away from the outermost pixels, and a rounding error less, where other maps begin."""
    device, shapes = place(name), ((4, 8), (2, 4), (1, 2))
    value, locations, weights = make_inputs(make_levels(*shapes), bs=1, num_queries=8, dtype=torch.float64)
    sizes = torch.tensor([(width, height) for height, width in shapes], dtype=torch.float64)[:, None]
    for query in range(8):
        less = torch.finfo(dtype).eps * 4**query
        at = (-1 + less, sizes - less)[query % 2]
        locations[0, query] = (at + 0.5) / sizes
    inputs = moved((value, locations, weights), device, dtype)
    found = results(name, inputs, make_levels(*shapes, device=device))[0]
    expected = results('by_hand', moved(inputs, 'cpu', torch.float64), make_levels(*shapes))[0]
    torch.testing.assert_close(found, expected, rtol=0, atol=10 * TOLERANCE[dtype])


@pytest.mark.parametrize('nowhere', [float('nan'), float('inf'), -float('inf')])
@pytest.mark.parametrize('name', BACKENDS)
def test_a_location_that_is_no_number_leaves_other_queries_alone(name: str, nowhere: float) -> None:
    """And its own query is no number, or has no part of it: kernels for GPUs count it as outside."""
    device, levels = place(name), make_levels((4, 5), (2, 3))
    inputs = make_inputs(levels, bs=1, dtype=torch.float32)
    expected = results(name, moved(inputs, device, torch.float32), make_levels((4, 5), (2, 3), device=device))
    inputs[1][0, 2, :, 0, 0, 1] = nowhere
    without = tuple(x.clone() for x in inputs)
    without[1][0, 2, :, 0, 0] = 99.0
    outside = by_hand(*without, levels)[0, 2].double()
    found = results(name, moved(inputs, device, torch.float32), make_levels((4, 5), (2, 3), device=device))
    others = torch.tensor([0, 1, 3, 4])
    for one, other in zip((found[0], *found[2:]), (expected[0], *expected[2:]), strict=True):
        torch.testing.assert_close(one[:, others], other[:, others], rtol=0, atol=1e-6)
    for one, other in zip(found[0][0, 2], outside, strict=True):
        assert one.isnan() or abs(one - other) < 1e-5


def test_deformops_gets_the_arguments_it_documents(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of version 3.0.1, in whose place plain code runs."""
    levels, calls = make_levels((4, 5), (2, 3)), []

    def msda(value, spatial_shapes, level_start_index, sampling_locations, attention_weights):
        calls.append((spatial_shapes, level_start_index))
        shapes = tuple(map(tuple, spatial_shapes.tolist()))
        assert level_start_index.tolist() == [0, *torch.tensor(shapes).prod(1).cumsum(0)[:-1].tolist()]
        assert sampling_locations.shape[:-1] == attention_weights.shape
        return by_hand(value, sampling_locations, attention_weights, make_levels(*shapes))

    registry = types.ModuleType('deformops.registry')
    registry.msda = msda
    monkeypatch.setitem(sys.modules, 'deformops', types.ModuleType('deformops'))
    monkeypatch.setitem(sys.modules, 'deformops.registry', registry)
    inputs = make_inputs(levels)
    found, expected = (results(name, inputs, levels) for name in ('deformops', 'by_hand'))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)
    assert [(shapes.dtype, starts.dtype) for shapes, starts in calls] == [(torch.int64, torch.int64)]


def with_here(monkeypatch: pytest.MonkeyPatch, *here: str) -> None:
    """As if these back-ends were installed."""
    changed = {name: backend._replace(is_here=name in here) for name, backend in BACKENDS.items()}
    monkeypatch.setattr(deformable_sampling, 'BACKENDS', changed)


@pytest.mark.parametrize(
    ('device', 'dtype', 'here', 'expected'),
    [
        ('cpu', torch.float32, ('mmcv', 'deformops', 'sparse', 'pytorch'), 'sparse'),
        ('cpu', torch.float64, ('sparse', 'pytorch'), 'sparse'),
        ('cpu', torch.bfloat16, ('mmcv', 'sparse', 'pytorch'), 'pytorch'),
        ('cuda', torch.float32, ('mmcv', 'deformops', 'sparse', 'pytorch'), 'mmcv'),
        ('cuda', torch.float16, ('mmcv', 'sparse', 'pytorch'), 'mmcv'),
        ('cuda', torch.bfloat16, ('mmcv', 'deformops', 'sparse', 'pytorch'), 'deformops'),
        ('cuda', torch.float32, ('deformops', 'sparse', 'pytorch'), 'deformops'),
        ('cuda', torch.float32, ('sparse', 'pytorch'), 'pytorch'),
        ('mps', torch.float32, ('mmcv', 'deformops', 'sparse', 'pytorch'), 'pytorch'),
    ],
)
def test_default(device: str, dtype: torch.dtype, here: tuple, expected: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with_here(monkeypatch, *here)
    assert backend_for(device, dtype) == expected


def test_choice_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    levels, ran = make_levels((4, 5)), []
    for name in ('sparse', 'pytorch'):
        spy = BACKENDS[name]._replace(sample=lambda *x, name=name: (ran.append(name), BACKENDS[name].sample(*x))[1])
        monkeypatch.setattr(deformable_sampling, 'BACKENDS', deformable_sampling.BACKENDS | {name: spy})
    inputs = make_inputs(levels, dtype=torch.float32)
    outputs = []
    for name in (None, 'pytorch', 'sparse'):
        use_backend(name)
        outputs.append(sample_levels(*inputs, levels))
    assert ran == ['sparse', 'pytorch', 'sparse']
    torch.testing.assert_close(outputs[1], outputs[0], rtol=0, atol=1e-5)


def test_a_choice_that_cannot_be_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"no back-end 'triton' .*: it has mmcv, deformops, sparse, pytorch\.$"):
        use_backend('triton')
    with_here(monkeypatch, 'sparse', 'pytorch')
    with pytest.raises(RuntimeError, match=r"'deformops' .* `pip install deformops`.* Here are: sparse, pytorch\.$"):
        use_backend('deformops')
    with pytest.raises(RuntimeError, match=r"'mmcv' .* `make setup MMCV=build`"):
        use_backend('mmcv')
    assert backend_for('cpu') == 'sparse'  # none of them was taken
    use_backend('sparse')
    with pytest.raises(ValueError, match=r"'sparse' .* does not sample bfloat16 on a cpu device: choose pytorch"):
        backend_for('cpu', torch.bfloat16)
    with pytest.raises(ValueError, match=r"'sparse' .* does not sample float32 on a cuda device: choose pytorch"):
        backend_for('cuda')


def import_again() -> types.ModuleType:
    """The module as a new process has it."""
    spec = importlib.util.spec_from_file_location('dino_mm.ops.again', deformable_sampling.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_environment_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """An unknown name ends the program before any work."""
    for variable, expected in (('pytorch', 'pytorch'), ('sparse', 'sparse'), ('', 'sparse')):
        monkeypatch.setenv('DINO_MM_DEFORMABLE', variable)
        assert import_again().backend_for('cpu') == expected
    monkeypatch.setenv('DINO_MM_DEFORMABLE', 'nonsense')
    with pytest.raises(ValueError, match=r"no back-end 'nonsense' .DINO_MM_DEFORMABLE"):
        import_again()


def test_plain_code_on_a_gpu_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    with_here(monkeypatch, 'sparse', 'pytorch')
    deformable_sampling.warn_of_plain_code.cache_clear()

    class OnGpu:
        """Stands for a tensor there."""

        is_meta = is_cpu = False
        is_cuda, device, dtype = True, torch.device('cuda'), torch.float32

    silent = BACKENDS['pytorch']._replace(sample=lambda *x: None)
    monkeypatch.setattr(deformable_sampling, 'BACKENDS', deformable_sampling.BACKENDS | {'pytorch': silent})
    with pytest.warns(UserWarning, match='pip install deformops') as caught:
        sample_levels(OnGpu(), None, None, None)
    sample_levels(OnGpu(), None, None, None)
    assert len(caught) == 1
    assert '\n' not in str(caught[0].message)
