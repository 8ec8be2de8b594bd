"""``python -m dino_mm.env`` reports what there is, and runs where something is missing or broken."""

import importlib.metadata
from pathlib import Path

import pytest
import torch
from commands import ROOT, python

import dino_mm
from dino_mm import env
from dino_mm.compat import SUPPORTED, found_set, install_command
from dino_mm.ops import deformable_sampling

# Runs at the start of Python: some modules and their distributions are not there.
BLOCKER = """
import importlib.abc, importlib.metadata, os, sys
modules, distributions = (os.environ[name].split() for name in ('NO_MODULES', 'NO_DISTRIBUTIONS'))

class Blocker(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in modules:
            raise ModuleNotFoundError(f'No module named {name!r}', name=name)

discover = importlib.metadata.Distribution.discover
def discover_others(**options):
    return (found for found in discover(**options) if found.metadata['Name'] not in distributions)

sys.meta_path.insert(0, Blocker())
importlib.metadata.Distribution.discover = discover_others
"""
NVIDIA_SMI = """#!/bin/sh
case "$1" in
--query-gpu=*) echo "NVIDIA H100, PCIe, 81559 MiB, 550.54.15" ;;
*) echo "| NVIDIA-SMI 550.54.15    Driver Version: 550.54.15    CUDA Version: 12.4 |" ;;
esac
"""


def report(status: int = 0, **variables: str) -> tuple[dict[str, str], list[str]]:
    """The lines of a report by their titles, and those of what is missing."""
    done = python('-m', 'dino_mm.env', status=status, **variables)
    assert 'Traceback' not in done.stdout + done.stderr
    lines = [(line[:17].strip(), line[18:]) for line in done.stdout.splitlines()]
    assert all(title for title, _ in lines), done.stdout
    return dict(lines), [text for title, text in lines if title == 'missing']


def without(folder: Path, *modules: str) -> dict[str, str]:
    """Environment variables of a Python that lacks some modules, or all of them."""
    (folder / 'sitecustomize.py').write_text(BLOCKER)
    there = importlib.metadata.packages_distributions()
    distributions = {name for module in modules for name in there.get(module, ())}
    return dict(PYTHONPATH=f'{folder}:{ROOT}', NO_MODULES=' '.join(modules), NO_DISTRIBUTIONS=' '.join(distributions))


def test_what_there_is() -> None:
    lines, missing = report()
    there = importlib.metadata.packages_distributions()
    for module in ('torch', 'torchvision', 'numpy', 'cv2', 'mmcv', 'mmengine', 'mmdet', 'timm', 'pycocotools'):
        for name in there[module]:
            assert f'{importlib.metadata.version(name)} ({name})' in lines[module]
    assert lines['torch'].endswith(('built for CPUs', ' CUDA ' + lines['torch'].split()[-1]))
    assert dino_mm.__version__ in lines['dino_mm']
    assert lines['training'] == 'could start here'
    assert lines['set'].startswith(found_set().label)
    assert not [line for line in missing if line.split(':')[0] in there]


@pytest.mark.parametrize('module', ['torch', 'numpy', 'mmcv', 'mmengine', 'mmdet'])
def test_what_a_training_needs(module: str, tmp_path: Path) -> None:
    """Says what is missing, by the name that is imported, what installs it, and reports the rest as ever."""
    lines, missing = report(status=1, **without(tmp_path, module))
    assert lines[module] == 'not installed'
    command = install_command(module) if module in SUPPORTED else f'pip install {module}'
    assert missing == [f'{module}: {command}']
    assert lines['training'].startswith('could not start here: ')
    assert lines['timm'].startswith(importlib.metadata.version('timm'))


def test_nothing_but_python(tmp_path: Path) -> None:
    modules = ('torch', 'torchvision', 'numpy', 'scipy', 'cv2', 'mmcv', 'mmengine', 'mmdet', 'timm', 'pycocotools')
    lines, missing = report(status=1, **without(tmp_path, *modules, 'faster_coco_eval', 'packaging'))
    assert all(lines[module] == 'not installed' for module in modules)
    assert len({line.split(':')[0] for line in missing}) == len(missing) == len(modules) + 1


def test_what_a_training_does_without(tmp_path: Path) -> None:
    lines, missing = report(**without(tmp_path, 'faster_coco_eval'))
    assert 'faster_coco_eval: pip install faster-coco-eval' in missing
    assert lines['training'] == 'could start here'


def test_what_is_there_but_broken(tmp_path: Path) -> None:
    """Whatever it raises, in one line."""
    (tmp_path / 'cv2.py').write_text("raise OSError('libGL.so.1: cannot open\\nshared object file')")
    lines, missing = report(status=1, PYTHONPATH=f'{tmp_path}:{ROOT}')
    assert lines['cv2'].endswith('cannot be imported: OSError: libGL.so.1: cannot open shared object file')
    assert missing == []
    assert lines['training'] == 'could not start here: OSError: libGL.so.1: cannot open shared object file'


def test_the_driver_tells_of_its_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which torch does not see here; a training on the CPU starts all the same."""
    (tmp_path / 'nvidia-smi').write_text(NVIDIA_SMI)
    (tmp_path / 'nvidia-smi').chmod(0o755)
    monkeypatch.setenv('PATH', str(tmp_path), prepend=':')
    lines, missing = report(CUDA_VISIBLE_DEVICES='')
    assert lines['gpu'] == 'NVIDIA H100, PCIe, 81559 MiB, driver 550.54.15 for CUDA up to 12.4'
    assert lines['gpus for torch'] == 'none'
    assert lines['attention, cpu'] == 'sparse'
    assert missing == []  # the user has hidden the GPU


@pytest.mark.parametrize(
    ('cuda', 'way'),
    [
        (None, 'built for CPUs: pip install --force-reinstall torch torchvision'),
        ('13.0', 'built for CUDA 13.0: a newer driver, or a torch for CUDA up to 12.4, see https://pytorch.org'),
    ],
)
def test_a_torch_that_does_not_see_the_gpu(cuda: str | None, way: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(env, '_output', lambda *command: 'CUDA Version: 12.4' if command[1:] == () else 'A, 1 MiB, 2')
    monkeypatch.setattr(torch.version, 'cuda', cuda)
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    missing: list[str] = []
    assert dict(env._gpus(missing))['gpu'] == 'A, 1 MiB, driver 2 for CUDA up to 12.4'
    assert len(missing) == 1
    assert way in missing[0]


@pytest.mark.parametrize(
    ('here', 'taken', 'offered'),
    [
        (('sparse', 'pytorch'), 'pytorch', ('mmcv', 'deformops')),
        (('sparse', 'pytorch', 'deformops'), 'deformops', ()),
        (('sparse', 'pytorch', 'mmcv', 'deformops'), 'mmcv', ()),
    ],
)
def test_attention_on_a_gpu(here: tuple, taken: str, offered: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it takes, and what would be faster than plain code."""
    for name, backend in deformable_sampling.BACKENDS.items():
        monkeypatch.setitem(deformable_sampling.BACKENDS, name, backend._replace(is_here=name in here))
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.delenv(deformable_sampling.VARIABLE, raising=False)
    missing: list[str] = []
    lines = dict(env._attention(missing))
    assert set(lines['attention has'].split(', ')) == set(here)
    assert (lines['attention, cpu'], lines['attention, cuda']) == ('sparse', taken)
    assert len(missing) == bool(offered)
    assert all(deformable_sampling.BACKENDS[name].way_to_get in missing[0] for name in offered)


def test_a_choice_of_attention(tmp_path: Path) -> None:
    lines, _ = report(DINO_MM_DEFORMABLE='pytorch')
    assert lines['attention, cpu'] == 'pytorch, of DINO_MM_DEFORMABLE'
    lines, _ = report(status=1, DINO_MM_DEFORMABLE='none such')
    assert "has no back-end 'none such'" in lines['attention']
    assert "has no back-end 'none such'" in lines['training']


def test_the_package_itself_stays_strict(tmp_path: Path) -> None:
    """It is for the report alone that missing libraries are let through."""
    variables = without(tmp_path, 'mmdet')
    for command in (('-c', 'import dino_mm'), ('-m', 'dino_mm.shipped'), ('-c', 'import dino_mm.env')):
        done = python(*command, status=1, **variables)
        assert 'mmdet' in done.stderr.splitlines()[-1]
