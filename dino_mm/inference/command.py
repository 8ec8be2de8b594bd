"""``dino-mm predict``: all checks come before the work, and what cannot be read does not stop the rest."""

import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import torch
from tqdm import tqdm

from dino_mm.checkpoints.errors import CheckpointError
from dino_mm.shipped import find_config
from dino_mm.zoo import get_model

from .outputs import OutputFolder, check_keeps, check_writable
from .prediction import Detector, check_numbers
from .sources import Source, SourceError, count_frames, find_sources


class UsageError(Exception):
    """What was asked for cannot be done; the message is one line."""


@dataclass
class Request:
    """What is asked for.

    Attributes:
        model: Name of a shipped config, or path of a config.
        weights: Path or address of a checkpoint, a training's folder, or 'zoo'.
        sources: See :func:`~dino_mm.inference.sources.find_sources`.
        out: Folder for the results.
        formats: Of ``outputs.FORMATS``.
        pictures: Write annotated pictures and videos.
        device: Where the model runs; None: on a GPU if there is one.
        score_thr, classes, batch_size, amp, tiles, overlap: See :func:`~dino_mm.inference.prediction.predict`.
    """

    model: str
    weights: str
    sources: Sequence[str]
    out: Path
    formats: Sequence[str] = ()
    pictures: bool = True
    device: str | None = None
    score_thr: float = 0.3
    classes: Sequence[str] | None = None
    batch_size: int = 1
    amp: bool = False
    tiles: int | None = None
    overlap: float = 0.2


@dataclass
class Outcome:
    """What came of it: frames that were read, objects by name, what could not be read, whether Ctrl-C ended it."""

    frames: int = 0
    objects: Counter[str] = field(default_factory=Counter)
    errors: list[SourceError] = field(default_factory=list)
    interrupted: bool = False

    def summary(self) -> str:
        """One line."""
        names = ', '.join(f'{count} {name}' for name, count in self.objects.most_common())
        found = _count(self.objects.total(), 'object')
        return f'{_count(self.frames, "picture")}, {found}{f" ({names})" if names else ""}'


def _count(number: int, thing: str) -> str:
    return f'{number} {thing}{"" if number == 1 else "s"}'


def predict_to_folder(request: Request) -> int:
    """Detect, write, report; the exit status: 1 if something could not be read, 130 after Ctrl-C.

    Raises:
        UsageError: Before anything is written, or where writing fails.
    """
    _silence_opencv()
    with _one_line(CheckpointError, OSError, ValueError, ImportError):
        find_config(request.model)
        check_numbers(request.score_thr, request.batch_size, request.tiles, request.overlap)
        sources = find_sources(request.sources)
        check_writable(request.out)
        if request.pictures:
            check_keeps(request.out, sources)
        if request.tiles is not None:
            from . import tiling  # noqa: F401  (says how to install sahi)
        detector = _load(request)
    start = time.monotonic()
    with _one_line(OSError):
        outcome = _run(detector, sources, request)
    print(f'{outcome.summary()} in {time.monotonic() - start:.1f} s; written to {request.out}')
    return 130 if outcome.interrupted else int(bool(outcome.errors))


def _load(request: Request) -> Detector:
    """The model with its options."""
    try:
        torch.empty(0, device=request.device)
    except (RuntimeError, AssertionError) as error:
        number = torch.cuda.device_count()
        there = ', '.join(['cpu', *(f'cuda:{i}' for i in range(number))])
        reason = str(error).splitlines()[0].rstrip('.')
        raise UsageError(f'--device {request.device}: {reason}. There is {there}.') from None
    model = get_model(request.model, request.weights, device=request.device)
    return Detector(
        model,
        request.score_thr,
        request.classes,
        request.batch_size,
        request.amp,
        request.tiles,
        request.overlap,
    )


def _run(detector: Detector, sources: Sequence[Source], request: Request) -> Outcome:
    """Read, detect and write, frame by frame."""
    outcome = Outcome()
    counts = [count_frames(source) for source in sources]
    total = None if None in counts else sum(filter(None, counts))

    def note(error: SourceError) -> None:
        outcome.errors.append(error)
        tqdm.write(f'error: {error}', file=sys.stderr)

    with (
        OutputFolder(request.out, detector.classes, request.pictures, request.formats) as output,
        tqdm(total=total, unit='picture', disable=None) as bar,
    ):
        try:
            for frame, found in detector.run(sources, note):
                output.add(frame, found)
                outcome.frames += 1
                outcome.objects.update(detector.classes[label] for label in found.labels)
                bar.update()
        except KeyboardInterrupt:  # how one ends a webcam: what was read stays
            outcome.interrupted = True
        if not outcome.frames:
            raise UsageError('Nothing could be read, so nothing is written.')
    return outcome


def _silence_opencv() -> None:
    """Let OpenCV print nothing about videos: our own messages name the file."""
    own: Any = cv2  # OpenCV 4 and 5 have the function in different places
    (own.setLogLevel if hasattr(own, 'setLogLevel') else own.utils.logging.setLogLevel)(0)


@contextmanager
def _one_line(*kinds: type[Exception]) -> Iterator[None]:
    """Turn errors that say the way out, and a GPU's lack of memory, into UsageError."""
    try:
        yield
    except torch.cuda.OutOfMemoryError:
        raise UsageError(
            'The GPU has too little memory. Give a smaller --batch-size, --amp, or --device cpu.'
        ) from None
    except kinds as error:
        raise UsageError(str(error)) from error
