import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dino_mm.visualization import contact_sheet, draw_contact_sheet, plot_learning_curve
from dino_mm.visualization.contact_sheet import (
    CAPTION,
    COLUMNS,
    HEADER,
    MARGIN,
    PREDICTION_COLOUR,
    TILE,
    TRUTH_COLOUR,
    Mark,
    Rectangle,
)
from dino_mm.visualization.curves import read_history

BLACK = (0, 0, 0)
TOTAL_LOSS_COLOUR = (0x22, 0x22, 0x22)
AP50_COLOUR = (0xD6, 0x27, 0x28)


def write_scalars(path: Path, *records: dict[str, Any]) -> Path:
    path.write_text('\n'.join(map(json.dumps, records)) + '\n')
    return path


def train_record(step: int, loss: float) -> dict[str, Any]:
    parts = {'loss_cls': loss / 10, 'loss_bbox': loss / 20, 'loss_iou': loss / 15}
    return {'lr': 1e-4, 'loss': loss, 'd0.loss_cls': 1.0, **parts, 'iter': step, 'step': step}


def val_record(step: int, ap: float, ap50: float) -> dict[str, Any]:
    return {'coco/bbox_mAP': ap, 'coco/bbox_mAP_50': ap50, 'time': 0.1, 'step': step}


def shows(path: Path, colour: tuple[int, int, int]) -> bool:
    return bool((np.asarray(Image.open(path).convert('RGB')) == colour).all(axis=2).any())


@pytest.mark.parametrize('steps', [(20, 40), (0, 0), (1, 2)], ids=['iterations', 'none', 'epochs'])
def test_evaluations_stand_at_their_iteration(tmp_path: Path, steps: tuple[int, int]) -> None:
    history = read_history(
        write_scalars(
            tmp_path / 'scalars.json',
            train_record(20, 8.0),
            val_record(steps[0], 0.1, 0.2),
            train_record(40, 4.0),
            val_record(steps[1], 0.3, 0.5),
        )
    )
    assert history.train['loss'] == [(20, 8.0), (40, 4.0)]
    assert history.train['loss_iou'] == [(20, 8.0 / 15), (40, 4.0 / 15)]
    assert set(history.train) == {'loss', 'loss_cls', 'loss_bbox', 'loss_iou'}
    assert history.evaluations == {
        'coco/bbox_mAP': [(20, 0.1), (40, 0.3)],
        'coco/bbox_mAP_50': [(20, 0.2), (40, 0.5)],
    }
    assert history.last_iteration == 40


def test_learning_curve_shows_both_panels(tmp_path: Path) -> None:
    scalars = write_scalars(
        tmp_path / 'scalars.json',
        *(train_record(step, 500 / step) for step in range(20, 101, 20)),
        val_record(50, 0.2, 0.4),
        val_record(100, 0.6, 0.8),
    )
    out = tmp_path / 'new' / 'curve.png'
    plot_learning_curve(scalars, out)
    assert Image.open(out).size == (1350, 1200)
    assert shows(out, TOTAL_LOSS_COLOUR)
    assert shows(out, AP50_COLOUR)


def test_learning_curve_without_evaluation(tmp_path: Path) -> None:
    scalars = write_scalars(tmp_path / 'scalars.json', train_record(1, 9.0), train_record(2, 8.0))
    plot_learning_curve(scalars, tmp_path / 'curve.png')
    assert shows(tmp_path / 'curve.png', TOTAL_LOSS_COLOUR)
    assert not shows(tmp_path / 'curve.png', AP50_COLOUR)


def draw(tmp_path: Path, size: tuple[int, int], count: int, **boxes: Any) -> Image.Image:
    """Sheet of black images of ``size``; ``truth`` and ``predictions`` are boxes on the first."""
    for index in range(count):
        Image.new('RGB', size).save(tmp_path / f'{index}.png')
    truth = {
        'images': [{'id': 7 + i, 'file_name': f'{i}.png'} for i in range(count)],
        'categories': [{'id': 3, 'name': 'kiwi'}],
        'annotations': [{'image_id': 7, 'category_id': 3, 'bbox': box} for box in boxes.get('truth', [])],
    }
    results = [
        {'image_id': 7, 'category_id': 3, 'bbox': box, 'score': score} for box, score in boxes.get('predictions', [])
    ]
    (tmp_path / 'truth.json').write_text(json.dumps(truth))
    (tmp_path / 'results.json').write_text(json.dumps(results))
    out = tmp_path / 'sheet.png'
    draw_contact_sheet(tmp_path / 'truth.json', tmp_path, tmp_path / 'results.json', out)
    return Image.open(out)


def pixel(sheet: Image.Image, x: float, y: float) -> Any:
    """Colour at a pixel of the first tile."""
    return sheet.getpixel((round(MARGIN + x), round(HEADER + y)))


@pytest.mark.parametrize(('count', 'rows'), [(1, 1), (4, 1), (5, 2), (30, 3)])
def test_sheet_size(tmp_path: Path, count: int, rows: int) -> None:
    sheet = draw(tmp_path, (128, 128), count)
    assert sheet.width == COLUMNS * (TILE + MARGIN) + MARGIN
    assert sheet.height == HEADER + rows * (TILE + CAPTION + MARGIN)


def test_boxes_are_drawn_at_scale(tmp_path: Path) -> None:
    # 128 px images are enlarged three times.
    sheet = draw(
        tmp_path,
        (128, 128),
        1,
        truth=[[10, 20, 40, 30]],
        predictions=[([70, 80, 20, 40], 0.9), ([100, 10, 20, 20], 0.29)],
    )
    for x, y in ((30, 105), (150, 105), (90, 60), (90, 150)):
        assert pixel(sheet, x, y) == TRUTH_COLOUR
    for x, y in ((210, 300), (270, 300), (240, 240), (240, 360)):
        assert pixel(sheet, x, y) == PREDICTION_COLOUR
    assert pixel(sheet, 90, 105) == pixel(sheet, 240, 300) == BLACK
    assert pixel(sheet, 300, 60) == BLACK  # Its score is below the threshold.


def test_equal_boxes_are_both_seen(tmp_path: Path) -> None:
    sheet = draw(tmp_path, (128, 128), 1, truth=[[40] * 4], predictions=[([40] * 4, 1.0)])
    colours = [pixel(sheet, x, 180) for x in range(117, 124)]
    assert colours == [
        BLACK,
        PREDICTION_COLOUR,
        TRUTH_COLOUR,
        TRUTH_COLOUR,
        PREDICTION_COLOUR,
        BLACK,
        BLACK,
    ]


def test_large_image_is_shrunk_and_centred(tmp_path: Path) -> None:
    sheet = draw(tmp_path, (768, 384), 1, truth=[[0, 0, 768, 384]])
    assert pixel(sheet, 5, 95) == contact_sheet.PAPER_COLOUR
    assert pixel(sheet, 192, 96) == TRUTH_COLOUR
    assert pixel(sheet, 192, 287) == TRUTH_COLOUR
    assert pixel(sheet, 192, 288) == contact_sheet.PAPER_COLOUR


def test_labels_stay_inside_and_apart() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        marks = []
        for left, top in rng.uniform(0, 330, (8, 2)):
            box = Rectangle(left, top, *np.minimum((left + 80, top + 100), TILE))
            marks.append(Mark(box, 'kiwi 0.50', is_truth=bool(rng.random() < 0.5)))
        labels: list[Rectangle] = []
        for mark in marks:
            boxes = [m.box for m in marks]
            labels.append(contact_sheet._place_label(mark, (TILE, TILE), labels, boxes))
            left, top, right, bottom = labels[-1]
            assert 0 <= left < right <= TILE
            assert 0 <= top < bottom <= TILE
            assert not any(map(labels[-1].intersection, labels[:-1]))
