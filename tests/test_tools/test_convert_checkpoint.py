"""tools/convert_checkpoint.py, and tools/test.py on another library's checkpoint."""

import argparse
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from commands import TINY, data_options, options
from foreign import as_detrex
from forked import run_tool
from mmengine.config import Config
from mmengine.registry import init_default_scope

import dino_mm
from dino_mm.checkpoints.classes import COCO_CLASSES
from dino_mm.datasets.digits import make_digits
from dino_mm.registry import MODELS

TOOL = 'tools/convert_checkpoint.py'
CONFIG = 'dino-resnet/dino_r50_4scale_12ep.py'


@pytest.fixture(scope='module')
def r50() -> torch.nn.Module:
    init_default_scope('mmdet')
    return MODELS.build(Config.fromfile(dino_mm.cfg(CONFIG)).model)


@pytest.fixture(scope='module')
def detrex(r50: torch.nn.Module, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp('detrex') / 'dino_r50.pth'
    torch.save(dict(model=as_detrex(r50.state_dict()), iteration=89999), path)
    return path


def test_converts_without_a_config(r50: torch.nn.Module, detrex: Path, tmp_path: Path) -> None:
    done = run_tool(TOOL, detrex, tmp_path / 'out.pth', '--tensors')
    lines = [line for line in done.stdout.splitlines() if 'OneDL' not in line]  # what the forks print
    assert lines[0].startswith(
        'checkpoint  a DINO detector of detrex, ResNet (detectron2 names), 6 encoder and 6 decoder'
    )
    assert lines[0].endswith('4 levels of 256 channels, 900 queries, 80 classes')
    assert lines[1] == f'config      {CONFIG}'
    assert lines[2] == 'mapped      578 of 634 tensors'
    assert lines[3] == 'dropped     56: the same tensor under a second name'
    assert lines[4] == 'not in it   53: left as it is: frozen norms elsewhere do not count batches'
    assert '  transformer.tgt_embed.weight -> query_selector.query_embedding.weight' in lines
    assert '  transformer.decoder.class_embed.0.bias dropped: the same tensor as class_embed.0.bias' in lines

    written = torch.load(tmp_path / 'out.pth', weights_only=True)
    assert written['meta']['dataset_meta']['classes'] == COCO_CLASSES
    own = r50.state_dict()
    assert written['state_dict'].keys() == {name for name in own if not name.endswith('num_batches_tracked')}
    assert all(torch.equal(tensor, own[name]) for name, tensor in written['state_dict'].items())
    assert (tmp_path / 'out.pth').stat().st_size < 1.1 * sum(4 * t.numel() for t in written['state_dict'].values())


def test_inspect_writes_nothing_and_backbones_need_a_config(detrex: Path, tmp_path: Path) -> None:
    checkpoint = torch.load(detrex, weights_only=True)['model']
    backbone = {name.removeprefix('backbone.'): t for name, t in checkpoint.items() if name.startswith('backbone.')}
    path = tmp_path / 'backbone.pth'
    torch.save(dict(model=backbone, args=argparse.Namespace(lr=1)), path)
    done = run_tool(TOOL, path, '--inspect', status=1)
    assert done.stderr.splitlines()[-1] == (
        f'{path}: A bare backbone, ResNet (detectron2 names): give a config with its size with --config.'
    )
    done = run_tool(TOOL, path, '--inspect', '--config', CONFIG)
    assert [line for line in done.stdout.splitlines() if 'OneDL' not in line][:3] == [
        'checkpoint  a bare backbone, ResNet (detectron2 names)',
        f'config      {CONFIG}',
        'mapped      265 of 265 tensors',
    ]
    assert [entry.name for entry in tmp_path.iterdir()] == ['backbone.pth']


def test_one_line_for_what_does_not_convert(detrex: Path, tmp_path: Path) -> None:
    path = tmp_path / 'x.pth'
    path.write_bytes(b'<html>not found</html>')
    done = run_tool(TOOL, path, '--inspect', status=1)
    assert done.stderr.splitlines()[-1].startswith(f'{path}: not a checkpoint, or a truncated one (22 bytes)')
    assert 'Traceback' not in done.stderr
    done = run_tool(TOOL, detrex, '--inspect', '--config', 'dino-resnet/dino_r50_5scale_12ep.py', status=1)
    assert done.stderr.rstrip().endswith(
        'It fits dino-resnet/dino_r50_4scale_12ep.py, '
        'dino-resnet/dino_r50_4scale_12ep_300dn.py, '
        'dino-resnet/dino_r50_4scale_12ep_amp.py.'
    )
    assert 'give OUT, or --inspect' in run_tool(TOOL, detrex, status=2).stderr


def test_test_takes_another_librarys_checkpoint(tmp_path: Path) -> None:
    """Equal predictions from a checkpoint of ours and from the same weights as detrex would have saved them."""
    data = make_digits(tmp_path / 'data', num_train=2, num_val=3)
    config = 'configs/dino-demo/dino_digits.py'
    settings = TINY | data_options(data)
    cfg = Config.fromfile(config)
    cfg.merge_from_dict({**TINY, 'model.neck.in_channels': [8, 16, 32]})
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    model.init_weights()
    torch.save(dict(state_dict=model.state_dict(), meta={}), tmp_path / 'ours.pth')
    torch.save(dict(model=as_detrex(model.state_dict())), tmp_path / 'theirs.pth')
    results = []
    for name in ('ours', 'theirs'):
        command = ('tools/test.py', config, tmp_path / f'{name}.pth', '--work-dir', tmp_path / name)
        run_tool(*command, '--out', tmp_path / f'{name}.pkl', *options(settings))
        results.append(pickle.loads((tmp_path / f'{name}.pkl').read_bytes()))
    assert len(results[0]) == len(results[1]) == 3
    for ours, theirs in zip(*results, strict=True):
        for key in ('bboxes', 'scores', 'labels'):
            np.testing.assert_array_equal(ours['pred_instances'][key], theirs['pred_instances'][key])

    (tmp_path / 'broken.pth').write_bytes(b'nothing')
    done = run_tool('tools/test.py', config, tmp_path / 'broken.pth', *options(settings), status=1)
    assert done.stderr.splitlines()[-1].startswith(f'error: {tmp_path}/broken.pth: not a checkpoint')
