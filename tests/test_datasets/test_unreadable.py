"""Pictures that cannot be read: replaced on request, named once, never many; storage that blinks is asked again."""

import errno
import re
import urllib.error
from pathlib import Path

import numpy as np
import pytest
from commands import TINY, options
from faults import SMALLER, write_config
from forked import run_tool
from mmengine import fileio
from mmengine.logging import MMLogger
from test_coco import annotation, build, write
from torch.utils.data import DataLoader

from dino_mm.datasets import loading
from dino_mm.datasets.digits import make_digits
from dino_mm.datasets.loading import WAITS, UnreadableImageError, read_file
from dino_mm.datasets.skipped import MIN_READ, SkippedPictures, TooManyUnreadableError

both_decoders = pytest.mark.parametrize('backend', ['cv2', 'pillow'])


def damage(path: Path, how: str) -> None:
    if how == 'missing':
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:40] if how == 'truncated' else b'no picture')


def data_set(root: Path, backend: str = 'cv2', **more):
    """Four pictures, the third damaged."""
    write(root, [annotation(i + 1, i) for i in range(4)])
    return build(
        root,
        on_unreadable='skip',
        pipeline=[dict(type='LoadImageFromFile', _scope_='dino_mm', imdecode_backend=backend)],
        **more,
    )


@both_decoders
@pytest.mark.parametrize('how', ['missing', 'truncated', 'text'])
def test_another_picture_takes_the_place(how: str, backend: str, tmp_path: Path, caplog) -> None:
    """The same one whenever the same random numbers are drawn."""
    dataset = data_set(tmp_path, backend)
    damage(tmp_path / '2.png', how)
    taken = []
    for _ in range(3):
        np.random.seed(1)
        taken.append(dataset[2]['img_id'])
    assert taken == [taken[0]] * 3
    assert taken[0] in (0, 1, 3)
    assert [dataset[i]['img_id'] for i in (0, 1, 3)] == [0, 1, 3]
    assert dataset.skipped.skipped == 3
    assert dataset.skipped.read == 9


def test_a_picture_is_named_once_by_all_workers(tmp_path: Path) -> None:
    MMLogger.get_instance(str(tmp_path), log_file=str(tmp_path / 'log'))  # the current one from here on
    dataset = data_set(tmp_path)
    damage(tmp_path / '2.png', 'missing')
    loader = DataLoader(dataset, batch_sampler=[[0, 2], [2, 1], [2, 3], [2, 2]], num_workers=2, collate_fn=list)
    assert [len(batch) for batch in loader] == [2] * 4
    said = [line for line in (tmp_path / 'log').read_text().splitlines() if 'Image id 2 is skipped' in line]
    assert len(said) == 1
    assert f'Cannot read the picture {tmp_path}/2.png' in said[0]
    assert dataset.skipped.skipped >= 5  # chance may choose it again


def test_more_than_one_in_a_hundred_end_it() -> None:
    few = SkippedPictures(3)
    for _ in range(MIN_READ // 100):
        few.skip(0, 'a', OSError('broken'))
    with pytest.raises(TooManyUnreadableError, match=r'11 of 11 pictures could not be read.*image id b\. broken More'):
        few.skip(1, 'b', OSError('broken'))
    many = SkippedPictures(3)
    for number in range(1, 50):
        many.skip(0, 'a', OSError('broken'))
        for _ in range(99 if number > 10 else 199):
            many.count_read()
    assert (many.read, many.skipped) == (49 * 100 + 10 * 100, 49)


@pytest.mark.parametrize(('value', 'more'), [('skip', dict(test_mode=True)), ('ignore', {})])
def test_tests_skip_nothing(value: str, more: dict, tmp_path: Path) -> None:
    write(tmp_path, [annotation(1, 0)])
    with pytest.raises(
        ValueError, match=f"`on_unreadable` of a data set is 'error' or, in training, 'skip', not '{value}'"
    ):
        build(tmp_path, on_unreadable=value, **more)


BLINKS = {
    'EIO': OSError(errno.EIO, 'Input/output error'),
    'ESTALE': OSError(errno.ESTALE, 'Stale file handle'),
    'timeout': TimeoutError('timed out'),
    'reset': ConnectionResetError(errno.ECONNRESET, 'Connection reset by peer'),
    'address': urllib.error.URLError(TimeoutError('timed out')),
}


@pytest.mark.parametrize('kind', BLINKS)
@pytest.mark.parametrize('times', [1, len(WAITS), len(WAITS) + 1])
def test_storage_that_blinks_is_asked_again(kind: str, times: int, monkeypatch: pytest.MonkeyPatch) -> None:
    waited, left = [], [BLINKS[kind]] * times
    monkeypatch.setattr(loading.time, 'sleep', waited.append)

    def get(path, backend_args=None):
        if left:
            raise left.pop()
        return b'content'

    monkeypatch.setattr(fileio, 'get', get)
    if times > len(WAITS):
        with pytest.raises(UnreadableImageError, match=r'Cannot read the picture a\.png'):
            read_file('a.png')
    else:
        assert read_file('a.png') == b'content'
    assert waited == list(WAITS[:times])


@pytest.mark.parametrize(
    'error', [FileNotFoundError(errno.ENOENT, 'No such file'), PermissionError(errno.EACCES, 'no')]
)
def test_what_stays_wrong_is_not_waited_for(error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading.time, 'sleep', lambda seconds: pytest.fail('waits'))

    def get(path, backend_args=None):
        raise error

    monkeypatch.setattr(fileio, 'get', get)
    with pytest.raises(UnreadableImageError):
        read_file('a.png')


def test_a_training_goes_on_and_ends_with_one_line_where_there_are_too_many(tmp_path: Path) -> None:
    """Two pictures of eight are too many in the end: the eleventh time that one of them is met."""
    data = make_digits(tmp_path / 'data', num_train=8, num_val=2)
    config = write_config(tmp_path / 'config.py', data, [])
    settings = TINY | SMALLER | {'train_cfg.max_iters': 200, 'train_cfg.val_interval': 1000}
    settings |= {'train_dataloader.dataset.on_unreadable': 'skip', 'train_dataloader.num_workers': 1}
    settings |= {'train_dataloader.batch_size': 4}
    damage(data / 'train' / '000004.png', 'text')
    damage(data / 'train' / '000003.png', 'truncated')
    command = ('tools/train.py', config, '--work-dir', tmp_path / 'run', *options(settings))
    done = run_tool(*command, status=1, OMP_NUM_THREADS='1')
    assert (done.stdout + done.stderr).count('Image id 4 is skipped') == 1
    assert 'Iter(train) [  2/200]' in done.stdout
    last = done.stderr.splitlines()[-1]
    assert last.startswith('error: 11 of ')
    assert re.search(r'0000(03|04)\.png', last)
    assert (tmp_path / 'run' / 'last_checkpoint').exists()
