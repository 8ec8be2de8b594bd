"""A sheet of images with their true and their predicted boxes."""

import json
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from PIL import Image, ImageDraw, ImageFont

COLUMNS = 4
TILE = 384
"""Width and height of the field for one image in pixels."""

MAX_ENLARGEMENT = 3.0
MARGIN = 14
HEADER = 44
CAPTION = 22
"""Heights in pixels of the legend at the top and of the line below each image."""

TRUTH_COLOUR = (40, 200, 90)
PREDICTION_COLOUR = (255, 140, 30)
TRUTH_LINE = 2
PREDICTION_LINE = 4
"""Line widths in pixels. The true box goes on top: where both agree, both are still seen."""

PAPER_COLOUR = (255, 255, 255)
INK_COLOUR = (30, 30, 30)
LABEL_FONT_SIZE = 13
TEXT_FONT_SIZE = 15


class Rectangle(NamedTuple):
    """A rectangle in the pixels of a tile; ``right`` and ``bottom`` lie outside of it."""

    left: float
    top: float
    right: float
    bottom: float

    def intersection(self, other: 'Rectangle') -> float:
        """Area shared with ``other`` in square pixels."""
        width = min(self.right, other.right) - max(self.left, other.left)
        height = min(self.bottom, other.bottom) - max(self.top, other.top)
        return max(width, 0) * max(height, 0)


@dataclass(frozen=True)
class Mark:
    """A box to draw on a tile, its label, and whether it is true or predicted."""

    box: Rectangle
    text: str
    is_truth: bool

    @property
    def colour(self) -> tuple[int, int, int]:
        """RGB colour of the box and of the label's ground."""
        return TRUTH_COLOUR if self.is_truth else PREDICTION_COLOUR


def draw_contact_sheet(
    coco_json: Path,
    image_dir: Path,
    results_json: Path,
    out_png: Path,
    num_images: int = 12,
    score_thr: float = 0.3,
) -> None:
    """Draw a grid of images, each with its true boxes and the predicted ones.

    Args:
        coco_json: True boxes in COCO format.
        image_dir: Folder of the image files that ``coco_json`` names.
        results_json: Predictions in COCO's result format, a list of objects with ``image_id``,
            ``category_id``, ``bbox`` (left, top, width, height in pixels) and ``score``.
        out_png: Picture to write.
        num_images: Number of images, spread evenly over the data set.
        score_thr: Predictions with a lower score are left out.
    """
    truth = json.loads(coco_json.read_text())
    predictions = [p for p in json.loads(results_json.read_text()) if p['score'] >= score_thr]
    marks = _collect_marks(truth, predictions)
    count = min(num_images, len(truth['images']))
    chosen = np.linspace(0, len(truth['images']) - 1, count).round().astype(int)

    cells = []
    for index in chosen:
        record = truth['images'][index]
        with Image.open(image_dir / record['file_name']) as image:
            tile = draw_tile(image.convert('RGB'), marks[record['id']])
        cells.append((tile, _caption(record['file_name'], marks[record['id']])))
    sheet = draw_grid(cells)
    _draw_legend(sheet, f'{count} of {len(truth["images"])} images', score_thr)
    out_png.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(out_png)


def draw_grid(cells: Sequence[tuple[Image.Image, str]]) -> Image.Image:
    """Lay tiles out in rows of ``COLUMNS``, each with its caption below, under an empty header."""
    rows = -(-len(cells) // COLUMNS)
    width = COLUMNS * (TILE + MARGIN) + MARGIN
    sheet = Image.new('RGB', (width, HEADER + rows * (TILE + CAPTION + MARGIN)), PAPER_COLOUR)
    for cell, (tile, caption) in enumerate(cells):
        row, column = divmod(cell, COLUMNS)
        left = MARGIN + column * (TILE + MARGIN)
        top = HEADER + row * (TILE + CAPTION + MARGIN)
        sheet.paste(tile, (left + (TILE - tile.width) // 2, top + (TILE - tile.height) // 2))
        write_text(sheet, (left + TILE // 2, top + TILE + CAPTION // 2), caption, anchor='mm')
    return sheet


def _collect_marks(truth: dict[str, Any], predictions: list[dict[str, Any]]) -> defaultdict[int, list[Mark]]:
    """Sort the boxes by image id, in image pixels: predictions by rising score, then true ones."""
    names = {category['id']: category['name'] for category in truth['categories']}
    marks: defaultdict[int, list[Mark]] = defaultdict(list)
    for item in [*sorted(predictions, key=lambda p: p['score']), *truth['annotations']]:
        left, top, width, height = item['bbox']
        box = Rectangle(left, top, left + width, top + height)
        name = names[item['category_id']]
        is_truth = 'score' not in item
        text = name if is_truth else f'{name} {item["score"]:.2f}'
        marks[item['image_id']].append(Mark(box, text, is_truth))
    return marks


def draw_tile(image: Image.Image, marks: list[Mark]) -> Image.Image:
    """Scale ``image`` to the size of a tile and draw ``marks``, given in its pixels, on it."""
    scale = min(TILE / image.width, TILE / image.height, MAX_ENLARGEMENT)
    size = (round(image.width * scale), round(image.height * scale))
    tile = image.resize(size, Image.Resampling.BICUBIC)
    marks = [Mark(Rectangle(*(v * scale for v in m.box)), m.text, m.is_truth) for m in marks]
    pen = ImageDraw.Draw(tile)
    for mark in marks:
        _draw_box(pen, mark, tile.size)
    labels: list[Rectangle] = []
    # The last mark is on top, so it is the first to choose the place of its label.
    for mark in reversed(marks):
        labels.append(_place_label(mark, tile.size, labels, [m.box for m in marks]))
        _draw_label(pen, labels[-1], mark)
    return tile


def _draw_box(pen: ImageDraw.ImageDraw, mark: Mark, size: tuple[int, int]) -> None:
    """Draw a line centred on the edge of a box, or just inside the tile of ``size`` at its rim."""
    line = TRUTH_LINE if mark.is_truth else PREDICTION_LINE
    left, top, right, bottom = (round(v) for v in mark.box)
    corners = (
        max(left - line // 2, 0),
        max(top - line // 2, 0),
        min(right + line // 2, size[0]) - 1,
        min(bottom + line // 2, size[1]) - 1,
    )
    if corners[0] <= corners[2] and corners[1] <= corners[3]:
        pen.rectangle(corners, outline=mark.colour, width=line)


def _place_label(mark: Mark, size: tuple[int, int], labels: list[Rectangle], boxes: list[Rectangle]) -> Rectangle:
    """Find a place beside or in a box, inside a tile of ``size``, where a label hides least."""
    width, height = _label_size(mark.text)
    box, gap = mark.box, PREDICTION_LINE // 2
    above, below = box.top - gap - height, box.bottom + gap
    before, behind = box.left - gap - width, box.right + gap
    right, bottom = box.right - width, box.bottom - height
    corners = [(box.left, above), (right, above), (box.left, below), (right, below)]
    if mark.is_truth:  # Prefer a place below, as predictions prefer one above.
        corners = corners[2:] + corners[:2]
    corners += [(before, box.top), (behind, box.top), (before, bottom), (behind, bottom)]
    corners += [(box.left + gap, box.top + gap), (box.left + gap, bottom - gap)]

    def inside(left: float, top: float) -> Rectangle:
        left = round(max(min(left, size[0] - width), 0))
        top = round(max(min(top, size[1] - height), 0))
        return Rectangle(left, top, left + width, top + height)

    def hidden(place: Rectangle) -> float:
        # Labels over labels are illegible, labels over boxes only in the way.
        return 20 * sum(map(place.intersection, labels)) + sum(map(place.intersection, boxes))

    return min((inside(*corner) for corner in corners), key=hidden)


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)


def _label_size(text: str) -> tuple[int, int]:
    """Width and height of a label in pixels."""
    return int(_font(LABEL_FONT_SIZE).getbbox(text)[2]) + 7, LABEL_FONT_SIZE + 4


def _draw_label(pen: ImageDraw.ImageDraw, place: Rectangle, mark: Mark) -> None:
    left, top, right, bottom = place
    pen.rectangle((left, top, right - 1, bottom - 1), fill=mark.colour)
    centre = ((left + right) / 2, (top + bottom) / 2)
    pen.text(centre, mark.text, INK_COLOUR, _font(LABEL_FONT_SIZE), anchor='mm')


def _draw_legend(sheet: Image.Image, title: str, score_thr: float) -> None:
    pen = ImageDraw.Draw(sheet)
    left, middle = MARGIN, HEADER // 2
    entries = [
        (TRUTH_COLOUR, TRUTH_LINE, 'true box, labelled with its class'),
        (
            PREDICTION_COLOUR,
            PREDICTION_LINE,
            f'predicted box, labelled with class and score, if the score is at least {score_thr:g}',
        ),
    ]
    for colour, line, text in entries:
        pen.rectangle((left, middle - 9, left + 26, middle + 9), outline=colour, width=line)
        left = write_text(sheet, (left + 36, middle), text, anchor='lm') + 40
    write_text(sheet, (sheet.width - MARGIN, middle), title, anchor='rm')


def write_text(sheet: Image.Image, place: tuple[int, int], text: str, anchor: str) -> int:
    """Write a line of text on the paper and return where it ends at the right, in pixels."""
    pen, font = ImageDraw.Draw(sheet), _font(TEXT_FONT_SIZE)
    pen.text(place, text, INK_COLOUR, font, anchor=anchor)
    return int(pen.textbbox(place, text, font, anchor=anchor)[2])


def _caption(file_name: str, marks: list[Mark]) -> str:
    true = sum(mark.is_truth for mark in marks)
    return f'{file_name}: {true} true, {len(marks) - true} predicted'
