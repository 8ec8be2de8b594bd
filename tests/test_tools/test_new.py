"""``dino-mm new``, and the page on own data, whose commands run here on a small model."""

import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import ROOT, options, python, scalars
from mmengine.config import Config

from dino_mm import get_config
from dino_mm.registry import MODELS

sys.path.insert(0, str(ROOT / 'tests' / 'test_projects'))
from own_data import make_items, write_coco, write_yolo

#: Shrinks R50 until it trains an iteration in a fraction of a second.
TINY = {
    'model.num_queries': 12,
    'model.num_feature_levels': 3,
    'model.embed_dims': 16,
    'model.backbone.depth': 18,
    'model.backbone.base_channels': 4,
    'model.neck.in_channels': [8, 16, 32],
    'model.neck.out_channels': 16,
    'model.neck.num_outs': 3,
    'model.neck.norm_cfg.num_groups': 4,
    'model.encoder.num_layers': 1,
    'model.encoder.num_heads': 2,
    'model.encoder.feedforward_channels': 32,
    'model.decoder.num_layers': 2,
    'model.decoder.num_heads': 2,
    'model.decoder.feedforward_channels': 32,
    'model.denoising.num_dn_queries': 6,
}


def commands() -> Iterator[list[str]]:
    """The commands of the page, in order."""
    for block in re.findall(r'```bash\n(.*?)```', (ROOT / 'docs' / 'own_data.md').read_text(), re.DOTALL):
        for line in block.splitlines():
            name, *arguments = shlex.split(line)
            assert name == 'dino-mm'
            yield arguments


def coco_checkpoint(path: Path) -> Path:
    """A small detector of COCO's classes, in place of the zoo's."""
    config = get_config('dino_r50_4scale_12ep')
    config.merge_from_dict({**TINY, 'model.backbone.init_cfg': None})
    torch.save(dict(state_dict=MODELS.build(config.model).state_dict()), path)
    return path


def dino_mm(*arguments: str | Path, **more) -> str:
    """What ``dino-mm`` prints."""
    done = python('-m', 'dino_mm', *arguments, PYTHONPATH=str(ROOT), **more)
    return done.stdout + done.stderr


def test_new_tells_what_it_found_and_how_to_train(tmp_path: Path) -> None:
    write_coco(tmp_path / 'data', {'train': make_items(8), 'val': make_items(4)})
    said = dino_mm('new', 'project', '--data', 'data', '--gpus', '2', cwd=tmp_path)
    assert f'{tmp_path}/data/annotations/instances_train.json: 8 images' in said
    assert said.endswith('written: project/config.py\ntrain it: tools/dist_train.sh project/config.py 2\n')
    for arguments, line in (
        (['project'], 'error: project: it exists and is not an empty folder. Name another one, or remove it.'),
        (['x', '--model', 'dino_r50_4scale_21ep'], "error: dino_mm ships no config 'dino_r50_4scale_21ep'. It has: "),
    ):
        said = dino_mm('new', *arguments, '--data', 'data', cwd=tmp_path, status=1)
        assert said.splitlines()[-1].startswith(line)
        assert 'Traceback' not in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ['data', 'project']


@pytest.mark.slow
def test_commands_of_the_page_train_and_test(tmp_path: Path) -> None:
    pytest.importorskip('supervision')
    write_yolo(tmp_path / 'data', {'train': make_items(10), 'val': make_items(4, 20)})
    start = coco_checkpoint(tmp_path / 'coco.pth')
    work_dir, ran = tmp_path / 'my_project' / 'work_dir', []
    for arguments in commands():
        settings = TINY | {'image_size': 64, 'load_from': start}
        if arguments[0] == 'train' and '--cfg-options' not in arguments:
            settings['epochs'] = 4
        if arguments[0] == 'test':
            pattern = Path(arguments[-1])
            arguments[-1] = str(next((tmp_path / pattern.parent).glob(pattern.name)))
        if arguments[0] != 'new':
            given = options(settings)
            arguments += given[1:] if '--cfg-options' in arguments else given
        ran.append((arguments[0], dino_mm(*arguments, cwd=tmp_path)))
    assert [name for name, _ in ran] == ['new', 'train', 'test', 'new', 'train']
    for name, source in (('crate', 'new'), ('barrel', 'new'), ('person', r'person \(row 0\)')):
        assert re.search(rf'^{name} +<- {source}$', ran[1][1], re.MULTILINE)
    assert 'coco/bbox_mAP:' in ran[2][1]
    lines = scalars(work_dir)
    assert [line['step'] for line in lines if 'coco/bbox_mAP' in line] == [1, 2, 3, 4]
    checkpoint = torch.load(next(work_dir.glob('best_*.pth')), weights_only=True)
    assert list(checkpoint['meta']['dataset_meta']['classes']) == ['crate', 'barrel', 'person']
    assert len(checkpoint['state_dict']['bbox_head.cls_branches.0.bias']) == 3
    assert checkpoint['ema_state_dict']['steps'] > 0
    attempt = Config.fromfile(tmp_path / 'work_dirs/try/config.py')
    assert (attempt.max_iters, attempt.epochs, attempt.train_dataloader.batch_size) == (20, None, 4)
    tried = scalars(tmp_path / 'work_dirs' / 'try')
    assert [line['step'] for line in tried if 'coco/bbox_mAP' in line] == [20]
    # The learning rate of 16 images, for 4, and a tenth of it for the backbone.
    groups = torch.load(tmp_path / 'work_dirs/try/iter_20.pth', weights_only=True)['optimizer']['param_groups']
    assert {round(group['initial_lr'], 12) for group in groups} == {2.5e-5, 2.5e-6}
    content = json.loads((tmp_path / 'two_classes/annotations/val.json').read_text())
    assert [row['name'] for row in content['categories']] == ['crate', 'barrel', 'person']
    assert Config.fromfile(tmp_path / 'two_classes/config.py').classes == ('person', 'crate')
