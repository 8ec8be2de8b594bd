"""The same generated data set in every format and layout that people have."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

from dino_mm.datasets import CheckedCocoDataset
from dino_mm.projects import make_project

R50 = 'dino_r50_4scale_12ep'
Objects = dict[str, list[tuple[str, list[float]]]]
CLASSES = ('crate', 'barrel', 'person')


@dataclass
class Item:
    """A picture: its name, size in pixels, and objects as (class, left, top, width, height)."""

    name: str
    size: tuple[int, int]
    objects: list[tuple[str, float, float, float, float]]

    def save(self, folder: Path) -> None:
        """Draw it."""
        folder.mkdir(parents=True, exist_ok=True)
        width, height = self.size
        pixels = np.random.default_rng(len(self.name)).integers(0, 90, (height, width, 3), np.uint8)
        for name, x, y, w, h in self.objects:
            pixels[int(y) : int(y + h), int(x) : int(x + w)] = 80 + 80 * CLASSES.index(name)
        Image.fromarray(pixels).save(folder / self.name)


def make_items(count: int, first: int = 0) -> list[Item]:
    """Pictures of several sizes; every fourth has no object."""
    rng, items = np.random.default_rng(first), []
    for i in range(first, first + count):
        size = (int(rng.integers(64, 97)), int(rng.integers(64, 97)))
        objects = []
        for label in range(0 if i % 4 == 3 else 1 + i % 3):
            x, y, w, h = (int(v) / 4 for v in rng.integers(20, 120, 4))
            objects.append((CLASSES[(i + label) % 3], x, y, min(w, size[0] - x), min(h, size[1] - y)))
        items.append(Item(f'photo {i}.{("jpg", "png", "JPG")[i % 3]}', size, objects))
    return items


def coco_content(items: list[Item], first: int = 1, title: bool = False) -> dict:
    """A COCO file; ``title`` adds the row that Roboflow has for the whole project."""
    categories = [dict(id=first + i, name=name, supercategory='goods') for i, name in enumerate(CLASSES)]
    if title:
        categories.insert(0, dict(id=first - 1, name='goods', supercategory='none'))
    images = [dict(id=i, file_name=x.name, width=x.size[0], height=x.size[1]) for i, x in enumerate(items)]
    annotations = []
    for i, item in enumerate(items):
        for name, *box in item.objects:
            entry = dict(id=len(annotations) + 1, image_id=i, bbox=box, area=box[2] * box[3], iscrowd=0)
            annotations.append(entry | dict(category_id=first + CLASSES.index(name)))
    return dict(images=images, annotations=annotations, categories=categories)


def write_coco(root: Path, splits: dict[str, list[Item]]) -> None:
    """``annotations/SPLIT.json`` and ``images/SPLIT/``."""
    (root / 'annotations').mkdir(parents=True)
    for split, items in splits.items():
        (root / 'annotations' / f'instances_{split}.json').write_text(json.dumps(coco_content(items)))
        for item in items:
            item.save(root / 'images' / split)


def write_roboflow_coco(root: Path, splits: dict[str, list[Item]]) -> None:
    """``train/_annotations.coco.json`` beside the pictures, ids from 0, a title among the categories."""
    for split, items in splits.items():
        folder = root / {'val': 'valid'}.get(split, split)
        for item in items:
            item.save(folder)
        (folder / '_annotations.coco.json').write_text(json.dumps(coco_content(items, title=True)))


def yolo_line(item: Item, name: str, x: float, y: float, w: float, h: float) -> str:
    """A YOLO label: class, centre and size as shares of the picture."""
    width, height = item.size
    return (
        f'{CLASSES.index(name)} {(x + w / 2) / width:.6f} {(y + h / 2) / height:.6f} {w / width:.6f} {h / height:.6f}'
    )


def write_labels(folder: Path, items: list[Item]) -> None:
    """YOLO's files; a picture without objects has an empty one, or none."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, item in enumerate(items):
        if item.objects or i % 2:
            lines = [yolo_line(item, *one) for one in item.objects]
            (folder / Path(item.name).with_suffix('.txt').name).write_text('\n'.join(lines))


def write_yolo(root: Path, splits: dict[str, list[Item]]) -> None:
    """``images/SPLIT`` and ``labels/SPLIT``; names by number, as ultralytics writes them."""
    for split, items in splits.items():
        for item in items:
            item.save(root / 'images' / split)
        write_labels(root / 'labels' / split, items)
    names = ''.join(f'  {i}: {name}\n' for i, name in enumerate(CLASSES))
    places = ''.join(f'{split}: images/{split}\n' for split in splits)
    (root / 'data.yaml').write_text(f'path: /not/on/this/machine\n{places}names:\n{names}')


def write_roboflow_yolo(root: Path, splits: dict[str, list[Item]]) -> None:
    """``train/images`` and ``train/labels``; the places in the YAML file lead out of its folder."""
    for split, items in splits.items():
        folder = root / {'val': 'valid'}.get(split, split)
        for item in items:
            item.save(folder / 'images')
        write_labels(folder / 'labels', items)
    (root / 'data.yaml').write_text(
        f'train: ../train/images\nval: ../valid/images\ntest: ../test/images\nnc: 3\nnames: {list(CLASSES)}\n'
    )


def write_xml(folder: Path, item: Item) -> None:
    """A VOC file, as the devkit counts: from 1 on, the last pixel included."""
    folder.mkdir(parents=True, exist_ok=True)
    root = ET.Element('annotation')
    ET.SubElement(root, 'filename').text = item.name
    for name, x, y, w, h in item.objects:
        entry = ET.SubElement(root, 'object')
        ET.SubElement(entry, 'name').text = name
        box = ET.SubElement(entry, 'bndbox')
        corners = dict(xmin=round(x) + 1, ymin=round(y) + 1, xmax=round(x + w), ymax=round(y + h))
        for key, value in corners.items():
            ET.SubElement(box, key).text = str(value)
    ET.ElementTree(root).write(folder / Path(item.name).with_suffix('.xml').name)


def write_voc(root: Path, splits: dict[str, list[Item]]) -> None:
    """``JPEGImages``, ``Annotations`` and ``ImageSets/Main``."""
    (root / 'ImageSets' / 'Main').mkdir(parents=True)
    for split, items in splits.items():
        for item in items:
            item.save(root / 'JPEGImages')
            write_xml(root / 'Annotations', item)
        stems = '\n'.join(Path(item.name).stem for item in items)
        (root / 'ImageSets' / 'Main' / f'{split}.txt').write_text(stems)


def write_roboflow_voc(root: Path, splits: dict[str, list[Item]]) -> None:
    """``train/NAME.xml`` beside the pictures."""
    for split, items in splits.items():
        folder = root / {'val': 'valid'}.get(split, split)
        for item in items:
            item.save(folder)
            write_xml(folder, item)


LAYOUTS = {
    'coco': write_coco,
    'roboflow coco': write_roboflow_coco,
    'yolo': write_yolo,
    'roboflow yolo': write_roboflow_yolo,
    'voc': write_voc,
    'roboflow voc': write_roboflow_voc,
}


def truth(items: list[Item]) -> Objects:
    """Picture -> its objects, as class and corners."""
    return {x.name: sorted((n, [a, b, a + w, b + h]) for n, a, b, w, h in x.objects) for x in items}


def read(config: Config, split: str) -> Objects:
    """What the data set of a project holds; all pictures have to be there."""
    settings = dict(config[f'{split}_dataloader'].dataset)
    for key in ('type', 'pipeline', 'filter_cfg'):
        settings.pop(key, None)
    dataset = CheckedCocoDataset(**settings, pipeline=[], serialize_data=False)
    dataset.require_pictures()
    names = dataset.metainfo['classes']
    return {
        Path(info['img_path']).name: sorted((names[i['bbox_label']], i['bbox']) for i in info['instances'])
        for info in (dataset.get_data_info(index) for index in range(len(dataset)))
    }


def assert_same(found: Objects, expected: Objects, tolerance: float = 0.5) -> None:
    assert found.keys() == expected.keys()
    for name, objects in expected.items():
        assert [label for label, _ in found[name]] == [label for label, _ in objects], name
        for (_, box), (_, stated) in zip(found[name], objects, strict=True):
            assert box == pytest.approx(stated, abs=tolerance), name


def project(tmp_path: Path, data: Path, **more: Any) -> Config:
    """A project's config, read by mmengine."""
    made = make_project(tmp_path / 'project', data, more.pop('model', R50), **more)
    return Config.fromfile(made.config)
