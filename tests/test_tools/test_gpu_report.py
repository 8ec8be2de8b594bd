"""tools/gpu_report.py: all of it on a CPU with a tiny model, and parts that fail."""

import importlib.util
import json
import os
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import parity
import pytest
from commands import ROOT
from forked import run_tool

from dino_mm.benchmark import device_parity, gpu_parts
from dino_mm.benchmark.gpu_parts import FULL, SMALL, Plan, Row

TOOL = 'tools/gpu_report.py'


@pytest.fixture(scope='module')
def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location('gpu_report', ROOT / TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_everything_runs_on_a_cpu(tmp_path: Path, tool: ModuleType) -> None:
    out = tmp_path / 'report.json'
    done = run_tool(TOOL, '--small', '--out', out)
    report = json.loads(out.read_text())
    assert list(report) == list(tool.parts(small=True))
    rows = {name: part['rows'] for name, part in report.items()}
    assert {'python', 'torch', 'mmcv', 'mmdet'} <= set(rows['versions'][0])
    assert [(row['work'], row['images'], row['precision']) for row in rows['speed']] == [
        (work, images, precision)
        for work, images in (('training', 1), ('training', 2), ('inference', 1))
        for precision in ('fp32', 'bf16')
    ]
    for row in rows['speed']:
        assert row['ratio'] == pytest.approx(row['ours']['seconds'] / row['mmdet']['seconds'])
        assert len(row['ours']['runs']) == len(row['mmdet']['runs']) == 2
    waits = {(row['side'], row['work']): row['waits'] for row in rows['waits']}
    assert waits['ours', 'gradients'] == 1 < waits['mmdet', 'gradients']
    calls = [row['calls'] for row in rows['launches']]
    assert len(calls) == 4
    assert min(calls[:2]) > max(calls[2:])  # training, inference
    assert [row['case'] for row in rows['parity']] == ['detection'] * 3 + ['training'] * 3
    assert all(row['equal'] for row in rows['parity'])
    assert [row['finite_gradients'] for row in rows['zoo']] == [True, True]
    assert [row['way'] for row in rows['compiled']] == ['compiled'] * 2
    assert all(f'== {name}' in done.stdout for name in report)


def slow(plan: Plan) -> Iterator[Row]:
    yield Row('first', dict(number=1))
    time.sleep(60)


def broken(plan: Plan) -> Iterator[Row]:
    yield Row('first', dict(number=1))
    raise KeyError('a part')


def ending(plan: Plan) -> Iterator[Row]:
    yield Row('first', dict(number=1))
    os._exit(7)


@pytest.mark.parametrize(
    ('run', 'limit', 'last'),
    [
        (slow, 1, dict(error='cut off')),
        (broken, 60, dict(error="KeyError: 'a part'")),
        (ending, 60, dict(error='ended', status=7)),
    ],
)
def test_a_part_that_fails_leaves_what_it_found(run, limit: int, last: dict, tool: ModuleType, capsys) -> None:
    start = time.monotonic()
    rows = tool.run_part(tool.Part(run, limit), SMALL, limit)
    assert time.monotonic() - start < 30
    assert [row.data for row in rows] == [dict(number=1), last]
    assert capsys.readouterr().out.startswith('first\n')
    assert [tool.failed(row.data) for row in rows] == [False, True]


def test_what_counts_as_failed(tool: ModuleType) -> None:
    assert not tool.failed(dict(ours=dict(seconds=1.0), mmdet=dict(error='it has no bfloat16')))
    assert tool.failed(dict(ours=dict(error='out of memory')))
    assert tool.failed(dict(equal=False))
    assert not tool.failed(dict(equal=True))


def test_limits_fit_into_eight_minutes(tool: ModuleType) -> None:
    assert tool.TIME_LIMIT < 8 * 60 - 5
    assert all(part.limit <= 150 for part in tool.parts(small=False).values())


def test_a_side_that_fails_is_a_row_without_a_ratio() -> None:
    class Side:
        device = SMALL.device

        def __init__(self, error: Exception | None) -> None:
            self.error = error

        def run(self, *_: object) -> None:
            if self.error is not None:
                raise self.error

    sides = dict(ours=Side(None), mmdet=Side(RuntimeError('no kernel\nfor this')))
    measured = gpu_parts.in_turns(sides, 'training', None, gpu_parts.PRECISIONS['bf16'], 3)
    assert measured['mmdet'] == dict(error='RuntimeError: no kernel')
    assert len(measured['ours']['runs']) == 3
    row = gpu_parts.row_of('training', 2, 'bf16', measured)
    assert 'mmdet fails: RuntimeError: no kernel' in row.text
    assert 'ratio' not in row.data


def test_names_of_losses() -> None:
    names = ['loss_class', 'loss_giou_enc', 'loss_bbox_3', 'loss_class_dn', 'loss_giou_dn_0']
    ours = ['loss_cls', 'enc_loss_iou', 'd3.loss_bbox', 'dn_loss_cls', 'd0.dn_loss_iou']
    assert [device_parity.our_name(name) for name in names] == ours


@pytest.mark.slow
@pytest.mark.parametrize('number', range(len(device_parity.GOLDENS)))
def test_goldens_hold_on_this_device(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_parity, 'GOLDENS', device_parity.GOLDENS[number : number + 1])
    monkeypatch.setattr(device_parity, 'WAYS', dict(list(device_parity.WAYS.items())[:2]))
    plan = replace(FULL, base=replace(FULL.base, device='cpu'))
    rows = list(device_parity.parity(plan, parity))
    assert [row.data['way'] for row in rows] == ['eager', 'channels last']
    assert all(row.data['equal'] for row in rows), [row.text for row in rows]
