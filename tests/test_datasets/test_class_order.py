"""The order of a file's category rows changes nothing: training, evaluation, transfer, names of an inferencer."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from commands import ROOT, TINY, options, python, scalars
from forked import run_tool

from dino_mm.datasets.digits import CLASSES as DIGITS
from dino_mm.datasets.digits import make_digits

BCCD = ROOT.parent / 'shared' / 'data' / 'bccd'
BLOOD = ('RBC', 'WBC', 'Platelets')
NAMES = """
import sys
from mmdet.apis import DetInferencer
config, checkpoint, image = sys.argv[1:]
inferencer = DetInferencer(model=config, weights=checkpoint, device='cpu', show_progress=False)
inferencer(image, pred_score_thr=0.0)
print('NAMES', *inferencer.visualizer.dataset_meta['classes'])
"""


def prepare(source: str, root: Path) -> tuple[tuple[str, ...], Path]:
    """Classes, and a folder with ``train.json``, ``val.json`` and few pictures in ``images/``."""
    root.mkdir()
    if source == 'digits':
        made = make_digits(root / 'made', num_train=8, num_val=3)
        parts = {part: (made / 'annotations' / f'{part}.json', made / part) for part in ('train', 'val')}
        classes = DIGITS
    else:
        parts = {part: (BCCD / 'annotations' / f'{part}.json', BCCD / 'images') for part in ('train', 'val')}
        classes = BLOOD
    (root / 'images').mkdir()
    for part, (annotations, pictures) in parts.items():
        content = json.loads(annotations.read_text())
        content['images'] = content['images'][:4]
        kept = {image['id'] for image in content['images']}
        content['annotations'] = [a for a in content['annotations'] if a['image_id'] in kept]
        for image in content['images']:
            name = f'{part}_{image["file_name"]}'
            shutil.copy(pictures / image['file_name'], root / 'images' / name)
            image['file_name'] = name
        (root / f'{part}.json').write_text(json.dumps(content))
    return classes, root


def turn_rows(root: Path, to: Path) -> Path:
    """The same data with the category rows of both files the other way round."""
    shutil.copytree(root, to)
    for part in ('train', 'val'):
        content = json.loads((to / f'{part}.json').read_text())
        content['categories'].reverse()
        (to / f'{part}.json').write_text(json.dumps(content))
    return to


def write_config(classes: tuple[str, ...], root: Path) -> Path:
    """The digits config with other classes; on the command line, '0' would be a number."""
    path = root / 'config.py'
    metainfo = f'dict(dataset=dict(metainfo=dict(classes={classes!r})))'
    loaders = [f'{part}_dataloader = {metainfo}' for part in ('train', 'val', 'test')]
    base = ROOT / 'configs' / 'dino-demo' / 'dino_digits.py'
    path.write_text('\n'.join([f'_base_ = {str(base)!r}', *loaders]))
    return path


def settings(classes: tuple[str, ...], root: Path) -> dict:
    result = TINY | {'model.bbox_head.num_classes': len(classes), 'train_cfg.max_iters': 2, 'train_cfg.val_interval': 2}
    for loader, part in (('train', 'train'), ('val', 'val'), ('test', 'val')):
        dataset = f'{loader}_dataloader.dataset'
        result |= {
            f'{dataset}.data_root': root,
            f'{dataset}.ann_file': f'{part}.json',
            f'{dataset}.data_prefix.img': 'images/',
        }
    return result | {f'{part}_evaluator.ann_file': root / 'val.json' for part in ('val', 'test')}


@pytest.mark.slow
@pytest.mark.parametrize('source', ['digits', 'bccd'])
def test_rows_in_reverse_train_evaluate_and_name_alike(source: str, tmp_path: Path) -> None:
    if source == 'bccd' and not BCCD.is_dir():
        pytest.skip('the real pictures are not here')
    classes, root = prepare(source, tmp_path / 'straight')
    other = turn_rows(root, tmp_path / 'reversed')
    logs = []
    for data in (root, other):
        config = write_config(classes, data)
        run_tool('tools/train.py', config, '--work-dir', data / 'work', *options(settings(classes, data)))
        lines = scalars(data / 'work')
        logs.append([{k: v for k, v in line.items() if 'loss' in k or 'coco' in k} for line in lines])
    assert logs[0] == logs[1]
    assert any('coco/bbox_mAP' in line for line in logs[0])
    checkpoints = [torch.load(data / 'work' / 'iter_2.pth', weights_only=True) for data in (root, other)]
    weights = [checkpoint['state_dict'] for checkpoint in checkpoints]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    assert [tuple(checkpoint['meta']['dataset_meta']['classes']) for checkpoint in checkpoints] == [classes] * 2

    # Transfer goes by the names that both state, so the rows follow the new order of `classes`.
    turned = classes[::-1]
    changes = settings(turned, other) | {
        'load_from': other / 'work' / 'iter_2.pth',
        'default_hooks.loading.class_transfer': True,
        'train_cfg.max_iters': 1,
        'optim_wrapper.optimizer.lr': 0,
        'default_hooks.checkpoint.interval': 1,
    }
    config = write_config(turned, tmp_path)
    done = run_tool('tools/train.py', config, '--work-dir', tmp_path / 'transfer', *options(changes))
    last = len(classes) - 1
    for row, name in enumerate(turned):
        assert f'{name} <- {name} (row {last - row})' in ' '.join((done.stdout + done.stderr).split())
    rows = torch.load(tmp_path / 'transfer' / 'iter_1.pth', weights_only=True)['state_dict']
    name = 'bbox_head.cls_branches.0.weight'
    torch.testing.assert_close(rows[name], weights[1][name].flip(0), rtol=0, atol=0)

    image = next((other / 'images').glob('val_*'))
    dumped = next((other / 'work').glob('*.py'))
    assert f'NAMES {" ".join(classes)}' in python('-c', NAMES, dumped, other / 'work' / 'iter_2.pth', image).stdout
