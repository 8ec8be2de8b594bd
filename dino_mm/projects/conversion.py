"""YOLO and Pascal VOC as COCO: ``supervision`` reads the labels, what it gives is written by our own rules.

``supervision`` can write COCO too. That is not used: it writes file names without their folders, an object whose
polygon has a hole as a crowd, on which nothing is trained, and the area of a mask instead of the box's. It also
numbers the classes of a YAML file anew where their numbers have gaps; those are refused here.
"""

import os
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from ..datasets.coco_rules import Entry
from ..datasets.loading import UnreadableImageError, UnsupportedImageError, image_size
from .errors import ProjectError
from .inventory import Inventory, label_of, read_yaml
from .parts import ALL

#: Pictures whose labels are read at once; their polygons are masks in memory meanwhile.
CHUNK = 200
INSTALL = "pip install 'supervision>=0.31'"


class Labelled(NamedTuple):
    """A picture and its label file; None stands for a picture without objects."""

    picture: Path
    label: Path | None


class Boxes(NamedTuple):
    """The objects of a picture: names of their classes, and corners (left, top, right, bottom) in pixels."""

    picture: Path
    names: list[str]
    corners: list[list[float]]


def convert(found: Inventory) -> dict[str, dict[str, list[Entry]]]:
    """Read all labels of a folder.

    Returns:
        Split -> ``images``, ``annotations`` and ``categories`` as in a COCO file; file names are relative to the folder
        and all splits have the same categories. YOLO's are in the order of its YAML file, Pascal VOC's by their names.

    Raises:
        ProjectError: A label, a picture or the YAML file is wrong, or ``supervision`` is not installed.
    """
    if found.yolo:
        yaml_file = _only_yaml(found)
        names, splits = class_names(yaml_file), yolo_splits(found, yaml_file)
        read = {split: list(read_boxes(labelled, yaml_file)) for split, labelled in splits.items()}
    else:
        read = {split: list(read_boxes(labelled)) for split, labelled in voc_splits(found).items()}
        names = sorted({name for boxes in read.values() for one in boxes for name in one.names})
    categories = [dict(id=number, name=name) for number, name in enumerate(names, 1)]
    return {split: dict(**_entries(boxes, names, found), categories=categories) for split, boxes in read.items()}


def _entries(boxes: Sequence[Boxes], names: Sequence[str], found: Inventory) -> dict[str, list[Entry]]:
    """COCO's images and annotations."""
    images: list[Entry] = []
    annotations: list[Entry] = []
    category = {name: number for number, name in enumerate(names, 1)}
    for number, (picture, labels, corners) in enumerate(boxes, 1):
        try:
            width, height = image_size(picture)
        except (UnreadableImageError, UnsupportedImageError, OSError) as error:
            raise ProjectError(f'{picture}: {" ".join(str(error).split())}') from None
        images.append(dict(id=number, file_name=found.short(picture), width=width, height=height))
        for name, (left, top, right, bottom) in zip(labels, corners, strict=True):
            box = [round(value, 3) for value in (left, top, right - left, bottom - top)]
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=number,
                    category_id=category[name],
                    bbox=box,
                    area=box[2] * box[3],
                    iscrowd=0,
                )
            )
    return dict(images=images, annotations=annotations)


def read_boxes(labelled: Sequence[Labelled], yaml_file: Path | None = None) -> Iterator[Boxes]:
    """Read labels: of YOLO with the YAML file that names the classes, of Pascal VOC without."""
    for start in range(0, len(labelled), CHUNK):
        chunk = labelled[start : start + CHUNK]
        try:
            yield from _read_chunk(chunk, yaml_file)
        except (ValueError, OSError) as error:
            for one in chunk:  # which of them it was
                try:
                    _read_chunk([one], yaml_file)
                except (ValueError, OSError) as reason:
                    raise ProjectError(f'{one.label or one.picture}: {" ".join(str(reason).split())}') from None
            raise ProjectError(f'{chunk[0].picture}: {" ".join(str(error).split())}') from None


def _read_chunk(chunk: Sequence[Labelled], yaml_file: Path | None) -> list[Boxes]:
    """Read the labels of a few pictures, by links in one folder, whatever their own folders are."""
    try:
        from supervision import DetectionDataset
    except ImportError:
        raise ProjectError(f'YOLO and Pascal VOC are read by supervision, which is missing: {INSTALL}') from None
    with tempfile.TemporaryDirectory() as folder:
        links = {}
        for number, (picture, label) in enumerate(chunk):
            link = Path(folder, f'{number:06}.png')  # what a picture is, its content says
            link.symlink_to(os.path.abspath(picture))
            if label is not None:
                link.with_suffix(label.suffix).symlink_to(os.path.abspath(label))
            links[str(link)] = picture
        where: dict[str, Any] = dict(images_directory_path=folder, annotations_directory_path=folder)
        try:
            if yaml_file is None:
                dataset = DetectionDataset.from_pascal_voc(**where)
            else:
                dataset = DetectionDataset.from_yolo(**where, data_yaml_path=str(yaml_file))
        except (ValueError, OSError) as error:
            text = str(error)
            for number, (picture, label) in enumerate(chunk):
                link = Path(folder, f'{number:06}.png')
                text = text.replace(str(link), str(picture))
                text = text.replace(str(link.with_suffix('.txt')), str(label))
            raise ValueError(text) from None
    result = []
    for link_name, picture in links.items():
        detections = dataset.annotations[link_name]
        labels = [] if detections.class_id is None else [dataset.classes[label] for label in detections.class_id]
        result.append(Boxes(picture, labels, detections.xyxy.tolist()))
    return result


def class_names(yaml_file: Path) -> list[str]:
    """Names of a YOLO data set's classes; the label is the place in the list.

    Raises:
        ProjectError: They are no list, their numbers have gaps, or a name stands twice.
    """
    names = read_yaml(yaml_file)['names']
    if isinstance(names, dict):
        if sorted(map(str, names)) != sorted(map(str, range(len(names)))):
            raise ProjectError(
                f'{yaml_file}: `names` has the numbers {sorted(names, key=str)}, not 0 to {len(names) - 1}.'
            )
        names = [name for _, name in sorted(names.items(), key=lambda item: int(item[0]))]
    if not isinstance(names, list) or not names:
        raise ProjectError(f'{yaml_file}: `names` is {names!r}. Write a list: `names: [cat, dog]`.')
    names = [str(name) for name in names]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ProjectError(f'{yaml_file}: `names` has {", ".join(twice)} twice. Give each class a name of its own.')
    return names


def _only_yaml(found: Inventory) -> Path:
    if len(found.yolo) > 1:
        first, second = (found.short(path) for path in found.yolo[:2])
        raise ProjectError(f'{found.folder}: {first} and {second} both name classes. Move one of them elsewhere.')
    return found.yolo[0]


def yolo_splits(found: Inventory, yaml_file: Path) -> dict[str, list[Labelled]]:
    """Pictures by the folders or lists that the YAML file states, or by the words in their paths if it states none."""
    content, splits = read_yaml(yaml_file), {}
    for key, split in (('train', 'train'), ('val', 'val'), ('valid', 'val'), ('test', 'test')):
        stated = content.get(key) or []
        places = [
            _resolve(found, yaml_file, content, place) for place in ([stated] if isinstance(stated, str) else stated)
        ]
        pictures = [picture for place in places if place is not None for picture in _pictures_of(found, place)]
        if pictures:
            splits[split] = [Labelled(picture, label_of(picture, found.others)) for picture in pictures]
    if 'train' in splits:
        if splits['train'] == splits.get('val'):  # as in ultralytics' own small examples
            del splits['val']
        return _without_blank_test(splits)
    by_word: dict[str, list[Labelled]] = {}
    for picture in found.pictures:
        split = found.split_of(picture.parent / '_') or ALL
        by_word.setdefault(split, []).append(Labelled(picture, label_of(picture, found.others)))
    return _without_blank_test(by_word)


def _without_blank_test(splits: dict[str, list[Labelled]]) -> dict[str, list[Labelled]]:
    """The splits without a test that nobody has labelled."""
    blank = not any(one.label for one in splits.get('test', ()))
    return {split: labelled for split, labelled in splits.items() if split != 'test' or not blank}


def _resolve(found: Inventory, yaml_file: Path, content: dict, place: Any) -> Path | None:
    """Where a YAML file's place is on this machine; Roboflow's begin with ``../`` and mean the file's own folder."""
    bases = [yaml_file.parent, found.folder]
    if isinstance(content.get('path'), str):
        bases = [yaml_file.parent / content['path'], found.folder / content['path'], *bases]
    tails = [str(place), str(place).removeprefix('../')]
    options = [Path(os.path.normpath(base / tail)) for tail in tails for base in bases]
    return next((path for path in options if path.is_relative_to(found.folder) and path.exists()), None)


def _pictures_of(found: Inventory, place: Path) -> list[Path]:
    """Pictures in a folder, or in a list of paths."""
    if place.is_dir():
        return [picture for picture in found.pictures if picture.is_relative_to(place)]
    known = set(found.pictures)
    lines = [line.strip() for line in place.read_text().splitlines()]
    paths = [Path(os.path.normpath(base / line)) for line in lines if line for base in (place.parent, found.folder)]
    return [path for path in dict.fromkeys(paths) if path in known]


def voc_splits(found: Inventory) -> dict[str, list[Labelled]]:
    """Pictures with an XML file, by ``ImageSets/Main/*.txt``, or by the words in their paths."""
    listed: dict[str, str] = {}
    for name, split in (('trainval', 'train'), ('train', 'train'), ('val', 'val'), ('test', 'test')):
        for path in sorted(found.others):
            if path.name == f'{name}.txt' and path.parent.name == 'Main':
                stems = [line.strip() for line in path.read_text().splitlines()]
                listed.update(dict.fromkeys(stems, split))
    by_stem: dict[str, list[Path]] = {}
    for picture in found.pictures:
        by_stem.setdefault(picture.stem, []).append(picture)
    splits: dict[str, list[Labelled]] = {}
    for label in found.voc:
        split = listed.get(label.stem, '') if listed else found.split_of(label.parent / '_') or ALL
        if split:
            splits.setdefault(split, []).append(Labelled(_picture_of(label, by_stem, found), label))
    if not splits:
        raise ProjectError(f'{found.folder}: the lists in ImageSets/Main name none of its XML files. Correct them.')
    return splits


def _picture_of(label: Path, by_stem: dict[str, list[Path]], found: Inventory) -> Path:
    """The picture of an XML file: of the same name, the nearest one if there are several."""
    stated = ElementTree.parse(label).findtext('filename')
    options = by_stem.get(label.stem) or found.by_name.get(stated or '', [])
    if not options:
        raise ProjectError(f'{label}: no images found. There is no picture {label.stem} below {found.folder}.')
    return max(options, key=lambda picture: len(os.path.commonpath([picture, label])))
