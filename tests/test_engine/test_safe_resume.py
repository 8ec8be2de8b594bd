"""``--resume`` takes the newest checkpoint that is whole and finite, and says what it passes over."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dino_mm.checkpoints.errors import CheckpointError
from dino_mm.engine.resume import AUTO, choose_checkpoint, find_resumable


def save(path: Path, iteration: int, value: float = 1.0, **entries: object) -> Path:
    """A checkpoint of a training, written ``iteration`` seconds after the first."""
    meta = dict(iter=iteration, epoch=0, written_at=1.7e9 + iteration, time='20260101_000000')
    weights = {'first.weight': torch.full((300,), 1.0), 'second.weight': torch.full((300,), value)}
    content = dict(meta=meta, state_dict=weights, message_hub=dict(), optimizer=dict(state=torch.zeros(9)))
    torch.save(content | entries, path)
    return path


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def turn_a_bit(path: Path) -> None:
    """Of a weight, where torch does not look."""
    content = bytearray(path.read_bytes())
    content[content.index(b'\0\0\x80\x3f' * 100) + 40] ^= 1
    path.write_bytes(content)


#: What is done to the newest checkpoint -> what is said of it.
FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    'truncated': (cut, 'not a checkpoint, or a truncated one'),
    'empty': (lambda path: path.write_bytes(b''), 'it is empty'),
    'zeros': (lambda path: path.write_bytes(b'\0' * 5000), 'not a checkpoint, or a truncated one'),
    'text': (lambda path: path.write_text('iter_2.pth'), 'not a checkpoint, or a truncated one'),
    'a bit': (turn_a_bit, 'it is damaged (in '),
    'nan': (lambda path: save(path, 6, float('nan')), "its tensor 'second.weight' holds NaN or infinity"),
    'infinity': (lambda path: save(path, 6, float('-inf')), "its tensor 'second.weight' holds NaN or infinity"),
    'averages': (
        lambda path: save(path, 6, ema_state_dict={'module.a': torch.tensor([1, float('nan')])}),
        "its tensor 'module.a' holds NaN or infinity",
    ),
    'a list': (lambda path: torch.save([1], path), 'holds a list, not a state dict'),
    'weights': (
        lambda path: torch.save(dict(state_dict=dict(a=torch.ones(2)), meta=dict(iter=6)), path),
        'it holds weights alone, no state of a training',
    ),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A work directory with three checkpoints."""
    work_dir = tmp_path / 'work'
    work_dir.mkdir()
    for iteration in (2, 4, 6):
        save(work_dir / f'iter_{iteration}.pth', iteration)
    (work_dir / 'last_checkpoint').write_text('iter_6.pth')
    return work_dir


@pytest.fixture(autouse=True)
def _as_tools_open_files() -> None:
    from dino_mm.checkpoints.files import register_safe_loaders

    register_safe_loaders()


@pytest.mark.parametrize('fault', FAULTS)
def test_what_is_no_whole_checkpoint_is_passed_over_and_named(folder: Path, fault: str) -> None:
    damage, reason = FAULTS[fault]
    damage(folder / 'iter_6.pth')
    found = find_resumable([folder])
    assert (found.path, found.iteration) == (folder / 'iter_4.pth', 4)
    assert list(found.passed) == [str(folder / 'iter_6.pth')]
    said = found.passed[str(folder / 'iter_6.pth')]
    assert reason in said
    assert '\n' not in said


@pytest.mark.parametrize(
    'text', [None, '', 'iter_2.pth', '/nowhere/iter_9.pth', '\0'], ids=['no file', 'empty', 'old', 'stale', 'zero']
)
def test_last_checkpoint_may_say_anything(folder: Path, text: str | None) -> None:
    (folder / 'last_checkpoint').unlink()
    if text is not None:
        (folder / 'last_checkpoint').write_text(text)
    runner = runner_of(folder)
    choose_checkpoint(runner)
    assert (runner._resume, runner._load_from) == (True, str(folder / 'iter_6.pth'))


def test_a_copy_and_another_name_of_the_folder_change_nothing(folder: Path, tmp_path: Path) -> None:
    """A copy has files of any age, and iteration numbers tell nothing of a training that was started anew."""
    copy = tmp_path / 'other'
    shutil.copytree(folder, copy)
    shutil.rmtree(folder)
    for age, name in enumerate(['iter_6.pth', 'iter_4.pth', 'iter_2.pth']):
        os.utime(copy / name, (2e9 + age, 2e9 + age))
    assert find_resumable([copy]).path == copy / 'iter_6.pth'
    save(copy / 'iter_1.pth', 1, meta=dict(iter=1, epoch=0, written_at=1.8e9))
    assert find_resumable([copy]).path == copy / 'iter_1.pth'


def test_mmengines_own_checkpoints_have_their_time_in_text(folder: Path) -> None:
    for iteration, time in ((2, '20260301_120000'), (4, '20260301_110000'), (6, '20260301_115959')):
        save(folder / f'iter_{iteration}.pth', iteration, meta=dict(iter=iteration, epoch=0, time=time))
    assert find_resumable([folder]).path == folder / 'iter_2.pth'


def test_best_and_half_written_ones_are_not_looked_at(folder: Path) -> None:
    for name in ('best_coco_bbox_mAP_iter_8.pth', '.iter_8.pth.77.part', '.iter_8.pth'):
        save(folder / name, 8)
    found = find_resumable([folder])
    assert (found.path, found.passed) == (folder / 'iter_6.pth', {})


def test_a_checkpoint_elsewhere_is_found_by_last_checkpoint(folder: Path, tmp_path: Path) -> None:
    elsewhere = save(tmp_path / 'elsewhere.pth', 9)
    assert find_resumable([folder], named=elsewhere).path == elsewhere


def runner_of(work_dir: Path, load_from: str | None = None) -> SimpleNamespace:
    """As much of a runner as matters here; what it logs is in ``said``."""
    said: list[str] = []
    logger = SimpleNamespace(info=said.append, warning=said.append)
    return SimpleNamespace(
        work_dir=str(work_dir), hooks=[], rank=0, logger=logger, said=said, _resume=AUTO, _load_from=load_from
    )


def test_each_file_that_is_passed_over_is_a_line_of_the_log(folder: Path) -> None:
    cut(folder / 'iter_6.pth')
    save(folder / 'iter_4.pth', 4, float('nan'))
    runner = runner_of(folder, 'start.pth')
    choose_checkpoint(runner)
    assert (runner._resume, runner._load_from) == (True, str(folder / 'iter_2.pth'))
    # The age of the truncated one is that of the file, which is the youngest.
    assert [line.split(': ')[0] for line in runner.said[:2]] == [
        f'--resume passes over {folder}/iter_{iteration}.pth' for iteration in (6, 4)
    ]
    assert runner.said[2:] == [f'--resume goes on from {folder}/iter_2.pth, the newest whole checkpoint.']


@pytest.mark.parametrize(
    ('load_from', 'source'),
    [('a.pth', '`load_from`, a.pth'), (None, 'nothing, as the config has no `load_from`')],
)
def test_without_any_checkpoint_it_starts_anew_and_says_so(tmp_path: Path, load_from: str | None, source: str) -> None:
    runner = runner_of(tmp_path, load_from)
    choose_checkpoint(runner)
    assert (runner._resume, runner._load_from) == (False, load_from)
    assert runner.said == [f'--resume: there is no checkpoint in {tmp_path}. Training starts from {source}.']


def test_a_new_run_names_checkpoints_of_an_earlier_one(folder: Path, tmp_path: Path) -> None:
    for place, said in (
        (folder, [f'{folder} has checkpoints of an earlier run: iter_2.pth, iter_4.pth, iter_6.pth.']),
        (tmp_path / 'new', []),
    ):
        runner = runner_of(place)
        runner._resume = False
        choose_checkpoint(runner)
        assert (runner._resume, runner._load_from) == (False, None)
        assert [line.partition(' This run')[0] for line in runner.said] == said


def test_damaged_checkpoints_alone_are_no_reason_to_start_anew(folder: Path) -> None:
    for path in folder.glob('*.pth'):
        cut(path)
    with pytest.raises(CheckpointError, match=rf'^No checkpoint in {folder} can be resumed \(.*--resume FILE') as error:
        choose_checkpoint(runner_of(folder))
    assert all(f'iter_{iteration}.pth: not a checkpoint' in str(error.value) for iteration in (2, 4, 6))


def test_a_checkpoint_that_was_asked_for_is_taken(folder: Path) -> None:
    runner = runner_of(folder, 'mine.pth')
    runner._resume = True
    choose_checkpoint(runner)
    assert (runner._resume, runner._load_from, runner.said) == (True, 'mine.pth', [])


def test_pickles_that_run_code_are_not_opened(folder: Path, tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / 'ran'),)

    save(folder / 'iter_8.pth', 8, optimizer=Evil())
    found = find_resumable([folder])
    assert found.path == folder / 'iter_6.pth'
    assert 'refused, it wants to create' in found.passed[str(folder / 'iter_8.pth')]
    assert not (tmp_path / 'ran').exists()
