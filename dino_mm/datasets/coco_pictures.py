"""What an annotation file says of its pictures, and what the pictures say: are they there, how large are they."""

import os
from collections import defaultdict
from collections.abc import Iterable

from mmengine.fileio import get

from .coco_file import CocoFile
from .coco_rules import Entry, Findings, Id, passes_size
from .loading import UnreadableImageError, UnsupportedImageError, image_size


def is_local(folder: str, backend_args: dict | None) -> bool:
    """Whether pictures are files that can be listed."""
    return '://' not in folder and (backend_args or {}).get('backend', 'local') == 'local'


def missing_pictures(file: CocoFile, folder: str) -> list[Entry]:
    """Images without a file in ``folder``; each of its folders is listed once, which is fast on network disks too."""
    by_folder: dict[str, list[tuple[str, Entry]]] = defaultdict(list)
    for image in file.images:
        head, tail = os.path.split(os.path.join(folder, image['file_name']))
        by_folder[head].append((tail, image))
    missing = []
    for head, wanted in by_folder.items():
        present = set(os.listdir(head or '.')) if os.path.isdir(head or '.') else set()
        missing += [image for name, image in wanted if name not in present]
    return missing


def read_sizes(
    file: CocoFile, folder: str, findings: Findings, backend_args: dict | None = None, every: bool = False
) -> set[Id]:
    """Read sizes that are not stated, or that boxes pass, from the headers of the pictures, in place.

    Exchanged width and height, or the size before an EXIF turn, are what makes boxes pass the stated size.

    Args:
        file: Annotations; their images get the sizes found.
        folder: Folder that ``file_name`` is relative to.
        findings: Where to count.
        backend_args: Of mmengine's file backends.
        every: Read the header of every picture.

    Returns:
        Ids of the images that cannot be used: of unknown size, or with a picture that cannot be read.
    """
    unusable = set()
    for image in file.images:
        stated = (image['width'], image['height'])
        if not every and None not in stated and not _is_passed(stated, file.by_image.get(image['id'], ())):
            continue
        path = os.path.join(folder, image['file_name'])
        try:
            found = image_size(path if is_local(folder, backend_args) else get(path, backend_args=backend_args))
        except (UnreadableImageError, UnsupportedImageError, OSError) as error:
            exists = not is_local(folder, backend_args) or os.path.exists(path)
            if exists or None in stated:
                unusable.add(image['id'])
                findings.add(*_unusable(image, str(error), exists))
            continue
        if found != stated:
            image['width'], image['height'] = found
            rule, said = ('no-size', '') if None in stated else ('wrong-size', ' instead of {}x{}'.format(*stated))
            findings.add(rule, f'id {image["id"]} is {found[0]}x{found[1]}{said}')
    return unusable


def _is_passed(size: tuple[int, int], annotations: Iterable[Entry]) -> bool:
    return any(passes_size(annotation['bbox'], *size) for annotation in annotations)


def _unusable(image: Entry, why: str, exists: bool) -> tuple[str, str]:
    """The rule that an image without a readable header meets, and the case."""
    case = f'id {image["id"]} ({image["file_name"]})'
    return ('bad-picture', f'{case}: {why}') if exists else ('unknown-size', case)
