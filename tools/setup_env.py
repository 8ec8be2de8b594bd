"""Set up a virtual environment with torch, mmcv's compiled ops and this package in editable mode.

``make setup`` runs this; running it again does only what is missing. Environment variables:

VENV           the virtual environment (default ``.venv``; relative to the repository)
TORCH_SPEC     another torch, such as ``torch==2.9.1 torchvision==0.24.1``
DINO_MM_CACHE  keeps mmcv wheels built here, and the build logs (default ``~/.cache/dino_mm``)
CXX, MAX_JOBS  the C++ compiler and the number of its processes for mmcv's ops
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ('3.10', '3.11', '3.12')
TORCH_SPEC = 'torch==2.14.1 torchvision==0.29.1'
MMCV_VERSION = '2.1.0'
MMCV_INDEX = 'https://download.openmmlab.com/mmcv/dist/{}/torch{}.{}.0/index.html'
LAST_PREBUILT_TORCH = (2, 4)
OPENCV_SPEC = 'opencv-python-headless<4.12'
GB = 10**9
HEADERS_PROBE = "import sysconfig; open(sysconfig.get_path('include') + '/Python.h').close()"
MMCV_PROBE = 'import mmcv, mmcv.ops; assert (2, 0) <= mmcv.version_info[:2] < (2, 2)'
TORCH_PROBE = """
import json, os, torch
from torch.utils.cpp_extension import CUDA_HOME
nvcc = CUDA_HOME is not None and os.path.exists(CUDA_HOME + '/bin/nvcc')
gpu = torch.version.cuda is not None and torch.cuda.is_available()
print(json.dumps({'version': torch.__version__.split('+')[0], 'cuda': torch.version.cuda,
    'gpu_ops': gpu and nvcc, 'include': os.path.dirname(torch.__file__) + '/include'}))
"""
FINAL_CHECK = """
import torch, mmcv.ops, mmdet, dino_mm
from importlib.metadata import version
print(*(f'{name} {version(name)}' for name in ('torch', 'mmcv', 'mmdet', 'mmdet-dino')), sep=', ')
"""


class SetupError(Exception):
    """A problem and the way out of it, in one line."""


@dataclass(frozen=True)
class Settings:
    """What the caller's environment variables ask for."""

    venv: Path
    cache: Path
    torch_spec: str

    @classmethod
    def from_env(cls) -> Settings:
        """Read the variables that the module's docstring names."""
        user_cache = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache', 'dino_mm')
        return cls(
            venv=ROOT / Path(os.environ.get('VENV') or '.venv').expanduser(),
            cache=ROOT / Path(os.environ.get('DINO_MM_CACHE') or user_cache).expanduser(),
            torch_spec=os.environ.get('TORCH_SPEC') or TORCH_SPEC,
        )

    @property
    def python(self) -> Path:
        """The environment's interpreter."""
        return self.venv / 'bin' / 'python'

    @property
    def python_version(self) -> str:
        """The version in the environment or, where there is none yet, the one that will be."""
        config = self.venv / 'pyvenv.cfg'
        text = config.read_text() if self.python.exists() and config.exists() else ''
        found = re.search(r'^version(?:_info)? = (\d+\.\d+)', text, re.M)
        return found[1] if found else '{}.{}'.format(*sys.version_info)


@dataclass(frozen=True)
class Torch:
    """What an mmcv build must know about the installed torch."""

    version: str
    cuda: str | None
    gpu_ops: bool  # whether mmcv's ops can be, and need be, compiled for the GPU
    include: str

    @property
    def ops(self) -> str:
        """A name for the kind of ops; machines with and without a GPU may share a cache."""
        cuda = f'cu{self.cuda}' if self.cuda else 'cpu'
        return f'{cuda}-gpuops' if self.gpu_ops else cuda


def say(text: str) -> None:
    """Tell the user at once, also where stdout is a pipe."""
    print(f'[setup] {text}', flush=True)


def succeeds(command: list[str]) -> bool:
    """Run a command that may fail and need not explain why."""
    return subprocess.run(command, cwd=ROOT, capture_output=True).returncode == 0


def run(command: list[str], problem: str = '', env: dict[str, str] | None = None) -> str:
    """Run a command quietly and return its stdout; if it fails, show its last lines and raise."""
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode:
        print(*(done.stdout + done.stderr).splitlines()[-15:], sep='\n', file=sys.stderr)
        raise SetupError(problem or f'this failed, see its output above: {shlex.join(command)}')
    return done.stdout


def pip(settings: Settings, command: str, *args: str) -> list[str]:
    """Compose a command line of the environment's own pip."""
    return [str(settings.python), '-m', 'pip', command, '-q', '--disable-pip-version-check', *args]


def release(version: str) -> tuple[int, ...]:
    """Return the major and minor number of a version."""
    return tuple(int(number) for number in version.split('.')[:2])


def installed_version(settings: Settings, package: str) -> str | None:
    """Look up a package's version in the environment, without the time to start its Python."""
    # pip writes INSTALLER last: what an interrupted pip left behind does not count.
    found = settings.venv.glob(f'lib/python*/site-packages/{package}-*.dist-info/INSTALLER')
    return next((path.parent.stem[len(package) + 1 :] for path in found), None)


def torch_satisfied(settings: Settings) -> bool:
    """Tell whether everything in the torch specification is installed as pinned."""
    for spec in settings.torch_spec.split():
        name, _, pin = spec.partition('==')
        found = installed_version(settings, name)
        if found is None or pin not in ('', found, found.split('+')[0]):
            return False
    return True


def fingerprint(settings: Settings) -> str:
    """Hash everything that decides what the environment holds."""
    # ROOT is part of it because the editable install points there: a moved clone needs a new one.
    parts = [str(ROOT), settings.torch_spec, settings.python_version, MMCV_VERSION, OPENCV_SPEC]
    files = ('requirements.txt', 'setup.py', 'pyproject.toml')
    parts += [(ROOT / name).read_text() for name in files]
    return hashlib.sha256('\n'.join(parts).encode()).hexdigest()


def check_space(folder: Path, needed: int, purpose: str, variable: str) -> None:
    """Refuse to start where the disk would fill up half-way."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise SetupError(
            f'{purpose} needs {needed / GB:.0f} GB at {folder}, {free / GB:.1f} GB are free; '
            f'free some space, or set {variable} to a folder on another disk'
        )


def find_compiler() -> str:
    """Find the C++ compiler for mmcv's ops."""
    commands = [os.environ['CXX']] if os.environ.get('CXX') else ['c++', 'g++', 'clang++']
    for command in commands:
        if shutil.which(command):
            return command
    raise SetupError(
        f'no C++ compiler ({", ".join(commands)}), which mmcv needs to be built; '
        'install one (Debian, Ubuntu: apt install build-essential) or set CXX'
    )


def check_build_tools(settings: Settings) -> None:
    """Check what compiling mmcv takes: a compiler, Python's headers and room for the objects."""
    find_compiler()
    python = str(settings.python) if settings.python.exists() else sys.executable
    if not succeeds([python, '-c', HEADERS_PROBE]):
        raise SetupError(
            'no Python.h, which mmcv needs to be built; install the headers of this Python '
            f'(Debian, Ubuntu: apt install python{settings.python_version}-dev)'
        )
    check_space(Path(tempfile.gettempdir()), GB, 'the build of mmcv', 'TMPDIR')


def build_expected(settings: Settings) -> bool:
    """Tell whether mmcv must be compiled, as far as that shows before torch is installed."""
    if (installed_version(settings, 'mmcv') or '').startswith(('2.0.', '2.1.')):
        return False
    pinned = re.search(r'\btorch==(\d+\.\d+[.\d]*)', settings.torch_spec)
    if pinned is None or release(pinned[1]) <= LAST_PREBUILT_TORCH:
        return False  # a prebuilt wheel may fit; if none does, the build checks its tools itself
    pattern = wheel_folder(settings, pinned[1], '*').name  # torch alone knows its CUDA version
    return not any((settings.cache / 'wheels').glob(f'{pattern}/mmcv-*.whl'))


def preflight(settings: Settings) -> None:
    """Find what would make the setup fail before spending minutes on it."""
    if settings.python_version not in PYTHONS:
        raise SetupError(
            f'this is Python {settings.python_version}, but {", ".join(PYTHONS[:-1])} or '
            f'{PYTHONS[-1]} is needed; install one and run "make setup PYTHON=/path/to/it"'
        )
    if installed_version(settings, 'torch') is None:
        check_space(settings.venv.parent, 10 * GB, 'the environment', 'VENV')
    if build_expected(settings):
        check_build_tools(settings)


def create_venv(settings: Settings) -> None:
    """Make the environment, or repair one that has no pip."""
    if not (settings.python.exists() and succeeds(pip(settings, '--version'))):
        problem = f'cannot make {settings.venv}; remove it, or (Debian) apt install python3-venv'
        run([sys.executable, '-m', 'venv', str(settings.venv)], problem)


def check_index(settings: Settings) -> None:
    """Fetch a tiny package the way that pip will fetch the others, mirrors and proxies included."""
    with tempfile.TemporaryDirectory() as folder:
        options = ('--no-deps', '--no-cache-dir', '--timeout', '10', '--retries', '1', '-d', folder)
        if not succeeds(pip(settings, 'download', *options, 'addict==2.4.0')):
            raise SetupError(
                'pip cannot reach the package index; check the network and the proxy, or set '
                'PIP_INDEX_URL to a mirror ("pip download addict==2.4.0" shows the details)'
            )


def install_torch(settings: Settings) -> None:
    """Install torch, unless the one that is there satisfies the specification."""
    if not torch_satisfied(settings):
        # The constraints keep numpy 2 out: it would come with torchvision, only to be replaced.
        run(pip(settings, 'install', '-c', 'requirements.txt', *settings.torch_spec.split()))


def install_requirements(settings: Settings) -> None:
    """Install everything else that comes from the package index."""
    run(pip(settings, 'install', '-r', 'requirements.txt'))
    # mmengine insists on opencv-python, whose cv2 needs libGL, which a bare machine lacks. The
    # headless package puts its own cv2 in the same place; it must come after everything that pulls
    # opencv-python in, and before mmcv, which imports cv2.
    run(pip(settings, 'install', '--force-reinstall', '--no-deps', OPENCV_SPEC))


def wheel_folder(settings: Settings, torch_version: str, ops: str) -> Path:
    """Name the cache folder of an mmcv wheel after everything that its compiled ops depend on."""
    python = 'cp' + settings.python_version.replace('.', '')
    key = f'mmcv{MMCV_VERSION}-torch{torch_version}-{python}-{platform.machine()}-{ops}'
    return settings.cache / 'wheels' / key


def provide_mmcv(settings: Settings) -> None:
    """Get mmcv with compiled ops from the first place that has it, or else compile it."""
    if succeeds([str(settings.python), '-c', MMCV_PROBE]):
        return
    problem = f'the installed torch does not work; remove {settings.venv} and run this again'
    output = run([str(settings.python), '-c', TORCH_PROBE], problem)
    torch = Torch(**json.loads(output.splitlines()[-1]))
    if release(torch.version) <= LAST_PREBUILT_TORCH and install_prebuilt(settings, torch):
        return
    folder = wheel_folder(settings, torch.version, torch.ops)
    cached = any(install_mmcv(settings, str(wheel)) for wheel in folder.glob('mmcv-*.whl'))
    if not cached and not install_mmcv(settings, str(build_mmcv(settings, torch, folder))):
        problem = f'mmcv was built but does not load; remove {folder} and run this again'
        run([str(settings.python), '-c', MMCV_PROBE], problem)


def install_mmcv(settings: Settings, *args: str) -> bool:
    """Install an mmcv over any that does not work, and tell whether this one does."""
    command = pip(settings, 'install', '--no-deps', '--force-reinstall', *args)
    return succeeds(command) and succeeds([str(settings.python), '-c', MMCV_PROBE])


def install_prebuilt(settings: Settings, torch: Torch) -> bool:
    """Try OpenMMLab's wheel index, which ends at torch 2.4."""
    cuda = 'cu' + torch.cuda.replace('.', '') if torch.cuda else 'cpu'
    url = MMCV_INDEX.format(cuda, *release(torch.version))
    options = ('--only-binary', ':all:', '-f', url, '--timeout', '10', '--retries', '0')
    return install_mmcv(settings, *options, f'mmcv=={MMCV_VERSION}')


def build_mmcv(settings: Settings, torch: Torch, folder: Path) -> Path:
    """Compile mmcv's source release and put the wheel in its folder of the cache."""
    check_build_tools(settings)
    log = settings.cache / 'logs' / f'{folder.name}.log'
    log.parent.mkdir(parents=True, exist_ok=True)
    target = 'CPU and GPU' if torch.gpu_ops else 'CPU (the GPU too where a GPU and nvcc are found)'
    say(f'compiling mmcv for the {target}: 7 to 18 minutes on two cores; log: {log}')
    with tempfile.TemporaryDirectory(prefix='mmcv-') as scratch:
        env = build_environment(settings, torch)
        source = download_mmcv(settings, Path(scratch), env)
        script = source / 'setup.py'
        script.write_text(set_cpp_standard(script.read_text(), cpp_standard(Path(torch.include))))
        command = [str(settings.python), 'setup.py', 'bdist_wheel']
        with log.open('w') as output:
            done = subprocess.run(command, cwd=source, env=env, stdout=output, stderr=output)
        if done.returncode:
            print(*log.read_text(errors='replace').splitlines()[-15:], sep='\n', file=sys.stderr)
            raise SetupError(f'mmcv did not compile; fix what {log} says and run this again')
        built = next((source / 'dist').glob('mmcv-*.whl'))
        folder.mkdir(parents=True, exist_ok=True)
        # Copied first, as the cache may be on another disk: nobody must ever find half a wheel.
        partial = Path(shutil.copy(built, folder / f'.{os.getpid()}.part'))
        return partial.replace(folder / built.name)


def download_mmcv(settings: Settings, folder: Path, env: dict[str, str]) -> Path:
    """Fetch and unpack mmcv's source release."""
    # pip asks its setup.py for the name, which imports torch: no isolation, and the build's env.
    options = ('--no-deps', '--no-binary', ':all:', '--no-build-isolation', '-d', str(folder))
    run(pip(settings, 'download', *options, f'mmcv=={MMCV_VERSION}'), env=env)
    shutil.unpack_archive(str(folder / f'mmcv-{MMCV_VERSION}.tar.gz'), str(folder))
    return folder / f'mmcv-{MMCV_VERSION}'


def cpp_standard(include: Path) -> str:
    """Read the C++ standard, such as ``20``, that torch's headers demand."""
    demand = re.compile(r'C\+\+(\d\d) or later compatible compiler is required')
    texts = (header.read_text(errors='ignore') for header in include.rglob('*.h'))
    return max((found for text in texts for found in demand.findall(text)), default='17')


def set_cpp_standard(script: str, standard: str) -> str:
    """Make mmcv's setup.py compile by the given C++ standard."""
    # It names C++17 for every torch that we support; its C++14 is for torch up to 1.12.
    return re.sub(r'(?<=-std=c\+\+)17\b', standard, script)


def build_environment(settings: Settings, torch: Torch) -> dict[str, str]:
    """Return the variables that steer mmcv's setup.py and torch's build extension."""
    env = dict(os.environ, MMCV_WITH_OPS='1', FORCE_CUDA=str(int(torch.gpu_ops)))
    env.update(CFLAGS='-g0 -O2 -w', CXX=find_compiler())
    # torch looks for ninja on the PATH; without it, it compiles one file after the other.
    env['PATH'] = os.pathsep.join([str(settings.venv / 'bin'), env.get('PATH', os.defpath)])
    if not torch.gpu_ops:
        env['CUDA_VISIBLE_DEVICES'] = ''  # a visible GPU makes mmcv's setup.py call nvcc
    memory = os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')
    # One of its compiler processes takes up to 2 GB.
    env.setdefault('MAX_JOBS', str(max(1, min(os.cpu_count() or 1, memory // (2 * GB)))))
    return env


def install_project(settings: Settings) -> None:
    """Install this repository in editable mode, and import all that it is built on."""
    run(pip(settings, 'install', '--no-deps', '--no-build-isolation', '-e', '.'))
    problem = f'the environment does not work; remove {settings.venv} and run this again'
    say(run([str(settings.python), '-c', FINAL_CHECK], problem).splitlines()[-1])


def set_up(settings: Settings, stamp: Path) -> None:
    """Do all steps; the stamp, written last, says that none was cut short."""
    preflight(settings)
    stamp.unlink(missing_ok=True)
    cost = 'already there' if torch_satisfied(settings) else 'about 2 minutes, 5.5 GB'
    steps = (
        (f'preparing {settings.venv}', create_venv),
        ('checking the package index', check_index),
        (f'installing {settings.torch_spec} ({cost})', install_torch),
        ('installing requirements.txt', install_requirements),
        (f'providing mmcv {MMCV_VERSION} with compiled ops', provide_mmcv),
        ('installing this package and checking the imports', install_project),
    )
    for number, (title, action) in enumerate(steps, start=1):
        say(f'{number}/{len(steps)} {title} ...')
        start = time.monotonic()
        action(settings)
        say(f'{number}/{len(steps)} done in {time.monotonic() - start:.0f} s')
    stamp.write_text(fingerprint(settings))


def main() -> int:
    """Set the environment up, or tell in one line what stands in the way."""
    settings = Settings.from_env()
    stamp = settings.venv / 'dino_mm.stamp'
    try:
        stamped = stamp.read_text() if settings.python.exists() and stamp.exists() else ''
        if stamped == fingerprint(settings):
            say(f'{settings.venv} is up to date')
            return 0
        set_up(settings, stamp)
    except (SetupError, OSError) as error:
        print(f'[setup] error: {error}', file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    say(f'{settings.venv} is ready')
    return 0


if __name__ == '__main__':
    sys.exit(main())
