"""What lies in a folder of data: pictures, and annotations of one format."""

import json
import os
import re
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import yaml

from .errors import ProjectError

PICTURES = {'.bmp', '.gif', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp'}
#: The word of a file or a folder -> its split.
SPLITS = {
    **dict.fromkeys(('train', 'training'), 'train'),
    **dict.fromkeys(('val', 'valid', 'validation', 'dev'), 'val'),
    **dict.fromkeys(('test', 'testing'), 'test'),
}
FORMATS = ('COCO', 'YOLO', 'Pascal VOC')


@dataclass
class Inventory:
    """The files below a folder, by what they are.

    Attributes:
        folder: The folder.
        pictures: Pictures, sorted.
        coco: COCO annotation files.
        yolo: YAML files with the names of classes, if there are label files.
        voc: XML files of Pascal VOC.
        others: All other files.
        by_name: File name -> the pictures of this name.
    """

    folder: Path
    pictures: list[Path] = field(default_factory=list)
    coco: list[Path] = field(default_factory=list)
    yolo: list[Path] = field(default_factory=list)
    voc: list[Path] = field(default_factory=list)
    others: set[Path] = field(default_factory=set)
    by_name: dict[str, list[Path]] = field(default_factory=lambda: defaultdict(list))

    def format(self) -> str:
        """The one format of the annotations.

        Raises:
            ProjectError: There are none, or of several formats.
        """
        if not self.pictures:
            raise ProjectError(
                f'{self.folder}: there is no picture below it. Name the folder that holds pictures and annotations.'
            )
        found = {name: files for name, files in zip(FORMATS, (self.coco, self.yolo, self.voc), strict=True) if files}
        if len(found) > 1:
            named = ' and '.join(f'{name} ({self.short(files[0])})' for name, files in found.items())
            raise ProjectError(f'{self.folder}: it has annotations as {named}. Move those of one format elsewhere.')
        if not found:
            raise ProjectError(f'{self.folder}: {self._why_none()}')
        return next(iter(found))

    def short(self, path: Path) -> str:
        """A path as it is written below the folder."""
        return path.relative_to(self.folder).as_posix()

    def split_of(self, path: Path) -> str | None:
        """The split that a path names: by its file name, else by the folder next above."""
        return split_of(path.relative_to(self.folder))

    def _why_none(self) -> str:
        labels = next((path for path in self.pictures if label_of(path, self.others) is not None), None)
        if labels is not None:
            return (
                f'{self.short(labels)} has a YOLO label, but no YAML file names the classes. '
                'Write data.yaml with `names: [cat, dog]`.'
            )
        return 'there are no annotations below it. It needs COCO JSON, YOLO labels with a data.yaml, or Pascal VOC XML.'


def split_of(path: Path) -> str | None:
    """The split that a relative path names, see :meth:`Inventory.split_of`."""
    for part in (path.stem, *reversed(path.parts[:-1])):
        for word in re.findall('[a-z]+', part.lower()):
            if word in SPLITS:
                return SPLITS[word]
    return None


def label_of(picture: Path, files: set[Path]) -> Path | None:
    """The YOLO label of a picture: in ``labels`` where the picture is in ``images``, else beside it; None without."""
    beside = picture.with_suffix('.txt')
    parts = list(beside.parts)
    if 'images' in parts:
        last = len(parts) - 1 - parts[::-1].index('images')
        parts[last] = 'labels'
    return next((path for path in (Path(*parts), beside) if path in files), None)


def take_inventory(folder: Path) -> Inventory:
    """Look through a folder; hidden files and projects of ours are left out, links are followed.

    Raises:
        ProjectError: There is no such folder, or a file of annotations cannot be read.
    """
    if not folder.is_dir():
        raise ProjectError(f'{folder}: there is no such folder. `--data` names the one with pictures and annotations.')
    found = Inventory(folder)
    by_suffix: dict[str, list[Path]] = defaultdict(list)
    for path in _files(folder):
        suffix = path.suffix.lower()
        if suffix in PICTURES:
            found.pictures.append(path)
            found.by_name[path.name].append(path)
        else:
            found.others.add(path)
            by_suffix[suffix].append(path)
    found.coco = [path for path in by_suffix['.json'] if _is_coco(path)]
    found.voc = [path for path in by_suffix['.xml'] if _is_voc(path)]
    if any(label_of(picture, found.others) is not None for picture in found.pictures):
        found.yolo = [path for path in by_suffix['.yaml'] + by_suffix['.yml'] if 'names' in read_yaml(path)]
    return found


def _files(folder: Path) -> list[Path]:
    """All files below a folder, sorted; a folder that several links lead to is gone through once."""
    files, seen = [], set()
    for here, folders, names in os.walk(folder, followlinks=True):
        real = os.path.realpath(here)
        if real in seen:
            folders.clear()
            continue
        seen.add(real)
        if 'config.py' in names and b"'dino_mm::" in Path(here, 'config.py').read_bytes():
            folders.clear()  # a project, whose annotations are copies of what was found before
            continue
        folders[:] = sorted(name for name in folders if not name.startswith('.'))
        files += [Path(here, name) for name in sorted(names) if not name.startswith('.')]
    return files


def _is_coco(path: Path) -> bool:
    text = path.read_bytes()
    try:
        content = json.loads(text)
    except ValueError as error:
        if not any(key in text for key in (b'"images"', b'"annotations"', b'"categories"')):
            return False  # a log, for example
        raise ProjectError(f'{path}: it is no valid JSON ({error}). Write it again, or move it elsewhere.') from None
    return isinstance(content, dict) and all(isinstance(content.get(key), list) for key in ('images', 'categories'))


def _is_voc(path: Path) -> bool:
    try:
        return ElementTree.parse(path).getroot().tag == 'annotation'
    except ElementTree.ParseError as error:
        if b'<annotation' not in path.read_bytes():
            return False
        raise ProjectError(f'{path}: it is no valid XML ({error}). Write it again, or move it elsewhere.') from None


def read_yaml(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping; an empty one if it holds something else."""
    try:
        content = yaml.safe_load(path.read_text(encoding='utf-8'))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ProjectError(f'{path}: it is no valid YAML ({" ".join(str(error).split())}).') from None
    return content if isinstance(content, dict) else {}
