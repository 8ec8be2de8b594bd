"""A detector compiled part by part computes the same, in few graphs, and trains, resumes and averages as ever."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from commands import TINY, data_options, options, python, scalars
from conftest import build_detector as build
from conftest import make_samples
from mmengine.config import Config
from torch import Tensor, nn
from torch._dynamo.utils import counters

from dino_mm.datasets.digits import make_digits
from dino_mm.engine.compilation import backbone_parts, compile_detector
from dino_mm.models import DINO

CONFIG = 'configs/dino-demo/dino_digits.py'
#: No two the same, with padding.
SIZES = [
    ((64, 96), (48, 64)),
    ((96, 64), (64, 64)),
    ((80, 112), (80, 80)),
    ((128, 96), (96, 90)),
    ((64, 160), (64, 100)),
    ((100, 132), (70, 100)),
]


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    limit = torch._dynamo.config.recompile_limit
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.config.recompile_limit = limit
    torch._dynamo.reset()


def training_step(model: DINO, sizes: tuple) -> dict[str, Tensor]:
    """Losses, and gradients by parameter name."""
    torch.manual_seed(1)
    inputs, samples = make_samples((2, 1), sizes=sizes)
    model.zero_grad()
    losses = model.loss(inputs.double(), samples)
    sum(losses.values()).backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {**{k: v.detach() for k, v in losses.items()}, **grads}


@torch.no_grad()
def detections(model: DINO, sizes: tuple) -> list[dict[str, Tensor]]:
    torch.manual_seed(1)
    inputs, samples = make_samples((0, 0), sizes=sizes)
    return [dict(sample.pred_instances.items()) for sample in model.eval().predict(inputs.double(), samples)]


def num_graphs() -> int:
    return counters['stats']['unique_graphs']


def test_all_sizes_train_with_the_graphs_of_the_first(tiny_cfg: Config) -> None:
    """One for each of four stages, one for all layers of the encoder, one for those of the decoder; no graph breaks."""
    tiny_cfg.encoder.num_layers = 2
    plain = build(tiny_cfg)
    model = copy.deepcopy(plain)
    compile_detector(model, backend='eager', fullgraph=True)
    for sizes in SIZES[:4]:
        torch.testing.assert_close(training_step(model, sizes), training_step(plain, sizes), rtol=0, atol=1e-9)
        assert num_graphs() == 6
    assert not counters['graph_break']
    unpadded = ((64, 96), (64, 96))
    torch.testing.assert_close(training_step(model, unpadded), training_step(plain, unpadded), rtol=0, atol=1e-9)
    assert num_graphs() == 8  # layers without a mask


def test_detections_of_all_sizes_are_the_same(tiny_cfg: Config) -> None:
    plain = build(tiny_cfg)
    model = copy.deepcopy(plain)
    names = list(model.state_dict())
    compile_detector(model, backend='eager', fullgraph=True)
    assert list(model.state_dict()) == names
    for sizes in SIZES:
        torch.testing.assert_close(detections(model, sizes), detections(plain, sizes), rtol=0, atol=1e-9)
    assert num_graphs() == 7  # of the decoder's layers, the first has a query that takes gradients
    assert not counters['graph_break']


@pytest.mark.slow
def test_recomputed_layers_and_the_compiler_of_gradients(tiny_cfg: Config) -> None:
    tiny_cfg.encoder.num_cp = tiny_cfg.decoder.num_cp = 1
    plain = build(tiny_cfg)
    model = copy.deepcopy(plain)
    compile_detector(model, backend='aot_eager', fullgraph=True)
    torch.testing.assert_close(training_step(model, SIZES[0]), training_step(plain, SIZES[0]), rtol=0, atol=1e-8)


@pytest.mark.slow
def test_half_precision(tiny_cfg: Config) -> None:
    """Half precision goes into the layers and into their graphs; rounding is the same."""
    plain = build(tiny_cfg).float()
    model = copy.deepcopy(plain)
    compile_detector(model, backend='aot_eager', fullgraph=True)
    inputs, samples = make_samples((2, 1), sizes=SIZES[0])
    losses = []
    for one in (plain, model):
        torch.manual_seed(1)
        with torch.autocast('cpu', dtype=torch.bfloat16):
            losses.append(one.loss(inputs, samples))
            sum(losses[-1].values()).backward()
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=1e-3)
    for one, other in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad, rtol=0, atol=0.05 * float(other.grad.abs().max()) + 1e-6)


@pytest.mark.slow
def test_inductor_gives_the_same(tiny_cfg: Config) -> None:
    plain = build(tiny_cfg)
    model = copy.deepcopy(plain)
    compile_detector(model, fullgraph=True)
    for sizes in SIZES[:2]:
        torch.testing.assert_close(training_step(model, sizes), training_step(plain, sizes), rtol=0, atol=1e-8)


def test_a_copy_is_not_compiled_and_has_the_same_names(tiny_cfg: Config) -> None:
    """As averaging of weights copies the model."""
    model = build(tiny_cfg)
    compile_detector(model, backend='eager')
    duplicate = copy.deepcopy(model)
    assert list(duplicate.state_dict()) == list(model.state_dict())
    detections(duplicate, SIZES[0])
    assert num_graphs() == 0


def test_wholes_for_cuda_graphs_begin_a_step_with_each_detection(
    tiny_cfg: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Five parts are a graph each for a size, without symbols; the head is one for all. The graphs take a GPU."""
    plain = build(tiny_cfg)
    model = copy.deepcopy(plain)
    begun: list[int] = []
    monkeypatch.setattr(torch.compiler, 'cudagraph_mark_step_begin', lambda: begun.append(num_graphs()))
    compile_detector(model, cuda_graphs=True, mode=None, backend='eager', fullgraph=True)
    for sizes in (SIZES[0], SIZES[2], SIZES[0]):
        torch.testing.assert_close(detections(model, sizes), detections(plain, sizes), rtol=0, atol=1e-9)
    assert begun == [0, 6, 11]
    assert num_graphs() == 11


class Unknown(nn.Module):
    """A backbone without stages of a known name."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU())


def test_parts_of_a_backbone_are_the_outermost_of_their_kind() -> None:
    backbone = Unknown()
    assert list(backbone_parts(backbone)) == [backbone]
    backbone.layers = nn.ModuleList(nn.Sequential(nn.Identity()) for _ in range(2))
    backbone.layers[0].blocks = nn.ModuleList([nn.Identity()])
    assert list(backbone_parts(backbone)) == list(backbone.layers)
    backbone.layers[0].ffn = nn.Identity()
    assert list(backbone_parts(backbone)) == [backbone.layers[0].ffn]


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_digits(tmp_path_factory.mktemp('digits') / 'data', num_train=8, num_val=3)


def compiled(**more: Any) -> dict[str, Any]:
    return TINY | {'default_hooks.compile.backend': 'aot_eager', **more}


@pytest.mark.slow
def test_training_averages_resumes_and_tests_compiled(data: Path, tmp_path: Path) -> None:
    """Weights, averages and losses of four iterations are those of a training that is not compiled."""
    settings = compiled(**{'default_hooks.ema.type': 'EMAHook'}) | data_options(data)
    plain = {key: value for key, value in settings.items() if 'compile' not in key}
    python('tools/train.py', CONFIG, '--work-dir', tmp_path / 'plain', *options(plain))
    python('tools/train.py', CONFIG, '--work-dir', tmp_path / 'compiled', '--compile', *options(settings))
    resume = ('--resume', tmp_path / 'compiled' / 'iter_2.pth')
    python('tools/train.py', CONFIG, '--work-dir', tmp_path / 'resumed', '--compile', *resume, *options(settings))
    expected, found, resumed = (
        torch.load(tmp_path / name / 'iter_4.pth', weights_only=True) for name in ('plain', 'compiled', 'resumed')
    )
    for part in ('state_dict', 'ema_state_dict'):
        assert list(found[part]) == list(expected[part])
        torch.testing.assert_close(found[part], expected[part], rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(resumed[part], expected[part], rtol=1e-3, atol=1e-5)
    losses = [[line['loss'] for line in scalars(tmp_path / name) if 'loss' in line] for name in ('plain', 'compiled')]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)
    assert len(losses[0]) == 4
    checkpoint = tmp_path / 'compiled' / 'iter_4.pth'
    done = python(
        *('tools/test.py', CONFIG, checkpoint, '--work-dir', tmp_path / 'test', '--compile', *options(settings))
    )
    assert 'coco/bbox_mAP:' in done.stdout


def test_training_with_cuda_graphs_is_refused(data: Path, tmp_path: Path) -> None:
    settings = compiled(**{'default_hooks.compile.cuda_graphs': True}) | data_options(data)
    done = python('tools/train.py', CONFIG, '--work-dir', tmp_path, '--compile', *options(settings), status=1)
    assert 'is for tests: leave it out to train' in done.stderr


def test_mmengines_own_compilation_is_refused(tmp_path: Path) -> None:
    done = python('tools/train.py', CONFIG, '--work-dir', tmp_path, *options({'compile': True}), status=1)
    assert done.stderr.splitlines()[-1].startswith('error: `compile` of the config would compile a training step')


def test_the_benchmark_compiles_whole_steps_only() -> None:
    done = python('tools/benchmark.py', '--compile', '--component', status=1)
    assert done.stderr.splitlines()[-1] == 'error: --compile measures whole steps, not --component.'
