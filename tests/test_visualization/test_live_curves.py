"""Learning curves in TensorBoard, by the lines of the documentation."""

import re
from pathlib import Path

import pytest
from commands import ROOT
from mmengine.config import Config
from mmengine.registry import VISUALIZERS, init_default_scope

import dino_mm


def test_tensorboard_gets_the_scalars(tmp_path: Path) -> None:
    pytest.importorskip('tensorboard')
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    lines = re.search(r'^visualizer = .*$', (ROOT / 'docs/report.md').read_text(), re.MULTILINE)
    assert lines is not None
    path = tmp_path / 'own.py'
    path.write_text(f"_base_ = '{dino_mm.cfg('dino_digits')}'\n{lines[0]}\n")
    config = Config.fromfile(path)
    init_default_scope('mmdet')
    visualizer = VISUALIZERS.build({**config.visualizer, 'name': 'live', 'save_dir': str(tmp_path)})
    visualizer.add_scalars({'loss': 2.5, 'coco/bbox_mAP': 0.25}, step=7)
    visualizer.close()
    events = next(tmp_path.rglob('events.out.tfevents*'))
    read = EventAccumulator(str(events)).Reload()
    assert [(event.step, event.value) for event in read.Scalars('loss')] == [(7, 2.5)]
    assert [(event.step, event.value) for event in read.Scalars('coco/bbox_mAP')] == [(7, 0.25)]
    assert (tmp_path / 'vis_data' / 'scalars.json').exists()
