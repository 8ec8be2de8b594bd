"""What happens with each oddity of a COCO annotation file: one entry in a table, one function that decides.

A finding is harmless (repaired, and counted in one log line) or a fault (all faults of a file end in one error, or are
left out with ``on_fault='drop'``). To change what happens, say, with crowd boxes, change :func:`crowd`. The table in
``docs/data.md`` is made from :data:`RULES`.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

Id = int | str
Entry = dict[str, Any]

#: Cases that a message lists of each rule.
SHOWN = 10
NUMBER = (int, float)


class AnnotationError(ValueError):
    """An annotation file cannot be used as it is; the message says what is wrong, where, and the way out."""


class MissingAnnotationsError(AnnotationError, FileNotFoundError):
    """There is no such annotation file."""


@dataclass(frozen=True)
class Rule:
    """One oddity.

    Attributes:
        found: What was found, in the plural.
        then: What is done about it; for a fault, the way out.
        fault: Whether it is refused.
        droppable: Whether ``on_fault='drop'`` can leave the entry out.
    """

    found: str
    then: str
    fault: bool = False
    droppable: bool = False


def _harmless(found: str, then: str) -> Rule:
    return Rule(found, then)


def _fault(found: str, then: str, droppable: bool = False) -> Rule:
    return Rule(found, then, fault=True, droppable=droppable)


RULES: dict[str, Rule] = {
    'byte-order-mark': _harmless('byte order marks at the start', 'skipped'),
    'text-ids': _harmless('ids written as text or as 1.0', 'read as the numbers that they are'),
    'annotation-ids': _harmless(
        'annotation ids that are missing, below 1, no whole numbers or used twice', 'numbered anew for the evaluation'
    ),
    'repeated': _harmless('annotations that are repeated with the same id and the same content', 'read once'),
    'no-iscrowd': _harmless('annotations without `iscrowd`', 'taken as single objects (0)'),
    'ignored': _harmless('annotations with `ignore`', 'taken as crowd: neither trained on nor counted in the AP'),
    'no-area': _harmless('annotations without a positive `area`', 'taken as width x height of the box'),
    'no-segmentation': _harmless('annotations without a `segmentation`', 'read for their boxes'),
    'no-size': _harmless('images without a valid `width` and `height`', "read from the picture's header"),
    'wrong-size': _harmless('images that are not as large as stated', "read from the picture's header"),
    'picture-twice': _harmless(
        'images of the picture of another',
        'kept apart: what only one of them has is background in the other',
    ),
    'passes-picture': _harmless(
        'boxes that pass their picture by more than 2 pixels',
        'used as they are; COCO has [left, top, width, height], not corners',
    ),
    'no-box-area': _harmless(
        'boxes without area inside the image (outside, or of no positive width and height)',
        'left out of training and evaluation',
    ),
    'tiny-box': _harmless('boxes under one pixel', 'left out of training, as MMDetection does'),
    'category-order': _harmless('category rows in another order than `classes`', 'labels follow `classes`'),
    'other-categories': _harmless('categories that are not among `classes`', 'their objects are not used'),
    'json': _fault('places where the JSON breaks off or is not valid', 'Write or download the file again, as UTF-8.'),
    'no-object': _fault('files that hold no JSON object', 'A COCO file is an object of lists.'),
    'no-list': _fault('required lists that are missing', 'Add them: images, annotations and categories are lists.'),
    'bad-category': _fault(
        'categories without a valid `id` and `name`', 'Give each category a whole number as id and a text as name.'
    ),
    'category-twice': _fault('categories with the id or the name of another', 'Merge or rename them.'),
    'bad-image': _fault('images without a valid `id` and `file_name`', 'Give them both.', droppable=True),
    'image-twice': _fault('images with the id of another', 'Number the images anew.', droppable=True),
    'bad-annotation': _fault('annotations that are no objects', 'Remove them.', droppable=True),
    'unknown-category': _fault(
        'annotations whose `category_id` no category has',
        'Correct them, or add the category. If all ids are shifted, to leave these out would mislabel the rest.',
        droppable=True,
    ),
    'unknown-image': _fault(
        'annotations whose `image_id` no image has', 'Correct them, or add the image.', droppable=True
    ),
    'bad-box': _fault(
        'annotations whose `bbox` is not four finite numbers',
        'Write [left, top, width, height] in pixels.',
        droppable=True,
    ),
    'bad-iscrowd': _fault('annotations whose `iscrowd` is neither 0 nor 1', 'Write 0 or 1.', droppable=True),
    'bad-picture': _fault('pictures that cannot be read', 'Replace them, or remove the images.', droppable=True),
    'unknown-size': _fault(
        'images without a valid `width` and `height` whose picture is missing',
        'State the size, or correct `data_prefix`.',
        droppable=True,
    ),
    'missing-picture': _fault(
        'images whose picture is missing',
        'Correct `file_name`, or the folder (`data_root`, `data_prefix`).',
        droppable=True,
    ),
    'no-objects': _fault('files without an object to train on', 'Label some, or correct the entries above.'),
    'missing-class': _fault('classes that the file does not have', 'Set `metainfo=dict(classes=(...))` to its names.'),
}


@dataclass
class Finding:
    """How often a rule was met, and the first cases in words."""

    count: int = 0
    cases: list[str] = field(default_factory=list)


class Findings:
    """All that was found in one file.

    Attributes:
        path: The file.
        by_rule: What was found, by the name of its rule.
        dropped: Whether entries with faults were left out, as asked, rather than refused.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.by_rule: dict[str, Finding] = {}
        self.dropped = False

    def add(self, rule: str, case: object) -> None:
        """Count one case; its text is kept if it is among the first."""
        finding = self.by_rule.setdefault(rule, Finding())
        finding.count += 1
        if len(finding.cases) < SHOWN:
            finding.cases.append(str(case))

    def faults(self) -> list[str]:
        """Names of the rules that were broken."""
        return [name for name in self.by_rule if RULES[name].fault]

    def line(self, rule: str) -> str:
        """One line about a rule: count, what was found, what is done, the first cases."""
        finding, text = self.by_rule[rule], RULES[rule]
        more = ', ...' if finding.count > len(finding.cases) else ''
        separator = '; ' if any(' ' in case for case in finding.cases) else ', '
        then = 'left out' if text.fault and self.dropped else text.then
        return f'{finding.count} {text.found}: {then} ({separator.join(finding.cases)}{more})'

    def raise_faults(self, on_fault: str) -> None:
        """Raise AnnotationError about all faults, or with ``on_fault='drop'`` about those that cannot be left out."""
        faults = [name for name in self.faults() if on_fault == 'error' or not RULES[name].droppable]
        self.dropped = not faults
        if not faults:
            return
        ways = ''
        if all(RULES[name].droppable for name in faults):
            ways = (
                "\nTo leave them out, set `on_fault='drop'` in data set and evaluator, or write a clean file: "
                f'`dino-mm check {self.path} IMAGES --fix CLEAN.json`.'
            )
        lines = ''.join(f'\n- {self.line(name)}' for name in faults)
        raise AnnotationError(f'{self.path} cannot be used as it is:{lines}{ways}')


def canonical_id(raw: object) -> Id | None:
    """One value for an id whether it is written as 7, 7.0 or "7"; None if it can be no id."""
    kind = type(raw)
    if kind is int:
        return raw  # type: ignore[return-value]
    if kind is float and math.isfinite(raw) and raw == int(raw):  # type: ignore[call-overload, arg-type]
        return int(raw)  # type: ignore[call-overload]
    if isinstance(raw, str) and raw.strip():
        text = raw.strip()
        return int(text) if text.lstrip('-').isdecimal() and str(int(text)) == text else text
    return None


class IdIndex:
    """Finds the entry that a reference means: the ids agree as number or as text, or, like "007" and 7, as number."""

    def __init__(self, ids: Iterable[Id]) -> None:
        self.known: set[Id] = set(ids)
        texts = [i for i in self.known if isinstance(i, str) and i.isdecimal()]
        self._by_number = {int(text): text for text in texts}

    def find(self, raw: object) -> Id | None:
        """The canonical id of the entry; None if there is none."""
        if type(raw) is int and raw in self.known:
            return raw
        found = canonical_id(raw)
        if found is None or found in self.known:
            return found
        number = int(found) if isinstance(found, int) or found.isdecimal() else None
        if number is None:
            return None
        return number if number in self.known else self._by_number.get(number)


def crowd(annotation: dict[str, Any]) -> tuple[int | None, str | None]:
    """Whether an annotation is a crowd, which is neither trained on nor counted in the AP, and the rule met.

    ``ignore``, which other formats have in its place, means the same.
    """
    value = annotation.get('iscrowd')
    if annotation.get('ignore'):
        return 1, 'ignored'
    if value is None:
        return 0, 'no-iscrowd'
    if isinstance(value, str):
        value = {'0': 0, '1': 1}.get(value.strip())
    if isinstance(value, NUMBER) and value in (0, 1):
        return int(value), None
    return None, 'bad-iscrowd'


def is_box(box: object) -> bool:
    """Whether ``box`` is a list of four finite numbers."""
    if type(box) is not list or len(box) != 4:
        return False
    x, y, w, h = box
    if type(x) in NUMBER and type(y) in NUMBER and type(w) in NUMBER and type(h) in NUMBER:
        try:
            return math.isfinite(x + y + w + h)
        except OverflowError:  # a whole number beyond what a float holds
            return False
    return False


def area(annotation: dict[str, Any]) -> tuple[float, str | None]:
    """Area of an object in square pixels, for the AP by size, and the rule met."""
    value: Any = annotation.get('area')
    if type(value) in NUMBER and 0 < value < math.inf:
        return value, None
    width, height = annotation['bbox'][2:]
    return (width * height, 'no-area') if width > 0 and height > 0 else (0.0, None)


def is_size(value: object) -> bool:
    """Whether ``value`` can be a width or a height in pixels."""
    return type(value) in NUMBER and 0 < value < math.inf and value == int(value)  # type: ignore[operator, call-overload]


def has_area_inside(box: list[float], width: float, height: float) -> bool:
    """Whether a box (left, top, width, height), pixels, has an area inside an image."""
    x, y, w, h = box
    return w > 0 and h > 0 and x < width and y < height and x + w > 0 and y + h > 0


def passes_size(box: list[float], width: float, height: float) -> bool:
    """Whether a box passes the image by more than rounding explains: the stated size is probably not the picture's."""
    return box[0] + box[2] > width + 2 or box[1] + box[3] > height + 2


def same(first: dict[str, Any], second: dict[str, Any]) -> bool:
    """Whether two annotations say the same of the same object."""
    return all(first.get(key) == second.get(key) for key in ('image_id', 'category_id', 'bbox', 'iscrowd'))
