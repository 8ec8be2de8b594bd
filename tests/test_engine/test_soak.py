"""A long training holds no more memory, files or threads than a short one."""

import json
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults import tiny, write_config
from forked import CONTEXT
from mmengine.hooks import Hook
from mmengine.runner import Runner
from PIL import Image

from dino_mm.engine.launch import build_runner

IMAGES, CLASSES, MOST_BOXES = 60, 10, 100
#: Nothing may grow over the last ones; what comes before them is warm-up.
ITERATIONS, WATCHED = 1000, 200
PIPELINE = [
    dict(type='LoadImageFromFile', _scope_='dino_mm', imdecode_backend='pillow'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomResize', scale=(160, 160), ratio_range=(0.3, 1.0), keep_ratio=True),
    dict(type='PackDetInputs'),
]


def make_pictures(folder: Path) -> Path:
    """A COCO data set: pictures of 24 to 160 pixels a side, with none to a hundred boxes."""
    draw, images, annotations = random.Random(0), [], []
    for split in ('train', 'val'):
        (folder / split).mkdir(parents=True)
    for number in range(IMAGES):
        width, height = draw.randint(24, 160), draw.randint(24, 160)
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / 'train' / f'{number}.png')
        images.append(dict(id=number, file_name=f'{number}.png', width=width, height=height))
        for _ in range([0, MOST_BOXES, draw.randint(1, MOST_BOXES)][min(number, 2)]):
            x, y = draw.uniform(0, width - 9), draw.uniform(0, height - 9)
            box = [x, y, draw.uniform(4, width - x), draw.uniform(4, height - y)]
            label = dict(category_id=draw.randrange(CLASSES), bbox=box, area=box[2] * box[3], iscrowd=0)
            annotations.append(dict(id=len(annotations), image_id=number, **label))
    categories = [dict(id=number, name=str(number)) for number in range(CLASSES)]
    content = json.dumps(dict(images=images, annotations=annotations, categories=categories))
    (folder / 'annotations').mkdir()
    for split in ('train', 'val'):
        (folder / 'annotations' / f'{split}.json').write_text(content)
    return folder


class Meter(Hook):
    """Notes what the process holds after each iteration."""

    priority = 'LOWEST'

    def __init__(self) -> None:
        self.resident: list[int] = []
        self.files: list[int] = []
        self.threads: list[int] = []
        self.boxes: set[int] = set()
        self.sizes: set[tuple[int, int]] = set()

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        for sample in data_batch['data_samples']:
            self.boxes.add(len(sample.gt_instances))
            self.sizes.add(sample.img_shape)

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        self.resident.append(int(Path('/proc/self/statm').read_text().split()[1]))
        self.files.append(len(os.listdir('/proc/self/fd')))
        self.threads.append(len(os.listdir('/proc/self/task')))


def train(config: Path, work_dir: Path) -> None:
    torch.set_num_threads(1)
    settings = {'train_cfg.max_iters': ITERATIONS, 'default_hooks.checkpoint.interval': 50}
    cfg = tiny(config, work_dir, settings | {'default_hooks.checkpoint.max_keep_ckpts': 1})
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    runner, meter = build_runner(cfg), Meter()
    runner.register_hook(meter)
    runner.train()
    (work_dir / 'meter.json').write_text(json.dumps(vars(meter), default=list))


@pytest.mark.skipif(not Path('/proc/self/statm').exists(), reason='the system has no /proc')
@pytest.mark.slow
def test_nothing_grows(tmp_path: Path) -> None:
    data, work_dir = make_pictures(tmp_path / 'data'), tmp_path / 'work'
    dataset = dict(data_root=f'{data}/', pipeline=PIPELINE, filter_cfg=dict(filter_empty_gt=False))
    config = write_config(tmp_path / 'config.py', data, [], train_dataloader=dict(dataset=dataset))
    process = CONTEXT.Process(target=train, args=(config, work_dir))
    process.start()
    process.join(1000)
    assert process.exitcode == 0
    seen = json.loads((work_dir / 'meter.json').read_text())
    assert len(seen['resident']) == ITERATIONS
    assert {0, MOST_BOXES} <= set(seen['boxes'])
    assert len(seen['sizes']) > ITERATIONS
    resident = np.array(seen['resident'][-WATCHED:], float)
    before, after = resident[: WATCHED // 4].mean(), resident[-WATCHED // 4 :].mean()
    print(f'resident memory: {before:.0f} pages, then {after:.0f}: {after / before - 1:.2%}')
    assert after <= 1.03 * before
    for name in ('files', 'threads'):
        assert max(seen[name][-WATCHED:]) <= max(seen[name][:-WATCHED]), name
