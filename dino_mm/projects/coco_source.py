"""COCO files as they lie in a folder: which split each is of, and where its pictures are."""

import json
from collections import Counter
from pathlib import Path

from .errors import ProjectError
from .inventory import Inventory, split_of
from .parts import ALL, Part

#: File names that are looked for to find the folder of the pictures.
SAMPLES = 50


def coco_parts(found: Inventory) -> list[Part]:
    """The parts of a data set in COCO's format, where they lie.

    Raises:
        ProjectError: Two files claim one split, or a file's pictures are nowhere.
    """
    files: dict[str, Path] = {}
    for path in found.coco:
        split = found.split_of(path) or ALL
        other = files.get(split)
        if other is not None and 'instances' in path.name and 'instances' not in other.name:
            other = None  # COCO's own folder has files for other tasks beside
        elif other is not None and 'instances' in other.name and 'instances' not in path.name:
            continue
        if other is not None:
            what = 'without a split in its name' if split == ALL else f'of the split {split!r}'
            raise ProjectError(
                f'{found.folder}: {found.short(other)} and {found.short(path)} are both annotation files {what}. '
                'Move one of them elsewhere.'
            )
        files[split] = path
    if 'train' in files:
        files.pop(ALL, None)
    return [part for split, path in files.items() if (part := _part(found, split, path)) is not None]


def _part(found: Inventory, split: str, path: Path) -> Part | None:
    content = json.loads(path.read_bytes())
    if split == 'test' and not content.get('annotations'):
        return None  # a test without published labels
    images = [image for image in content['images'] if isinstance(image, dict)]
    names: list[str] = [name for image in images if isinstance(name := image.get('file_name'), str) and name]
    if not names:
        raise ProjectError(f'{path}: it lists no images. Correct it, or move it elsewhere.')
    votes: Counter[Path] = Counter()
    for name in names[:: max(1, len(names) // SAMPLES)]:
        tail = Path(name).parts
        for picture in found.by_name.get(tail[-1], ()):
            if picture.parts[-len(tail) :] == tail:
                votes[Path(*picture.parts[: -len(tail)])] += 1
    if not votes:
        raise ProjectError(
            f'{path}: no images found. It lists {names[0]}, which is nowhere below {found.folder}. '
            'Name the folder that holds both.'
        )

    def rank(root: Path) -> tuple:
        below = root.relative_to(found.folder) if root.is_relative_to(found.folder) else Path()
        return -votes[root], root != path.parent, split_of(below / '_') != split, len(root.parts), str(root)

    return Part(split, path, min(votes, key=rank))
