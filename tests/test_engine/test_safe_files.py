"""Files are whole or absent, and outputs that cannot be written are known before the work."""

import errno
import os
from pathlib import Path

import pytest

from dino_mm.engine.safe_files import remove_partial, writable_file, writable_folder, write_whole


def test_a_file_is_written_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / 'new' / 'a.pth'
    for content in (b'first', b'second' * 1000):
        write_whole(path, content)
        assert path.read_bytes() == content
    assert [one.name for one in path.parent.iterdir()] == ['a.pth']
    umask = os.umask(0)
    os.umask(umask)
    assert path.stat().st_mode & 0o777 == 0o666 & ~umask


@pytest.mark.parametrize('step', ['fsync', 'replace'])
def test_what_cannot_be_written_leaves_everything_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    path = tmp_path / 'a.pth'
    path.write_bytes(b'first')

    def fail(*_: object) -> None:
        assert path.read_bytes() == b'first'
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(*(('os.fsync', fail) if step == 'fsync' else ('pathlib.Path.replace', fail)))
    with pytest.raises(OSError, match='No space left'):
        write_whole(path, b'second')
    assert [one.name for one in tmp_path.iterdir()] == ['a.pth']
    assert path.read_bytes() == b'first'


def test_the_content_is_on_the_disk_before_the_name_and_the_name_before_the_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a machine that goes down may lose is what was not flushed."""
    done: list[str] = []
    fsync, replace = os.fsync, Path.replace
    monkeypatch.setattr('os.fsync', lambda file: (done.append(os.readlink(f'/proc/self/fd/{file}')), fsync(file)))
    monkeypatch.setattr('pathlib.Path.replace', lambda *paths: (done.append('replace'), replace(*paths)))
    write_whole(tmp_path / 'a.pth', b'content')
    assert done == [f'{tmp_path}/.a.pth.{os.getpid()}.part', 'replace', str(tmp_path)]


def test_only_half_written_files_of_ours_are_removed(tmp_path: Path) -> None:
    for name in ('.a.pth.1.part', '.last_checkpoint.22.part', 'a.part', '.a.pth', 'a.pth'):
        (tmp_path / name).touch()
    assert [path.name for path in remove_partial(tmp_path)] == ['.a.pth.1.part', '.last_checkpoint.22.part']
    assert sorted(path.name for path in tmp_path.iterdir()) == ['.a.pth', 'a.part', 'a.pth']


def test_outputs_are_made_or_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / 'file').touch()
    assert writable_folder(tmp_path / 'a' / 'b', '--x') == str(tmp_path / 'a' / 'b')
    assert list((tmp_path / 'a' / 'b').iterdir()) == []
    assert writable_file(tmp_path / 'c' / 'out.pkl', '--out') == str(tmp_path / 'c' / 'out.pkl')
    assert list((tmp_path / 'c').iterdir()) == []
    for call, path in ((writable_folder, 'file/x'), (writable_file, 'file/x/out.pkl'), (writable_file, 'a')):
        with pytest.raises(SystemExit, match=rf'^--x {tmp_path}.*Name (another folder|another file)\.$'):
            call(tmp_path / path, '--x')


def test_a_full_disk_is_found_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It lets an empty file be made."""
    monkeypatch.setattr('tempfile.TemporaryFile', lambda **_: Path('/dev/full').open('wb'))  # noqa: SIM115
    with pytest.raises(SystemExit, match=r'^--work-dir .*No space left on device.*Name another folder\.$'):
        writable_folder(tmp_path, '--work-dir')
