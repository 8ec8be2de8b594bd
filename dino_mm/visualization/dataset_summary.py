"""One picture of a data set: what is in it, in which sizes, and the images that should be looked at."""

import math
from collections import Counter
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from dino_mm.datasets.check import DatasetCheck
from dino_mm.datasets.loading import UnreadableImageError, UnsupportedImageError, decode, image_size

from .contact_sheet import COLUMNS, Mark, Rectangle, draw_grid, draw_tile, write_text

COLOUR = '#1f77b4'
#: Sides in pixels between COCO's small, medium and large objects.
SMALL, LARGE = 32, 96
#: Classes that are named; of more, the most and the least frequent.
MAX_CLASSES = 30
NUM_IMAGES = 2 * COLUMNS
CAPTION_LETTERS = 52


def draw_dataset(check: DatasetCheck, out_png: Path) -> None:
    """Draw objects per class, box sizes, boxes per image, aspect ratios, and a contact sheet.

    The sheet shows images with findings first, then those with the most objects.

    Args:
        check: What :func:`~dino_mm.datasets.check.check_dataset` found.
        out_png: Picture to write.
    """
    figure = Figure(figsize=(16, 9.5), dpi=100, layout='constrained')
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    title = f'{Path(check.file.path).name}: {len(check.file.images)} images, {len(check.file.annotations)} objects'
    figure.suptitle(title)
    boxes = np.array([a['bbox'] for a in check.file.annotations], dtype=float).reshape(-1, 4)
    boxes = boxes[(boxes[:, 2:] > 0).all(1)]
    _draw_classes(axes[0, 0], check)
    _draw_sizes(axes[0, 1], np.sqrt(boxes[:, 2] * boxes[:, 3]))
    _draw_counts(axes[1, 0], [len(check.file.by_image.get(image['id'], ())) for image in check.file.images])
    _draw_ratios(axes[1, 1], boxes[:, 2] / boxes[:, 3])
    canvas.draw()
    plots = Image.fromarray(np.asarray(canvas.buffer_rgba())).convert('RGB')
    sheet = _draw_images(check)
    picture = Image.new('RGB', (max(plots.width, sheet.width), plots.height + sheet.height), 'white')
    picture.paste(plots, ((picture.width - plots.width) // 2, 0))
    picture.paste(sheet, (0, plots.height))
    out_png.parent.mkdir(parents=True, exist_ok=True)
    picture.save(out_png)


def _draw_classes(axes: Axes, check: DatasetCheck) -> None:
    counts = Counter(annotation['category_id'] for annotation in check.file.annotations)
    named = [(c['name'], counts[c['id']]) for c in check.file.categories if c['name'] in check.classes]
    named.sort(key=lambda pair: -pair[1])
    title = 'Objects per class'
    if len(named) > MAX_CLASSES:
        half = MAX_CLASSES // 2
        title += f': the {half} most frequent and the {half} least frequent of {len(named)}'
        named = named[:half] + named[-half:]
    names = [name[:18] for name, _ in named]
    bars = axes.bar(range(len(named)), [count for _, count in named], color=COLOUR)
    if len(named) <= 12:
        axes.bar_label(bars)
    axes.set_xticks(range(len(named)), names)
    if len(named) > 6:
        axes.tick_params('x', rotation=90)
    axes.set_title(title)


def _draw_sizes(axes: Axes, sides: np.ndarray) -> None:
    if len(sides):
        axes.hist(sides, bins=np.geomspace(sides.min() * 0.99, sides.max() * 1.01, 41).tolist(), color=COLOUR)
        axes.set_xscale('log')
    counts = np.histogram(sides, bins=[0, SMALL, LARGE, np.inf])[0]
    shares = counts / max(counts.sum(), 1)
    for side in (SMALL, LARGE):
        axes.axvline(side, color='#d62728', linewidth=1)
    axes.set_title("Box sizes; COCO's small {:.0%}, medium {:.0%}, large {:.0%}".format(*shares))
    axes.set_xlabel(f'square root of the area in pixels of the file (lines at {SMALL} and {LARGE})')


def _draw_counts(axes: Axes, counts: list[int]) -> None:
    most = max(counts, default=0)
    axes.hist(counts, bins=[i - 0.5 for i in range(most + 2)] if most < 60 else 60, color=COLOUR)
    axes.set_yscale('symlog')
    groups = max(100 // most, 1) if most else 0
    axes.set_title(f'Objects per image: {sum(c == 0 for c in counts)} images without, {most} at most')
    axes.set_xlabel(f'for the fullest image, denoising makes {groups} x {2 * most} queries (num_dn_queries=100)')


def _draw_ratios(axes: Axes, ratios: np.ndarray) -> None:
    if len(ratios):
        limit = max(4.0, math.ceil(np.abs(np.log2(ratios)).max()))
        axes.hist(np.log2(ratios), bins=np.linspace(-limit, limit, 49).tolist(), color=COLOUR)
        ticks = np.arange(-int(limit), int(limit) + 1, max(1, int(limit) // 4))
        axes.set_xticks(ticks, [f'1:{2.0**-t:g}' if t < 0 else f'{2.0**t:g}:1' for t in ticks])
    axes.set_title('Aspect ratios, width : height')


def _draw_images(check: DatasetCheck) -> Image.Image:
    """A contact sheet; without a folder of pictures, only its header."""
    by_count = sorted(check.file.images, key=lambda image: -len(check.file.by_image.get(image['id'], ())))
    first = [image for image in by_count if image['id'] in check.conspicuous]
    chosen = (first + [image for image in by_count if image['id'] not in check.conspicuous])[:NUM_IMAGES]
    names = {category['id']: category['name'] for category in check.file.categories}
    cells = []
    folder = check.folder
    for image in chosen if folder is not None else ():
        annotations = check.file.by_image.get(image['id'], [])
        marks = [
            Mark(Rectangle(x, y, x + w, y + h), names[a['category_id']], is_truth=True)
            for a in annotations
            for x, y, w, h in [a['bbox']]
        ]
        tile = draw_tile(read_picture(Path(folder or '', image['file_name'])), marks)
        why = check.conspicuous.get(image['id'], f'{len(marks)} objects')
        cells.append((tile, f'{why}: {image["file_name"]}'[:CAPTION_LETTERS]))
    sheet = draw_grid(cells)
    title = 'Images with findings, then those with the most objects' if cells else 'No folder of pictures was given'
    write_text(sheet, (14, 22), title, anchor='lm')
    return sheet


def read_picture(path: Path) -> Image.Image:
    """A picture as training sees it; grey where it cannot be read, which the check of all pixels names."""
    try:
        return Image.fromarray(decode(path.read_bytes(), 'pillow', str(path))[..., ::-1])
    except (UnreadableImageError, UnsupportedImageError, OSError):
        return Image.new('RGB', image_size(path), 'grey')
