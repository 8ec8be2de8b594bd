"""Make a project: look at the data, check them, write annotation files where needed, and the config."""

import json
import shlex
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..datasets.check import DatasetCheck, check_dataset
from ..datasets.coco_file import check_classes, missing_class_cases, shorten
from ..datasets.coco_rules import RULES, AnnotationError, Entry
from ..shipped import UnknownConfigError, find
from ..zoo import get_config, zoo_models
from .coco_source import coco_parts
from .config_text import Recipe, config_text, default_epochs, launch_command
from .conversion import convert
from .errors import ProjectError
from .inventory import Inventory, take_inventory
from .parts import ALL, Part, divide


@dataclass(frozen=True)
class Project:
    """A project that was made.

    Attributes:
        config: Its config.
        command: What starts the training.
        report: What was found, a line for each split and finding.
    """

    config: Path
    command: str
    report: str


def make_project(
    target: Path,
    data: Path,
    model: str,
    classes: Sequence[str] | None = None,
    gpus: int = 1,
    seed: int = 0,
    epochs: int | None = None,
    image_size: int | None = None,
    batch_size: int | None = None,
) -> Project:
    """Make a folder with a config that fine-tunes a model on a data set.

    It is written whole or not at all. The data stay where they are and as they are. Annotations that are converted, or
    divided into training and validation, are written into ``annotations/`` of the project.

    Args:
        target: The project's folder; missing or empty.
        data: Folder with pictures and annotations, as COCO JSON, YOLO or Pascal VOC.
        model: A shipped config.
        classes: Names of the labels; the data's own by default.
        gpus: Number of GPUs, for the learning rate that the config tells.
        seed: Of the division, where the data have no validation set.
        epochs: Length of the training; by default the fewer, the more images there are.
        image_size: Shorter edge of a test, pixels; the recipe's by default.
        batch_size: Images of each GPU; the recipe's by default.

    Raises:
        ProjectError: Data or arguments do not fit; one line.
        UnknownConfigError: There is no such model; names the nearest.
    """
    target, stated = target.absolute(), target
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ProjectError(f'{stated}: it exists and is not an empty folder. Name another one, or remove it.')
    recipe = _recipe(model, image_size, batch_size)
    found = take_inventory(data.absolute())
    found.format()  # before anything is written
    command = launch_command(str(stated / 'config.py'), gpus)
    with _written_whole(target) as work:
        parts, checks = _prepare(found, work / 'annotations', seed, classes)
        names, sizes = tuple(classes or _names(checks['train'])), {k: len(c.file.images) for k, c in checks.items()}
        what = f'{found.format()} data of {len(names)} classes: '
        what += ', '.join(f'{number} images for {split}' for split, number in sizes.items())
        epochs = epochs or default_epochs(sizes['train'])
        text = config_text(recipe, parts, names, found.folder, epochs, gpus, what, command)
        (work / 'config.py').write_text(text, encoding='utf-8')
    report = '\n'.join(check.report().replace(str(work), str(stated)) for check in checks.values())
    return Project(stated / 'config.py', command, report)


@contextmanager
def _written_whole(target: Path) -> Iterator[Path]:
    """A folder that becomes ``target``, missing or empty, at the end of the block; nothing is left after an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f'.{target.name}.', dir=target.parent))
    try:
        yield work
        work.chmod(0o755)
        if target.exists():
            target.rmdir()
        work.rename(target)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise


def _recipe(model: str, image_size: int | None, batch_size: int | None) -> Recipe:
    base = find(model).removesuffix('.py')
    config = get_config(base)
    zoo = zoo_models().get(Path(base).stem)
    scale = config.test_dataloader.dataset.pipeline[1].scale
    return Recipe(
        model=Path(base).stem,
        base=_short_name(base),
        weights=None if zoo is None else zoo.weights,
        lr=config.optim_wrapper.optimizer.lr,
        base_batch=config.auto_scale_lr.base_batch_size,
        has_init_cfg=config.model.backbone.get('init_cfg') is not None,
        image_size=image_size or min(scale),
        batch_size=batch_size or config.train_dataloader.batch_size,
    )


def _short_name(base: str) -> str:
    """A config's name without its folder, if no other config has it."""
    try:
        find(Path(base).stem)
    except UnknownConfigError:
        return base
    return Path(base).stem


def _prepare(
    found: Inventory, folder: Path, seed: int, classes: Sequence[str] | None
) -> tuple[dict[str, Part], dict[str, DatasetCheck]]:
    """All parts with a validation set among them, and their checks, in the order train, val, test."""
    if found.format() == 'COCO':
        parts = {part.split: part for part in coco_parts(found)}
    else:
        parts = {split: _write(folder, split, content, found.folder) for split, content in convert(found).items()}
    whole = parts.pop(ALL, None)
    if 'train' not in parts:
        if whole is None:
            others = ' and '.join(sorted(parts)) or 'a test without labels'
            raise ProjectError(
                f'{found.folder}: there is no training set, only {others}. Call its file or folder `train`.'
            )
        parts['train'] = whole
    checks = {split: _check(part, found, classes) for split, part in parts.items()}
    if 'val' not in parts:
        file = checks['train'].file
        divided = divide(file.images, file.annotations, seed, _shown(parts['train'], found))
        for split, content in zip(('train', 'val'), divided, strict=True):
            content = {**file.rest, **content, 'categories': file.categories}
            parts[split] = _write(folder, split, content, parts['train'].pictures)
            checks[split] = _check(parts[split], found, classes)
        if whole is not None:
            (folder / f'{ALL}.json').unlink(missing_ok=True)
    order = [split for split in ('train', 'val', 'test') if split in parts]
    names = classes or _names(checks['train'])
    for split in order:
        _require_classes(checks[split], names, parts[split], found)
    return {split: parts[split] for split in order}, {split: checks[split] for split in order}


def _write(folder: Path, split: str, content: dict[str, Any], pictures: Path) -> Part:
    folder.mkdir(exist_ok=True)
    path = folder / f'{split}.json'
    path.write_text(json.dumps(content), encoding='utf-8')
    return Part(split, path, pictures, is_new=True)


def _shown(part: Part, found: Inventory) -> Path:
    """What errors call a part: its file, or the folder whose labels were converted."""
    return found.folder if part.is_new else part.ann_file


def _check(part: Part, found: Inventory, classes: Sequence[str] | None) -> DatasetCheck:
    """Check a part as training does.

    Raises:
        ProjectError: It has faults or no boxes, or the file cannot be read.
    """
    shown = _shown(part, found)
    try:
        if classes is not None:
            check_classes('--classes', list(classes))
        check = check_dataset(str(part.ann_file), part.pictures)
    except AnnotationError as error:
        raise ProjectError(' '.join(str(error).split())) from None
    faults = [rule for rule in check.findings.faults() if rule != 'no-objects']
    if faults:
        said = '; '.join(f'{check.findings.by_rule[rule].count} {RULES[rule].found}' for rule in faults)
        files = shlex.join(map(str, (part.ann_file, part.pictures)))
        way = f'`dino-mm check {files}` names them; with `--fix CLEAN.json` it writes a file without them.'
        raise ProjectError(f'{shown}: {said}. {"Correct the labels." if part.is_new else way}')
    wanted = {row['id'] for row in check.file.categories if classes is None or row['name'] in classes}
    if (wanted or classes is None) and not any(
        a['category_id'] in wanted and not a['iscrowd'] for a in check.file.annotations
    ):
        split = '' if part.split == ALL else f'the split {part.split!r} has '
        raise ProjectError(f'{shown}: {split or "it has "}no boxes to learn from. Label some, or move it elsewhere.')
    return check


def _names(check: DatasetCheck) -> tuple[str, ...]:
    """Names of a file's classes, without the row that Roboflow adds for the whole project."""
    categories = check.file.categories
    used = {annotation['category_id'] for annotation in check.file.annotations}
    above = {row.get('supercategory') for row in categories if row.get('supercategory') != row['name']}

    def is_title(row: Entry) -> bool:
        return row['id'] not in used and row['name'] in above and row.get('supercategory') in (None, 'none')

    return tuple(row['name'] for row in categories if not is_title(row))


def _require_classes(check: DatasetCheck, classes: Sequence[str], part: Part, found: Inventory) -> None:
    """Raise ProjectError if a part lacks one of the classes; else let its report be of these classes."""
    categories = check.file.categories
    missing = missing_class_cases(classes, categories)
    if missing:
        has = shorten([repr(row['name']) for row in categories], 20)
        raise ProjectError(
            f'{_shown(part, found)}: there are no labels of the class {shorten(missing)}; it has {has}. '
            'Correct `--classes` or the categories.'
        )
    check.file.note_classes(list(classes), check.findings)
    check.classes = tuple(classes)
