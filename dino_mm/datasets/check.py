"""Check a COCO data set before training: the verdicts of training and evaluation, and what only pictures can tell."""

import json
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm import tqdm

from .coco_file import CocoFile, check_classes, load, missing_class_cases, require_annotation_file
from .coco_pictures import missing_pictures, read_sizes
from .coco_rules import RULES, Entry, Findings, Id, has_area_inside, passes_size
from .loading import UnreadableImageError, UnsupportedImageError, decode

#: Share of boxes under one pixel, from which on they are probably in another unit.
MANY = 0.25


@dataclass
class DatasetCheck:
    """What was found in a data set.

    Attributes:
        file: The annotations, repaired, without entries that have faults.
        findings: All findings, of the file and of its pictures.
        classes: Names of the labels.
        folder: Where the pictures are; None if they were not looked at.
        conspicuous: Image id -> why it should be looked at.
    """

    file: CocoFile
    findings: Findings
    classes: tuple[str, ...]
    folder: Path | None
    conspicuous: dict[Id, str]

    @property
    def has_faults(self) -> bool:
        """Whether training would refuse the data set."""
        return bool(self.findings.faults())

    def report(self) -> str:
        """One line for each rule that was met, faults first, and what the numbers suggest."""
        names = sorted(self.findings.by_rule, key=lambda name: not RULES[name].fault)
        lines = [('FAULT  ' if RULES[name].fault else 'noted  ') + self.findings.line(name) for name in names]
        wanted = {category['id'] for category in self.file.categories if category['name'] in self.classes}
        objects = [a['category_id'] for a in self.file.annotations if a['category_id'] in wanted]
        summary = (
            f'{self.file.path}: {len(self.file.images)} images, {len(objects)} objects of {len(set(objects))} of '
            f'{len(self.classes)} classes'
        )
        return '\n'.join([summary, *lines, *self.hints()])

    def hints(self) -> list[str]:
        """What is no fault and yet worth a thought."""
        hints = []
        tiny = self.findings.by_rule.get('tiny-box')
        if tiny and tiny.count > MANY * len(self.file.annotations):
            hints.append("hint   Many boxes are under one pixel. COCO has pixels, not shares of the picture's size.")
        used = {annotation['category_id'] for annotation in self.file.annotations}
        empty = [c['name'] for c in self.file.categories if c['name'] in self.classes and c['id'] not in used]
        if empty:
            hints.append(f'hint   Classes without an object: {", ".join(empty[:10])}{", ..." if empty[10:] else ""}.')
        most = max(map(len, self.file.by_image.values()), default=0)
        if most > 100:
            hints.append(
                f'hint   One image has {most} objects: its denoising queries are {2 * most}, one positive and one '
                f'negative each, beside `num_queries`, but `denoising.max_dn_queries` at most; `test_cfg.max_per_img` '
                f'detects 300 an image.'
            )
        return hints

    def write_clean(self, path: Path) -> None:
        """Write the annotations without faults, whole or not at all.

        Raises:
            AnnotationError: There are faults that leaving entries out does not mend.
        """
        self.findings.raise_faults('drop')
        content = {
            **self.file.rest,
            'images': self.file.images,
            'annotations': self.file.annotations,
            'categories': self.file.categories,
        }
        partial = path.with_name(path.name + '.part')
        partial.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(content))
        partial.replace(path)


def check_dataset(
    ann_file: str, folder: str | os.PathLike | None = None, classes: Sequence[str] | None = None, pixels: bool = False
) -> DatasetCheck:
    """Check annotations, and with ``folder`` the pictures: are they there, and are they as large as stated.

    Args:
        ann_file: COCO annotation file.
        folder: Folder that ``file_name`` is relative to.
        classes: Names of the labels; the file's own by default.
        pixels: Decode every picture too, as training does.

    Raises:
        FileNotFoundError: There is no such file or folder.
        AnnotationError: The file is no JSON, or has no lists to check.
    """
    require_annotation_file(str(ann_file), 'ANN')
    if folder is not None and not Path(folder).is_dir():
        raise FileNotFoundError(f'There is no folder {folder}. Give the one that `file_name` is relative to.')
    file = load(str(ann_file), ann_file)
    findings = file.findings
    if classes is not None:
        check_classes(str(ann_file), classes)
        for case in missing_class_cases(classes, file.categories):
            findings.add('missing-class', case)
        known = {category['name'] for category in file.categories}
        file.note_classes([name for name in classes if name in known], findings)
    names = tuple(classes or (category['name'] for category in file.categories))
    check = DatasetCheck(file, findings, names, None if folder is None else Path(folder), {})
    if not file.has_annotations:
        findings.add('no-list', '`annotations` is missing')
    if folder is not None:
        _check_pictures(check, str(folder), pixels)
    _check_boxes(check)
    if not check.has_faults and not any(not annotation['iscrowd'] for annotation in file.annotations):
        findings.add('no-objects', f'{len(file.images)} images')
    return check


def _check_pictures(check: DatasetCheck, folder: str, pixels: bool) -> None:
    file, findings = check.file, check.findings
    unusable = set()
    for image in missing_pictures(file, folder):
        unusable.add(image['id'])
        findings.add('missing-picture', f'id {image["id"]} ({os.path.join(folder, image["file_name"])})')
    file.leave_out(unusable)
    unusable = read_sizes(file, folder, findings, every=True)
    file.leave_out(unusable)
    if pixels:
        damaged = _decode_all(file.images, folder)
        for image, why in damaged:
            findings.add('bad-picture', f'id {image["id"]}: {why}')
        file.leave_out({image['id'] for image, _ in damaged})


def _decode_all(images: Sequence[Entry], folder: str) -> list[tuple[Entry, str]]:
    """Decode all pictures; those that fail, and why."""

    def decode_one(image: Entry) -> str | None:
        path = os.path.join(folder, image['file_name'])
        try:
            decode(Path(path).read_bytes(), 'pillow', path)
        except (UnreadableImageError, UnsupportedImageError, OSError) as error:
            return str(error)
        return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:  # decoders let other threads run
        reasons = list(tqdm(pool.map(decode_one, images), total=len(images), desc='decoding', unit='picture'))
    return [(image, why) for image, why in zip(images, reasons, strict=True) if why is not None]


def _check_boxes(check: DatasetCheck) -> None:
    """Count boxes that are left out, and collect the images that should be looked at."""
    for image in check.file.images:
        if image['width'] is None or image['height'] is None:
            continue
        for annotation in check.file.by_image.get(image['id'], ()):
            box, case = annotation['bbox'], f'annotation {annotation["id"]} of image {image["id"]}'
            if not has_area_inside(box, image['width'], image['height']):
                check.findings.add('no-box-area', case)
                check.conspicuous[image['id']] = 'a box without area inside'
            elif min(box[2:]) < 1:
                check.findings.add('tiny-box', case)
                check.conspicuous.setdefault(image['id'], 'a box under one pixel')
            elif passes_size(box, image['width'], image['height']):
                check.findings.add('passes-picture', case)
                check.conspicuous.setdefault(image['id'], 'a box passes the picture')
