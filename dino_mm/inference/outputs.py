"""Detections as files: annotated pictures and videos, COCO JSON, YOLO labels, a CSV table.

A file appears under its name when it is whole. Nothing is kept in memory, so that a video may be of any length.
"""

import csv
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Protocol

import cv2
import numpy as np
from numpy.typing import NDArray

from dino_mm.visualization import draw_detections

from .detections import Detections
from .sources import Frame, Source

COLOURED = ('.bmp', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp')
FORMATS = ('coco', 'yolo', 'csv')
COLUMNS = ('file', 'frame', 'label', 'name', 'score', 'left', 'top', 'right', 'bottom')


class Writer(Protocol):
    """One kind of file."""

    def add(self, frame: Frame, found: Detections) -> None:
        """Write the detections of one frame; frames of a source come in a row."""

    def close(self, whole: bool) -> None:
        """End: what is not ``whole`` is removed."""


class OutputFolder:
    """Writes into a folder, as a context: what an error leaves incomplete is removed, Ctrl-C keeps what is there.

    Args:
        folder: Is made if it is missing.
        classes: Names of the model's classes.
        pictures: Write annotated pictures and videos.
        formats: Of ``FORMATS``.

    Raises:
        OSError: The folder cannot be written into.
    """

    def __init__(self, folder: Path, classes: Sequence[str], pictures: bool, formats: Iterable[str]) -> None:
        check_writable(folder)
        self._folder, self._is_new = folder, not folder.exists()
        folder.mkdir(parents=True, exist_ok=True)
        makers: dict[str, Callable[[Path, Sequence[str]], Writer]] = dict(
            coco=CocoWriter, yolo=YoloWriter, csv=CsvWriter
        )
        self.writers: list[Writer] = [PictureWriter(folder, classes)] if pictures else []
        self.writers += [makers[name](folder, classes) for name in dict.fromkeys(formats)]

    def add(self, frame: Frame, found: Detections) -> None:
        """Write the detections of one frame."""
        for writer in self.writers:
            writer.add(frame, found)

    def __enter__(self) -> 'OutputFolder':
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        whole = kind is None or issubclass(kind, KeyboardInterrupt)
        with ExitStack() as stack:  # an error of one does not keep the others from ending
            for writer in self.writers:
                stack.callback(writer.close, whole)
        if self._is_new and not any(self._folder.iterdir()):
            self._folder.rmdir()


def check_writable(folder: Path) -> None:
    """Raise OSError, in one line, if a folder cannot be made or written into; nothing is made yet."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise OSError(f'{folder} cannot be written into ({error.strerror or error}). Name another folder.') from None


def check_keeps(folder: Path, sources: Sequence[Source]) -> None:
    """Raise OSError if an annotated picture or video would take the place of a source."""
    originals = {os.path.realpath(source.name) for source in sources if source.kind != 'array'}
    for source in sources:
        path = picture_path(folder, source)
        if os.path.realpath(path) in originals:
            raise OSError(f'{path} would be overwritten by an annotated copy. Name another folder than {folder}.')


def picture_path(folder: Path, source: Source) -> Path:
    """Where the annotated picture or video goes; pictures keep their format if OpenCV writes colours in it."""
    if source.kind == 'video':
        return folder / f'{source.stem}.mp4'
    suffix = source.suffix
    keeps = suffix.lower() in COLOURED and cv2.haveImageWriter(f'x{suffix}')
    return folder / f'{source.stem}{suffix if keeps else ".png"}'


def frame_stem(frame: Frame) -> str:
    """Place of a frame's results, without an ending: ``video/000012`` of a video."""
    return frame.source.stem if frame.number is None else f'{frame.source.stem}/{frame.number:06d}'


def write_whole(path: Path, content: bytes) -> None:
    """Write a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'{path.name}.part')
    try:
        partial.write_bytes(content)
        partial.replace(path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


class PictureWriter:
    """Pictures with boxes, and one MP4 (MPEG-4) for each video."""

    def __init__(self, folder: Path, classes: Sequence[str]) -> None:
        self.folder, self.classes = folder, classes
        self._video: _Video | None = None

    def add(self, frame: Frame, found: Detections) -> None:
        """Draw and write."""
        captions = [
            f'{self.classes[label]} {score:.2f}' for label, score in zip(found.labels, found.scores, strict=True)
        ]
        drawn = draw_detections(frame.image, found.boxes, found.labels, captions)
        path = picture_path(self.folder, frame.source)
        if self._video is not None and self._video.path != path:
            self.close(True)
        if frame.number is None:
            write_whole(path, _encode(drawn, path))
            return
        if self._video is None:
            self._video = _Video(path, frame)
        self._video.write(drawn)

    def close(self, whole: bool) -> None:
        """End the video."""
        if self._video is not None:
            self._video.close(whole)
            self._video = None


def _encode(image: NDArray[np.uint8], path: Path) -> bytes:
    try:
        done, content = cv2.imencode(path.suffix, image)
    except cv2.error:
        done = False
    if not done:
        size = 'x'.join(map(str, image.shape[1::-1]))
        raise OSError(f'{path} cannot be written: its format takes no {size} pixels. Give --no-pictures.')
    return content.tobytes()


class _Video:
    """An MP4 that is being written."""

    def __init__(self, path: Path, first: Frame) -> None:
        self.path, self._partial = path, path.with_name(f'{path.stem}.part.mp4')
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = first.image.shape[:2]
        self.size = (width, height)
        self._writer = cv2.VideoWriter(str(self._partial), cv2.VideoWriter.fourcc(*'mp4v'), first.fps or 0.0, self.size)
        if not self._writer.isOpened():
            raise OSError(f'{path} cannot be written: OpenCV opens no MP4 of {width}x{height} pixels there.')

    def write(self, image: NDArray[np.uint8]) -> None:
        """Add a frame; one of another size, as streams may have, is fitted."""
        same = image.shape[1::-1] == self.size
        self._writer.write(image if same else cv2.resize(image, self.size))

    def close(self, whole: bool) -> None:
        self._writer.release()
        if whole:
            self._partial.replace(self.path)
        else:
            self._partial.unlink(missing_ok=True)


class _Text:
    """A text file that gets its name when it is whole."""

    def __init__(self, path: Path) -> None:
        self.path, self._partial = path, path.with_name(f'{path.name}.part')
        self.file = self._partial.open('w', newline='', encoding='utf-8')

    def close(self, whole: bool) -> None:
        try:
            self.file.close()
        except OSError:  # what was buffered finds no room
            whole = False
            raise
        finally:
            _finish(self._partial, self.path, whole)


class CsvWriter:
    """``predictions.csv``: one line for each object; corners in pixels."""

    def __init__(self, folder: Path, classes: Sequence[str]) -> None:
        self.classes, self._text = classes, _Text(folder / 'predictions.csv')
        self._table = csv.writer(self._text.file)
        self._table.writerow(COLUMNS)

    def add(self, frame: Frame, found: Detections) -> None:
        """Write the lines of one frame."""
        index = '' if frame.number is None else frame.number
        rows = (
            (frame.source.name, index, label, self.classes[label], score, *box) for box, score, label in _rows(found)
        )
        self._table.writerows(rows)

    def close(self, whole: bool) -> None:
        """Name the file."""
        self._text.close(whole)


class YoloWriter:
    """``labels/*.txt``: label, centre and size in [0, 1] for each object; ``classes.txt``: the names of the labels."""

    def __init__(self, folder: Path, classes: Sequence[str]) -> None:
        self.folder, self.classes = folder, classes

    def add(self, frame: Frame, found: Detections) -> None:
        """Write the file of one frame; it is empty without objects."""
        height, width = frame.image.shape[:2]
        lines = []
        for (left, top, right, bottom), _, label in _rows(found):
            numbers = ((left + right) / 2 / width, (top + bottom) / 2 / height, (right - left) / width)
            lines.append(f'{label} {" ".join(f"{n:.8f}" for n in (*numbers, (bottom - top) / height))}\n')
        write_whole(self.folder / 'labels' / f'{frame_stem(frame)}.txt', ''.join(lines).encode())

    def close(self, whole: bool) -> None:
        """Write the names; every other file is whole already."""
        if whole:
            write_whole(self.folder / 'classes.txt', ''.join(f'{name}\n' for name in self.classes).encode())


class CocoWriter:
    """``predictions.json``: a COCO data set with a ``score`` for each annotation; category ids count from 1.

    The two long lists grow on disk, the images in a file of their own until the end.
    """

    def __init__(self, folder: Path, classes: Sequence[str]) -> None:
        self._text = _Text(folder / 'predictions.json')
        self._images = tempfile.TemporaryFile('w+', dir=folder, encoding='utf-8')  # noqa: SIM115  (closed in `close`)
        categories = [dict(id=label + 1, name=name) for label, name in enumerate(classes)]
        self._text.file.write(f'{{"categories": {json.dumps(categories)},\n"annotations": [')
        self._num_images = self._num_annotations = 0

    def add(self, frame: Frame, found: Detections) -> None:
        """Write one image and its annotations."""
        self._num_images += 1
        height, width = frame.image.shape[:2]
        image = dict(id=self._num_images, file_name=frame.source.place, width=width, height=height)
        if frame.number is not None:
            image |= dict(file_name=f'{frame_stem(frame)}.jpg', video=frame.source.name, frame=frame.number)
        self._images.write(_separator(self._num_images) + json.dumps(image))
        for (left, top, right, bottom), score, label in _rows(found):
            self._num_annotations += 1
            box = [left, top, right - left, bottom - top]
            annotation = dict(
                id=self._num_annotations,
                image_id=self._num_images,
                category_id=label + 1,
                bbox=box,
                area=box[2] * box[3],
                iscrowd=0,
                score=score,
            )
            self._text.file.write(_separator(self._num_annotations) + json.dumps(annotation))

    def close(self, whole: bool) -> None:
        """Join the lists."""
        joined = False
        try:
            with self._images:
                self._text.file.write('\n],\n"images": [')
                self._images.seek(0)
                while part := self._images.read(1 << 20):
                    self._text.file.write(part)
                self._text.file.write('\n]}\n')
            joined = True
        finally:
            self._text.close(whole and joined)


def _rows(found: Detections) -> Iterable[tuple[list[float], float, int]]:
    """Box, score and label of each object, as Python numbers."""
    return zip(found.boxes.tolist(), found.scores.tolist(), found.labels.tolist(), strict=True)


def _separator(number: int) -> str:
    return '\n' if number == 1 else ',\n'


def _finish(partial: Path, path: Path, whole: bool) -> None:
    if whole:
        partial.replace(path)
    else:
        partial.unlink(missing_ok=True)
