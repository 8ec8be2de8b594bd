"""A small valid COCO file with pictures, what it must be read as, and perfect predictions for it."""

import copy
import json
from pathlib import Path
from typing import Any

import torch
from mmengine.config import ConfigDict
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image

from dino_mm.evaluation import CheckedCocoMetric

CLASSES = ('cat', 'dog', 'owl')
SIZES = {'a.png': (60, 40), 'b.png': (40, 64), 'deep/c.png': (50, 50)}
BACKENDS = ('pycocotools', 'faster-coco-eval')
BOXES = [
    # image, class, box
    ('a.png', 'cat', [5, 6, 20, 18]),
    ('a.png', 'dog', [30.5, 4, 25.5, 30]),
    ('b.png', 'owl', [2, 3, 30, 60]),
    ('b.png', 'cat', [20, 10, 12.25, 14]),
    ('deep/c.png', 'dog', [1, 1, 11, 9]),
]


def clean() -> dict[str, Any]:
    """The file's content: ids with gaps, category rows in the order of ``CLASSES``."""
    images = [dict(id=3 + 2 * i, file_name=n, width=w, height=h) for i, (n, (w, h)) in enumerate(SIZES.items())]
    categories = [dict(id=i, name=name, supercategory='thing') for i, name in zip((2, 5, 9), CLASSES, strict=True)]
    ids = {image['file_name']: image['id'] for image in images} | {c['name']: c['id'] for c in categories}
    annotations = [
        dict(
            id=10 + i,
            image_id=ids[image],
            category_id=ids[name],
            bbox=box,
            area=box[2] * box[3],
            iscrowd=0,
            segmentation=[[box[0], box[1], box[0] + box[2], box[1], box[0] + box[2], box[1] + box[3]]],
        )
        for i, (image, name, box) in enumerate(BOXES)
    ]
    return copy.deepcopy(dict(info=dict(year=2026), images=images, annotations=annotations, categories=categories))


def write(root: Path, content: Any, name: str = 'ann.json') -> Path:
    """Write pictures and annotations; bytes and texts are written as they are."""
    for picture, size in SIZES.items():
        if not (root / picture).exists():
            (root / picture).parent.mkdir(exist_ok=True)
            Image.new('RGB', size, (size[0], 90, 30)).save(root / picture)
    path = root / name
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def build(root: Path, **more: Any) -> Any:
    """The data set of ``root``."""
    init_default_scope('mmdet')
    cfg = dict(
        type='dino_mm.CheckedCocoDataset',
        data_root=str(root),
        ann_file='ann.json',
        data_prefix=dict(img=''),
        metainfo=dict(classes=CLASSES),
        pipeline=[],
    )
    return DATASETS.build(ConfigDict(cfg | more))


def objects(dataset: Any) -> list[tuple]:
    """What is trained on: (file, class, box), sorted."""
    found = []
    for i in range(len(dataset)):
        info = dataset.get_data_info(i)
        name = str(Path(info['img_path']).relative_to(dataset.data_root))
        for instance in info['instances']:
            if not instance['ignore_flag']:
                left, top, right, bottom = instance['bbox']
                label = dataset.metainfo['classes'][instance['bbox_label']]
                found.append((name, label, [left, top, right - left, bottom - top]))
    return sorted(found)


def perfect(dataset: Any, boxes: list[tuple]) -> list[dict]:
    """Predictions of exactly ``boxes`` (file, class, box)."""
    predictions = []
    for i in range(len(dataset)):
        info = dataset.get_data_info(i)
        name = str(Path(info['img_path']).relative_to(dataset.data_root))
        mine = [(label, box) for image, label, box in boxes if image == name]
        corners = [[x, y, x + w, y + h] for _, (x, y, w, h) in mine]
        predictions.append(
            dict(
                img_id=info['img_id'],
                ori_shape=SIZES[name][::-1],
                pred_instances=dict(
                    bboxes=torch.tensor(corners).reshape(-1, 4).float(),
                    scores=torch.linspace(0.9, 0.5, len(mine)),
                    labels=torch.tensor([dataset.metainfo['classes'].index(label) for label, _ in mine]).long(),
                ),
            )
        )
    return predictions


def evaluate(path: Path, dataset: Any, predictions: list[dict], backend: str, **options: Any) -> dict[str, float]:
    """All figures of one backend."""
    metric = CheckedCocoMetric(str(path), proposal_nums=(1, 10, 100), backend=backend, classwise=True, **options)
    metric.dataset_meta = dataset.metainfo
    metric.process({}, predictions)
    return metric.evaluate(len(predictions))
