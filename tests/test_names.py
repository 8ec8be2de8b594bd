"""The names that users import and type, each in a process of its own where another library reads it."""

import importlib
import importlib.util
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from commands import MMDET_TOOLS, ROOT, python
from foreign import as_detrex
from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import TRANSFORMS as ROOT_TRANSFORMS
from mmengine.registry import DefaultScope
from PIL import Image

import dino_mm
from dino_mm import standin
from dino_mm.registry import MODELS

R50 = 'dino_r50_4scale_12ep'


def last_line(code: str, *arguments: str | Path, **more) -> str:
    """What a new Python prints at the end of ``code``."""
    return python('-c', code, *arguments, **more).stdout.splitlines()[-1]


def test_import_is_light_and_classes_come_when_asked_for(tmp_path: Path) -> None:
    heavy = "[m for m in sys.modules if m.startswith(('mmdet.models', 'mmdet.datasets', 'dino_mm.models'))]"
    code = f"""
import sys, dino_mm
before = {heavy}, 'DINO' in dir(dino_mm)
from dino_mm import DINO, CheckedCocoMetric
from dino_mm.models.detectors.dino import DINO as same
print(*before, DINO is same is dino_mm.DINO, CheckedCocoMetric.__module__)
"""
    assert last_line(code, cwd=tmp_path) == '[] True True dino_mm.evaluation.coco_metric'


def test_every_part_is_a_name_of_the_package() -> None:
    rooms = ('models', 'engine', 'datasets', 'evaluation', 'inference', 'export')
    parts = {name: room for room in rooms for name in importlib.import_module(f'dino_mm.{room}').__all__}
    functions = {'cfg', 'get_config', 'get_model', 'list_models', '__version__'}
    errors = {'CheckpointError', 'UnknownConfigError'}
    assert set(dino_mm.__all__) == set(parts) | functions | errors
    for name, room in parts.items():
        assert getattr(dino_mm, name).__module__.startswith(f'dino_mm.{room}.')
    assert set(dino_mm.__all__) <= set(dir(dino_mm))
    with pytest.raises(AttributeError, match="module 'dino_mm' has no attribute 'DIMO'"):
        dino_mm.DIMO  # noqa: B018


def test_type_checkers_see_every_name() -> None:
    text = (ROOT / 'dino_mm' / '__init__.py').read_text().partition('__all__ =')[0]
    assert set(dino_mm.__all__) <= set(re.findall(r'\w+', text))


def test_api_page_says_what_every_name_is() -> None:
    page = (ROOT / 'docs/api.md').read_text().partition('## The command')[0]
    rows = re.findall(r'^\| `(\w+)[^`]*` \| (.+) \|$', page, re.MULTILINE)
    names = [name for name, _ in rows]
    assert sorted(names) == sorted(dino_mm.__all__)
    assert all(text.endswith('.') for _, text in rows)


@pytest.mark.parametrize('name', [f'dino-resnet/{R50}.py', f'dino-resnet/{R50}', R50])
def test_mmdets_own_tools_read_our_names_in_base(name: str, tmp_path: Path) -> None:
    """Which parse the config before they import anything of ours."""
    (tmp_path / 'own.py').write_text(f"_base_ = 'dino_mm::{name}'\nmodel = dict(bbox_head=dict(num_classes=3))\n")
    out = tmp_path / 'printed.py'
    python(MMDET_TOOLS / 'misc/print_config.py', 'own.py', '--save-path', out, cwd=tmp_path)
    expected = dino_mm.get_config(R50)
    expected.model.bbox_head.num_classes = 3
    assert Config.fromfile(out).to_dict() == expected.to_dict()  # no `_scope_` is added either


def test_unknown_name_in_base_and_others_of_openmmlab(tmp_path: Path) -> None:
    (tmp_path / 'own.py').write_text("_base_ = 'dino_mm::dino_r50_4scale_12e'")
    code = "from mmengine.config import Config; Config.fromfile('own.py')"
    said = python('-c', code, cwd=tmp_path, status=1).stderr.splitlines()[-1]
    assert said.startswith('dino_mm.shipped.UnknownConfigError: ')
    assert f'Near to it: {R50}, ' in said
    (tmp_path / 'own.py').write_text("_base_ = 'no_such::folder/name.py'")
    said = python('-c', code, cwd=tmp_path, status=1).stderr.splitlines()[-1]
    assert said == 'AssertionError: mmengine does not support to load no_such config.'


def test_names_are_taught_after_mmengine_too(tmp_path: Path) -> None:
    """Where no .pth file was read: -S leaves out this environment's, whose packages are then put on the path."""
    (tmp_path / 'own.py').write_text(f"_base_ = 'dino_mm::{R50}'")
    code = f"""
import sys
sys.path += [p for p in {[p for p in __import__('sys').path if 'site-packages' in p]!r}]
from mmengine.config import Config
import mmengine.config.utils as utils
assert 'dino_mm' not in utils.MODULE2PACKAGE
import dino_mm
print(Config.fromfile('own.py').model.type, utils.MODULE2PACKAGE['dino_mm'])
"""
    done = python('-S', '-c', code, cwd=tmp_path, PYTHONPATH=str(ROOT))
    assert done.stdout.splitlines()[-1] == 'dino_mm.DINO dino_mm'


def test_another_mmengine_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, 'other.config.utils', SimpleNamespace(MODULE2PACKAGE={}))
    module = SimpleNamespace(__name__='other.config.config', Config=SimpleNamespace())
    standin.teach_names(module)
    assert vars(module.Config) == sys.modules['other.config.utils'].MODULE2PACKAGE == {}


def test_our_scope_has_mmdets_types_too(tiny_cfg: ConfigDict) -> None:
    """As mmengine's inferencers make the scope of the metafiles the default one."""
    with DefaultScope.overwrite_default_scope('dino_mm'):
        model = ROOT_MODELS.build(tiny_cfg)
        loads = ROOT_TRANSFORMS.build(dict(type='LoadAnnotations', with_bbox=True))
        image = ROOT_TRANSFORMS.build(dict(type='LoadImageFromFile'))
    assert type(model) is dino_mm.DINO
    assert type(model.backbone).__module__ == 'mmdet.models.backbones.resnet'
    assert type(loads).__module__ == 'mmdet.datasets.transforms.loading'  # mmcv has one of this name
    assert type(image) is dino_mm.LoadImageFromFile
    assert MODELS.get('dino_mm.ResNet') is None
    assert ROOT_MODELS.get('ResNet') is None


@pytest.mark.slow
def test_mmdets_inferencer_by_name(tmp_path: Path) -> None:
    """With the scope that tells it where to look; the weights lie where torch keeps downloads."""
    model = dino_mm.get_model(R50, device='cpu')
    hub = tmp_path / 'hub' / 'checkpoints'
    hub.mkdir(parents=True)
    torch.save(dict(model=as_detrex(model.state_dict())), hub / 'dino_r50_4scale_12ep_49_2AP.pth')
    Image.new('RGB', (64, 64)).save(tmp_path / 'image.png')
    code = f"""
from mmdet.apis import DetInferencer
try:
    DetInferencer('{R50}')
except ValueError as error:
    assert str(error) == 'Cannot find model: {R50} in mmdet', error
inferencer = DetInferencer('{R50}', scope='dino_mm', device='cpu')
found = inferencer('image.png', no_save_vis=True, no_save_pred=True)['predictions'][0]
print(type(inferencer.model), len(found['scores']), inferencer.model.level_embed.sum().item(), sep=';')
"""
    done = last_line(code, cwd=tmp_path, TORCH_HOME=str(tmp_path))
    kind, count, total = done.split(';')
    assert (kind, count) == ("<class 'dino_mm.models.detectors.dino.DINO'>", '300')
    assert float(total) == pytest.approx(model.level_embed.sum().item(), rel=1e-6)


def test_mmengines_hub(tmp_path: Path) -> None:
    code = f"""
import torch
from mmengine.hub import get_config, get_model
names = ('dino-resnet/{R50}.py', '{R50}')
weights = [get_config('dino_mm::' + name, pretrained=True).model_path for name in names]
with torch.device('meta'):
    model = get_model('dino_mm::{R50}')
print(*weights, type(model).__module__, type(model.backbone).__module__, sep='\\n')
"""
    stub = tmp_path / 'pkg_resources.py'
    if importlib.util.find_spec('pkg_resources') is None:  # setuptools has none from 82 on, which mmengine needs
        stub.write_text(
            'class DistributionNotFound(Exception): ...\ndef get_distribution(name): raise DistributionNotFound(name)\n'
        )
    lines = python('-c', code, cwd=tmp_path, PYTHONPATH=f'{tmp_path}:{ROOT}').stdout.splitlines()
    assert lines[-4:-2] == [dino_mm.zoo.zoo_models()[R50].weights] * 2
    assert lines[-2:] == ['dino_mm.models.detectors.dino', 'mmdet.models.backbones.resnet']
