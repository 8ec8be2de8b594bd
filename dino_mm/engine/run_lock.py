"""One run a folder: a record of who works there, which dies with its process."""

import json
import os
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from .safe_files import write_whole

#: The record of the run in its folder, and the lock that is held while the record is read and written.
RECORD, GUARD = '.run.json', '.run.lock'
#: Seconds between two signs of life, and without one after which a run on another machine is taken for dead. Network
#: file systems show the time of a file up to a minute late.
HEARTBEAT, SILENCE = 15.0, 90.0


class FolderInUseError(RuntimeError):
    """Another run works in the folder; the message says which, and the way out."""


@contextmanager
def one_run(folder: str | Path, force: bool = False) -> Iterator[None]:
    """Keep other runs out of ``folder`` meanwhile.

    A run whose process is gone holds nobody up. Of a process on another machine, or in another container, only the
    signs of life tell: if the last is recent, this waits for the next one, for up to 90 seconds.

    Args:
        folder: The work directory, which exists.
        force: Work there in any case; the other run is not stopped.

    Raises:
        FolderInUseError: Another run works there.
    """
    folder = Path(folder)
    own = dict(_this_process(), token=uuid.uuid4().hex)
    _take(folder, own, force)
    ended = threading.Event()
    threading.Thread(target=_beat, args=(folder / RECORD, own, ended), daemon=True).start()
    try:
        yield
    finally:
        ended.set()
        # Where the folder cannot be written into any more, the record dies with the process.
        with suppress(OSError), FileLock(folder / GUARD):
            if _read(folder / RECORD) == own:
                (folder / RECORD).unlink()


def _take(folder: Path, own: dict[str, Any], force: bool) -> None:
    """Write the own record as soon as no other run is alive."""
    first: tuple[dict, float] | None = None
    while True:
        with FileLock(folder / GUARD):
            other = _read(folder / RECORD)
            if other is None or force or _is_dead(other, folder):
                if other is not None and force:
                    _say(f'--force: {_name(other)} may still work in {folder}. Both write there now.')
                write_whole(folder / RECORD, json.dumps(own).encode())
                return
            seen = (other, (folder / RECORD).stat().st_mtime)
        if _is_near(other) or first not in (None, seen):
            raise FolderInUseError(
                f'{folder} is in use by {_name(other)}. Wait for its end or stop it, give another --work-dir, or add '
                '--force if it is certain that nothing runs there.'
            )
        if first is None:
            _say(f'{_name(other)} may still work in {folder}: waits up to {SILENCE:.0f} s for a sign of life.')
        first = seen
        time.sleep(min(1.0, HEARTBEAT))


def _read(record: Path) -> dict[str, Any] | None:
    """A record; None if there is none that can be read, which a machine that went down may leave."""
    try:
        content = json.loads(record.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) and isinstance(content.get('pid'), int) else None


def _is_dead(other: dict[str, Any], folder: Path) -> bool:
    """Whether the run of a record is certainly gone: its process here, or its signs of life elsewhere."""
    if _is_near(other):
        return not _is_alive(other['pid']) or _started(other['pid']) != other.get('started')
    # Both times are the file system's, whose clock may differ from this machine's.
    os.utime(folder / GUARD)
    return (folder / GUARD).stat().st_mtime - (folder / RECORD).stat().st_mtime > SILENCE


def _is_near(other: dict[str, Any]) -> bool:
    """Whether this process can see the other one."""
    own = _this_process()
    return all(other.get(key) == own[key] for key in ('host', 'boot', 'container'))


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _this_process() -> dict[str, Any]:
    """Machine, start of the machine, container and process, where the system tells them."""
    return dict(
        host=socket.gethostname(),
        boot=_text('/proc/sys/kernel/random/boot_id'),
        container=_link('/proc/self/ns/pid'),
        pid=os.getpid(),
        started=_started(os.getpid()),
    )


def _started(pid: int) -> str | None:
    """When a process started, which tells it from another that has its number by now; None if it has ended."""
    state, *fields = (_text(f'/proc/{pid}/stat') or '').rpartition(')')[2].split() or ['']
    return None if state in ('', 'Z', 'X') else fields[18]  # a dead one stays as a zombie until its parent asks


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text().strip()
    except OSError:
        return None


def _link(path: str) -> str | None:
    try:
        return os.readlink(path)
    except OSError:
        return None


def _name(other: dict[str, Any]) -> str:
    return f'the run of process {other["pid"]} on {other.get("host")}'


def _beat(record: Path, own: dict[str, Any], ended: threading.Event) -> None:
    """Give signs of life until the run has ended, or another has taken the folder by force."""
    while not ended.wait(HEARTBEAT):
        other = _read(record)
        if other is not None and other != own:
            _say(f'Another run has taken {record.parent}: {_name(other)}. Both write there now.')
            return
        try:
            os.utime(record)
        except OSError:  # a network file system that blinks
            continue


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)  # the runner's log does not exist yet
