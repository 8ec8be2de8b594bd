"""The parts of tools/mmcv_wheel.py that decide; no network, no compiler."""

import importlib.util
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from unittest.mock import Mock

import pytest
from commands import ROOT

TAG = f'cp{sys.version_info[0]}{sys.version_info[1]}'
MACHINE = platform.machine()


@pytest.fixture
def mmcv_wheel(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script as a module, beside a torch 2.14.1 for CUDA 13.0, without GPUs or CUDA's compiler."""
    spec = importlib.util.spec_from_file_location('mmcv_wheel', ROOT / 'tools' / 'mmcv_wheel.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for name in ('CXX', 'MAX_JOBS', 'FORCE_CUDA', 'TORCH_CUDA_ARCH_LIST', 'CPATH'):
        monkeypatch.delenv(name, raising=False)
    set_torch(monkeypatch, module)
    monkeypatch.setattr(module, 'cuda_toolkit', lambda: None)
    return module


def set_torch(
    monkeypatch: pytest.MonkeyPatch,
    module: ModuleType,
    version: str = '2.14.1+cu130',
    cuda: str | None = '13.0',
    gpus: tuple[tuple[int, int], ...] = (),
    site: Path = Path('site'),
) -> None:
    torch = Mock(__version__=version, __file__=str(site / 'torch' / '__init__.py'))
    torch.version.cuda = cuda
    torch.cuda.device_count.return_value = len(gpus)
    torch.cuda.get_device_capability = lambda i: gpus[i]
    monkeypatch.setattr(module, 'torch', torch)


@pytest.mark.parametrize(
    ('torch', 'force', 'arch_list', 'nvcc', 'ops'),
    [
        (dict(cuda=None), '', '', True, 'cpu'),
        (dict(cuda=None), '1', '9.0', True, 'cpu'),
        (dict(), '', '9.0', True, 'cu13.0'),
        (dict(), '1', '', True, 'cu13.0-gpuops-all'),
        (dict(), '1', '9.0', False, 'cu13.0'),
        (dict(), '1', '8.0;9.0+PTX', True, 'cu13.0-gpuops-8.0-9.0+PTX'),
        (dict(gpus=((9, 0), (8, 6), (9, 0))), '', '', True, 'cu13.0-gpuops-8.6-9.0'),
        (dict(gpus=((9, 0),)), '', '8.0 8.6', True, 'cu13.0-gpuops-8.0-8.6'),
        (dict(gpus=((9, 0),)), '', '', False, 'cu13.0'),
    ],
)
def test_wheel_folder_names_all_that_operators_depend_on(
    mmcv_wheel, monkeypatch, tmp_path, torch, force, arch_list, nvcc, ops
):
    set_torch(monkeypatch, mmcv_wheel, **torch)
    monkeypatch.setattr(mmcv_wheel, 'cuda_toolkit', lambda: tmp_path if nvcc else None)
    monkeypatch.setenv('FORCE_CUDA', force)
    monkeypatch.setenv('TORCH_CUDA_ARCH_LIST', arch_list)
    folder = mmcv_wheel.wheel_folder(tmp_path, mmcv_wheel.gpu_targets())
    assert folder == tmp_path / 'wheels' / f'mmcv2.1.0-torch2.14.1-{TAG}-{MACHINE}-{ops}'


@pytest.mark.parametrize(
    ('version', 'cuda', 'url'),
    [
        ('2.1.2+cu121', '12.1', 'https://download.openmmlab.com/mmcv/dist/cu121/torch2.1.0/index.html'),
        ('2.4.1+cpu', None, 'https://download.openmmlab.com/mmcv/dist/cpu/torch2.4.0/index.html'),
    ],
)
def test_address_of_the_prebuilt_wheel(mmcv_wheel, monkeypatch, tmp_path, version, cuda, url):
    set_torch(monkeypatch, mmcv_wheel, version, cuda)
    run = Mock()
    monkeypatch.setattr(mmcv_wheel.subprocess, 'run', run)
    mmcv_wheel.download_prebuilt(tmp_path)
    assert [call.args[0][-2:] for call in run.call_args_list] == [[url, 'mmcv==2.1.0']]


@pytest.mark.parametrize(
    ('version', 'build', 'cached', 'on_index', 'asked', 'compiled', 'found'),
    [
        ('2.4.1', False, False, True, True, False, True),
        ('2.4.1', False, False, False, True, False, False),
        ('2.4.1', False, True, False, False, False, True),
        ('2.4.1', True, False, True, True, False, True),
        ('2.4.1', True, False, False, True, True, True),
        ('2.5.0', False, False, True, False, False, False),
        ('2.14.1', False, True, True, False, False, False),  # what was compiled here once is not the default
        ('2.14.1', True, True, True, False, False, True),
        ('2.14.1', True, False, True, False, True, True),
    ],
)
def test_where_the_wheel_comes_from(
    mmcv_wheel, monkeypatch, tmp_path, capsys, version, build, cached, on_index, asked, compiled, found
):
    set_torch(monkeypatch, mmcv_wheel, version)
    wheel = mmcv_wheel.wheel_folder(tmp_path, []) / 'mmcv-2.1.0-any.whl'
    wheel.parent.mkdir(parents=True)
    download = Mock(side_effect=lambda folder: wheel.touch() if on_index else None)
    compile_ = Mock(side_effect=lambda folder, log, targets: wheel.touch())
    monkeypatch.setattr(mmcv_wheel, 'download_prebuilt', download)
    monkeypatch.setattr(mmcv_wheel, 'build', compile_)
    monkeypatch.setattr(sys, 'argv', ['mmcv_wheel.py', '--cache', str(tmp_path), *(['--build'] if build else [])])
    if cached:
        wheel.touch()
    assert mmcv_wheel.main() == 0
    assert (download.called, compile_.called) == (asked, compiled)
    assert capsys.readouterr().out.strip() == (str(wheel) if found else '')


def test_failed_build_shows_the_end_of_its_log(mmcv_wheel, monkeypatch, tmp_path, capsys):
    def build(folder: Path, log: Path, targets: list[str]) -> None:
        log.parent.mkdir()
        log.write_text('\n'.join(f'line {i}' for i in range(40)))
        raise subprocess.CalledProcessError(1, 'setup.py')

    monkeypatch.setattr(mmcv_wheel, 'build', build)
    monkeypatch.setattr(sys, 'argv', ['mmcv_wheel.py', '--cache', str(tmp_path), '--build'])
    assert mmcv_wheel.main() == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[:15] == [f'line {i}' for i in range(25, 40)]
    assert re.fullmatch(r'\[setup\] mmcv did not compile; fix what .*\.log says and run this again', lines[15])


@pytest.mark.parametrize(
    ('header', 'standard'),
    [
        ('#error C++20 or later compatible compiler is required to use PyTorch.', '20'),
        ('#error "C++17 or later compatible compiler is required to use PyTorch."', '17'),
        ('#error C++14 or later compatible compiler is required to use ATen.', '14'),
        ('#pragma once', '17'),
    ],
)
def test_cpp_standard(mmcv_wheel, tmp_path, header, standard):
    folder = tmp_path / 'include' / 'torch' / 'csrc'
    folder.mkdir(parents=True)
    (folder / 'all.h').write_text(f'#if !defined(_MSC_VER)\n{header}\n#endif\n')
    (folder / 'latin1.h').write_bytes(b'// \xe9\n')
    assert mmcv_wheel.cpp_standard(tmp_path / 'include') == standard


def test_cpp_standard_is_the_highest_that_a_header_demands(mmcv_wheel, tmp_path):
    for number in (17, 20, 14):
        text = f'#error C++{number} or later compatible compiler is required'
        (tmp_path / f'{number}.h').write_text(text)
    assert mmcv_wheel.cpp_standard(tmp_path) == '20'


def test_set_cpp_standard(mmcv_wheel):
    script = (
        "if torch_version <= parse_version('1.12.1'):\n"
        "    extra_compile_args['nvcc'] += ['-std=c++14']\n"
        'else:\n'
        "    extra_compile_args['nvcc'] += ['-std=c++17']\n"
        "extra_compile_args['cxx'] = ['-Wall', '-std=c++17']  # 17 flags\n"
    )
    assert mmcv_wheel.set_cpp_standard(script, '17') == script
    assert mmcv_wheel.set_cpp_standard(script, '20') == script.replace('c++17', 'c++20')


def test_build_environment(mmcv_wheel, monkeypatch):
    env = mmcv_wheel.build_environment([])
    assert (env['MMCV_WITH_OPS'], env['FORCE_CUDA'], env['CUDA_VISIBLE_DEVICES']) == ('1', '0', '')
    assert env['CFLAGS'] == '-g0 -O2 -w'
    assert env['PATH'].split(os.pathsep)[0] == str(Path(sys.executable).parent)
    assert 1 <= int(env['MAX_JOBS']) <= os.cpu_count()
    assert 'CPATH' not in env
    monkeypatch.setenv('MAX_JOBS', '7')
    assert mmcv_wheel.build_environment([])['MAX_JOBS'] == '7'


@pytest.mark.parametrize('complete', [True, False])
def test_headers_that_the_toolkit_lacks_come_from_torchs_packages(mmcv_wheel, monkeypatch, tmp_path, complete):
    for name in ('toolkit/include', 'site/nvidia/cu13/include', 'site/nvidia/nccl/include', 'site/nvidia/nccl/lib'):
        (tmp_path / name).mkdir(parents=True)
    if complete:
        (tmp_path / 'toolkit/include/cusparse.h').touch()
    set_torch(monkeypatch, mmcv_wheel, site=tmp_path / 'site')
    monkeypatch.setattr(mmcv_wheel, 'cuda_toolkit', lambda: tmp_path / 'toolkit')
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', '3')
    monkeypatch.setenv('CPATH', '/mine')
    env = mmcv_wheel.build_environment(['9.0'])
    assert (env['FORCE_CUDA'], env['CUDA_VISIBLE_DEVICES']) == ('1', '3')
    folders = [] if complete else [str(tmp_path / f'site/nvidia/{name}/include') for name in ('cu13', 'nccl')]
    assert env['CPATH'].split(os.pathsep) == [*folders, '/mine']
