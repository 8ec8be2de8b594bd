"""``tools/test.py --report``: predictions and report after a test."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import TINY, data_options, options
from forked import run_tool
from mmengine.config import Config

import dino_mm
from dino_mm.datasets.digits import make_digits
from dino_mm.engine import ReportHook
from dino_mm.evaluation import CheckedCocoMetric
from dino_mm.evaluation.predictions import ReportError
from dino_mm.registry import MODELS


def test_report_after_a_test(tmp_path: Path) -> None:
    data = make_digits(tmp_path / 'data', num_train=2, num_val=3)
    settings = {key: value for key, value in TINY.items() if key.startswith('model.')} | data_options(data)
    config = Config.fromfile(dino_mm.cfg('dino_digits'))
    model_settings = {k: json.loads(v) if isinstance(v, str) else v for k, v in settings.items() if 'model.' in k}
    config.merge_from_dict(model_settings)
    torch.save(dict(state_dict=MODELS.build(config.model).state_dict()), tmp_path / 'model.pth')
    out = tmp_path / 'new' / 'report'
    arguments = ('--work-dir', tmp_path / 'work', '--report', out, *options(settings))
    done = run_tool('tools/test.py', 'configs/dino-demo/dino_digits.py', tmp_path / 'model.pth', *arguments)
    assert f'Report: {out}/report.html' in done.stdout + done.stderr
    ap = re.search(r'coco/bbox_mAP: (0\.\d{4})', done.stdout + done.stderr)
    assert ap is not None
    assert f'<b>{float(ap[1]):.3f}</b>' in (out / 'report.html').read_text()
    rows = json.loads((out / 'predictions.bbox.json').read_text())
    assert {row['image_id'] for row in rows} == {1, 2, 3}


def runner_of(*metrics: object, folders: tuple[str, ...] = ('images',)) -> SimpleNamespace:
    parts = [SimpleNamespace(data_prefix=dict(img=folder)) for folder in folders]
    dataset = parts[0] if len(parts) == 1 else SimpleNamespace(datasets=parts)
    return SimpleNamespace(
        test_evaluator=SimpleNamespace(metrics=list(metrics)), test_dataloader=SimpleNamespace(dataset=dataset)
    )


def test_what_cannot_be_reported_is_said_before_the_test(tmp_path: Path) -> None:
    ann = tmp_path / 'ann.json'
    ann.write_text(json.dumps(dict(images=[], annotations=[], categories=[dict(id=1, name='cat')])))
    metric = CheckedCocoMetric(str(ann), metric='bbox')
    (tmp_path / 'file').touch()
    for runner, folder, message in (
        (runner_of(), 'report', r"A report needs `test_evaluator = dict\(type='dino_mm.CheckedCocoMetric'"),
        (runner_of(CheckedCocoMetric(str(ann), metric='proposal')), 'report', "metric='bbox'"),
        (runner_of(CheckedCocoMetric(metric='bbox')), 'report', 'ann_file='),
        (runner_of(metric, folders=('a', 'b')), 'report', r"not in \['a', 'b'\]: use `dino-mm report`"),
        (runner_of(metric), 'file/report', 'cannot be written into'),
    ):
        with pytest.raises(ReportError, match=message):
            ReportHook(str(tmp_path / folder)).before_test(runner)
    ReportHook(str(tmp_path / 'report')).before_test(runner_of(object(), metric))
    assert metric.outfile_prefix == str(tmp_path / 'report/predictions')
