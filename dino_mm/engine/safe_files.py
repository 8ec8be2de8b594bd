"""Files that are whole or absent, and places that can be written into."""

import errno
import os
import tempfile
from pathlib import Path

from mmengine.fileio import LocalBackend, register_backend

#: The name of :class:`WholeFileBackend` in mmengine's ``backend_args``.
WHOLE_FILES = 'dino_mm_whole_files'
#: Errors of a file system that has no room left: the disk, the quota, the largest size of a file.
NO_ROOM = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
#: Errors of a file system that cannot be written to any more, or that does not answer.
NO_WAY = {errno.EROFS, errno.EIO, errno.ESTALE}
#: What a file is called while it is written: a dot, its name, the process, and this.
TEMPORARY = '.part'
#: Bytes that are written to find out whether there is room: a block of any file system is smaller.
PROBE = b'\0' * 65536


class WholeFileBackend(LocalBackend):
    """mmengine's local files, but whole or absent, whatever happens while they are written."""

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write bytes."""
        write_whole(filepath, obj)

    def put_text(self, obj: str, filepath: str | Path, encoding: str = 'utf-8') -> None:
        """Write text."""
        write_whole(filepath, obj.encode(encoding))


register_backend(WHOLE_FILES, WholeFileBackend, force=True)


def write_whole(path: str | Path, content: bytes) -> None:
    """Write a file so that, at any moment, ``path`` is what it was before or all of ``content``.

    The content is on the disk when this returns.

    Raises:
        OSError: It could not be written; ``path`` is what it was, and nothing is left beside it.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f'.{path.name}.{os.getpid()}{TEMPORARY}')
    try:
        with partial.open('wb') as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    _flush_folder(path.parent)


def _flush_folder(folder: Path) -> None:
    """Put the names in ``folder`` on the disk, where the file system can do so for a folder."""
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except OSError:  # Windows
        return
    try:
        os.fsync(descriptor)
    except OSError:  # some network file systems
        pass
    finally:
        os.close(descriptor)


def remove_partial(folder: str | Path) -> list[Path]:
    """Delete what writers that were killed left in ``folder``; the files that were deleted."""
    left = sorted(Path(folder).glob(f'.*{TEMPORARY}'))
    for path in left:
        path.unlink(missing_ok=True)
    return left


def writable_folder(path: str | Path, option: str) -> str:
    """Make a folder if there is none, and see that it can be written into.

    Args:
        path: The folder.
        option: What the user calls it, for the message.

    Returns:
        Its absolute path.

    Raises:
        SystemExit: It cannot be written into.
    """
    try:
        _probe(Path(path).absolute())
    except OSError as error:
        raise SystemExit(f'{option} {path}: it can not be written into ({error}). Name another folder.') from None
    return str(Path(path).absolute())


def writable_file(path: str | Path, option: str) -> str:
    """See that a file can be written, whose folder is made if there is none; its absolute path.

    Raises:
        SystemExit: It cannot be written.
    """
    file = Path(path).absolute()
    try:
        if file.exists():
            file.open('ab').close()
        _probe(file.parent)
    except OSError as error:
        raise SystemExit(f'{option} {path}: it can not be written ({error}). Name another file.') from None
    return str(file)


def _probe(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        file.write(PROBE)
        file.flush()
        os.fsync(file.fileno())
