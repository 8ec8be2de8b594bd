"""Trainings that are killed, whose disk is full, or whose files are damaged: none loses what was saved.

Each is our tool in a process of its own.
"""

import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from commands import TINY, data_options, options, scalars
from forked import Tool, full_disk, killed_at_change, killed_while_writing, until

from dino_mm.checkpoints.files import register_safe_loaders
from dino_mm.datasets.digits import make_digits
from dino_mm.engine.resume import find_resumable
from dino_mm.engine.run_lock import RECORD

CONFIG = 'configs/dino-demo/dino_digits.py'
#: A checkpoint after each iteration, of which one is kept.
EACH = {'default_hooks.checkpoint.interval': 1, 'default_hooks.checkpoint.max_keep_ckpts': 1}
#: Bytes: more than a log has, less than a checkpoint.
LIMIT = 600_000


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_digits(tmp_path_factory.mktemp('digits') / 'data', num_train=4, num_val=1)


Train = Callable[..., Tool]


@pytest.fixture
def train(data: Path, tmp_path: Path) -> Train:
    """Start a training of ``iterations``, evaluated after ``val_interval``."""
    register_safe_loaders()

    def start(
        work_dir: Path, *arguments: str | Path, iterations: int = 3, val_interval: int = 100, fault=None, **settings
    ) -> Tool:
        length = {'train_cfg.max_iters': iterations, 'train_cfg.val_interval': val_interval}
        all_settings = TINY | EACH | data_options(data) | length | settings
        output = tmp_path / f'{time.monotonic_ns()}.txt'
        return Tool(
            output, 'tools/train.py', CONFIG, '--work-dir', work_dir, *arguments, *options(all_settings), fault=fault
        )

    return start


@pytest.fixture(scope='module')
def three(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Work directory of a training with checkpoints after iterations 1, 2 and 3."""
    work_dir = tmp_path_factory.mktemp('three') / 'work'
    settings = TINY | EACH | data_options(data) | {'train_cfg.max_iters': 3, 'train_cfg.val_interval': 100}
    settings['default_hooks.checkpoint.max_keep_ckpts'] = 5
    tool = Tool(work_dir.parent / 'out.txt', 'tools/train.py', CONFIG, '--work-dir', work_dir, *options(settings))
    tool.wait()
    return work_dir


def steps(work_dir: Path) -> list[int]:
    """Iterations that the newest run trained."""
    return [line['step'] for line in scalars(work_dir) if 'loss' in line]


def checkpoints(work_dir: Path) -> list[str]:
    """Names of the checkpoint files, those that are half written among them."""
    return sorted(path.name for path in work_dir.glob('*') if '.pth' in path.name)


def last_line(output: str) -> str:
    return output.strip().splitlines()[-1]


@pytest.mark.parametrize('number', [0, 1])
def test_a_training_that_is_killed_has_a_whole_checkpoint(train: Train, tmp_path: Path, number: int) -> None:
    """As the second checkpoint is begun, and before the next change of it."""
    train(tmp_path / 'work', fault=killed_at_change(number, 'iter_2.pth')).wait(-9)
    found = find_resumable([tmp_path / 'work'])
    assert (found.iteration, found.damaged) == (1, False)


def test_a_training_that_is_killed_within_a_checkpoint_goes_on(train: Train, three: Path, tmp_path: Path) -> None:
    work = tmp_path / 'work'
    shutil.copytree(three, work)
    for iteration in (1, 2):
        (work / f'iter_{iteration}.pth').unlink()
    arguments = dict(iterations=5)
    train(work, '--resume', fault=killed_while_writing(LIMIT), **arguments).wait(-25)
    half, whole = sorted(work.glob('*iter*'))
    assert (half.stat().st_size, whole.name) == (LIMIT, 'iter_3.pth')
    output = train(work, '--resume', **arguments).wait()
    assert f'Deleted {half}, which an interrupted run left half written.' in output
    assert steps(work) == [4, 5]
    assert checkpoints(work) == ['iter_5.pth']
    assert (work / 'last_checkpoint').read_text() == 'iter_5.pth'


@pytest.mark.slow
@pytest.mark.parametrize('number', range(21))
def test_at_any_moment_there_is_a_whole_checkpoint(train: Train, tmp_path: Path, number: int) -> None:
    """With the best one, for which the last is written again; and the next run tidies up and goes on."""
    work = tmp_path / 'work'
    arguments = {'val_interval': 2, 'default_hooks.checkpoint.save_best': 'coco/bbox_mAP'}
    output = train(work, fault=killed_at_change(number, '.pth', 'last_checkpoint'), **arguments).wait(None)
    found = find_resumable([work])
    assert not found.passed
    if number < 2:
        assert found.iteration is None  # the first is not there yet
        return
    assert found.iteration == 3 or 'killed before' in output
    train(work, '--resume', iterations=4, **arguments).wait()
    assert steps(work) == list(range(found.iteration + 1, 5))
    best = [name for name in checkpoints(work) if 'best' in name]
    assert set(checkpoints(work)) - set(best) == {'iter_4.pth'}
    # Between the best and the last checkpoint, which says that it is the best, no file says so: then it stays.
    assert len(best) <= (2 if number in (11, 12) else 1)
    assert (work / 'last_checkpoint').read_text() == 'iter_4.pth'


def test_a_full_disk_costs_a_checkpoint_at_most(train: Train, three: Path, tmp_path: Path) -> None:
    """The next one is written, and until then the former is kept."""
    work = tmp_path / 'work'
    shutil.copytree(three, work)
    output = train(work, '--resume', iterations=5, fault=full_disk(LIMIT, writes=1)).wait()
    assert f'iter_4.pth is not written: File too large. {work}/iter_3.pth is kept. The next try is at' in output
    assert checkpoints(work)[-1:] == ['iter_5.pth']
    assert find_resumable([work]).iteration == 5


def test_a_disk_that_stays_full_ends_the_training_in_one_line(train: Train, three: Path, tmp_path: Path) -> None:
    work = tmp_path / 'work'
    shutil.copytree(three, work)
    output = train(work, '--resume', iterations=9, fault=full_disk(LIMIT)).wait(1)
    assert last_line(output).startswith(f'error: {work}/iter_5.pth is not written: File too large. {work}/iter_3.pth')
    assert 'Traceback' not in output
    assert checkpoints(work) == ['iter_3.pth']
    assert find_resumable([work]).iteration == 3


def test_resume_finds_the_newest_whole_checkpoint_of_a_moved_folder(train: Train, three: Path, tmp_path: Path) -> None:
    work = tmp_path / 'moved'
    shutil.copytree(three, work)
    torch.save(nan(work / 'iter_2.pth'), work / 'iter_2.pth')
    (work / 'iter_3.pth').write_bytes((work / 'iter_3.pth').read_bytes()[:900_000])
    (work / 'last_checkpoint').write_text('')
    output = train(work, '--resume').wait()
    assert f'passes over {work}/iter_3.pth: not a checkpoint, or a truncated one (900000 bytes)' in output
    assert f"passes over {work}/iter_2.pth: its tensor '{NAN}' holds NaN or infinity" in output
    assert steps(work) == [2, 3]


NAN = 'bbox_head.cls_branches.0.bias'


def nan(path: Path) -> dict:
    """A checkpoint with a weight that is no number."""
    content = torch.load(path, weights_only=True)
    content['state_dict'][NAN][1] = float('nan')
    return content


def test_weights_that_are_not_finite_are_not_saved(train: Train, tmp_path: Path) -> None:
    """Here the optimizer makes them infinite, at gradients as they should be."""
    output = train(tmp_path / 'work', **{'optim_wrapper.optimizer.weight_decay': 'inf'}).wait(1)
    said = r"error: No checkpoint is saved at iteration 1: '[\w.]+' holds NaN or infinity, .* There is no earlier one"
    assert re.match(said, last_line(output))
    assert checkpoints(tmp_path / 'work') == []


def test_a_full_disk_of_the_log_does_not_end_the_training(train: Train, tmp_path: Path) -> None:
    (tmp_path / 'full.json').symlink_to('/dev/full')
    full = {'visualizer.vis_backends.0.scalar_save_file': tmp_path / 'full.json'}
    output = train(tmp_path / 'work', val_interval=3, **full).wait()
    assert output.count('The values of the log are not written: No space left on device.') == 1
    assert checkpoints(tmp_path / 'work') == ['iter_3.pth']


def test_a_folder_has_one_run(train: Train, tmp_path: Path) -> None:
    """Until it has ended, were it by ``kill -9``."""
    work = tmp_path / 'work'
    first = train(work, iterations=100_000)
    until((work / 'last_checkpoint').exists)
    output = train(work, '--resume').wait(1)
    assert last_line(output).startswith(f'error: {work} is in use by the run of process {first.pid} on ')
    assert len([path for path in work.iterdir() if path.is_dir()]) == 1  # the second wrote nothing
    first.kill()
    assert json.loads((work / RECORD).read_text())['pid'] == first.pid
    trained = find_resumable([work]).iteration
    train(work, '--resume', iterations=trained + 1).wait()
    assert steps(work) == [trained + 1]
    assert not (work / RECORD).exists()


OUTPUTS = {
    'the work directory of a training': ('train.py', '--work-dir', 'file/work', '--work-dir'),
    'the work directory of a test': ('test.py', '--work-dir', 'file/work', '--work-dir'),
    'predictions': ('test.py', '--out', 'file/out.pkl', '--out'),
    'pictures': ('test.py', '--show-dir', 'file/shown', '--show-dir'),
    'results': ('test.py', '--cfg-options', 'test_evaluator.outfile_prefix={}/file/x', 'test_evaluator.outfile_prefix'),
}


@pytest.mark.parametrize('output', OUTPUTS)
def test_outputs_that_cannot_be_written_are_known_before_the_work(tmp_path: Path, output: str) -> None:
    """There is no checkpoint either, of which nothing is said."""
    (tmp_path / 'file').touch()
    tool, option, path, name = OUTPUTS[output]
    value = path.format(tmp_path) if option == '--cfg-options' else tmp_path / path
    checkpoint = ['none.pth'] if tool == 'test.py' else []
    where = [] if option == '--work-dir' else ['--work-dir', tmp_path / 'work']
    said = Tool(tmp_path / 'out.txt', f'tools/{tool}', CONFIG, *checkpoint, *where, option, value).wait(1)
    assert last_line(said).startswith(f'{name} {tmp_path}/file/')
    assert 'it can not be written' in said
    assert 'Traceback' not in said
