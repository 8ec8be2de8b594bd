"""Small data sets with predictions in COCO's result format, for the tests of the report."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

from dino_mm.datasets.coco_file import CocoFile, read_coco_file

CLASSES = ('cat', 'dog', 'owl')
SIZE = (200, 160)
Box = Sequence[float]


class Case(NamedTuple):
    """Files of a data set and of its predictions."""

    ann: Path
    images: Path
    predictions: Path

    def file(self) -> CocoFile:
        return read_coco_file(str(self.ann))


def write_case(
    folder: Path,
    truth: Sequence[tuple[int, str, Box]],
    detections: Sequence[tuple[int, str, Box, float]],
    crowds: Sequence[tuple[int, str, Box]] = (),
    num_images: int = 1,
    classes: Sequence[str] = CLASSES,
) -> Case:
    """Write grey pictures, annotations and predictions; boxes are left, top, width, height.

    Ids begin at 10 for images and at 5 for categories, whose rows are turned round.
    """
    case = Case(folder / 'ann.json', folder / 'images', folder / 'predictions.bbox.json')
    case.images.mkdir()
    images = [dict(id=10 + i, file_name=f'{i}.png', width=SIZE[0], height=SIZE[1]) for i in range(num_images)]
    for image in images:
        Image.new('RGB', SIZE, 'grey').save(case.images / image['file_name'])
    ids = {name: 5 + i for i, name in enumerate(classes)}
    annotations = [
        dict(id=i, image_id=10 + image, category_id=ids[name], bbox=list(box), area=box[2] * box[3], iscrowd=int(crowd))
        for i, (image, name, box, crowd) in enumerate(
            [(*item, False) for item in truth] + [(*item, True) for item in crowds], 1
        )
    ]
    categories = [dict(id=number, name=name) for name, number in reversed(ids.items())]
    case.ann.write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))
    rows = [
        dict(image_id=10 + image, category_id=ids[name], bbox=list(box), score=score)
        for image, name, box, score in detections
    ]
    case.predictions.write_text(json.dumps(rows))
    return case


def noisy_case(folder: Path, crowds: bool = False, num_images: int = 30) -> Case:
    """Random objects and detections with every kind of error; the same in every run."""
    rng = np.random.default_rng(7)
    truth, detections, regions = [], [], []
    for image in range(num_images):
        for _ in range(int(rng.integers(1, 6))):
            name = CLASSES[rng.integers(3)]
            box = np.concatenate([rng.uniform(0, 110, 2), rng.uniform(8, 50, 2)]).round(2)
            truth.append((image, name, box.tolist()))
            for _ in range(int(rng.integers(0, 4))):
                moved = (box + rng.normal(0, 5, 4)).round(2)
                moved[2:] = np.maximum(moved[2:], 3)
                guess = name if rng.random() < 0.7 else CLASSES[rng.integers(3)]
                detections.append((image, guess, moved.tolist(), round(rng.uniform(0.05, 1), 4)))
        box = np.concatenate([rng.uniform(0, 110, 2), rng.uniform(8, 50, 2)]).round(2)
        detections.append((image, CLASSES[rng.integers(3)], box.tolist(), round(rng.uniform(0, 0.9), 4)))
        if crowds and image % 3 == 0:
            regions.append((image, CLASSES[rng.integers(3)], [100.0, 80.0, 90.0, 70.0]))
    return write_case(folder, truth, detections, regions, num_images)
