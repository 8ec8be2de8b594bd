"""One run a folder: who is refused, who waits, and whose record is void."""

import json
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dino_mm.engine import run_lock
from dino_mm.engine.run_lock import RECORD, FolderInUseError, one_run


def record(folder: Path, **changes: object) -> Path:
    """The record of a run: this process's, but for ``changes``."""
    path = folder / RECORD
    path.write_text(json.dumps(run_lock._this_process() | dict(token='other') | changes))
    return path


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, '-c', ''])
    process.wait()
    return process.pid


def test_a_second_run_is_refused_until_the_first_has_ended(tmp_path: Path) -> None:
    with one_run(tmp_path):
        with pytest.raises(FolderInUseError) as error, one_run(tmp_path):
            pytest.fail('two runs')
        held = json.loads((tmp_path / RECORD).read_text())
        assert held['pid'] == os.getpid()
    assert f'{tmp_path} is in use by the run of process {os.getpid()} on {held["host"]}.' in str(error.value)
    assert '--force' in str(error.value)
    assert '\n' not in str(error.value)
    assert not (tmp_path / RECORD).exists()
    with one_run(tmp_path):
        pass


def test_force_takes_the_folder_and_its_record_stays(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = record(tmp_path)
    with one_run(tmp_path, force=True):
        assert json.loads(path.read_text())['token'] != 'other'
        mine = path.read_text()
        taken = record(tmp_path, token='third').read_text()
    assert path.read_text() == taken != mine  # it is the third's, which ends it
    assert f'--force: the run of process {os.getpid()}' in capsys.readouterr().err


@pytest.mark.parametrize(
    'changes',
    [lambda: dict(pid=dead_process()), lambda: dict(started='1')],
    ids=['the process has ended', 'another process has its number'],
)
def test_a_run_that_is_gone_holds_nobody_up(tmp_path: Path, changes) -> None:
    record(tmp_path, **changes())
    began = time.monotonic()
    with one_run(tmp_path):
        assert time.monotonic() - began < 5


def sleep() -> None:
    time.sleep(100)


def test_a_killed_process_that_nobody_asks_for_is_gone(tmp_path: Path) -> None:
    """A zombie, as under a first process of a container that does not wait for its children."""
    process = multiprocessing.get_context('fork').Process(target=sleep)
    process.start()
    record(tmp_path, pid=process.pid, started=run_lock._started(process.pid))
    with pytest.raises(FolderInUseError), one_run(tmp_path):
        pytest.fail('two runs')
    os.kill(process.pid, 9)
    while run_lock._started(process.pid) is not None:
        time.sleep(0.01)
    with one_run(tmp_path):
        os.kill(process.pid, 0)  # its number is still there
    process.join()


@pytest.mark.parametrize('text', ['', '{', '[]', '{"pid": "x"}', 'null'])
def test_a_broken_record_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / RECORD).write_text(text)
    with one_run(tmp_path):
        pass


ELSEWHERE = [dict(host='elsewhere'), dict(boot='before'), dict(container='another')]


@pytest.mark.parametrize('place', ELSEWHERE)
def test_a_run_elsewhere_is_alive_while_it_gives_signs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: dict
) -> None:
    """Its process number says nothing here."""
    path = record(tmp_path, pid=dead_process(), **place)
    # The other run, which is heard while this one waits.
    monkeypatch.setattr(run_lock.time, 'sleep', lambda _: os.utime(path, (time.time() + 1,) * 2))
    with pytest.raises(FolderInUseError, match='in use by the run of process'), one_run(tmp_path):
        pytest.fail('two runs')


@pytest.mark.parametrize('place', ELSEWHERE)
def test_a_run_elsewhere_that_is_silent_is_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: dict) -> None:
    path = record(tmp_path, **place)
    now = time.time()
    os.utime(path, (now - run_lock.SILENCE - 5,) * 2)
    monkeypatch.setattr(run_lock.time, 'sleep', lambda _: pytest.fail('waits'))
    with one_run(tmp_path):
        pass


def test_it_waits_no_longer_than_the_silence_lasts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    """So that a job that was moved to another machine goes on by itself."""
    monkeypatch.setattr(run_lock, 'SILENCE', 1.5)
    record(tmp_path, host='elsewhere')
    began = time.monotonic()
    with one_run(tmp_path):
        assert 1 < time.monotonic() - began < 10
    assert 'waits up to 2 s for a sign of life' in capsys.readouterr().err


def test_it_gives_signs_of_life(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, 'HEARTBEAT', 0.02)
    with one_run(tmp_path):
        path = tmp_path / RECORD
        os.utime(path, (1e9, 1e9))
        end = time.monotonic() + 20
        while path.stat().st_mtime < 1.1e9:
            assert time.monotonic() < end
            time.sleep(0.01)


def contend(folder: str, barrier, results) -> None:
    barrier.wait()
    try:
        with one_run(folder):
            results.put(True)
            time.sleep(1)
    except FolderInUseError:
        results.put(False)


def test_of_many_that_start_at_once_one_runs(tmp_path: Path) -> None:
    """Where a dead run has left its record, too."""
    record(tmp_path, pid=dead_process())
    context = multiprocessing.get_context('fork')
    barrier, results = context.Barrier(6), context.Queue()
    processes = [context.Process(target=contend, args=(str(tmp_path), barrier, results)) for _ in range(6)]
    for process in processes:
        process.start()
    assert sorted(results.get(timeout=60) for _ in processes) == [False] * 5 + [True]
    for process in processes:
        process.join()
