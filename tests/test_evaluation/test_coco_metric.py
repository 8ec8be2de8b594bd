"""COCO evaluation: known AP, both backends equal, clear errors."""

import json
import sys

import numpy as np
import pytest
import torch

from dino_mm.evaluation import CheckedCocoMetric

CLASSES = ('cat', 'dog', 'owl')


@pytest.fixture
def data(tmp_path):
    """20 images with boxes of three classes, one of them degenerate, and noisy predictions."""
    rng = np.random.default_rng(0)
    images, annotations, predictions = [], [], []
    for image in range(20):
        images.append(dict(id=image, file_name=f'{image}.png', width=200, height=160))
        count = int(rng.integers(0, 6))
        boxes = np.concatenate([rng.uniform(0, 80, (count, 2)), rng.uniform(5, 70, (count, 2))], 1)
        labels = rng.integers(0, 3, count)
        for box, label in zip(boxes, labels, strict=True):
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=image,
                    category_id=int(label) + 1,
                    bbox=box.tolist(),
                    area=float(box[2] * box[3]),
                    iscrowd=0,
                )
            )
        noisy = np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1) + rng.normal(0, 2, (count, 4))
        false = rng.uniform(0, 60, (2, 4)) + np.array([0, 0, 70, 70])
        predictions.append(
            dict(
                img_id=image,
                ori_shape=(160, 200),
                pred_instances=dict(
                    bboxes=torch.tensor(np.concatenate([noisy, false])),
                    scores=torch.tensor(rng.uniform(0.1, 1, count + 2)),
                    labels=torch.tensor(np.concatenate([labels, rng.integers(0, 3, 2)])),
                ),
            )
        )
    annotations.append(dict(id=999, image_id=3, category_id=1, bbox=[5.0, 5.0, 0.0, 0.0], area=0.0, iscrowd=0))
    path = tmp_path / 'ann.json'
    categories = [dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)]
    path.write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))
    return str(path), predictions


def evaluate(path, predictions, **options) -> dict:
    metric = CheckedCocoMetric(ann_file=path, metric='bbox', proposal_nums=(1, 10, 100), **options)
    metric.dataset_meta = dict(classes=CLASSES)
    metric.process({}, predictions)
    return metric.evaluate(len(predictions))


def test_backends_give_equal_figures(data) -> None:
    slow = evaluate(*data, classwise=True)
    fast = evaluate(*data, classwise=True, backend='faster-coco-eval')
    assert slow == fast
    assert 0.2 < slow['coco/bbox_mAP'] < 0.9
    assert slow['coco/bbox_mAP_50'] > slow['coco/bbox_mAP_75']


def test_perfect_predictions_have_ap_one(tmp_path) -> None:
    path = tmp_path / 'ann.json'
    box = [10.0, 20.0, 40.0, 50.0]
    content = dict(
        images=[dict(id=1, file_name='a.png', width=100, height=100)],
        annotations=[dict(id=1, image_id=1, category_id=2, bbox=box, area=2000.0, iscrowd=0)],
        categories=[dict(id=i + 1, name=name) for i, name in enumerate(CLASSES)],
    )
    path.write_text(json.dumps(content))
    instances = dict(
        bboxes=torch.tensor([[10.0, 20.0, 50.0, 70.0]]), scores=torch.tensor([0.5]), labels=torch.tensor([1])
    )
    predictions = [dict(img_id=1, ori_shape=(100, 100), pred_instances=instances)]
    for backend in ('pycocotools', 'faster-coco-eval'):
        assert evaluate(str(path), predictions, backend=backend)['coco/bbox_mAP'] == 1.0


def test_errors_name_the_remedy(tmp_path, monkeypatch) -> None:
    with pytest.raises(FileNotFoundError, match=r'missing\.json.*val_evaluator\.ann_file'):
        CheckedCocoMetric(ann_file=str(tmp_path / 'missing.json'))
    with pytest.raises(ValueError, match="backend is 'fast'"):
        CheckedCocoMetric(backend='fast')
    monkeypatch.setitem(sys.modules, 'faster_coco_eval', None)
    with pytest.raises(ImportError, match='pip install faster-coco-eval'):
        CheckedCocoMetric(backend='faster-coco-eval')
