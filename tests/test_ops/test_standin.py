"""Without compiled operators mmcv and mmdet import, and an operator says how to get it when it is called."""

import importlib
import inspect
import os
import pickle
import sys
from pathlib import Path

import mmcv
import pytest
import torch
from commands import ROOT, python
from torch import Tensor

from dino_mm import standin

FILE = ROOT / 'dino_mm' / 'standin.py'
#: As the wheel's .pth file loads it: a copy of its own, before anything else.
BY_PATH = f"""
import importlib.util, sys
# What this environment's own .pth file has put there.
sys.meta_path[:] = [finder for finder in sys.meta_path if getattr(finder, 'marker', '') != 'dino_mm.standin']
def load():
    spec = importlib.util.spec_from_file_location('by_path', {str(FILE)!r})
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.install()
load(); load()
"""


@pytest.fixture(scope='module')
def lite(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A PYTHONPATH with an mmcv like the one installed, but for its compiled operators."""
    folder = tmp_path_factory.mktemp('lite')
    (folder / 'mmcv').mkdir()
    for path in Path(mmcv.__file__).parent.iterdir():
        if not path.name.startswith(('_ext', '__pycache__')):
            (folder / 'mmcv' / path.name).symlink_to(path)
    return os.pathsep.join([str(folder), str(ROOT), os.environ.get('PYTHONPATH', '')])


def test_mmdet_imports_and_an_operator_says_what_is_missing(lite: str) -> None:
    """With mmdet imported before dino_mm, and the stand-in installed by both."""
    code = f"""{BY_PATH}
from mmdet.utils import register_all_modules
register_all_modules()
import dino_mm, mmcv.ops, torch
assert sum('Finder' in repr(finder) and 'by_path' in repr(finder) for finder in sys.meta_path) == 1
assert not any('dino_mm.standin' in repr(finder) for finder in sys.meta_path)
assert not dino_mm.compat.has_operators()
assert mmcv.ops.get_compiling_cuda_version() == 'not available'

from mmcv.ops import MultiScaleDeformableAttention, batched_nms  # mmdet merges test-time augmentation by the latter
boxes, scores = torch.tensor([[0., 0, 9, 9], [0, 0, 9, 8], [20, 20, 30, 30]]), torch.tensor([.5, .6, .7])
assert batched_nms(boxes, scores, torch.zeros(3), dict(type='nms', iou_threshold=0.7))[1].tolist() == [2, 1]

from dino_mm.models.layers.attention import DeformableAttention
assert issubclass(DeformableAttention, MultiScaleDeformableAttention)
try:
    mmcv.ops.roi_align(torch.rand(1, 1, 8, 8), torch.tensor([[0., 0, 0, 4, 4]]), 2)
except RuntimeError as error:
    print(error)
"""
    said = python('-c', code, PYTHONPATH=lite).stdout.splitlines()[-1]
    assert said.startswith("mmcv's operator 'roi_align_forward' is missing")
    assert '`make setup MMCV=build`' in said


def test_what_python_finds_itself_comes_first(tmp_path: Path) -> None:
    (tmp_path / 'mmcv').mkdir()
    for name in ('__init__', '_ext'):
        (tmp_path / 'mmcv' / f'{name}.py').touch()
    done = python('-c', f'{BY_PATH}\nimport mmcv._ext; print(mmcv._ext.__file__)', PYTHONPATH=str(tmp_path))
    assert done.stdout.strip() == str(tmp_path / 'mmcv' / '_ext.py')


def test_start_of_python_loads_nothing_more(tmp_path: Path) -> None:
    """Every start of Python runs the file: it must cost nothing and need nothing."""
    code = f'import sys, importlib.util; before = set(sys.modules)\n{BY_PATH}\nprint(set(sys.modules) - before)'
    loaded = eval(python('-S', '-c', code, cwd=tmp_path).stdout)
    assert {name.split('.')[0] for name in loaded} <= {'__future__', 'importlib', 'types'}


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> standin.MissingOperators:
    """The stand-in, in place of whatever there is."""
    module = standin.Finder.create_module(standin.Finder.find_spec('mmcv._ext'))
    standin.Finder.exec_module(module)
    monkeypatch.setitem(sys.modules, 'mmcv._ext', module)
    return module


def test_only_operators_are_made_up(module: standin.MissingOperators) -> None:
    """What Python asks of any module has its answer."""
    for name in ('__file__', '__path__', '__wrapped__', '_repr_html_'):
        with pytest.raises(AttributeError, match=name):
            getattr(module, name)
    assert inspect.getmodule(module) is module
    assert not inspect.isclass(module)
    assert inspect.getdoc(module) == inspect.getdoc(standin)
    operator = module.ms_deform_attn_forward
    assert operator is module.ms_deform_attn_forward
    assert pickle.loads(pickle.dumps(operator)) is operator
    assert standin.is_standin(module)
    assert not standin.is_standin(torch)
    assert standin.Finder.find_spec('mmcv.ops') is None
    with pytest.raises(RuntimeError, match="operator 'ms_deform_attn_forward' is missing"):
        operator(torch.zeros(1), offset=1)


def kept_by_hand(boxes: Tensor, scores: Tensor, threshold: float, offset: int) -> list[int]:
    """Indices of the boxes that none of a higher score overlaps by more than the threshold."""
    kept: list[int] = []
    for index in scores.argsort(descending=True).tolist():
        for other in kept:
            start, end = torch.maximum(boxes[index, :2], boxes[other, :2]), torch.minimum(boxes[index], boxes[other])
            shared = (end[2:] - start + offset).clamp(min=0).prod()
            areas = [(box[2:] - box[:2] + offset).prod() for box in (boxes[index], boxes[other])]
            if shared / (sum(areas) - shared) > threshold:
                break
        else:
            kept.append(index)
    return kept


@pytest.mark.parametrize('count', [0, 1, 60])
@pytest.mark.parametrize('offset', [0, 1])
def test_nms(module: standin.MissingOperators, count: int, offset: int) -> None:
    corner = torch.rand(count, 2) * 20
    boxes, scores = torch.cat([corner, corner + torch.rand(count, 2) * 15], 1), torch.rand(count)
    for threshold in (0.1, 0.5, 0.9):
        kept = module.nms(boxes, scores, iou_threshold=threshold, offset=offset)
        assert kept.tolist() == kept_by_hand(boxes, scores, threshold, offset)
        assert kept.dtype == torch.int64


@pytest.mark.skipif(
    standin.is_standin(importlib.import_module('mmcv._ext')), reason='this mmcv has no compiled operators'
)
def test_nms_is_that_of_mmcv() -> None:
    corner = torch.rand(300, 2) * 50
    boxes, scores = torch.cat([corner, corner + torch.rand(300, 2) * 30], 1), torch.rand(300)
    theirs = importlib.import_module('mmcv._ext').nms
    for threshold in (0.1, 0.5, 0.9):
        for offset in (0, 1):
            settings = dict(iou_threshold=threshold, offset=offset)
            assert torch.equal(standin.nms(boxes, scores, **settings), theirs(boxes, scores, **settings))
