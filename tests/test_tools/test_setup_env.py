"""The parts of tools/setup_env.py that decide, and the failures that it announces; no network."""

import importlib.util
import os
import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType
from unittest.mock import Mock

import pytest
from commands import ROOT

PYTHON = f'{sys.version_info[0]}.{sys.version_info[1]}'
DiskUsage = namedtuple('DiskUsage', 'total used free')


@pytest.fixture
def setup_env(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script as a module, in a temporary directory, on a machine fit for a build."""
    spec = importlib.util.spec_from_file_location('setup_env', ROOT / 'tools' / 'setup_env.py')
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, 'setup_env', module)  # dataclasses look their module up there
    spec.loader.exec_module(module)
    for name in ('CXX', 'TORCH_SPEC', 'MAX_JOBS', 'MMCV', 'FORCE_CUDA', 'CUDA_HOME', 'CUDA_PATH'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('VENV', str(tmp_path / 'venv'))
    monkeypatch.setenv('DINO_MM_CACHE', str(tmp_path / 'cache'))
    monkeypatch.setenv('PATH', str(tmp_path / 'bin'))
    write_command(tmp_path / 'bin' / 'c++', 'exit 0')
    monkeypatch.setattr(module, 'HEADERS_PROBE', 'pass')
    set_free_space(monkeypatch, module, 50e9)
    return module


def set_free_space(monkeypatch: pytest.MonkeyPatch, module: ModuleType, free: float) -> None:
    monkeypatch.setattr(module.shutil, 'disk_usage', lambda _: DiskUsage(90e9, 90e9 - free, free))


def write_command(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f'#!/bin/sh\n{script}\n')
    path.chmod(0o755)


def fake_venv(settings) -> None:
    """An environment without any package, whose Python, and thus pip, is the one of the tests."""
    write_command(settings.python, f'exec "{sys.executable}" "$@"')
    (settings.venv / 'pyvenv.cfg').write_text(f'version = {PYTHON}.4\n')


def fake_package(settings, name: str, version: str, complete: bool = True) -> Path:
    info = settings.site_packages / f'{name.replace("-", "_")}-{version}.dist-info'
    info.mkdir(parents=True)
    (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n')
    if complete:
        (info / 'INSTALLER').touch()
    return info


def fail(setup_env: ModuleType, capsys: pytest.CaptureFixture) -> str:
    """The one line on stderr with which the setup ends."""
    assert setup_env.main() == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith('[setup] error: ')
    return lines[0]


def test_cache_follows_xdg(setup_env, monkeypatch):
    monkeypatch.delenv('DINO_MM_CACHE')
    monkeypatch.setenv('XDG_CACHE_HOME', '/caches')
    assert setup_env.Settings.from_env().cache == Path('/caches/dino_mm')
    monkeypatch.delenv('XDG_CACHE_HOME')
    assert setup_env.Settings.from_env().cache == Path.home() / '.cache' / 'dino_mm'


def test_python_version_is_the_one_of_the_environment(setup_env):
    settings = setup_env.Settings.from_env()
    assert settings.python_version == PYTHON
    fake_venv(settings)
    (settings.venv / 'pyvenv.cfg').write_text('home = /usr/bin\nversion = 3.9.18\n')
    assert settings.python_version == '3.9'


@pytest.mark.parametrize(
    ('mmcv', 'wheel', 'files', 'build'),
    [
        ('', '', ['requirements-lite.txt'], False),
        ('', '/w/mmcv-2.1.0.whl', ['requirements-build.txt'], False),
        ('build', '/w/mmcv-2.1.0.whl', ['requirements-build.txt'], True),
        ('forks', None, ['requirements-forks.txt'], None),
    ],
)
def test_kinds_of_mmdetection(setup_env, monkeypatch, mmcv, wheel, files, build):
    """A kind's own file of requirements, mmcv's wheel where there is one, and no torch but the chosen one."""
    monkeypatch.setenv('MMCV', mmcv)
    commands = []
    monkeypatch.setattr(setup_env, 'run', lambda command, env=None: commands.append((command, env)))
    monkeypatch.setattr(setup_env, 'succeeds', lambda command: True)
    find = Mock(return_value=Mock(returncode=0, stdout=f'{wheel}\n'))
    monkeypatch.setattr(setup_env.subprocess, 'run', find)
    setup_env.install_packages(setup_env.Settings.from_env())
    ((command, env),) = commands
    given = [command[i + 1] for i, option in enumerate(command) if option == '-r']
    assert given == [*files, 'requirements.txt']
    assert all((ROOT / name).is_file() for name in given)
    assert [name for name in command if name.endswith('.whl')] == ([wheel] if wheel else [])
    assert set(setup_env.TORCH_SPEC.split()) < set(command)
    assert env['MMCV_WITH_OPS'] == '0'  # or the source of the forks' mmcv would be compiled
    assert ['--build' in call.args[0] for call in find.call_args_list] == ([] if build is None else [build])


def test_headless_opencv_only_where_the_other_does_not_load(setup_env, monkeypatch):
    settings = setup_env.Settings.from_env()
    fake_package(settings, 'opencv-python', '5.0.0.93')
    commands = []
    monkeypatch.setattr(setup_env, 'run', lambda command, env=None: commands.append(command))
    monkeypatch.setattr(setup_env, 'find_mmcv', lambda settings: '')
    for loads, spec in ((True, '.[demo,fast-eval]'), (False, 'opencv-python-headless==5.0.0.93')):
        monkeypatch.setattr(setup_env, 'succeeds', lambda command, loads=loads: loads)
        setup_env.install_packages(settings)
        assert commands[-1][-1] == spec


@pytest.mark.parametrize(
    'found',
    [
        (),
        ('mmcv',),
        ('mmcv-lite', 'mmcv', 'mmdet'),
        ('onedl-mmcv', 'onedl-mmdetection', 'onedl-mmengine', 'opencv-python', 'opencv-python-headless'),
    ],
)
def test_what_another_kind_has_left_goes_before_anything_is_installed(setup_env, monkeypatch, found):
    settings = setup_env.Settings.from_env()
    for name in (*found, 'mmdet-dino', 'numpy'):
        fake_package(settings, name, '1.0')
    commands = []
    monkeypatch.setattr(setup_env, 'run', commands.append)
    setup_env.install_torch(settings)
    removed = [command[-len(found) :] for command in commands[:-1]]
    assert [sorted(names) for names in removed] == ([sorted(found)] if found else [])
    assert commands[-1][-2:] == setup_env.TORCH_SPEC.split()


def test_half_installed_packages_do_not_count(setup_env, monkeypatch):
    pytest.importorskip('pip')
    settings = setup_env.Settings.from_env()
    fake_venv(settings)
    half, whole = fake_package(settings, 'torch', '2.14.1', complete=False), fake_package(settings, 'mmdet', '3.3.0')
    setup_env.create_venv(settings)
    assert (half.exists(), whole.exists()) == (False, True)  # pip, too, would take the half one for installed


def test_unknown_kind(setup_env, monkeypatch, capsys):
    monkeypatch.setenv('MMCV', 'full')
    assert 'MMCV=full is unknown; leave it empty, or choose build or forks' in fail(setup_env, capsys)


@pytest.mark.parametrize('version', ['3.9', '3.14'])
def test_python_that_is_too_old_or_too_new(setup_env, capsys, version):
    settings = setup_env.Settings.from_env()
    fake_venv(settings)
    (settings.venv / 'pyvenv.cfg').write_text(f'version = {version}.1\n')
    line = fail(setup_env, capsys)
    assert f'this is Python {version}, but 3.10, 3.11, 3.12 or 3.13 is needed' in line
    assert 'make setup PYTHON=' in line


def test_full_disk(setup_env, monkeypatch, capsys, tmp_path):
    set_free_space(monkeypatch, setup_env, 4e9)
    line = fail(setup_env, capsys)
    assert f'the environment needs 10 GB at {tmp_path}, 4.0 GB are free' in line
    assert 'set VENV to' in line


def test_full_disk_is_no_problem_once_torch_is_there(setup_env, monkeypatch):
    set_free_space(monkeypatch, setup_env, 2e9)
    settings = setup_env.Settings.from_env()
    fake_package(settings, 'torch', '2.14.1')
    setup_env.preflight(settings)


def test_full_temporary_directory(setup_env, monkeypatch, capsys):
    monkeypatch.setenv('MMCV', 'build')
    set_free_space(monkeypatch, setup_env, 0.3e9)
    fake_package(setup_env.Settings.from_env(), 'torch', '2.14.1')
    line = fail(setup_env, capsys)
    assert 'the build of mmcv needs 1 GB' in line
    assert '0.3 GB are free' in line
    assert 'set TMPDIR to' in line


def test_no_compiler(setup_env, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv('MMCV', 'build')
    monkeypatch.setenv('PATH', str(tmp_path))
    line = fail(setup_env, capsys)
    assert 'no C++ compiler (c++, g++, clang++)' in line
    assert 'apt install build-essential' in line
    monkeypatch.setenv('CXX', 'g++-42')
    assert 'no C++ compiler (g++-42)' in fail(setup_env, capsys)


def test_no_cuda_compiler(setup_env, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv('MMCV', 'build')
    monkeypatch.setenv('FORCE_CUDA', '1')
    monkeypatch.setenv('CUDA_HOME', str(tmp_path / 'cuda'))
    assert 'FORCE_CUDA=1, but no nvcc' in fail(setup_env, capsys)
    write_command(tmp_path / 'cuda' / 'bin' / 'nvcc', 'exit 0')
    setup_env.preflight(setup_env.Settings.from_env())


def test_no_compiler_is_needed_by_default(setup_env, monkeypatch, tmp_path):
    monkeypatch.setenv('PATH', str(tmp_path))
    for kind in ('', 'forks'):
        monkeypatch.setenv('MMCV', kind)
        setup_env.preflight(setup_env.Settings.from_env())


def test_no_python_headers(setup_env, monkeypatch, capsys):
    monkeypatch.setenv('MMCV', 'build')
    monkeypatch.setattr(setup_env, 'HEADERS_PROBE', "open('/nowhere/Python.h')")
    line = fail(setup_env, capsys)
    assert 'no Python.h' in line
    assert f'apt install python{PYTHON}-dev' in line


def test_no_network(setup_env, monkeypatch, capsys):
    pytest.importorskip('pip')
    for name in ('PIP_NO_INDEX', 'PIP_EXTRA_INDEX_URL', 'PIP_FIND_LINKS'):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv('PIP_CONFIG_FILE', os.devnull)
    monkeypatch.setenv('PIP_INDEX_URL', 'http://127.0.0.1:9')
    fake_venv(setup_env.Settings.from_env())
    line = fail(setup_env, capsys)
    assert 'pip cannot reach the package index' in line
    assert 'PIP_INDEX_URL' in line


def test_complete_environment_is_left_alone(setup_env, monkeypatch, capsys):
    settings = setup_env.Settings.from_env()
    fake_venv(settings)
    stamp = settings.venv / 'dino_mm.stamp'
    stamp.write_text(setup_env.fingerprint(settings))
    monkeypatch.setattr(setup_env.subprocess, 'run', None)  # nothing may be started
    assert setup_env.main() == 0
    assert capsys.readouterr().out == f'[setup] {settings.venv} is up to date\n'


def test_stamp_goes_before_anything_changes(setup_env, monkeypatch, capsys):
    pytest.importorskip('pip')
    settings = setup_env.Settings.from_env()
    fake_venv(settings)
    stamp = settings.venv / 'dino_mm.stamp'
    stamp.write_text(setup_env.fingerprint(settings))
    monkeypatch.setenv('TORCH_SPEC', 'torch==2.9.1 torchvision==0.24.1')
    monkeypatch.setattr(setup_env, 'check_index', Mock(side_effect=setup_env.SetupError('cut off')))
    assert fail(setup_env, capsys) == '[setup] error: cut off'
    assert not stamp.exists()  # or the first torch's stamp would vouch for half of the second
