"""tools/benchmark.py and its counters: known counts, known memory, whole runs of a tiny model."""

import importlib
import importlib.util
import json
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from commands import ROOT, options
from foreign import with_mmdets_dino
from forked import run_tool
from mmdet.models.layers.transformer.dino_layers import DinoTransformerDecoder
from mmdet.models.layers.transformer.utils import MLP
from PIL import Image
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from dino_mm.benchmark.comparison import (
    COMPONENTS,
    WHOLE,
    Setting,
    Side,
    largest_difference,
    make_batch,
    mmdet_config,
    our_config,
)
from dino_mm.benchmark.gpu_parts import SMALL
from dino_mm.benchmark.profiling import LABEL_CHECK, OperatorCounter, PeakMemory, Worker, stopwatch
from dino_mm.models.task_modules import hungarian_matcher
from dino_mm.ops import linear

TOOL = 'tools/benchmark.py'
CPU = torch.device('cpu')
#: The model of `tools/gpu_report.py --small`, as options of a command.
TINY = SMALL.base.cfg_options | {'model.neck.in_channels': '[16,32,64]'}
RUN = ('--size', '64x96', '--threads', '1', '--repeats', '2')


@pytest.fixture(scope='module')
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location('benchmark', ROOT / TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


VALUES = torch.tensor([3.0, 1.0, 2.0])


@pytest.mark.parametrize(
    ('function', 'waits'),
    [
        (lambda x: x + x * 2, {}),
        (lambda x: x[torch.tensor([0, 2])], {}),
        (lambda x: torch.where(x > 1, x, 0), {}),
        (lambda x: x.max().item(), {'_local_scalar_dense': 1}),
        (lambda x: 1 if x.sum() > 0 else 0, {'_local_scalar_dense': 1}),
        (lambda x: [int(v) for v in x], {'_local_scalar_dense': 3}),
        (lambda x: x.nonzero(), {'nonzero': 1}),
        (lambda x: torch.where(x > 1), {'nonzero': 1}),
        (lambda x: x.masked_select(x > 1), {'masked_select': 1}),
        (lambda x: x[x > 1], {'index with a mask': 1}),
        (lambda x: x.clone().__setitem__(x > 1, 0.0), {'index_put_ with a mask': 1}),
        (lambda x: x.unique(), {'_unique2': 1}),
        (lambda x: x.unique_consecutive(), {'unique_consecutive': 1}),
        (lambda x: torch.equal(x, x), {'equal': 1}),
        (lambda x: x.tolist(), {'Tensor.tolist': 1}),
        (lambda x: np.asarray(x), {'Tensor.numpy': 1}),
        (lambda x: x.cpu().numpy(), {'Tensor.cpu': 1}),
        (lambda x: (x.cpu(), x.cpu(), x.cpu().tolist()), {'Tensor.cpu': 3}),
        (lambda x: x.cpu().to(x.device), {'Tensor.cpu': 1, 'Tensor.to': 1}),
        (lambda x: torch.tensor([1, 2], device=x.device), {'torch.tensor': 1}),
        (lambda x: torch.as_tensor([1, 2], device=x.device), {'torch.as_tensor': 1}),
        (lambda x: x.new_tensor([1, 2]), {'Tensor.new_tensor': 1}),
        (lambda x: torch.tensor([1, 2]).to(x), {'Tensor.to': 1}),
        (lambda x: torch.from_numpy(np.ones(2)).to(x.device), {'Tensor.to': 1}),
        (lambda x: torch.from_numpy(np.ones(2)).to(x.device, non_blocking=True), {}),
        (lambda x: (torch.tensor([1, 2]).tolist(), x.new_full((2,), 1), x.to(x.device, torch.float64)), {}),
        (lambda x: F.one_hot(x.long(), 4).sum().item(), {LABEL_CHECK: 2, '_local_scalar_dense': 1}),
    ],
)
def test_waits_are_counted(function, waits: dict) -> None:
    with OperatorCounter() as counter:
        function(VALUES)
    assert counter.waits == waits
    assert counter.num_waits == sum(waits.values()) - waits.get(LABEL_CHECK, 0)
    assert counter.places.total() == counter.num_waits
    assert all(place.startswith('test_tools/test_benchmark.py:') for place in counter.places)


def test_operators_of_both_passes_are_counted() -> None:
    x = VALUES.clone().requires_grad_()
    with OperatorCounter() as counter:
        y = (x * x).sum()
    assert counter.calls == {'mul': 1, 'sum': 1}
    with OperatorCounter() as counter:
        y.backward()
    assert counter.calls['mul'] == 2
    assert counter.calls['expand'] == 1
    assert counter.waits == {}


def test_copies_from_and_to_a_gpu_are_counted_once() -> None:
    with FakeTensorMode():
        x, host = torch.ones(3, device='cuda'), torch.ones(3)
        with OperatorCounter(x.device) as counter:
            x.cpu()
            x.to('cpu')
            torch.empty(3).copy_(x)
            host.to('cuda')
            x.clone().copy_(host)
            torch.tensor([1.0], device='cuda')
            x.new_tensor([1.0])
            host.to('cuda', non_blocking=True)
            x.clone().copy_(host, True)
            torch.full((3,), 1.0, device='cuda')
            x * 2
    assert counter.waits == {
        'copy to the host': 3,
        'copy from the host': 2,
        'torch.tensor': 1,
        'Tensor.new_tensor': 1,
    }


def test_methods_are_as_before_after_counting() -> None:
    before = methods()
    with pytest.raises(ZeroDivisionError), OperatorCounter():
        _ = 1 / 0
    assert before == methods()


def methods() -> list[Callable]:
    """What a counter replaces while it counts."""
    of_tensors = [getattr(Tensor, name) for name in ('cpu', 'numpy', 'tolist', 'to', 'new_tensor')]
    return [*of_tensors, torch.tensor, torch.as_tensor, torch.from_numpy, F.one_hot, hungarian_matcher.assign]


@pytest.mark.skipif(sys.platform != 'linux', reason='the resident set is read from /proc')
def test_peak_memory_is_of_what_runs_within() -> None:
    mebibyte = 2**20
    kept = torch.ones(64 * mebibyte // 4)
    with PeakMemory(CPU) as peak:
        torch.ones(48 * mebibyte // 4)
    assert 47 * mebibyte < peak.bytes < 64 * mebibyte  # the kernel counts pages in batches
    with PeakMemory(CPU) as peak:
        kept.add_(1)
    assert peak.bytes < 16 * mebibyte


def test_stopwatch() -> None:
    seconds: dict[str, float] = {}
    with stopwatch(seconds, 'sleep', CPU):
        importlib.import_module('time').sleep(0.05)
    assert 0.05 <= seconds['sleep'] < 5


def test_a_worker_holds_an_object_until_it_fails() -> None:
    worker = Worker(Counter, 'aab')
    assert worker('most_common', 1) == [('a', 2)]
    worker('update', 'bb')
    assert worker('total') == 5
    with pytest.raises(RuntimeError, match='no attribute'):
        worker('unknown')
    worker.close()
    ending = Worker(importlib.import_module, 'os')
    with pytest.raises(RuntimeError, match='ended with status 7: out of memory'):
        ending('_exit', 7)


def test_sides_differ_in_code_only() -> None:
    setting = Setting('dino-resnet/dino_r50_5scale_12ep.py', queries=300, cfg_options={'model.decoder.num_layers': 3})
    ours = our_config(setting)
    theirs = mmdet_config(ours)
    assert (ours.num_queries, theirs.num_queries) == (300, 300)
    assert theirs.type == 'mmdet.DINO'
    assert theirs.backbone == ours.backbone
    assert theirs.neck == ours.neck
    assert theirs.num_feature_levels == theirs.encoder.layer_cfg.self_attn_cfg.num_levels == 5
    assert theirs.decoder.num_layers == 3
    assert theirs.decoder.layer_cfg.cross_attn_cfg.num_levels == 5
    position = ours.positional_encoding
    assert (position.temperature, position.offset) == (20, 0.0)
    with pytest.raises(ValueError, match=r'`model\.embed_dims` is 128'):
        our_config(Setting(setting.config, {'model.embed_dims': 128}))


def test_batches_repeat_and_lie_within_the_image() -> None:
    setting = Setting('any', height=40, width=80, batch=3, boxes=50)
    (inputs, samples), (again, _) = (make_batch(setting, 7) for _ in range(2))
    assert inputs.shape == (3, 3, 40, 80)
    assert torch.equal(inputs, again)
    for sample in samples:
        boxes, labels = sample.gt_instances.bboxes, sample.gt_instances.labels
        assert boxes.shape == (50, 4)
        assert (boxes[:, :2] >= 0).all()
        assert (boxes[:, 2:] <= torch.tensor([80, 40])).all()
        sides = (boxes[:, 2:] - boxes[:, :2]) / torch.tensor([80, 40])
        assert 0.029 < sides.min() < sides.max() < 0.401
        assert set(labels.tolist()) <= set(range(7))


def test_ratios_are_taken_pair_by_pair(tool: ModuleType) -> None:
    row = tool.compare('time', 's', dict(ours=[1.0, 3.0, 2.0], mmdet=[2.0, 3.0, 8.0]))
    assert (row['ours'], row['mmdet']) == (2.0, 3.0)
    assert row['ratio'] == 0.5
    assert row['range'] == [0.25, 1.0]
    assert tool.compare('waits', '', dict(ours=[1], mmdet=[0]))['ratio'] is None
    assert largest_difference([[0.5, 0.25]], [[0.5, 0.375]]) == 0.125


@pytest.mark.parametrize(
    ('arguments', 'words'),
    [
        (['--sweep', 'colour=1'], 'is not `size=`'),
        (['--component', 'backbone'], 'invalid choice'),
        (['--memory', 'a.py', '--picture', 'a.png'], '--memory has neither'),
    ],
)
def test_bad_arguments_are_named(tool: ModuleType, arguments, words, monkeypatch, capsys) -> None:
    monkeypatch.setattr(sys, 'argv', ['benchmark.py', *arguments])
    with pytest.raises(SystemExit):
        tool.parse_args()
    assert words in capsys.readouterr().err


def test_a_dino_with_other_weights_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """As the forks' is."""
    init_layers = DinoTransformerDecoder._init_layers

    def wider(decoder: DinoTransformerDecoder) -> None:
        init_layers(decoder)
        decoder.ref_point_head = MLP(4 * decoder.embed_dims, decoder.embed_dims, decoder.embed_dims, 2)

    monkeypatch.setattr(DinoTransformerDecoder, '_init_layers', wider)
    with pytest.raises(RuntimeError, match=r'encodes a box in 1024 numbers, MMDetection 3\.3 and dino_mm in 512, so'):
        Side('mmdet', SMALL.base)


@with_mmdets_dino
def test_training_step_and_inference(tmp_path: Path) -> None:
    out = tmp_path / 'report.json'
    done = run_tool(TOOL, *RUN, '--out', out, *options(TINY))
    report = json.loads(out.read_text())
    assert set(report) == {'environment', 'command', 'repeats', 'results'}
    assert report['environment']['torch'] == torch.__version__
    (result,) = report['results']
    assert result['setting']['decoder_queries'] == 20 + 2 * 8 * (100 // 8)
    assert result['largest_difference_of_scores'] < 1e-6
    measures = {measure['name']: measure for measure in result['measures']}
    for work in ('inference', 'training step'):
        assert measures[work]['ratio'] > 0
        assert len(measures[work]['runs']['ours']) == len(measures[work]['runs']['mmdet']) == 2
        assert measures[f'{work}, operator calls, forward']['ratio'] < 1
    assert measures['training step, host waits, forward']['ours'] == 1
    assert measures['training step, host waits, forward']['mmdet'] == 171
    assert measures['training step, host waits, forward']['kinds']['mmdet'][LABEL_CHECK] == 10
    rows = [line for line in done.stdout.splitlines() if line.startswith(('inference', 'training'))]
    assert [row.split('  ')[0] for row in rows] == [m['name'] for m in result['measures'] if m['shown']]


@with_mmdets_dino
@pytest.mark.filterwarnings('ignore:.*instance named of benchmark')  # both sides log in one process here
@pytest.mark.parametrize(('batch', 'boxes'), [(1, 8), (2, 100), (4, 1), (4, 60)])
def test_no_part_calls_more_operators_than_mmdets(batch: int, boxes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """As any CPU runs it, however many images and boxes; the backward pass as a whole."""
    config, tiny = 'dino-resnet/dino_r50_4scale_12ep.py', TINY | {'model.neck.in_channels': [16, 32, 64]}
    setting = Setting(config, tiny, 64, 96, batch, boxes, threads=torch.get_num_threads())
    ours, mmdet = (Side(side, setting) for side in ('ours', 'mmdet'))
    for work in (*COMPONENTS, *WHOLE):
        limits = mmdet.count(work)
        for as_convolution in (False, True):
            monkeypatch.setattr(linear, 'AS_CONVOLUTION', as_convolution)
            counts = ours.count(work)
            for phase in ('forward', 'backward') if work == 'training-step' else ('forward',):
                assert counts[phase]['calls'].total() <= limits[phase]['calls'].total(), f'{work}, {phase}'


@pytest.mark.slow
@with_mmdets_dino
def test_components_growth_and_picture(tmp_path: Path) -> None:
    out, picture = tmp_path / 'report.json', tmp_path / 'new' / 'growth.png'
    parts = ('denoising', 'matching-and-loss')
    arguments = ('--component', *parts, '--sweep', 'boxes=8,2', '--out', out, '--picture', picture)
    run_tool(TOOL, *RUN, *arguments, *options(TINY))
    base, again, more = json.loads(out.read_text())['results']
    assert (again['axis'], again['position'], again['label']) == ('boxes', 8, '8')
    assert again['measures'] == base['measures']  # not measured twice
    assert (base['axis'], more['axis'], more['position'], more['label']) == (None, 'boxes', 2, '2')
    assert (base['setting']['boxes'], more['setting']['boxes']) == (8, 2)
    for result in (base, more):
        assert [m['name'] for m in result['measures'] if m['drawn']] == [part.replace('-', ' ') for part in parts]
    assert Image.open(picture).width == 1080
