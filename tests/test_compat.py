"""Libraries that are missing or do not go together are named in one line, with the command that mends it."""

import ast
import importlib.util
import sys
import warnings
from collections.abc import Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import SimpleNamespace

import pytest
from commands import ROOT, python

from dino_mm import compat

OPENMMLAB = {'mmcv': '2.1.0', 'mmengine': '0.10.7', 'mmdet': '3.3.0'}
LITE = {'mmcv-lite': '2.1.0', 'mmengine': '0.10.7', 'mmdet': '3.3.0'}
FORKS = {'onedl-mmcv': '2.3.6', 'onedl-mmengine': '0.10.12', 'onedl-mmdetection': '3.5.1'}


def add_distributions(folder: Path, versions: Mapping[str, str]) -> None:
    """What pip leaves of an installed distribution, without its code."""
    for name, version in versions.items():
        info = folder / f'{name.replace("-", "_")}-{version}.dist-info'
        info.mkdir(parents=True)
        (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n')


class Machine:
    """An environment as the checks see it."""

    def __init__(self, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.folder, self.patch = folder, monkeypatch
        self.specs: dict[str, ModuleSpec | None] = {
            module: ModuleSpec(module, None, origin=f'{module}/__init__.py') for module in compat.SUPPORTED
        }
        monkeypatch.setattr(importlib.util, 'find_spec', self.specs.__getitem__)
        monkeypatch.setattr(compat, 'has_operators', lambda: 'mmcv' in self.versions)
        monkeypatch.setattr(sys, 'path', [str(folder / 'first'), str(folder / 'second')])
        self.versions: dict[str, str] = {}

    def install(self, **versions: str) -> None:
        """Add distributions, torch and timm too unless they are given; '' is none."""
        self.versions = {'torch': '2.4.0', 'timm': '1.0.20'} | {k.replace('_', '-'): v for k, v in versions.items()}
        self.versions = {name: version for name, version in self.versions.items() if version}
        add_distributions(self.folder / 'first', self.versions)
        for module in compat.SUPPORTED:
            if not any(name in self.versions for name in compat.DISTRIBUTIONS.get(module, (module,))):
                self.specs[module] = None

    def refusal(self) -> str:
        """The message of the check."""
        with pytest.raises(ImportError) as raised:
            compat.check_versions()
        message = str(raised.value)
        assert '\n' not in message
        return message


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    return Machine(tmp_path, monkeypatch)


@pytest.mark.parametrize(
    ('versions', 'message'),
    [
        # missing
        (OPENMMLAB | {'mmcv': ''}, 'dino_mm needs mmcv, which is not installed: `pip install mmcv-lite==2.1.0`.'),
        (OPENMMLAB | {'mmdet': ''}, 'dino_mm needs mmdet, which is not installed: `pip install mmdet==3.3.0`.'),
        (OPENMMLAB | {'torch': ''}, 'dino_mm needs torch, which is not installed: `pip install torch torchvision`.'),
        (FORKS | {'onedl-mmcv': ''}, 'dino_mm needs mmcv, which is not installed: `pip install onedl-mmcv==2.3.6`.'),
        (
            FORKS | {'onedl-mmdetection': ''},
            'dino_mm needs mmdet, which is not installed: `pip install onedl-mmdetection==3.5.1`.',
        ),
        (FORKS | {'onedl-mmengine': ''}, 'not installed: `pip install onedl-mmengine==0.10.12`.'),
        # too old, too new
        (OPENMMLAB | {'mmcv': '1.7.2'}, 'needs mmcv >=2.0.0, <3.0.0, but mmcv 1.7.2 is installed, which is too old: '),
        (
            {'mmcv-full': '1.7.2', 'mmengine': '0.10.7', 'mmdet': '3.3.0'},
            'mmcv-full 1.7.2 is installed, which is too old: `pip uninstall -y mmcv-full`, then `pip install mmcv-lite',
        ),
        (
            OPENMMLAB | {'mmdet': '2.28.2'},
            'mmdet 2.28.2 is installed, which is too old: `pip uninstall -y mmdet`, then',
        ),
        (OPENMMLAB | {'mmdet': '4.0.0'}, 'needs mmdet >=3.3.0, <4.0.0, but mmdet 4.0.0 is installed, which is too new'),
        (OPENMMLAB | {'mmengine': '0.10.3'}, 'mmengine 0.10.3 is installed, which is too old'),
        (
            OPENMMLAB | {'timm': '0.9.16'},
            'timm 0.9.16 is installed, which is too old: `pip uninstall -y timm`, then `pip',
        ),
        (OPENMMLAB | {'torch': '1.13.1'}, 'torch 1.13.1 is installed, which is too old'),
        (FORKS | {'onedl-mmdetection': '3.2.0'}, 'then `pip install onedl-mmdetection==3.5.1`'),
        # what mmdet 3.3.0 itself refuses
        (OPENMMLAB | {'mmcv': '2.2.0'}, 'mmdet 3.3.0 asserts mmcv <2.2.0, but mmcv 2.2.0 is installed: `pip uninstall'),
        (
            {'onedl-mmcv': '2.3.6', 'mmengine': '0.10.7', 'mmdet': '3.3.0'},
            'mmdet 3.3.0 asserts mmcv <2.2.0, but onedl-mmcv 2.3.6 is installed: `pip uninstall -y onedl-mmcv`, then '
            '`pip install mmcv-lite==2.1.0`.',
        ),
        # two at once
        (
            OPENMMLAB | {'mmcv-lite': '2.1.0'},
            'mmcv 2.1.0 and mmcv-lite 2.1.0 are installed over one another, all as `mmcv`: '
            '`pip uninstall -y mmcv mmcv-lite`, then `pip install mmcv-lite==2.1.0`.',
        ),
        (
            FORKS | {'mmcv-lite': '2.1.0'},
            '`pip uninstall -y mmcv-lite onedl-mmcv`, then `pip install onedl-mmcv==2.3.6`',
        ),
        (FORKS | {'mmdet': '3.3.0'}, 'mmdet 3.3.0 and onedl-mmdetection 3.5.1 are installed over one another'),
        (FORKS | {'mmengine': '0.10.7'}, 'mmengine 0.10.7 and onedl-mmengine 0.10.12 are installed over one another'),
    ],
)
def test_refusal(versions: dict, message: str, machine: Machine) -> None:
    machine.install(**versions)
    assert message in machine.refusal()


def test_two_versions_at_once(machine: Machine) -> None:
    """As an interrupted upgrade leaves them."""
    machine.install(**OPENMMLAB)
    add_distributions(machine.folder / 'first', {'mmcv': '2.0.0'})
    assert 'installed over one another, all as `mmcv`: `pip uninstall -y mmcv`, then' in machine.refusal()


def test_a_distribution_behind_another_one_does_not_count(machine: Machine) -> None:
    """As that of a virtual environment in front of the system's."""
    machine.install(**LITE)
    add_distributions(machine.folder / 'second', {'mmcv': '1.7.2', 'mmdet': '2.28.2'})
    compat.check_versions()
    assert compat.found_set().names['mmcv'] == 'mmcv-lite'


@pytest.mark.parametrize('left', [None, ModuleSpec('mmdet', None, origin=None)], ids=['nothing', 'empty folders'])
def test_code_that_is_missing(left: ModuleSpec | None, machine: Machine) -> None:
    machine.install(**LITE)
    machine.specs['mmdet'] = left
    assert machine.refusal() == (
        'mmdet 3.3.0 is installed in part only, its code is missing: '
        '`pip uninstall -y mmdet`, then `pip install mmdet==3.3.0`.'
    )


def test_code_without_a_distribution_is_an_untested_set(machine: Machine) -> None:
    """As a copy of mmdet's repository on PYTHONPATH."""
    machine.install(**LITE | {'mmdet': ''})
    machine.specs['mmdet'] = ModuleSpec('mmdet', None, origin='mmdet/__init__.py')
    with pytest.warns(UserWarning, match=r'no tests with .* mmdet \(unknown\)'):
        compat.check_versions()


@pytest.mark.parametrize(
    ('versions', 'label', 'tested'),
    [
        (OPENMMLAB, 'OpenMMLab with compiled mmcv', True),
        (LITE, 'OpenMMLab with mmcv-lite', True),
        (FORKS, 'forks', True),
        (OPENMMLAB | {'mmcv': '2.0.1'}, 'OpenMMLab with compiled mmcv', False),
        (LITE | {'mmengine': '0.10.5'}, 'OpenMMLab with mmcv-lite', False),
        (FORKS | {'onedl-mmcv': '2.4.0'}, 'forks', False),
        ({'mmcv-lite': '2.1.0', 'onedl-mmengine': '0.10.12', 'onedl-mmdetection': '3.5.1'}, 'other', False),
    ],
)
def test_sets_and_the_warning_of_an_untested_one(versions: dict, label: str, tested: bool, machine: Machine) -> None:
    machine.install(**versions)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        compat.check_versions()
    found = compat.found_set()
    assert (found.label, found.tested) == (label, tested)
    assert list(found.names.values()) == list(versions)
    assert list(found.versions.values()) == list(versions.values())
    assert len(caught) == (not tested)
    for warning in caught:
        text = str(warning.message)
        assert '\n' not in text
        assert all(f'{name} {version}' in text for name, version in versions.items())
        assert 'mmcv-lite 2.1.0, mmengine 0.10.7, mmdet 3.3.0; mmcv 2.1.0' in text


def test_mmcv_without_operators_is_none_of_the_tested_sets(machine: Machine) -> None:
    """As when it was compiled for another Python."""
    machine.install(**OPENMMLAB)
    machine.patch.setattr(compat, 'has_operators', lambda: False)
    assert compat.found_set().label == 'other'
    with pytest.warns(UserWarning, match=r'mmdet 3\.3\.0 \(without compiled operators\)'):
        compat.check_versions()


def test_operators_of_another_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU torch beside CUDA operators, and the other way round: their library does not load."""
    monkeypatch.setitem(sys.modules, 'mmcv._ext', None)
    for cuda, kind in ((None, 'which is for CPUs only'), ('12.4', 'which is for CUDA 12.4')):
        monkeypatch.setattr('torch.version.cuda', cuda)
        with pytest.raises(ImportError, match=kind) as raised:
            compat.has_operators()
        message = str(raised.value)
        assert message.startswith("mmcv's compiled operators do not load with torch ")
        assert '`pip uninstall -y mmcv onedl-mmcv`, then `pip install ' in message
        assert '\n' not in message


def test_an_old_python(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, 'sys', SimpleNamespace(version_info=(3, 9, 18)))
    with pytest.raises(ImportError, match=r'^dino_mm needs Python 3\.10 or newer, but this is Python 3\.9: make an'):
        compat.check_python()


@pytest.mark.parametrize(
    ('version', 'messages'),
    [
        ((3, 10, 0), []),
        ((3, 13, 5), []),
        ((3, 14, 0), ['dino_mm has no tests with Python 3.14: if something fails, take Python 3.10 to 3.13.']),
    ],
)
def test_a_new_python(version: tuple, messages: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compat, 'sys', SimpleNamespace(version_info=version))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter('always')
        compat.check_python()
    assert [str(warning.message) for warning in caught] == messages


@pytest.mark.parametrize('name', ['__init__', 'cli', 'compat', 'shipped', 'standin', 'version', 'zoo'])
def test_an_old_python_reads_what_comes_before_the_check(name: str) -> None:
    """Its annotations are not evaluated, and its grammar is that of 3.9."""
    text = (ROOT / 'dino_mm' / f'{name}.py').read_text()
    tree = ast.parse(text, feature_version=(3, 9))
    if any(isinstance(node, ast.FunctionDef | ast.AnnAssign) for node in ast.walk(tree)):
        assert 'from __future__ import annotations' in text


def test_the_check_needs_none_of_the_libraries(tmp_path: Path) -> None:
    """Not even those that a half-installed environment lacks."""
    code = f'import sys; sys.path[:] = [p for p in sys.path if "packages" not in p] + [{str(ROOT)!r}]; import dino_mm'
    done = python('-S', '-c', code, cwd=tmp_path, status=1)
    last = done.stderr.splitlines()[-1]
    assert last == 'ImportError: dino_mm needs torch, which is not installed: `pip install torch torchvision`.'
