"""Transfer to other classes: rows, prior, names, table."""

import math

import pytest
import torch

from dino_mm.checkpoints.classes import (
    COCO_CATEGORY_IDS,
    COCO_CLASSES,
    classes_of_rows,
    plan_transfer,
)
from dino_mm.checkpoints.errors import CheckpointError

SOURCE = ('cat', 'dog', 'Traffic Light', 'cow')
PRIOR = -math.log(99)


def tensors(rows: int, offset: float) -> dict[str, torch.Tensor]:
    column = torch.arange(rows, dtype=torch.float32) + offset
    return {
        'bbox_head.cls_branches.0.weight': column[:, None].repeat(1, 3),
        'bbox_head.cls_branches.0.bias': column.clone(),
        'bbox_head.cls_branches.1.weight': column[:, None].repeat(1, 3) + 0.5,
        'bbox_head.cls_branches.1.bias': column + 0.5,
        'denoising.label_embedding.weight': column[:, None].repeat(1, 2) + 0.25,
        'level_embed': torch.ones(1),
    }


def test_rows_move_and_new_ones_start_with_the_prior() -> None:
    transfer = plan_transfer(['traffic light', 'zebra', 'cat'], SOURCE)
    assert transfer.rows == (2, None, 0)
    checkpoint, own = tensors(4, 10.0), tensors(3, 100.0)
    transfer.apply(checkpoint, own)
    assert checkpoint['bbox_head.cls_branches.0.bias'].tolist() == [12.0, pytest.approx(PRIOR), 10.0]
    assert checkpoint['bbox_head.cls_branches.1.bias'].tolist() == [12.5, pytest.approx(PRIOR), 10.5]
    assert checkpoint['bbox_head.cls_branches.0.weight'].tolist() == [[12.0] * 3, [101.0] * 3, [10.0] * 3]
    assert checkpoint['bbox_head.cls_branches.1.weight'].tolist() == [[12.5] * 3, [101.5] * 3, [10.5] * 3]
    assert checkpoint['denoising.label_embedding.weight'].tolist() == [[12.25] * 2, [101.25] * 2, [10.25] * 2]
    assert checkpoint['level_embed'].tolist() == [1.0]
    assert own['bbox_head.cls_branches.0.bias'].tolist() == [100.0, 101.0, 102.0]


def test_table() -> None:
    transfer = plan_transfer(['lights', 'zebra', 'cat'], SOURCE, dict(lights='traffic light'))
    assert transfer.table().splitlines() == [
        'lights <- Traffic Light (row 2)',
        'zebra  <- new',
        'cat    <- cat (row 0)',
        'not taken over: dog, cow',
    ]


def test_unknown_names_of_a_map_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"'lama' of the checkpoint.*checkpoint has cat, dog, Traffic Light, cow"):
        plan_transfer(['horse'], SOURCE, dict(horse='lama'))
    with pytest.raises(CheckpointError, match="'hors' of the model"):
        plan_transfer(['horse'], SOURCE, dict(hors='cow'))


def test_classes_of_rows() -> None:
    assert classes_of_rows(4, SOURCE) == SOURCE
    assert classes_of_rows(80, None) == COCO_CLASSES
    by_id = classes_of_rows(91, None)
    assert (by_id[0], by_id[1], by_id[12], by_id[90]) == ('', 'person', '', 'toothbrush')
    assert [row for row, name in enumerate(by_id) if name] == list(COCO_CATEGORY_IDS)
    with pytest.raises(CheckpointError, match='has 7 classes and does not tell their names'):
        classes_of_rows(7, None)
    with pytest.raises(CheckpointError, match='has 7 classes and names 4'):
        classes_of_rows(7, SOURCE)


def test_category_ids_transfer_by_name() -> None:
    transfer = plan_transfer(['stop sign', 'cow'], classes_of_rows(91, None))
    assert transfer.rows == (13, 21)
