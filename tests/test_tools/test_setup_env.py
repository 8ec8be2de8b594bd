"""The parts of tools/setup_env.py that decide, and the failures that it announces; no network."""

import importlib.util
import os
import platform
import sys
from collections import namedtuple
from pathlib import Path
from types import ModuleType
from unittest.mock import Mock

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / 'tools' / 'setup_env.py'
PYTHON = f'{sys.version_info[0]}.{sys.version_info[1]}'
TAG = f'cp{sys.version_info[0]}{sys.version_info[1]}'
MACHINE = platform.machine()
DiskUsage = namedtuple('DiskUsage', 'total used free')


@pytest.fixture
def setup_env(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    """The script as a module, in a temporary directory, on a machine fit for a build."""
    spec = importlib.util.spec_from_file_location('setup_env', SCRIPT)
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, 'setup_env', module)  # dataclasses look their module up there
    spec.loader.exec_module(module)
    for name in ('CXX', 'TORCH_SPEC', 'MAX_JOBS'):
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


def fake_package(settings, name: str, version: str, last_file: str = 'INSTALLER') -> None:
    packages = settings.venv / 'lib' / f'python{PYTHON}' / 'site-packages'
    info = packages / f'{name}-{version}.dist-info'
    info.mkdir(parents=True)
    (info / last_file).touch()


def fail(setup_env: ModuleType, capsys: pytest.CaptureFixture) -> str:
    """The one line on stderr with which the setup ends."""
    assert setup_env.main() == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith('[setup] error: ')
    return lines[0]


@pytest.mark.parametrize(
    ('cuda', 'gpu_ops', 'ops'),
    [(None, False, 'cpu'), ('13.0', False, 'cu13.0'), ('12.1', True, 'cu12.1-gpuops')],
)
def test_wheel_folder(setup_env, tmp_path, cuda, gpu_ops, ops):
    torch = setup_env.Torch('2.14.1', cuda, gpu_ops, 'include')
    folder = setup_env.wheel_folder(setup_env.Settings.from_env(), torch.version, torch.ops)
    assert folder == tmp_path / 'cache' / 'wheels' / f'mmcv2.1.0-torch2.14.1-{TAG}-{MACHINE}-{ops}'


def test_wheel_folder_names_the_python_of_the_environment(setup_env):
    settings = setup_env.Settings.from_env()
    fake_venv(settings)
    (settings.venv / 'pyvenv.cfg').write_text('home = /usr/bin\nversion = 3.10.13\n')
    assert '-cp310-' in setup_env.wheel_folder(settings, '2.14.1', 'cpu').name


def test_cache_follows_xdg(setup_env, monkeypatch):
    monkeypatch.delenv('DINO_MM_CACHE')
    monkeypatch.setenv('XDG_CACHE_HOME', '/caches')
    assert setup_env.Settings.from_env().cache == Path('/caches/dino_mm')
    monkeypatch.delenv('XDG_CACHE_HOME')
    assert setup_env.Settings.from_env().cache == Path.home() / '.cache' / 'dino_mm'


@pytest.mark.parametrize(
    ('header', 'standard'),
    [
        ('#error C++20 or later compatible compiler is required to use PyTorch.', '20'),
        ('#error "C++17 or later compatible compiler is required to use PyTorch."', '17'),
        ('#error C++14 or later compatible compiler is required to use ATen.', '14'),
        ('#pragma once', '17'),
    ],
)
def test_cpp_standard(setup_env, tmp_path, header, standard):
    folder = tmp_path / 'include' / 'torch' / 'csrc'
    folder.mkdir(parents=True)
    (folder / 'all.h').write_text(f'#if !defined(_MSC_VER)\n{header}\n#endif\n')
    (folder / 'latin1.h').write_bytes(b'// \xe9\n')
    assert setup_env.cpp_standard(tmp_path / 'include') == standard


def test_cpp_standard_is_the_highest_that_a_header_demands(setup_env, tmp_path):
    for number in (17, 20, 14):
        text = f'#error C++{number} or later compatible compiler is required'
        (tmp_path / f'{number}.h').write_text(text)
    assert setup_env.cpp_standard(tmp_path) == '20'


def test_set_cpp_standard(setup_env):
    script = (
        "if torch_version <= parse_version('1.12.1'):\n"
        "    extra_compile_args['nvcc'] += ['-std=c++14']\n"
        'else:\n'
        "    extra_compile_args['nvcc'] += ['-std=c++17']\n"
        "extra_compile_args['cxx'] = ['-Wall', '-std=c++17']  # 17 flags\n"
    )
    assert setup_env.set_cpp_standard(script, '17') == script
    assert setup_env.set_cpp_standard(script, '20') == script.replace('c++17', 'c++20')


def test_torch_satisfied(setup_env, monkeypatch):
    settings = setup_env.Settings.from_env()
    assert not setup_env.torch_satisfied(settings)
    fake_package(settings, 'torch', '2.14.1')
    assert not setup_env.torch_satisfied(settings)
    fake_package(settings, 'torchvision', '0.29.1+cpu')
    assert setup_env.torch_satisfied(settings)
    monkeypatch.setenv('TORCH_SPEC', 'torch==2.9.1 torchvision==0.29.1')
    assert not setup_env.torch_satisfied(setup_env.Settings.from_env())
    monkeypatch.setenv('TORCH_SPEC', 'torch torchvision==0.29.1+cpu')
    assert setup_env.torch_satisfied(setup_env.Settings.from_env())


def test_half_installed_torch_does_not_count(setup_env):
    settings = setup_env.Settings.from_env()
    fake_package(settings, 'torch', '2.14.1', last_file='METADATA')
    fake_package(settings, 'torchvision', '0.29.1')
    assert not setup_env.torch_satisfied(settings)


def test_build_expected(setup_env, monkeypatch, tmp_path):
    settings = setup_env.Settings.from_env()
    assert setup_env.build_expected(settings)
    wheel = setup_env.wheel_folder(settings, '2.14.1', 'cu13.0') / 'mmcv-2.1.0-any.whl'
    wheel.parent.mkdir(parents=True)
    wheel.touch()
    assert not setup_env.build_expected(settings)
    monkeypatch.setenv('TORCH_SPEC', 'torch==2.9.1 torchvision==0.24.1')
    settings = setup_env.Settings.from_env()
    assert setup_env.build_expected(settings)
    fake_package(settings, 'mmcv', '2.1.0')
    assert not setup_env.build_expected(settings)


def test_old_torch_may_find_a_prebuilt_mmcv(setup_env, monkeypatch):
    monkeypatch.setenv('TORCH_SPEC', 'torch==2.1.2 torchvision==0.16.2')
    assert not setup_env.build_expected(setup_env.Settings.from_env())


def test_build_environment(setup_env, tmp_path, monkeypatch):
    settings = setup_env.Settings.from_env()
    env = setup_env.build_environment(settings, setup_env.Torch('2.14.1', '13.0', False, ''))
    assert (env['MMCV_WITH_OPS'], env['FORCE_CUDA'], env['CUDA_VISIBLE_DEVICES']) == ('1', '0', '')
    assert (env['CXX'], env['CFLAGS']) == ('c++', '-g0 -O2 -w')
    assert env['PATH'].split(os.pathsep)[0] == str(settings.venv / 'bin')
    assert 1 <= int(env['MAX_JOBS']) <= os.cpu_count()
    monkeypatch.setenv('MAX_JOBS', '7')
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '3')
    env = setup_env.build_environment(settings, setup_env.Torch('2.14.1', '13.0', True, ''))
    assert (env['FORCE_CUDA'], env['CUDA_VISIBLE_DEVICES'], env['MAX_JOBS']) == ('1', '3', '7')


def test_unsupported_python(setup_env, monkeypatch, capsys):
    monkeypatch.setattr(setup_env, 'PYTHONS', ('3.98', '3.99'))
    line = fail(setup_env, capsys)
    assert f'this is Python {PYTHON}, but 3.98 or 3.99 is needed' in line
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
    set_free_space(monkeypatch, setup_env, 0.3e9)
    fake_package(setup_env.Settings.from_env(), 'torch', '2.14.1')
    line = fail(setup_env, capsys)
    assert 'the build of mmcv needs 1 GB' in line
    assert '0.3 GB are free' in line
    assert 'set TMPDIR to' in line


def test_no_compiler(setup_env, monkeypatch, capsys, tmp_path):
    monkeypatch.setenv('PATH', str(tmp_path))
    line = fail(setup_env, capsys)
    assert 'no C++ compiler (c++, g++, clang++)' in line
    assert 'apt install build-essential' in line
    monkeypatch.setenv('CXX', 'g++-42')
    assert 'no C++ compiler (g++-42)' in fail(setup_env, capsys)


def test_no_python_headers(setup_env, monkeypatch, capsys):
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
