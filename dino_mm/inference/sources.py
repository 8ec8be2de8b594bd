"""Where pictures come from: files, folders, patterns, addresses, videos, webcams, arrays.

What there is to read is found out first, without opening anything. Then frames come one after another, so that memory
stays the same however long a video is.
"""

import glob
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import NamedTuple
from urllib.parse import urlsplit

import cv2
import numpy as np
from numpy.typing import NDArray

PICTURES = ('.bmp', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp')
VIDEOS = ('.avi', '.flv', '.m4v', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.ts', '.webm', '.wmv')
STREAMS = ('rtmp', 'rtsp', 'udp')
"""Schemes of addresses that are videos whatever their ending."""

DEFAULT_FPS = 25.0
"""Of webcams and streams that state no rate."""


class SourceError(OSError):
    """A source is missing or cannot be read; the message is one line that names it and the way out."""


@dataclass(frozen=True, eq=False)
class Source:
    """One picture or video.

    Attributes:
        name: Path or address as it was given or found, the number of a webcam, 'array 0' of an array.
        place: Its file name, with the sub-folders below the folder that all files are in.
        stem: Place of its results: ``place`` without an ending; no two sources have the same.
        kind: 'picture', 'video' or 'array'.
        pixels: Of an array.
    """

    name: str
    place: str
    stem: str
    kind: str
    pixels: NDArray[np.uint8] | None = None

    @property
    def suffix(self) -> str:
        """The ending of its name; '' without one."""
        return PurePosixPath(self.place).suffix


class Frame(NamedTuple):
    """A picture, or one of a video.

    Attributes:
        source: Where it comes from.
        image: (height, width, 3), BGR.
        number: Its place in the video, from 0 on; None of a picture.
        fps: Frames per second of the video; None of a picture.
    """

    source: Source
    image: NDArray[np.uint8]
    number: int | None = None
    fps: float | None = None


Given = str | os.PathLike | int | NDArray[np.uint8]


def find_sources(given: Given | Sequence[Given]) -> list[Source]:
    """Everything that there is to read, folders and patterns file by file; each file once.

    Args:
        given: A picture, video, folder (without its sub-folders), pattern such as ``'data/**/*.jpg'``, address, number
            of a webcam, array (height, width, 3) of uint8 in BGR, or several of them.

    Raises:
        SourceError: There is no such file, or no picture in a folder.
    """
    found: dict[str, NDArray[np.uint8] | None] = {}
    known: set[str] = set()
    for one in _as_list(given):
        if isinstance(one, np.ndarray):
            found[f'array {len(found)}'] = _checked(one)
            continue
        for name in _expand(str(one)):
            if (identity := _identity(name)) not in known:
                known.add(identity)
                found[name] = None
    if not found:
        raise SourceError('There is nothing to read: name a picture, a folder, a video, an address or a webcam.')
    places, taken = _places(list(found)), set[str]()
    sources = []
    for name, pixels in found.items():
        stem = _free(places[name], taken)
        taken.add(stem)
        sources.append(Source(name, places[name], stem, _kind(name, pixels), pixels))
    return sources


def read_frames(
    source: Source,
    load: Callable[[str], NDArray[np.uint8]],
    on_error: Callable[[SourceError], None],
) -> Iterator[Frame]:
    """The frames of a source, one at a time.

    Args:
        source: Of :func:`find_sources`.
        load: Reads a picture by path or address.
        on_error: Is called once if it cannot be read, or not to its end.
    """
    if source.pixels is not None:
        yield Frame(source, source.pixels)
    elif source.kind == 'video':
        yield from _read_video(source, on_error)
    else:
        try:
            image = load(source.name)
        except Exception as error:  # each file backend and decoder has its own
            on_error(SourceError(_one_line(source.name, error)))
            return
        yield Frame(source, image)


def count_frames(source: Source) -> int | None:
    """Frames that a source states to have: 1 of a picture; None if a video does not say, or is a stream."""
    if source.kind != 'video':
        return 1
    if not Path(source.name).is_file():
        return None
    capture = cv2.VideoCapture(source.name)
    try:
        return _stated_frames(capture)
    finally:
        capture.release()


def _read_video(source: Source, on_error: Callable[[SourceError], None]) -> Iterator[Frame]:
    is_webcam = _is_webcam(source.name)
    capture = cv2.VideoCapture(int(source.name) if is_webcam else source.name)
    count, seconds = 0, 0.0
    try:
        if not capture.isOpened():
            on_error(SourceError(_unopened(source.name)))
            return
        stated, fps = _stated_frames(capture), capture.get(cv2.CAP_PROP_FPS)
        while True:
            more, image = capture.read()
            if not more:
                break
            yield Frame(source, image.astype(np.uint8, copy=False), count, fps if fps > 0 else DEFAULT_FPS)
            count, seconds = count + 1, capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
    finally:
        capture.release()
    if is_webcam:
        on_error(SourceError(f'Webcam {source.name} stopped after {count} frames.'))
    elif _is_cut(count, seconds, stated, fps):
        of = 'any' if stated is None else f'{stated}'
        on_error(
            SourceError(
                f'{source.name}: the video ends after {count} of {of} frames, which are used. '
                'The file is cut or damaged: copy it again.'
            )
        )


def _stated_frames(capture: cv2.VideoCapture) -> int | None:
    stated = int(capture.get(cv2.CAP_PROP_FRAME_COUNT))
    return stated if stated > 0 else None


def _is_cut(count: int, seconds: float, stated: int | None, fps: float) -> bool:
    """Whether the end is missing.

    MKV and WebM state a duration alone, from which OpenCV computes a number of frames. With a varying frame rate that
    is too large. So both the number and the time of the last frame have to be short, by more than rounding.
    """
    if stated is None:
        return count == 0
    missing = min(stated - count, stated - seconds * fps)
    return missing > max(2, stated / 100)


def _as_list(given: Given | Sequence[Given]) -> list[Given]:
    single = isinstance(given, str | os.PathLike | int | np.ndarray)
    return [given] if single else list(given)  # type: ignore[list-item,arg-type]


def _checked(pixels: NDArray) -> NDArray[np.uint8]:
    if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype != np.uint8 or not pixels.size:
        raise SourceError(
            f'An array of {pixels.dtype}, shape {pixels.shape}, is no picture: it takes uint8, (height, width, 3), BGR.'
        )
    return pixels


def _expand(text: str) -> list[str]:
    """The files that ``text`` stands for."""
    path = Path(text).expanduser()
    if path.is_dir():
        return _in_folder(path)
    if path.is_file() or '://' in text or _is_webcam(text):
        return [text if '://' in text else str(path)]
    if glob.has_magic(text):
        found = [name for name in sorted(glob.glob(str(path), recursive=True)) if _is_known(name)]
        if found:
            return found
        raise SourceError(f'No picture or video fits {text}; known endings are {", ".join(PICTURES + VIDEOS)}.')
    raise SourceError(f'There is no file or folder {text}.')


def _in_folder(folder: Path) -> list[str]:
    entries = sorted(folder.iterdir())
    found = [str(entry) for entry in entries if _is_known(str(entry))]
    if found:
        return found
    inner = any(entry.is_dir() for entry in entries)
    hint = f" Its sub-folders are not searched: give '{folder}/**/*' for them." if inner else ''
    raise SourceError(
        f'The folder {folder} holds no picture or video; known endings are {", ".join(PICTURES + VIDEOS)}.{hint}'
    )


def _is_known(path: str) -> bool:
    return path.lower().endswith(PICTURES + VIDEOS) and os.path.isfile(path)


def _is_webcam(name: str) -> bool:
    return name.isdecimal() and not Path(name).is_file()


def _identity(name: str) -> str:
    is_file = '://' not in name and os.path.isfile(name)
    return os.path.realpath(name) if is_file else name


def _kind(name: str, pixels: NDArray | None) -> str:
    if pixels is not None:
        return 'array'
    url = urlsplit(name) if '://' in name else None
    path = url.path if url else name
    is_video = path.lower().endswith(VIDEOS) or _is_webcam(name) or (url is not None and url.scheme in STREAMS)
    return 'video' if is_video else 'picture'


def _places(names: Sequence[str]) -> dict[str, str]:
    """Name -> file name; files keep the sub-folders that they have below the folder common to all."""
    files = {name: os.path.abspath(name) for name in names if '://' not in name and os.path.isfile(name)}
    root = os.path.commonpath([os.path.dirname(path) for path in files.values()]) if files else ''
    places = {name: Path(os.path.relpath(path, root)).as_posix() for name, path in files.items()}
    for name in names:
        if '://' in name:
            url = urlsplit(name)
            places[name] = PurePosixPath(url.path).name or url.netloc.replace(':', '_')
        elif name not in files:
            places[name] = f'webcam_{name}' if name.isdecimal() else name.replace(' ', '_')
    return places


def _free(place: str, taken: Collection[str]) -> str:
    """``place`` without its ending; with it, or with a number, where that is taken."""
    path = PurePosixPath(place)
    bare = str(path.with_suffix('')) if path.suffix.lower() in PICTURES + VIDEOS else place
    numbered = (f'{bare}-{number}' for number in range(2, len(taken) + 3))
    return next(stem for stem in (bare, place, *numbered) if stem not in taken)


def _unopened(name: str) -> str:
    if _is_webcam(name):
        return f'There is no webcam {name}, or another program uses it; the first one has number 0.'
    return f'Cannot open the video {name}: it is missing, damaged, cut, or of a format that OpenCV does not know.'


def _one_line(name: str, error: Exception) -> str:
    """The error in one line that names the picture."""
    text = ' '.join(str(error).split())
    return text if name in text else f'Cannot read the picture {name}: {type(error).__name__}: {text}'
