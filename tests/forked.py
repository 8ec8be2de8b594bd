"""Our tools in processes of their own, forked from one that has imported everything: seconds less for each.

They are processes like any other: they die of real signals and have limits of their own. A tool may be told to meet a
fault, which the system itself brings about.
"""

import errno
import gc
import multiprocessing
import os
import resource
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from commands import ROOT

CONTEXT = multiprocessing.get_context('forkserver')
#: What our tools import; none of it computes, since threads of a computation would not be there in a fork.
CONTEXT.set_forkserver_preload(
    [
        *('mmdet.apis', 'mmdet.datasets', 'mmdet.engine', 'mmdet.visualization', 'dino_mm.datasets'),
        *('dino_mm.engine.launch', 'dino_mm.evaluation', 'dino_mm.models', 'dino_mm.visualization'),
    ]
)
#: What the audit hooks of Python call what changes a folder.
CHANGES = ('os.rename', 'os.remove', 'open')


class Tool:
    """A tool that runs: ``pid``, ``output()`` so far, ``wait()`` for its exit status."""

    def __init__(
        self,
        output: Path,
        *command: str | Path,
        fault: Callable[[], None] | None = None,
        errors: Path | None = None,
        cwd: Path = ROOT,
        env: dict[str, str] | None = None,
    ) -> None:
        self._output = output
        files = output, errors or output
        for file in files:
            file.touch()
        words = [str(one) for one in command]
        self._process = CONTEXT.Process(target=_run, args=(files, words, cwd, env or {}, fault))
        self._process.start()
        self.pid = self._process.pid

    def output(self) -> str:
        """What it has printed and logged."""
        return self._output.read_text(errors='replace')

    def wait(self, status: int | None = 0) -> str:
        """Its output, once it has ended with ``status``."""
        self._process.join(300)
        assert self._process.exitcode is not None, f'does not end\n{self.output()[-3000:]}'
        assert status in (None, self._process.exitcode), f'{self._process.exitcode}\n{self.output()[-5000:]}'
        return self.output()

    @property
    def status(self) -> int:
        """Its exit status, once it has ended; a signal's number is negative."""
        assert self._process.exitcode is not None
        return self._process.exitcode

    def kill(self) -> None:
        """As ``kill -9`` does."""
        os.kill(self.pid, signal.SIGKILL)
        self._process.join()


def until(condition: Callable[[], bool], seconds: float = 120) -> None:
    """Wait for ``condition``."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, 'nothing has happened'
        time.sleep(0.02)


def run_tool(*command: str | Path, cwd: Path = ROOT, status: int = 0, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a tool to its end, as ``commands.python`` does; variables that torch reads when it is imported come late."""
    with TemporaryDirectory() as folder:
        output, errors = Path(folder, 'output'), Path(folder, 'errors')
        process = Tool(output, *command, errors=errors, cwd=cwd, env=env)
        process.wait(None)
        done = subprocess.CompletedProcess(command, process.status, output.read_text(), errors.read_text())
    assert done.returncode == status, f'{command}\n{done.stdout[-3000:]}\n{done.stderr[-6000:]}'
    return done


def _run(
    files: tuple[Path, Path], command: list[str], cwd: Path, env: dict[str, str], fault: Callable[[], None] | None
) -> None:
    for number, path in enumerate(files, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.environ.update(env)
    torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))
    os.chdir(cwd)
    sys.argv = command
    if fault is not None:
        fault()
    status = _status_of(command[0])
    # Loaders end their workers now. Otherwise multiprocessing kills them, and torch takes that for an error.
    gc.collect()
    sys.exit(status)


def _status_of(script: str) -> Any:
    """What a script gives to ``sys.exit``; its frames are gone then."""
    try:
        runpy.run_path(script, run_name='__main__')
    except SystemExit as error:
        return error.code
    return None


def _changes(names: tuple[str, ...], meet: Callable[[int, str], None]) -> None:
    """Call ``meet`` with the number of the change, from 0, and what it is, before each change of certain files."""
    seen = [0]

    def hook(event: str, arguments: tuple) -> None:
        if event not in CHANGES or isinstance(arguments[0], int):
            return
        if event == 'open' and not (arguments[1] and set(arguments[1]) & set('wax+')):
            return
        path = os.fspath(arguments[0])
        if any(name in path for name in names):
            seen[0] += 1
            meet(seen[0] - 1, f'{event} {path}')

    sys.addaudithook(hook)


def _limit_files(size: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))


def full_disk(size: int, writes: int | None = None) -> Callable[[], None]:
    """No file can grow beyond ``size`` bytes: the write is an error, as it is on a full disk.

    Until ``writes`` checkpoints have failed, where it is given.
    """
    return partial(_full_disk, size, writes)


def _full_disk(size: int, writes: int | None) -> None:
    _limit_files(size)

    tried: list[str] = []

    def meet(_: int, change: str) -> None:
        tried.extend([change] if change.startswith('open') else [])
        if writes is not None and len(tried) > writes:
            _limit_files(resource.RLIM_INFINITY)

    _changes(('.pth',), meet)


def killed_while_writing(size: int) -> Callable[[], None]:
    """The process is killed when the first file has ``size`` bytes, while it writes more."""
    return partial(_die_while_writing, size)


def _die_while_writing(size: int) -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
    _limit_files(size)


def killed_at_change(number: int, *names: str) -> Callable[[], None]:
    """The process is killed right before change ``number``, from 0, of files whose paths have one of ``names``."""
    return partial(_die_at_change, number, names)


def _die_at_change(number: int, names: tuple[str, ...]) -> None:
    def meet(found: int, change: str) -> None:
        if found == number:
            os.write(2, f'killed before {change}\n'.encode())
            os.kill(os.getpid(), signal.SIGKILL)

    _changes(names, meet)


def signalled_at_change(sent: signal.Signals, number: int, *names: str) -> Callable[[], None]:
    """The process gets a signal right before change ``number``, from 0, of files whose paths have one of ``names``."""
    return partial(_signal_at_change, sent, number, names)


def _signal_at_change(sent: signal.Signals, number: int, names: tuple[str, ...]) -> None:
    _changes(names, lambda found, _: os.kill(os.getpid(), sent) if found == number else None)


def signalled_at_fork(sent: signal.Signals) -> Callable[[], None]:
    """The process gets a signal as it forks the first worker of a data loader, of a training that listens to it."""
    return partial(_signal_at_fork, sent)


def _signal_at_fork(sent: signal.Signals) -> None:
    own, was, left = os.getpid(), signal.getsignal(sent), [True]

    def hook(event: str, arguments: tuple) -> None:
        if event == 'os.fork' and os.getpid() == own and signal.getsignal(sent) is not was and left:
            left.clear()
            os.kill(own, sent)

    sys.addaudithook(hook)


def read_only(folder: Path, name: str) -> Callable[[], None]:
    """Nothing in ``folder`` can be changed any more once a file is begun whose path has ``name``."""
    return partial(_become_read_only, str(folder), name)


def _become_read_only(folder: str, name: str) -> None:
    struck: list[bool] = []
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT

    def hook(event: str, arguments: tuple) -> None:
        if event not in (*CHANGES, 'os.mkdir', 'os.utime') or not isinstance(arguments[0], str | os.PathLike):
            return
        path = os.fspath(arguments[0])
        if event == 'open' and not arguments[2] & writing:
            return
        if name in path:
            struck.append(True)
        if struck and path.startswith(folder):
            raise OSError(errno.EROFS, os.strerror(errno.EROFS), path)

    sys.addaudithook(hook)
