"""A stranger's checkpoint runs nothing, however it is opened: neither its pickle nor the config's text in it."""

import os
from pathlib import Path

import pytest
import torch
from commands import ROOT, TINY, data_options
from forked import Tool
from mmengine.config import Config

import dino_mm
from dino_mm.datasets.digits import make_digits
from dino_mm.registry import MODELS

INFER = """
import sys
from mmdet.apis import DetInferencer
import dino_mm
DetInferencer(sys.argv[1], weights=sys.argv[2], device='cpu', scope='dino_mm', show_progress=False)
"""
GET_MODEL = """
import sys
import dino_mm
dino_mm.get_model(sys.argv[1], checkpoint=sys.argv[2])
"""
#: Ways to open a checkpoint: the command, in which the last two words stand for the config and the checkpoint.
WAYS = {
    'train': 'tools/train.py CONFIG --cfg-options load_from=FILE',
    'resume': 'tools/train.py CONFIG --resume FILE',
    'resume the newest': 'tools/train.py CONFIG --resume',
    'test': 'tools/test.py CONFIG FILE',
    'inspect': 'tools/convert_checkpoint.py --config CONFIG --inspect FILE',
    'convert': 'tools/convert_checkpoint.py --config CONFIG FILE OUT',
    'get_model': 'GET_MODEL CONFIG FILE',
    'inferencer': 'INFER CONFIG FILE',
    'inferencer by name': 'INFER dino_r50_4scale_12ep R50',
}
#: What other tests show on every run, or what takes a large model.
SLOW = ('resume', 'resume the newest', 'test', 'inferencer by name')


class Evil:
    """Pickled, it makes a folder where it is opened."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self) -> tuple:
        return os.mkdir, (self.folder,)


@pytest.fixture(scope='module')
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny digits config in a file."""
    folder = tmp_path_factory.mktemp('config')
    data = make_digits(folder / 'data', num_train=4, num_val=1)
    config = Config.fromfile(ROOT / 'configs/dino-demo/dino_digits.py')
    settings = {**TINY, **data_options(data), 'model.neck.in_channels': [8, 16, 32], 'train_cfg.max_iters': 2}
    config.merge_from_dict({key: str(v) if isinstance(v, Path) else v for key, v in settings.items()})
    config.dump(folder / 'tiny.py')
    return folder / 'tiny.py'


def content(config: Path | str, text: str) -> dict:
    """A checkpoint of a training of one iteration, with a config's text wherever mmengine and others keep it."""
    path = config if isinstance(config, Path) else dino_mm.cfg(config)
    state = MODELS.build(Config.fromfile(path).model).state_dict()
    hub = dict(log_scalars={}, runtime_info=dict(cfg=text), resumed_keys={})
    return dict(
        meta=dict(config=text, cfg=text, iter=1, epoch=0, experiment_name='a', dataset_meta=dict(classes=('a',))),
        state_dict=state,
        message_hub=hub,
    )


@pytest.mark.parametrize('kind', ['text', 'pickle'])
@pytest.mark.parametrize('way', [pytest.param(way, marks=pytest.mark.slow if way in SLOW else ()) for way in WAYS])
def test_a_strangers_checkpoint_runs_nothing(config: Path, tmp_path: Path, way: str, kind: str) -> None:
    ran, work = tmp_path / 'ran', tmp_path / 'work'
    work.mkdir()
    file = work / 'iter_1.pth'
    made = content(
        'dino_r50_4scale_12ep' if way == 'inferencer by name' else config, f'__import__("os").mkdir({str(ran)!r})\n'
    )
    torch.save(made | (dict(notes=Evil(ran)) if kind == 'pickle' else {}), file)
    for name, code in (('INFER', INFER), ('GET_MODEL', GET_MODEL)):
        (tmp_path / name).write_text(code)
    words = {'CONFIG': config, 'OUT': tmp_path / 'out.pth', 'R50': file, 'INFER': tmp_path / 'INFER'}
    words['GET_MODEL'] = tmp_path / 'GET_MODEL'
    command = [str(words.get(word, word)).replace('FILE', str(file)) for word in WAYS[way].split()]
    if 'train.py' in WAYS[way] or 'test.py' in WAYS[way]:
        command[2:2] = ['--work-dir', str(work)]
    said = Tool(tmp_path / 'out.txt', *command).wait(1 if kind == 'pickle' else 0)
    assert not ran.exists()
    if kind == 'pickle' and not way.startswith('inferencer'):
        assert 'refused, it wants to create' in said.strip().splitlines()[-1]
