"""The example detects without torch what MMDetection detects with it; the command is as its help says."""

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
import torch
from commands import ROOT, python
from export_cases import Exported, exported_once, write_config
from mmdet.apis import inference_detector
from mmengine.registry import init_default_scope
from PIL import Image

from dino_mm import export_detector

EXAMPLE = ROOT / 'examples' / 'onnx_only.py'


@pytest.fixture(scope='module')
def exported() -> Exported:
    return exported_once()


@pytest.fixture(scope='module')
def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location('onnx_only', EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def picture(height: int, width: int) -> Image.Image:
    rng = np.random.default_rng(height)
    coarse = Image.fromarray(rng.integers(0, 256, (6, 8, 3)).astype(np.uint8))
    return coarse.resize((width, height), Image.Resampling.NEAREST)


def turned() -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = 6
    return exif


#: Ending, picture, options of `save`: sizes are enlarged, reduced, limited by the longer edge, and padded.
PICTURES = {
    'small': ('png', picture(60, 80), {}),
    'large': ('png', picture(301, 253), {}),
    'long': ('png', picture(100, 400), {}),
    'narrow': ('png', picture(600, 100), {}),
    'grey': ('png', picture(150, 170).convert('L'), {}),
    'palette': ('png', picture(150, 170).convert('P'), {}),
    'alpha': ('png', picture(150, 170).convert('RGBA'), {}),
    'turned': ('jpg', picture(120, 180), dict(exif=turned())),
    'deep': ('png', Image.fromarray(np.asarray(picture(90, 120).convert('L')).astype(np.uint16) * 251), {}),
}


@pytest.mark.parametrize('case', PICTURES.values(), ids=PICTURES.keys())
def test_detections_are_those_of_mmdetection(case, exported: Exported, example, tmp_path: Path) -> None:
    ending, image, options = case
    path = tmp_path / f'picture.{ending}'
    image.save(path, **options)
    init_default_scope('mmdet')
    expected = inference_detector(exported.model, str(path)).pred_instances
    boxes, scores, labels = example.OnnxDetector(exported.path).detect(Image.open(path))
    assert len(boxes) == len(expected.bboxes) > 0
    torch.testing.assert_close(torch.from_numpy(scores), expected.scores, rtol=0, atol=1e-4)
    assert labels.tolist() == expected.labels.tolist()
    sides = torch.tensor([*expected.bboxes.amax(0)[2:]]).clamp(min=100)
    torch.testing.assert_close(torch.from_numpy(boxes) / sides.max(), expected.bboxes / sides.max(), rtol=0, atol=1e-3)


def test_it_needs_neither_torch_nor_mmdetection(exported: Exported, tmp_path: Path) -> None:
    picture(100, 120).save(tmp_path / 'a.png')
    arguments = (exported.path, tmp_path / 'a.png', '--out', tmp_path / 'drawn.png')
    done = python('-X', 'importtime', EXAMPLE, *arguments, cwd=tmp_path)
    imported = {line.rpartition('|')[2].strip().partition('.')[0] for line in done.stderr.splitlines()}
    assert 'onnxruntime' in imported
    assert not imported & {'torch', 'mmdet', 'mmcv', 'mmengine', 'dino_mm'}
    lines = done.stdout.splitlines()
    assert lines
    for line in lines:
        name, score, *box = line.split()
        assert name in 'abcde'
        assert float(score) >= 0.3
        assert len(box) == 4
    assert Image.open(tmp_path / 'drawn.png').size == (120, 100)


def test_what_it_cannot_do_is_one_line(exported: Exported, tmp_path: Path) -> None:
    picture(100, 300).save(tmp_path / 'a.png')
    (tmp_path / 'text.png').write_text('no picture')
    fixed = export_detector(exported.model, tmp_path / 'fixed.onnx', size=(96, 160), tell=list)
    bare = onnx.load(exported.path)
    del bare.metadata_props[:]
    onnx.save(bare, tmp_path / 'bare.onnx')
    for arguments, message in (
        ((fixed, 'a.png'), 'The picture becomes 67 x 200 pixels (height x width), but the model is made for 96 x 160'),
        ((tmp_path / 'bare.onnx', 'a.png'), "has no 'classes' among its metadata"),
        (('none.onnx', 'a.png'), 'there is no file none.onnx'),
        ((fixed, 'text.png'), 'cannot identify image file'),
        (('text.png', 'a.png'), 'onnxruntime cannot run text.png'),
    ):
        done = python(EXAMPLE, *arguments, cwd=tmp_path, status=1)
        assert message in done.stderr
        assert len(done.stderr.splitlines()) == 1


def test_the_command_exports_a_checkpoint(exported: Exported, tmp_path: Path) -> None:
    config = write_config('resnet', tmp_path)
    torch.save(dict(state_dict=exported.model.state_dict()), tmp_path / 'a.pth')
    arguments = ('-m', 'dino_mm', 'export', config, '--checkpoint', 'a.pth', '--size', '64x96')
    done = python(*arguments, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert 'batch 1, 64 x 96: logits ' in done.stdout
    assert done.stdout.splitlines()[-1].startswith('written: tiny_resnet.onnx, ')
    assert (tmp_path / 'tiny_resnet.onnx').is_file()
    for wrong, message, status in (
        (('dino_r50_4scale_12', '--size', '64x96'), 'error: dino_mm ships no config', 1),
        ((config, '--format', 'onxx'), "there is no format 'onxx'; did you mean onnx?", 2),
    ):
        done = python('-m', 'dino_mm', 'export', *wrong, cwd=tmp_path, status=status, PYTHONPATH=str(ROOT))
        assert message in done.stderr.splitlines()[-1]
        assert 'Traceback' not in done.stderr
