"""What a training prints is not worth the training: a terminal may be closed, a pipe broken, a disk full."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, TextIO


class LossyStream:
    """A text stream that drops what cannot be written.

    Args:
        stream: What is written to.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write ``text`` if that is possible."""
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        """Flush the stream if that is possible."""
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _drop_what_is_left(stream: TextIO) -> None:
    """Empty a stream, or what Python flushes at the end of a program makes its exit status 120."""
    try:
        stream.flush()
    except OSError:
        with open(os.devnull, 'w') as nothing:
            os.dup2(nothing.fileno(), stream.fileno())
        stream.flush()


@contextmanager
def output_may_be_lost() -> Iterator[None]:
    """Let nothing end meanwhile because standard output or error cannot be written to."""
    before = sys.stdout, sys.stderr
    # A program may have none of them.
    sys.stdout, sys.stderr = (stream and LossyStream(stream) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before
        for stream in filter(None, before):
            _drop_what_is_left(stream)
