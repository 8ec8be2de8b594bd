"""Get a wheel of mmcv with compiled operators for the torch that runs this, and print its path.

``tools/setup_env.py`` runs this in its environment. For a torch up to 2.4 the wheel comes from OpenMMLab's index; with
``--build``, from a compiler where the index has none. The cache keeps both. Without a wheel nothing is printed.
Environment variables:

CXX, MAX_JOBS         the C++ compiler and the number of its processes
FORCE_CUDA            1 compiles the GPU operators also where no GPU is
TORCH_CUDA_ARCH_LIST  the GPUs to compile for, such as ``8.0;9.0`` (default: those of this machine)
"""

import argparse
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

VERSION = '2.1.0'
INDEX = 'https://download.openmmlab.com/mmcv/dist/{}/torch{}.{}.0/index.html'
LAST_PREBUILT_TORCH = (2, 4)
GB = 10**9
PIP = (sys.executable, '-m', 'pip', '-q', '--disable-pip-version-check')
#: mmcv's setup.py imports pkg_resources, which newer setuptools lack. torch asks for 77.0.3 or newer.
BUILD_TOOLS = ('setuptools>=77.0.3,<80', 'ninja', 'packaging', 'psutil', 'wheel')


def cuda_toolkit() -> Path | None:
    """The folder of the CUDA toolkit that torch's build extension will use, if it has a compiler."""
    from torch.utils.cpp_extension import CUDA_HOME  # not above: it warns where no GPU is

    return Path(CUDA_HOME) if CUDA_HOME and Path(CUDA_HOME, 'bin', 'nvcc').exists() else None


def gpu_targets() -> list[str]:
    """The compute capabilities to compile for; none if the GPU operators are left out."""
    gpus = [torch.cuda.get_device_capability(i) for i in range(torch.cuda.device_count())]
    wanted = gpus or os.environ.get('FORCE_CUDA') == '1'
    if not (wanted and torch.version.cuda and cuda_toolkit()):
        return []
    named = re.findall(r'[^ ;]+', os.environ.get('TORCH_CUDA_ARCH_LIST', ''))
    return named or sorted({f'{major}.{minor}' for major, minor in gpus}) or ['all']


def wheel_folder(cache: Path, targets: list[str]) -> Path:
    """Name the cache folder of a wheel after everything that its compiled operators depend on."""
    version = torch.__version__.split('+')[0]
    python = 'cp{}{}'.format(*sys.version_info)
    cuda = f'cu{torch.version.cuda}' if torch.version.cuda else 'cpu'
    ops = '-'.join([cuda, 'gpuops', *targets] if targets else [cuda])
    return cache / 'wheels' / f'mmcv{VERSION}-torch{version}-{python}-{platform.machine()}-{ops}'


def torch_release() -> tuple[int, int]:
    """The major and minor number of torch."""
    major, minor = torch.__version__.split('.')[:2]
    return int(major), int(minor)


def download_prebuilt(folder: Path) -> None:
    """Try OpenMMLab's index."""
    cuda = f'cu{torch.version.cuda}'.replace('.', '') if torch.version.cuda else 'cpu'
    options = ('--no-deps', '--only-binary', ':all:', '--timeout', '10', '--retries', '0', '-d', str(folder))
    url = INDEX.format(cuda, *torch_release())
    subprocess.run([*PIP, 'download', *options, '-f', url, f'mmcv=={VERSION}'], capture_output=True)


def build(folder: Path, log: Path, targets: list[str]) -> None:
    """Compile mmcv's source release and put the wheel in its folder of the cache."""
    log.parent.mkdir(parents=True, exist_ok=True)
    folder.mkdir(parents=True, exist_ok=True)
    what = f'the CPU and GPUs ({", ".join(targets)})' if targets else 'the CPU (FORCE_CUDA=1 and nvcc: GPUs too)'
    print(f'[setup] compiling mmcv for {what}: 7 to 18 minutes, for GPUs 60; log: {log}', file=sys.stderr, flush=True)
    with log.open('w') as output, tempfile.TemporaryDirectory(prefix='mmcv-') as scratch:
        where = dict(stdout=output, stderr=output, check=True)
        subprocess.run([*PIP, 'install', *BUILD_TOOLS], **where)
        # pip asks its setup.py for the name, which imports torch: no isolation, and the build's environment.
        options = ('--no-deps', '--no-binary', ':all:', '--no-build-isolation', '-d', scratch)
        env = build_environment(targets)
        subprocess.run([*PIP, 'download', *options, f'mmcv=={VERSION}'], env=env, **where)
        source = Path(scratch, f'mmcv-{VERSION}')
        shutil.unpack_archive(f'{source}.tar.gz', scratch)
        script = source / 'setup.py'
        script.write_text(set_cpp_standard(script.read_text(), cpp_standard(Path(torch.__file__).parent / 'include')))
        subprocess.run([sys.executable, 'setup.py', 'bdist_wheel'], cwd=source, env=env, **where)
        built = next((source / 'dist').glob('mmcv-*.whl'))
        # Copied first, as the cache may be on another disk: nobody must ever find half a wheel.
        Path(shutil.copy(built, folder / f'.{os.getpid()}.part')).replace(folder / built.name)


def cpp_standard(include: Path) -> str:
    """Read the C++ standard, such as ``20``, that torch's headers demand."""
    demand = re.compile(r'C\+\+(\d\d) or later compatible compiler is required')
    texts = (header.read_text(errors='ignore') for header in include.rglob('*.h'))
    return max((found for text in texts for found in demand.findall(text)), default='17')


def set_cpp_standard(script: str, standard: str) -> str:
    """Make mmcv's setup.py compile by the given C++ standard."""
    # It names C++17 for every torch that we support; its C++14 is for torch up to 1.12.
    return re.sub(r'(?<=-std=c\+\+)17\b', standard, script)


def build_environment(targets: list[str]) -> dict[str, str]:
    """Return the variables that steer mmcv's setup.py and torch's build extension."""
    env = dict(os.environ, MMCV_WITH_OPS='1', FORCE_CUDA=str(int(bool(targets))), CFLAGS='-g0 -O2 -w')
    # torch looks for ninja on the PATH; without it, it compiles one file after the other.
    env['PATH'] = os.pathsep.join([str(Path(sys.executable).parent), env.get('PATH', os.defpath)])
    if not targets:
        env['CUDA_VISIBLE_DEVICES'] = ''  # a visible GPU makes mmcv's setup.py call nvcc
    elif not (cuda_toolkit() / 'include' / 'cusparse.h').exists():
        # torch's headers include those of CUDA's libraries. A bare toolkit lacks them, torch's own packages have them.
        folders = sorted(Path(torch.__file__).parents[1].glob('nvidia/*/include'))
        env['CPATH'] = os.pathsep.join([*map(str, folders), *filter(None, [env.get('CPATH')])])
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    # One of its compiler processes takes up to 2 GB.
    env.setdefault('MAX_JOBS', str(max(1, min(os.cpu_count() or 1, memory // (2 * GB)))))
    return env


def main() -> int:
    """Print the wheel's path, or tell in one line why there is none."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--cache', type=Path, required=True, help='keeps wheels and logs')
    parser.add_argument('--build', action='store_true', help='compile mmcv if there is no wheel of it')
    args = parser.parse_args()
    prebuilt = torch_release() <= LAST_PREBUILT_TORCH
    if not (prebuilt or args.build):
        return 0  # what --build once compiled here is not what others get
    targets = gpu_targets()
    folder = wheel_folder(args.cache, targets)
    log = args.cache / 'logs' / f'{folder.name}.log'
    try:
        if prebuilt and not any(folder.glob('mmcv-*.whl')):
            download_prebuilt(folder)
        if args.build and not any(folder.glob('mmcv-*.whl')):
            build(folder, log, targets)
    except subprocess.CalledProcessError:
        print(*log.read_text(errors='replace').splitlines()[-15:], sep='\n', file=sys.stderr)
        print(f'[setup] mmcv did not compile; fix what {log} says and run this again', file=sys.stderr)
        return 1
    print(*folder.glob('mmcv-*.whl'))
    return 0


if __name__ == '__main__':
    sys.exit(main())
