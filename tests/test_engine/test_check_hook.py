"""What is checked before a run: pictures of training, validation and test, within wrappers too."""

import json
from pathlib import Path

import pytest
from commands import TINY, data_options, options
from forked import run_tool
from mmengine.dataset import ConcatDataset, RepeatDataset

from dino_mm.datasets.coco import CheckedCocoDataset
from dino_mm.datasets.digits import make_digits
from dino_mm.engine.check_hook import parts_of, require_pictures

CONFIG = 'configs/dino-demo/dino_digits.py'


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_digits(tmp_path / 'data', num_train=4, num_val=3)


@pytest.mark.parametrize('part', ['train', 'val'])
def test_training_does_not_start_without_a_picture(part: str, data: Path, tmp_path: Path) -> None:
    (data / part / '000001.png').unlink()
    settings = options(TINY | data_options(data))
    done = run_tool('tools/train.py', CONFIG, '--work-dir', tmp_path / 'work', *settings, status=1)
    assert 'error: ' in done.stderr
    assert 'Traceback' not in done.stderr
    assert '1 images whose picture is missing' in done.stderr
    assert f'id 2 ({data / part}/000001.png)' in done.stderr
    assert not list((tmp_path / 'work').glob('*.pth'))
    assert 'Iter(train)' not in done.stdout


def test_configs_without_the_hook_are_checked_by_our_tools(data: Path, tmp_path: Path) -> None:
    (data / 'val' / '000001.png').unlink()
    settings = options(TINY | data_options(data) | {'default_hooks.checks.type': 'IterTimerHook'})
    done = run_tool('tools/train.py', CONFIG, '--work-dir', tmp_path / 'work', *settings, status=1)
    assert '1 images whose picture is missing' in done.stderr


@pytest.mark.parametrize('damage', ['class', 'json', 'reference'])
def test_training_does_not_start_with_faulty_validation_annotations(damage: str, data: Path, tmp_path: Path) -> None:
    path = data / 'annotations' / 'val.json'
    content = json.loads(path.read_text())
    if damage == 'class':
        content['categories'][3]['name'] = 'drei'
    elif damage == 'reference':
        content['annotations'][0]['image_id'] = 99
    path.write_text(json.dumps(content)[: -9 if damage == 'json' else None])
    settings = options(TINY | data_options(data))
    done = run_tool('tools/train.py', CONFIG, '--work-dir', tmp_path / 'work', *settings, status=1)
    words = {'class': 'no categories 3', 'json': 'JSON breaks off', 'reference': 'image_id 99'}[damage]
    assert words in done.stderr
    assert str(path) in done.stderr
    assert 'Traceback' not in done.stderr
    assert 'Iter(train)' not in done.stdout


def test_training_does_not_start_with_another_number_of_classes(data: Path, tmp_path: Path) -> None:
    settings = options(TINY | data_options(data) | {'model.bbox_head.num_classes': 3})
    done = run_tool('tools/train.py', CONFIG, '--work-dir', tmp_path / 'work', *settings, status=1)
    assert done.stderr.splitlines()[-1].startswith(
        'error: `model.bbox_head.num_classes` is 3, but the data set has 10 classes (0, 1, 2, 3, 4, ...). '
    )
    assert 'Traceback' not in done.stderr


def test_resuming_needs_a_file(tmp_path: Path) -> None:
    done = run_tool('tools/train.py', CONFIG, '--resume', tmp_path, status=2)
    assert f'error: --resume {tmp_path}: a folder. Name a checkpoint in it' in done.stderr


def test_wrapped_data_sets_are_checked(data: Path) -> None:
    (data / 'val' / '000000.png').unlink()
    options = dict(data_root=str(data), metainfo=dict(classes=tuple('0123456789')), pipeline=[])
    whole, lacking = (
        CheckedCocoDataset(ann_file=f'annotations/{part}.json', data_prefix=dict(img=part), **options)
        for part in ('train', 'val')
    )
    both, repeated = ConcatDataset([whole, lacking]), RepeatDataset(lacking, 3)
    assert list(parts_of(both)) == [whole, lacking]
    assert list(parts_of(repeated)) == [lacking]
    require_pictures(ConcatDataset([whole, whole]))
    for wrapped in (both, repeated):
        with pytest.raises(ValueError, match=r'000000\.png'):
            require_pictures(wrapped)
