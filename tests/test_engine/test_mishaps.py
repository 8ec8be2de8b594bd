"""What befalls a work directory, a signal or a worker at a bad moment: the training ends in order, or goes on."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from commands import ROOT, TINY, options
from faults import SMALLER, write_config
from forked import Tool, read_only, signalled_at_change, signalled_at_fork, until

from dino_mm.checkpoints.files import register_safe_loaders
from dino_mm.datasets.digits import make_digits
from dino_mm.engine.preemption_hook import EXIT_STATUS
from dino_mm.engine.resume import find_resumable

#: Checkpoints after each second iteration, and no validation before the end.
SETTINGS = TINY | SMALLER | {'train_cfg.max_iters': 1000, 'train_cfg.val_interval': 1000}
WORKERS = {'train_dataloader.num_workers': 2, 'train_dataloader.persistent_workers': True}


@pytest.fixture(scope='module')
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('config')
    register_safe_loaders()
    return write_config(folder / 'config.py', make_digits(folder / 'data', num_train=9, num_val=1), [])


Train = Callable[..., Tool]


@pytest.fixture
def train(config: Path, tmp_path: Path) -> Train:
    """Start a training in ``work_dir``."""

    def start(work_dir: Path, *arguments: str, fault: Callable[[], None] | None = None, **settings: object) -> Tool:
        output = tmp_path / f'{time.monotonic_ns()}.txt'
        command = ('tools/train.py', config, '--work-dir', work_dir, *arguments, *options(SETTINGS | settings))
        return Tool(output, *command, fault=fault)

    return start


def last_line(output: str) -> str:
    return output.strip().splitlines()[-1]


def names(folder: Path) -> set[str]:
    """Of checkpoints, those that are half written among them."""
    return {path.name for path in folder.iterdir() if '.pth' in path.name}


def test_a_file_system_that_becomes_read_only_ends_the_training_in_one_line(train: Train, tmp_path: Path) -> None:
    """Logs, heartbeat and the record of who runs there cannot be written either."""
    work = tmp_path / 'work'
    output = train(work, fault=read_only(work, 'iter_4.pth')).wait(1)
    kept = f'{work}/iter_2.pth is kept'
    assert last_line(output).startswith(f'error: {work}/iter_6.pth is not written: Read-only file system. {kept}')
    assert 'Traceback' not in output
    assert names(work) == {'iter_2.pth'}
    output = train(work, '--resume', **{'train_cfg.max_iters': 3}).wait()
    assert f'--resume goes on from {work}/iter_2.pth' in output


@pytest.mark.parametrize('number', [0, pytest.param(1, marks=pytest.mark.slow)], ids=['opened', 'renamed'])
def test_a_signal_while_a_checkpoint_is_written(number: int, train: Train, tmp_path: Path) -> None:
    """The checkpoint becomes whole, and is the last."""
    work = tmp_path / 'work'
    output = train(work, fault=signalled_at_change(signal.SIGTERM, number, 'iter_4.pth')).wait(EXIT_STATUS)
    assert f'Training stops after iteration 4 (SIGTERM), with {work}/iter_4.pth' in output
    assert names(work) == {'iter_2.pth', 'iter_4.pth'}
    assert find_resumable([work]).iteration == 4


def test_a_signal_while_workers_start(train: Train, tmp_path: Path) -> None:
    """The first step is made, and saved."""
    work = tmp_path / 'work'
    output = train(work, fault=signalled_at_fork(signal.SIGTERM), **WORKERS).wait(EXIT_STATUS)
    assert f'Training stops after iteration 1 (SIGTERM), with {work}/iter_1.pth' in output
    assert 'Traceback' not in output


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f'/proc/{pid}/task/{pid}/children').read_text().split()]


@pytest.mark.slow
def test_a_worker_that_is_killed_ends_the_training(train: Train, tmp_path: Path) -> None:
    """As by the system where memory is short: at once, with the worker named."""
    work = tmp_path / 'work'
    tool = train(work, **WORKERS)
    until((work / 'iter_2.pth').exists)
    worker = children(tool.pid)[0]
    os.kill(worker, signal.SIGKILL)
    began = time.monotonic()
    output = tool.wait(1)
    assert time.monotonic() - began < 30
    assert re.search(rf'DataLoader worker \(pid.* {worker}\) .*killed', output)
    assert find_resumable([work]).iteration >= 2


@pytest.mark.slow
def test_a_training_that_is_held_for_a_while_goes_on(train: Train, tmp_path: Path) -> None:
    work = tmp_path / 'work'
    tool = train(work, **WORKERS | {'train_cfg.max_iters': 6})
    until((work / 'iter_2.pth').exists)
    os.kill(tool.pid, signal.SIGSTOP)
    time.sleep(3)
    os.kill(tool.pid, signal.SIGCONT)
    tool.wait()
    assert find_resumable([work]).iteration == 6


@pytest.mark.slow
def test_a_folder_that_is_moved_is_made_anew(train: Train, tmp_path: Path) -> None:
    """Later checkpoints lie where the training was told to put them; both folders can be resumed from."""
    work, moved = tmp_path / 'work', tmp_path / 'moved'
    tool = train(work, **{'train_cfg.max_iters': 40})
    until((work / 'iter_4.pth').exists)
    work.rename(moved)
    output = tool.wait()
    assert 'Traceback' not in output
    assert find_resumable([work]).iteration == 40
    assert 'iter_2.pth' in names(moved)
    train(moved, '--resume', **{'train_cfg.max_iters': 1}).wait()


def test_places_that_are_something_else(train: Train, tmp_path: Path) -> None:
    """Folders with names of files, and links."""
    real, work = tmp_path / 'real', tmp_path / 'work'
    real.mkdir()
    work.symlink_to(real)
    (real / 'last_checkpoint').mkdir()
    (real / 'iter_7.pth').mkdir()
    output = train(work, '--resume', **{'train_cfg.max_iters': 2}).wait()
    assert f'--resume: there is no checkpoint in {work}.' in output
    assert f'last_checkpoint is not written ([Errno {21}] Is a directory' in output
    output = train(work, '--resume', **{'train_cfg.max_iters': 3}).wait()
    assert f'--resume goes on from {work}/iter_2.pth' in output


def can_mount() -> bool:
    unshare = shutil.which('unshare')
    command = 'mount -t tmpfs tmpfs /mnt'
    return bool(unshare) and not subprocess.run([unshare, '-rm', 'sh', '-c', command], capture_output=True).returncode


#: Size of a disk -> how a training on it ends: before the work, and at its second checkpoint.
DISKS = {'40k': r'^--work-dir .*work: it can not be written into \(.*No space left', '1500k': r'^error: .*iter_'}


@pytest.mark.slow
@pytest.mark.skipif(not can_mount(), reason='file systems cannot be mounted here')
@pytest.mark.parametrize('size', DISKS)
def test_a_small_disk_of_its_own(size: str, config: Path, tmp_path: Path) -> None:
    """A tmpfs of so many bytes."""
    (tmp_path / 'disk').mkdir()
    arguments = ['tools/train.py', config, '--work-dir', tmp_path / 'disk' / 'work', *options(SETTINGS)]
    script = f'mount -t tmpfs -o size={size} tmpfs {tmp_path}/disk && exec "$@"'
    done = subprocess.run(
        ['unshare', '-rm', 'sh', '-c', script, 'sh', sys.executable, *map(str, arguments)],
        cwd=ROOT,
        env=os.environ | dict(PYTHONPATH=f'{ROOT}:{ROOT}/tests', OMP_NUM_THREADS='1'),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stderr[-3000:]
    assert re.search(DISKS[size], done.stderr.strip().splitlines()[-1])
    assert 'Traceback' not in done.stderr
