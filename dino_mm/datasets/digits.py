"""A small detection data set of real handwritten digits, made on the spot in COCO format.

Every scene is a 128x128 px RGB image with one to six digits of scikit-learn's ``load_digits`` (8x8
px scans of handwriting), enlarged, coloured and laid over a cluttered background. It needs no
download, and a given seed yields the same bytes every time, so that short trainings on it can be
compared.
"""

import argparse
import hashlib
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw

CLASSES: tuple[str, ...] = ('0', '1', '2', '3', '4', '5', '6', '7', '8', '9')

NUM_TRAIN = 800
NUM_VAL = 100
"""Scenes that ``make_digits`` makes unless told otherwise."""

SCENE_SIZE = 128
"""Width and height of a scene in pixels."""

MAX_DIGITS = 6
DIGIT_SIZES = (20.0, 56.0)
"""Shortest and longest side of an enlarged scan in pixels; the ink in it is up to a tenth off."""

STAMP_NAME = 'digits.json'
TRAIN_SHARE = 0.7

OVERLAP_CHANCE = 0.2
"""Share of the scenes in which digits may overlap at all."""

MAX_OVERLAP = 0.25
"""Largest share of a digit's box that the other boxes of the scene may cover together."""

PLACEMENT_TRIES = 50
INK_THRESHOLD = 0.25
"""Opacity from which on a pixel counts as ink: the box of a digit encloses all such pixels."""

FloatArray = NDArray[np.float32]
IndexArray = NDArray[np.int64]


@dataclass(frozen=True)
class Box:
    """A box on the pixel grid; ``right`` and ``bottom`` are the first pixels outside of it."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def area(self) -> int:
        """Area in square pixels."""
        return (self.right - self.left) * (self.bottom - self.top)

    def intersection(self, other: 'Box') -> int:
        """Area shared with ``other`` in square pixels."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(width, 0) * max(height, 0)


@dataclass(frozen=True)
class Palette:
    """What the colours of one scene start from.

    Attributes:
        ground: Mean colour of the background, RGB levels from 0 to 255.
        polarity: +1 where the digits are lighter than the background, -1 where they are darker.
    """

    ground: FloatArray
    polarity: int


def make_digits(out_dir: Path, num_train: int = NUM_TRAIN, num_val: int = NUM_VAL, seed: int = 0) -> Path:
    """Write the data set, unless ``out_dir`` already holds it for the same arguments.

    The result is ``train/*.png``, ``val/*.png``, ``annotations/train.json`` and
    ``annotations/val.json``. Training and validation scenes are drawn from disjoint sets of digit
    scans. Scene ``i`` of a part depends on ``seed`` and ``i`` alone: a smaller data set is the
    beginning of a larger one.

    Args:
        out_dir: Folder to write to. One that holds such files of other origin is refused.
        num_train: Number of training scenes, at least 1.
        num_val: Number of validation scenes, at least 1.
        seed: Seed of everything random in the scenes. The split of the scans does not depend on it.

    Returns:
        ``out_dir``, to be used as ``data_root``.

    Raises:
        ModuleNotFoundError: scikit-learn, which brings the scans, is not installed.
        FileExistsError: ``out_dir`` holds a data set of other origin.
    """
    if min(num_train, num_val) < 1:
        raise ValueError(f'need at least one scene of each part, got {num_train=} and {num_val=}')
    stamp: dict[str, Any] = {
        'generator': hashlib.sha256(Path(__file__).read_bytes()).hexdigest(),
        'num_train': num_train,
        'num_val': num_val,
        'seed': seed,
        'complete': True,
    }
    stamp_path = out_dir / STAMP_NAME
    if stamp_path.is_file() and json.loads(stamp_path.read_text()) == stamp:
        return out_dir

    scans, labels = _load_scans()
    _clear(out_dir)
    # The stamp goes first: by it the next call knows an interrupted run for ours, to be redone.
    stamp_path.write_text(json.dumps({**stamp, 'complete': False}, indent=2) + '\n')
    train_rows, val_rows = split_samples(labels)
    for part, (name, rows, count) in enumerate([('train', train_rows, num_train), ('val', val_rows, num_val)]):
        _write_part(out_dir, name, count, scans[rows], labels[rows], (seed, part))
    stamp_path.write_text(json.dumps(stamp, indent=2) + '\n')
    return out_dir


def split_samples(labels: IndexArray) -> tuple[IndexArray, IndexArray]:
    """Divide digit scans into those of the training and those of the validation scenes.

    Args:
        labels: Digit of each scan, 0 to 9, shape (num_scans,).

    Returns:
        Ascending row numbers of the training and of the validation scans: every row is in one of
        them, 70 % of each digit in the first. No seed enters, so that no training set shares a scan
        with any validation set.
    """
    rng = np.random.default_rng(0)
    shuffled = [rng.permutation(np.flatnonzero(labels == digit)) for digit in range(len(CLASSES))]
    cuts = [round(TRAIN_SHARE * len(rows)) for rows in shuffled]
    train = np.concatenate([rows[:cut] for rows, cut in zip(shuffled, cuts, strict=True)])
    val = np.concatenate([rows[cut:] for rows, cut in zip(shuffled, cuts, strict=True)])
    return np.sort(train), np.sort(val)


def draw_scene(
    scans: FloatArray, labels: IndexArray, rng: np.random.Generator
) -> tuple[Image.Image, list[tuple[Box, int]]]:
    """Draw one scene.

    Args:
        scans: Digit scans to choose from, ink from 0 (none) to 1, shape (num_scans, 8, 8).
        labels: Digit of each scan, 0 to 9, shape (num_scans,).
        rng: Source of everything random in the scene.

    Returns:
        The image and, for each digit on it, its box in pixels and which digit it is. The box is
        tight around the digit's ink; a part that a later digit covers counts as well.
    """
    palette = _draw_palette(rng)
    canvas = _draw_background(palette, rng)
    max_overlap = MAX_OVERLAP if rng.random() < OVERLAP_CHANCE else 0.0
    boxes: list[Box] = []
    digits: list[int] = []
    for _ in range(rng.integers(1, MAX_DIGITS + 1)):
        row = int(rng.integers(len(scans)))
        opacity = draw_digit(scans[row], float(rng.uniform(*DIGIT_SIZES)), float(rng.normal(0, 6)))
        box = _place(opacity.shape, boxes, max_overlap, rng)
        if box is None:
            continue
        colour = _shifted(palette, rng.uniform(125, 165), 35, rng)
        patch = canvas[box.top : box.bottom, box.left : box.right]
        patch += opacity[..., None] * (colour - patch)
        boxes.append(box)
        digits.append(int(labels[row]))
    canvas += rng.normal(0, rng.uniform(1, 6), canvas.shape)
    pixels = np.clip(np.rint(canvas), 0, 255).astype(np.uint8)
    return Image.fromarray(pixels), list(zip(boxes, digits, strict=True))


def draw_digit(scan: FloatArray, size: float, angle: float = 0.0) -> FloatArray:
    """Enlarge a scan smoothly and crop it to its ink.

    Args:
        scan: Ink from 0 to 1, shape (8, 8).
        size: Length to which the 8 px of a scan are stretched, in pixels.
        angle: Turn anticlockwise in degrees.

    Returns:
        Opacity from 0 to 1, shape (height, width); its outermost rows and columns each hold ink.
    """
    # The empty rim lets the interpolation run out to zero instead of stopping short at the edge.
    padded = np.pad(scan, 2)
    side = round(len(padded) * size / len(scan))
    enlarged = Image.fromarray(padded).resize((side, side), Image.Resampling.BICUBIC)
    ink = np.asarray(enlarged.rotate(angle, Image.Resampling.BICUBIC))
    # A steeper slope turns the soft edge of an enlarged scan into that of a pen stroke; steeper
    # still, it would fill the loops of small eights and nines.
    opacity = np.clip((ink - 0.25) / 0.6, 0, 1).astype(np.float32, copy=False)
    rows = np.flatnonzero((opacity >= INK_THRESHOLD).any(axis=1))
    columns = np.flatnonzero((opacity >= INK_THRESHOLD).any(axis=0))
    return opacity[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _load_scans() -> tuple[FloatArray, IndexArray]:
    """Return scans with ink from 0 to 1, shape (1797, 8, 8), and their digits, shape (1797,)."""
    try:
        from sklearn.datasets import load_digits
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            'the digits data set is made from the scans in scikit-learn, which is not installed: '
            "run `pip install scikit-learn` (or install this package as 'mmdet-dino[demo]')",
            name=error.name,
        ) from error
    bunch = load_digits()
    return (bunch.images / 16).astype(np.float32), bunch.target.astype(np.int64)


def _clear(out_dir: Path) -> None:
    """Make ``out_dir`` a folder without our files; refuse to delete files of other origin."""
    parts = [out_dir / name for name in ('train', 'val', 'annotations')]
    present = [part for part in parts if part.exists()]
    if present and not (out_dir / STAMP_NAME).is_file():
        raise FileExistsError(
            f'{present[0]} exists, but no {STAMP_NAME} beside it says that we wrote it: '
            'choose another folder, or remove it'
        )
    for part in present:
        shutil.rmtree(part)
    out_dir.mkdir(parents=True, exist_ok=True)


def _write_part(
    out_dir: Path,
    name: str,
    count: int,
    scans: FloatArray,
    labels: IndexArray,
    seed: tuple[int, int],
) -> None:
    """Write ``count`` scenes to ``out_dir/name`` and what is on them to ``annotations``."""
    (out_dir / name).mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        scene, objects = draw_scene(scans, labels, np.random.default_rng([*seed, index]))
        file_name = f'{index:06d}.png'
        scene.save(out_dir / name / file_name)
        images.append({'id': index + 1, 'file_name': file_name, 'width': SCENE_SIZE, 'height': SCENE_SIZE})
        for box, digit in objects:
            annotations.append(
                {
                    'id': len(annotations) + 1,
                    'image_id': index + 1,
                    'category_id': digit + 1,
                    'bbox': [box.left, box.top, box.right - box.left, box.bottom - box.top],
                    'area': box.area,
                    'iscrowd': 0,
                }
            )
    categories = [{'id': index + 1, 'name': name} for index, name in enumerate(CLASSES)]
    content = {'images': images, 'annotations': annotations, 'categories': categories}
    path = out_dir / 'annotations' / f'{name}.json'
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps(content) + '\n')


def _draw_palette(rng: np.random.Generator) -> Palette:
    """Choose a dark background for light digits, or a light one for dark digits."""
    polarity = int(rng.choice([-1, 1]))
    brightness = rng.uniform(25, 75) if polarity > 0 else rng.uniform(180, 230)
    return Palette(ground=brightness + _tint(25, rng), polarity=polarity)


def _shifted(palette: Palette, contrast: float, tint: float, rng: np.random.Generator) -> FloatArray:
    """Shift the background's colour ``contrast`` levels towards that of digits, with a tint."""
    return np.clip(palette.ground + palette.polarity * contrast + _tint(tint, rng), 0, 255)


def _tint(strength: float, rng: np.random.Generator) -> FloatArray:
    """Draw a shift of the channels, about ``strength`` levels at most, that keeps their mean."""
    shift = rng.uniform(-strength, strength, 3)
    return (shift - shift.mean()).astype(np.float32)


def _draw_background(palette: Palette, rng: np.random.Generator) -> FloatArray:
    """Draw an uneven background with distractor strokes, levels of shape (128, 128, 3)."""
    position = np.linspace(-1, 1, SCENE_SIZE, dtype=np.float32)
    slope = rng.uniform(-15, 15, 2)
    gradient = slope[0] * position[:, None] + slope[1] * position[None, :]
    cells = int(rng.integers(4, 17))
    blotches = Image.fromarray(rng.normal(0, rng.uniform(2, 9), (cells, cells)).astype(np.float32))
    texture = np.asarray(blotches.resize((SCENE_SIZE, SCENE_SIZE), Image.Resampling.BICUBIC))
    canvas = palette.ground + (gradient + texture)[..., None]
    for _ in range(rng.integers(0, 5)):
        colour = _shifted(palette, rng.uniform(30, 60), 20, rng)
        canvas += _draw_stroke(rng)[..., None] * (colour - canvas)
    return canvas.astype(np.float32)


def _draw_stroke(rng: np.random.Generator) -> FloatArray:
    """Draw a thin straight or bent line somewhere, opacity of shape (128, 128)."""
    scale = 2  # Pillow draws hard edges: draw large and shrink.
    mask = Image.new('L', (SCENE_SIZE * scale, SCENE_SIZE * scale))
    pen = ImageDraw.Draw(mask)
    width = int(rng.integers(2, 6))
    if rng.random() < 0.5:
        pen.line(rng.integers(0, mask.width, 4).tolist(), fill=255, width=width)
    else:
        left, top = rng.integers(-mask.width // 4, mask.width, 2).tolist()
        size = int(rng.integers(mask.width // 4, mask.width))
        start = int(rng.integers(360))
        # At most a third of a circle: a full one would pass for a zero.
        end = start + int(rng.integers(30, 120))
        pen.arc((left, top, left + size, top + size), start, end, fill=255, width=width)
    return (np.asarray(mask.reduce(scale), dtype=np.float32) / 255).astype(np.float32, copy=False)


def _place(shape: Sequence[int], boxes: list[Box], max_overlap: float, rng: np.random.Generator) -> Box | None:
    """Find a place for a digit of ``shape`` (height, width); None where the scene has no room."""
    height, width = shape
    for _ in range(PLACEMENT_TRIES):
        left = int(rng.integers(SCENE_SIZE - width + 1))
        top = int(rng.integers(SCENE_SIZE - height + 1))
        box = Box(left, top, left + width, top + height)
        if max(_covered_shares([*boxes, box])) <= max_overlap:
            return box
    return None


def _covered_shares(boxes: list[Box]) -> list[float]:
    """Return the share of each box that the others cover, twice where two others meet."""
    return [sum(box.intersection(other) for other in boxes if other is not box) / box.area for box in boxes]


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: ``python -m dino_mm.datasets.digits OUT``."""
    parser = argparse.ArgumentParser(description='Make the digits detection data set (COCO format).')
    parser.add_argument('out', type=Path, metavar='OUT', help='folder to write to')
    parser.add_argument('--num-train', type=int, default=NUM_TRAIN, help='training scenes (%(default)s)')
    parser.add_argument('--num-val', type=int, default=NUM_VAL, help='validation scenes (%(default)s)')
    parser.add_argument('--seed', type=int, default=0, help='seed of the scenes (%(default)s)')
    options = parser.parse_args(arguments)
    try:
        out_dir = make_digits(options.out, options.num_train, options.num_val, options.seed)
    except (ModuleNotFoundError, FileExistsError, ValueError) as error:
        parser.exit(1, f'error: {error}\n')
    print(f'{options.num_train} training and {options.num_val} validation scenes in {out_dir}')


if __name__ == '__main__':
    main()
