"""The sign of life, the warning of a slow loader, and a log of bounded length."""

import json
import os
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.logging import HistoryBuffer
from mmengine.runner import get_priority
from mmengine.structures import InstanceData

from dino_mm.engine import HeartbeatHook, LoggerHook
from dino_mm.engine import heartbeat_hook as module
from dino_mm.engine.heartbeat_hook import WINDOW


def make_runner(work_dir: Path, workers: int = 2, **scalars: list[float]) -> SimpleNamespace:
    """What the hook asks of a runner."""
    histories = {f'train/{name}': HistoryBuffer(values, [1] * len(values)) for name, values in scalars.items()}
    return SimpleNamespace(
        iter=0,
        rank=0,
        max_iters=1000,
        work_dir=str(work_dir),
        message_hub=SimpleNamespace(log_scalars=histories),
        train_dataloader=SimpleNamespace(num_workers=workers),
    )


def read(folder: Path) -> dict:
    assert [path.name for path in folder.iterdir()] == ['heartbeat.json']
    return json.loads((folder / 'heartbeat.json').read_text())


def test_the_file_tells_where_the_training_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not in every iteration, but in the last."""
    now = [100.0]
    monkeypatch.setattr(module.time, 'monotonic', lambda: now[0])
    runner, hook = make_runner(tmp_path, loss=[3.0, 2.5]), HeartbeatHook(seconds=15)
    hook.before_train(runner)
    hook.after_train_iter(runner, 0)
    content = read(tmp_path)
    assert abs(content.pop('time') - time.time()) < 60
    assert content.pop('memory_mib') is None or torch.cuda.is_available()
    assert content.pop('host')
    assert content == dict(iteration=1, max_iters=1000, loss=2.5, largest_batch=None, most_boxes=0, pid=os.getpid())
    for iteration, seconds, written in ((5, 114.9, 1), (6, 115.0, 7), (7, 116.0, 7), (999, 116.0, 1000)):
        runner.iter, now[0] = iteration, seconds
        hook.after_train_iter(runner, 0)
        assert read(tmp_path)['iteration'] == written
    runner.message_hub.log_scalars['train/loss'].update(float('nan'))
    hook.after_train_iter(runner, 0)
    assert read(tmp_path)['loss'] is None
    other = make_runner(tmp_path / 'none', loss=[1.0])
    other.rank = 1
    HeartbeatHook().after_train_iter(other, 0)  # would not find the folder


def test_a_file_that_cannot_be_written_ends_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said = []
    monkeypatch.setattr(module, 'print_log', lambda text, *_: said.append(text))
    runner, hook = make_runner(tmp_path / 'none', loss=[1.0]), HeartbeatHook(seconds=0)
    for _ in range(3):
        hook.after_train_iter(runner, 0)
    (text,) = said
    assert text.startswith(f'Cannot write {tmp_path}/none/heartbeat.json: ')


@pytest.mark.parametrize(
    ('workers', 'whole', 'waiting', 'advised'),
    [(2, 0.3, 0.1, 3), (2, 0.4, 0.3, 8), (0, 0.4, 0.3, 3), (2, 0.3, 0.02, None), (4, 0.3, 0.04, 5)],
)
def test_a_slow_loader_is_named_once_with_the_workers_it_needs(
    workers: int, whole: float, waiting: float, advised: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Workers make a batch in ``workers * whole`` seconds each; what came before the window does not count."""
    said = []
    monkeypatch.setattr(module, 'print_log', lambda text, *_: said.append(text))
    times = [[9.0] * WINDOW + [value] * WINDOW for value in (whole, waiting)]
    runner, hook = make_runner(tmp_path, workers, time=times[0], data_time=times[1]), HeartbeatHook()
    runner.iter = 70
    hook.before_train(runner)
    for iteration in range(70, 70 + 3 * WINDOW):
        runner.iter = iteration
        hook.after_train_iter(runner, 0)
    assert len(said) == (advised is not None)
    assert advised is None or f'`train_dataloader.num_workers` to {advised} instead of {workers}' in said[0]


def test_the_log_keeps_so_many_values_and_no_more(tmp_path: Path) -> None:
    """A resumed one's, too."""
    runner, hook = make_runner(tmp_path, loss=[float(i) for i in range(50)]), HeartbeatHook(history=20)
    for value in range(50, 60):
        runner.message_hub.log_scalars['train/loss'].update(float(value))
        hook.after_train_iter(runner, 0)
    values, counts = runner.message_hub.log_scalars['train/loss'].data
    assert values.tolist() == list(range(40, 60))
    assert len(counts) == 20


def batch_of(height: int, width: int, *boxes: int) -> dict:
    """What a data loader gives: images one by one, the first of them smaller, and their boxes."""
    images = [torch.zeros(3, height - number, width) for number in range(len(boxes))][::-1]
    samples = [DetDataSample(gt_instances=InstanceData(bboxes=torch.zeros(count, 4))) for count in boxes]
    return dict(inputs=images, data_samples=samples)


def test_growth_of_the_gpus_memory_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the iteration, its batch and the largest so far; MMEngine's log resets the peak that the GPU tells."""
    said, peak = [], [0]
    monkeypatch.setattr(module, 'print_log', lambda text, *_: said.append(text))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'max_memory_allocated', lambda: peak[0] * 2**20)
    runner, hook = make_runner(tmp_path, loss=[1.0]), HeartbeatHook(seconds=0)
    hook.before_train(runner)
    steps = [
        (1000, batch_of(32, 48, 2, 7)),
        (1050, batch_of(64, 48, 3)),  # a little more is not told
        (1050, batch_of(40, 48, 90, 0)),
        (3200, batch_of(48, 64, 1)),
        (500, batch_of(8, 8, 1)),  # after a reset
        (3500, batch_of(8, 8, 1)),
        (3521, batch_of(64, 64, 5)),
    ]
    for iteration, (use, batch) in enumerate(steps):
        runner.iter, peak[0] = iteration, use
        hook.after_train_iter(runner, 0, batch)
    assert said == [
        'Iteration 1: the largest use of the GPU is now 1,000 MiB, not 0. This batch: 32 x 48 pixels, up to 7 boxes in '
        'an image. Largest so far: 32 x 48 pixels, 7 boxes.',
        'Iteration 4: the largest use of the GPU is now 3,200 MiB, not 1,000. This batch: 48 x 64 pixels, up to 1 '
        'boxes in an image. Largest so far: 64 x 48 pixels, 90 boxes.',
        'Iteration 7: the largest use of the GPU is now 3,521 MiB, not 3,200. This batch: 64 x 64 pixels, up to 5 '
        'boxes in an image. Largest so far: 64 x 64 pixels, 90 boxes.',
    ]
    content = read(tmp_path)
    assert (content['memory_mib'], content['largest_batch'], content['most_boxes']) == (3521, [64, 64], 90)


def test_the_peak_is_read_before_the_log_resets_it() -> None:
    assert get_priority('NORMAL') < get_priority(HeartbeatHook.priority) < get_priority(LoggerHook.priority)
