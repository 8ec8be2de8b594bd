"""The one place that reads a COCO annotation file, repairs what can be repaired and refuses the rest.

Data set, metric, class transfer and ``tools/check_dataset.py`` all take what :func:`read_coco_file` gives. What happens
with each oddity is decided in :mod:`.coco_rules`.
"""

import difflib
import gc
import json
import logging
import os
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from json import detect_encoding
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

from mmengine.fileio import get_local_path
from mmengine.logging import print_log

from . import coco_rules as rules
from .coco_rules import AnnotationError, Entry, Findings, Id, IdIndex, MissingAnnotationsError, canonical_id

ON_FAULT = ('error', 'drop')
#: Harmless findings that cost objects, or may show wrong ones, and so are worth a warning.
LEFT_OUT = ('no-box-area', 'tiny-box', 'other-categories', 'passes-picture', 'picture-twice')
#: Names that an error lists of a file's categories.
SHOWN_NAMES = 20


@dataclass(eq=False)
class CocoFile:
    """A verified annotation file.

    Attributes:
        path: Where it was read from, as the config states it.
        images: ``id``, ``file_name``; ``width`` and ``height`` in pixels, None where no valid one is stated.
        annotations: ``image_id``, ``category_id``, ``bbox`` (left, top, width, height; pixels), ``area``,
            ``iscrowd`` 0 or 1, ``id`` from 1 on, each once; ids of images and categories are those of their entries.
        categories: ``id`` and ``name``, in the order of the file.
        findings: What was odd.
        has_annotations: Whether there is a list of annotations; a test set without labels has none.
        rest: What else the file has, such as ``info``.
        by_image: Image id -> its annotations.
    """

    path: str
    images: list[Entry]
    annotations: list[Entry]
    categories: list[Entry]
    findings: Findings
    has_annotations: bool = True
    rest: Entry = field(default_factory=dict)
    by_image: dict[Id, list[Entry]] = field(default_factory=lambda: defaultdict(list))

    def __post_init__(self) -> None:
        for annotation in self.annotations:
            self.by_image[annotation['image_id']].append(annotation)

    def category_ids(self, classes: Sequence[str]) -> list[Id]:
        """The category id of each class: label i is ``classes[i]``, whatever the order of the file's rows.

        Raises:
            AnnotationError: ``classes`` is no list of names, or the file lacks one of them.
        """
        check_classes(self.path, classes)
        by_name = {category['name']: category['id'] for category in self.categories}
        if any(name not in by_name for name in classes):
            raise AnnotationError(_missing_classes(self.path, classes, self.categories))
        return [by_name[name] for name in classes]

    def note_classes(self, classes: Sequence[str], findings: Findings) -> None:
        """Count what ``classes`` leaves out of the file, or takes in another order."""
        wanted = set(classes)
        rows = [category['name'] for category in self.categories if category['name'] in wanted]
        for name, row in zip(classes, rows, strict=True):
            if name != row:
                findings.add('category-order', name)
        for category in self.categories:
            if category['name'] not in wanted:
                findings.add('other-categories', category['name'])

    def leave_out(self, images: Collection[Id]) -> None:
        """Forget images and what is on them, for all who hold this file."""
        self.images = [image for image in self.images if image['id'] not in images]
        self.annotations = [a for a in self.annotations if a['image_id'] not in images]
        for image in images:
            self.by_image.pop(image, None)


def read_coco_file(
    path: str, on_fault: str = 'error', backend_args: dict | None = None, needs_annotations: bool = True
) -> CocoFile:
    """Read, repair and verify an annotation file; one that is in use already is not read again.

    Args:
        path: Local path, or an address that mmengine's ``backend_args`` can read.
        on_fault: 'error' refuses the file; 'drop' leaves faulty entries out, with a count in the log.
        backend_args: Of mmengine's file backends.
        needs_annotations: Whether the file must have annotations; False for a test set without labels.

    Raises:
        MissingAnnotationsError: There is no such file.
        AnnotationError: The file has faults; all of them are named.
    """
    if on_fault not in ON_FAULT:
        raise ValueError(f"`on_fault` is {on_fault!r}; it can be 'error' or 'drop'.")
    require_annotation_file(path)
    with get_local_path(path, backend_args=backend_args) as local_path:
        stat = os.stat(local_path)
        key = (str(path), stat.st_mtime_ns, stat.st_size, on_fault)
        file = _IN_USE.get(key)
        if file is None:
            file = load(str(path), local_path)
            file.findings.raise_faults(on_fault)
            log_findings(file.findings)
            _IN_USE[key] = file
    if needs_annotations and not file.has_annotations:
        file.findings.add('no-list', '`annotations` is missing')
        file.findings.raise_faults(on_fault)
    return file


#: Files that a data set or a metric of this process holds, by path, state and options.
_IN_USE: WeakValueDictionary[tuple, CocoFile] = WeakValueDictionary()


def load(path: str, local_path: str | os.PathLike) -> CocoFile:
    """Read a file without raising for faults: entries with faults are left out, all findings are kept.

    Raises:
        AnnotationError: The file holds no JSON, no object, or lacks a list, so that nothing else can be said.
    """
    findings = Findings(path)
    with _without_garbage_collection():
        content = _parse(local_path, findings)
        has_annotations = isinstance(content, dict) and 'annotations' in content
        lists = _required_lists(content, findings)
        categories = _categories(lists['categories'], findings)
        images = _images(lists['images'], findings)
        annotations = _annotations(lists['annotations'], images, categories, findings)
        rest = {name: value for name, value in content.items() if name not in lists}
        return CocoFile(path, images, annotations, categories, findings, has_annotations, rest)


def require_annotation_file(path: str, key: str = 'dataset.ann_file` and `dataset.data_root') -> None:
    """Raise MissingAnnotationsError, naming the config key, if the local file ``path`` is missing."""
    if '://' not in str(path) and not Path(path).is_file():
        raise MissingAnnotationsError(
            f'There is no annotation file {path}. Correct `{key}`; shipped configs look below the environment '
            'variable DATA_ROOT, by default data/coco/.'
        )


def check_classes(path: str, classes: object) -> None:
    """Raise AnnotationError unless ``classes`` is a list of different names."""
    advice = "Write a list of names: `metainfo=dict(classes=('cat', 'dog'))`"
    if isinstance(classes, str):
        raise AnnotationError(
            f'{path}: `classes` is the text {classes!r}, not a list of names; a tuple of one name needs a comma: '
            f"`classes=('{classes}',)`."
        )
    if not isinstance(classes, list | tuple) or not all(isinstance(name, str) for name in classes) or not classes:
        raise AnnotationError(f'{path}: `classes` is {classes!r}. {advice}.')
    twice = sorted({name for name in classes if classes.count(name) > 1})
    if twice:
        raise AnnotationError(f'{path}: `classes` names {", ".join(twice)} twice. {advice}, each once.')


def log_findings(findings: Findings) -> None:
    """One log line for each rule that was met."""
    for name in findings.by_rule:
        left_out = rules.RULES[name].fault or name in LEFT_OUT
        print_log(
            f'{findings.path}: {findings.line(name)}',
            logger='current',
            level=logging.WARNING if left_out else logging.INFO,
        )


def shorten(items: Sequence[object], limit: int = rules.SHOWN) -> str:
    """The items in one line, cut off after ``limit``."""
    text = ', '.join(map(str, items[:limit]))
    return text if len(items) <= limit else f'{text}, ... ({len(items)} in all)'


@contextmanager
def _without_garbage_collection() -> Iterator[None]:
    """Millions of new lists and dicts, none of them garbage, make Python look for garbage again and again."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()


def _parse(local_path: str | os.PathLike, findings: Findings) -> Any:
    with open(local_path, 'rb') as file:
        start = file.read(4)
    encoding = detect_encoding(start)  # JSON may be UTF-8, 16 or 32, and its first characters tell which
    if encoding == 'utf-8-sig':
        findings.add('byte-order-mark', 'UTF-8')
    problem = None
    try:
        with open(local_path, encoding=encoding) as text:
            return json.load(text)
    except json.JSONDecodeError as error:
        size = os.path.getsize(local_path)
        problem = f'line {error.lineno} column {error.colno} of {size} bytes: {error.msg}'
    except UnicodeDecodeError as error:
        problem = f'byte {error.start} is not {error.encoding}'
    except ValueError as error:  # among others, a whole number of thousands of digits
        problem = str(error)
    except RecursionError:
        problem = 'nested too deeply'
    findings.add('json', problem)
    findings.raise_faults('error')
    return None


def _required_lists(content: Any, findings: Findings) -> dict[str, list]:
    if not isinstance(content, dict):
        findings.add('no-object', f'it holds a {type(content).__name__}')
        findings.raise_faults('error')
    content.setdefault('annotations', [])  # a test set has none
    for name in ('images', 'annotations', 'categories'):
        value = content.get(name)
        if not isinstance(value, list):
            findings.add('no-list', f'`{name}` is {"missing" if value is None else "a " + type(value).__name__}')
    if 'no-list' in findings.by_rule:
        findings.raise_faults('error')
    return {name: content[name] for name in ('images', 'annotations', 'categories')}


def _categories(rows: list, findings: Findings) -> list[Entry]:
    result: list[Entry] = []
    seen: dict[Any, int] = {}
    for number, row in enumerate(rows):
        name = row.get('name') if isinstance(row, dict) else None
        key = canonical_id(row.get('id')) if isinstance(row, dict) else None
        if key is None or not isinstance(name, str) or not name:
            findings.add('bad-category', f'row {number}: {_short(row)}')
            continue
        if name in seen or (key,) in seen:
            findings.add('category-twice', f'{name!r} (id {key}) in row {number}')
            continue
        seen[name] = seen[(key,)] = number
        if type(row['id']) is not type(key):
            findings.add('text-ids', f'category {row["id"]!r}')
        result.append({**row, 'id': key})
    return result


def _images(rows: list, findings: Findings) -> list[Entry]:
    result: list[Entry] = []
    seen: set[Id] = set()
    pictures: set[str] = set()
    for number, row in enumerate(rows):
        if not isinstance(row, dict):
            findings.add('bad-image', f'entry {number}: {_short(row)}')
            continue
        raw, name = row.get('id'), row.get('file_name')
        key = raw if type(raw) is int else canonical_id(raw)
        if key is None or not isinstance(name, str) or not name:
            findings.add('bad-image', f'entry {number}: id {_short(raw)}, file_name {_short(name)}')
            continue
        if key in seen:
            findings.add('image-twice', f'id {key} ({name})')
            continue
        seen.add(key)
        if name in pictures:
            findings.add('picture-twice', f'id {key} ({name})')
        pictures.add(name)
        if type(raw) is not type(key):
            findings.add('text-ids', f'image {raw!r}')
        row['id'] = key
        for side in ('width', 'height'):
            row[side] = _size(row.get(side))
        result.append(row)
    return result


def _size(value: Any) -> int | None:
    if type(value) is int and value > 0:
        return value
    if isinstance(value, str) and value.strip().isdecimal():
        value = int(value)
    return int(value) if rules.is_size(value) else None


def _annotations(rows: list, images: list[Entry], categories: list[Entry], findings: Findings) -> list[Entry]:
    image_ids = IdIndex(image['id'] for image in images)
    category_ids = IdIndex(category['id'] for category in categories)
    result: list[Entry] = []
    for number, row in enumerate(rows):
        if type(row) is not dict:
            findings.add('bad-annotation', f'entry {number}: {_short(row)}')
            continue
        image, category = image_ids.find(row.get('image_id')), category_ids.find(row.get('category_id'))
        if category is None or image is None or not rules.is_box(row.get('bbox')):
            _note_faults(row, number, image, category, findings)
            continue
        crowd, rule = rules.crowd(row)
        if rule is not None:
            case = _name(row, number)
            findings.add(rule, case if crowd is not None else f'annotation {case}: {_short(row["iscrowd"])}')
        if crowd is None:
            continue
        row.pop('ignore', None)  # said by `iscrowd` from here on
        row['area'], rule = rules.area(row)
        if rule is not None:
            findings.add(rule, _name(row, number))
        if not row.get('segmentation'):
            findings.add('no-segmentation', _name(row, number))
        if type(row['image_id']) is not type(image) or type(row['category_id']) is not type(category):
            findings.add('text-ids', f'annotation {_name(row, number)}')
        row['image_id'], row['category_id'], row['iscrowd'] = image, category, crowd
        result.append(row)
    return _number(result, findings)


def _note_faults(row: Entry, number: int, image: Id | None, category: Id | None, findings: Findings) -> None:
    name = _name(row, number)
    if image is None:
        findings.add('unknown-image', f'annotation {name}: image_id {_short(row.get("image_id"))}')
    if category is None:
        findings.add('unknown-category', f'annotation {name}: category_id {_short(row.get("category_id"))}')
    if not rules.is_box(row.get('bbox')):
        findings.add(
            'bad-box', f'annotation {name} of image id {_short(row.get("image_id"))}: {_short(row.get("bbox"))}'
        )


def _number(annotations: list[Entry], findings: Findings) -> list[Entry]:
    """Give each annotation an id from 1 on; pycocotools takes a matched id 0 for no match."""
    if all(type(a.get('id')) is int and a['id'] > 0 for a in annotations) and len(
        {a['id'] for a in annotations}
    ) == len(annotations):
        return annotations
    first: dict[Any, Entry] = {}
    result = []
    for number, annotation in enumerate(annotations):
        raw = annotation.get('id')
        key = canonical_id(raw)
        if key is not None and key in first and rules.same(first[key], annotation):
            findings.add('repeated', raw)
            continue
        if type(raw) is not int or raw < 1 or key in first:
            findings.add('annotation-ids', f'none in entry {number}' if raw is None else _short(raw))
        if key is not None:
            first.setdefault(key, annotation)
        result.append(annotation)
    for number, annotation in enumerate(result, 1):
        annotation['id'] = number
    return result


def _name(row: Entry, number: int) -> str:
    """What a message calls an annotation: its id, or its place in the list."""
    raw = row.get('id')
    return f'in entry {number}' if raw is None else _short(raw)


def _short(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else text[:57] + '...'


def missing_class_cases(classes: Sequence[str], categories: Sequence[Entry]) -> list[str]:
    """The classes that ``categories`` lack, each with the name that may have been meant."""
    names = {category['name']: category['name'] for category in categories}
    folded = {name.casefold().strip(): name for name in names}
    cases = []
    for name in classes:
        if name not in names:
            close = difflib.get_close_matches(name, list(names), 1)
            meant = folded.get(name.casefold().strip()) or (close[0] if close else None)
            cases.append(name if meant is None else f'{name} (did you mean {meant!r}?)')
    return cases


def _missing_classes(path: str, classes: Sequence[str], categories: Sequence[Entry]) -> str:
    letters = ''
    if len(classes) > 1 and all(len(name) == 1 for name in classes):
        letters = " Each class is one letter: `classes=('cat')` is a text; write `classes=('cat',)`."
    return (
        f'{path} has no categories {shorten(missing_class_cases(classes, categories))}; it has '
        f'{shorten([repr(category["name"]) for category in categories], SHOWN_NAMES)}. '
        f'Set `metainfo=dict(classes=(...))` of the data set to the names in the file.{letters}'
    )
