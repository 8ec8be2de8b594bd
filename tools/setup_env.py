"""Set up a virtual environment with torch, MMDetection and this package in editable mode.

``make setup`` runs this; running it again does only what is missing. Environment variables:

MMCV           empty: OpenMMLab's packages, nothing is compiled here; ``build``: the same, with mmcv's operators
               compiled; ``forks``: the maintained forks
VENV           the virtual environment (default ``.venv``; relative to the repository)
TORCH_SPEC     another torch, such as ``torch==2.9.1 torchvision==0.24.1``
DINO_MM_CACHE  keeps the mmcv wheels built here, and the build logs (default ``~/.cache/dino_mm``)
CXX, MAX_JOBS  the C++ compiler and the number of its processes for ``MMCV=build``
FORCE_CUDA     1 compiles mmcv's GPU operators also where no GPU is; TORCH_CUDA_ARCH_LIST says for which GPUs
"""

from __future__ import annotations

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from importlib.metadata import distributions
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = ('3.10', '3.11', '3.12', '3.13')
TORCH_SPEC = 'torch==2.14.1 torchvision==0.29.1'
#: What may stand behind the import names mmcv, mmengine and mmdet; two for one name overwrite each other's files.
MMDETECTION = ('mmcv', 'mmcv-full', 'mmcv-lite', 'onedl-mmcv')
MMDETECTION += ('mmengine', 'onedl-mmengine', 'mmdet', 'onedl-mmdetection')
#: Both are `cv2`, and the forks bring both.
OPENCV = ('opencv-python', 'opencv-python-headless')
GB = 10**9
HEADERS_PROBE = "import sysconfig; open(sysconfig.get_path('include') + '/Python.h').close()"
FINAL_CHECK = 'import torch, mmcv.ops, mmdet, dino_mm'
BUILD_CHECK = f'{FINAL_CHECK}; assert mmcv._ext.__spec__.has_location'


class SetupError(Exception):
    """A problem and the way out of it, in one line."""


@dataclass(frozen=True)
class Settings:
    """What the caller's environment variables ask for."""

    mmcv: str
    venv: Path
    cache: Path
    torch_spec: str

    @classmethod
    def from_env(cls) -> Settings:
        """Read the variables that the module's docstring names."""
        user_cache = Path(os.environ.get('XDG_CACHE_HOME') or '~/.cache', 'dino_mm')
        return cls(
            mmcv=os.environ.get('MMCV', ''),
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

    @property
    def site_packages(self) -> Path:
        """The environment's folder of packages."""
        return self.venv / 'lib' / f'python{self.python_version}' / 'site-packages'

    def installed(self) -> dict[str, str]:
        """The versions of the installed distributions by name."""
        found = distributions(path=[str(self.site_packages)])
        return {str(item.metadata['Name']).lower(): item.version for item in found}


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


def fingerprint(settings: Settings) -> str:
    """Hash everything that decides what the environment holds."""
    # ROOT is part of it because the editable install points there: a moved clone needs a new one.
    parts = [str(ROOT), settings.mmcv, settings.torch_spec, settings.python_version]
    files = [*sorted(ROOT.glob('requirements*.txt')), ROOT / 'setup.py', ROOT / 'pyproject.toml']
    files += [Path(__file__), ROOT / 'tools' / 'mmcv_wheel.py']
    return hashlib.sha256('\n'.join(parts + [path.read_text() for path in files]).encode()).hexdigest()


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


def check_build_tools(settings: Settings) -> None:
    """Check what compiling mmcv takes: compilers, Python's headers and room for the objects."""
    compilers = [os.environ['CXX']] if os.environ.get('CXX') else ['c++', 'g++', 'clang++']
    if not any(map(shutil.which, compilers)):
        raise SetupError(
            f'no C++ compiler ({", ".join(compilers)}), which MMCV=build needs; install one (Debian, Ubuntu: '
            'apt install build-essential), set CXX, or leave MMCV=build out'
        )
    cuda = os.environ.get('CUDA_HOME') or os.environ.get('CUDA_PATH') or '/usr/local/cuda'
    if os.environ.get('FORCE_CUDA') == '1' and not (shutil.which('nvcc') or Path(cuda, 'bin', 'nvcc').exists()):
        raise SetupError("FORCE_CUDA=1, but no nvcc; install torch's version of the CUDA toolkit or set CUDA_HOME")
    python = str(settings.python) if settings.python.exists() else sys.executable
    if not succeeds([python, '-c', HEADERS_PROBE]):
        raise SetupError(
            'no Python.h, which MMCV=build needs; install the headers of this Python (Debian, Ubuntu: '
            f'apt install python{settings.python_version}-dev), or leave MMCV=build out'
        )
    check_space(Path(tempfile.gettempdir()), GB, 'the build of mmcv', 'TMPDIR')


def preflight(settings: Settings) -> None:
    """Find what would make the setup fail before spending minutes on it."""
    if settings.mmcv not in ('', 'build', 'forks'):
        raise SetupError(f'MMCV={settings.mmcv} is unknown; leave it empty, or choose build or forks')
    if settings.python_version not in PYTHONS:
        raise SetupError(
            f'this is Python {settings.python_version}, but {", ".join(PYTHONS[:-1])} or {PYTHONS[-1]} is needed; '
            f'install one, remove {settings.venv} if it is there, and run "make setup PYTHON=/path/to/it"'
        )
    if 'torch' not in settings.installed():
        check_space(settings.venv.parent, 10 * GB, 'the environment', 'VENV')
    if settings.mmcv == 'build':
        check_build_tools(settings)


def create_venv(settings: Settings) -> None:
    """Make the environment, or repair one that has no pip or a half-installed package."""
    if not (settings.python.exists() and succeeds(pip(settings, '--version'))):
        problem = f'cannot make {settings.venv}; remove it, or (Debian) apt install python3-venv'
        run([sys.executable, '-m', 'venv', str(settings.venv)], problem)
        (settings.venv / '.gitignore').write_text('*\n')
    for info in settings.site_packages.glob('*.dist-info'):
        if not (info / 'INSTALLER').exists():  # an interrupted pip left it, and would take it for installed
            shutil.rmtree(info)


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
    """Install torch, and remove what another ``MMCV`` or torch has left."""
    installed = settings.installed()
    found = [name for name in MMDETECTION + OPENCV if name in installed]
    if found:
        run(pip(settings, 'uninstall', '-y', *found))
    run(pip(settings, 'install', *settings.torch_spec.split()))


def install_packages(settings: Settings) -> None:
    """Install MMDetection of the chosen kind, everything else, and this repository in editable mode."""
    kind = settings.mmcv or 'lite'
    wheel = '' if kind == 'forks' else find_mmcv(settings)
    options = [wheel, '-r', 'requirements-build.txt'] if wheel else ['-r', f'requirements-{kind}.txt']
    # torch is named again, lest anything replaces it.
    options += [*settings.torch_spec.split(), '-r', 'requirements.txt', '-e', '.[demo,fast-eval]']
    run(pip(settings, 'install', *options), env=dict(os.environ, MMCV_WITH_OPS='0'))
    if not succeeds([str(settings.python), '-c', 'import cv2']):
        # Most likely libGL is missing, as on bare machines. The headless package puts its cv2 over the other.
        spec = f'opencv-python-headless=={settings.installed()["opencv-python"]}'
        run(pip(settings, 'install', '--force-reinstall', '--no-deps', spec))


def find_mmcv(settings: Settings) -> str:
    """Return the path of an mmcv wheel with compiled operators; empty if there is none and none is to be compiled."""
    command = [str(settings.python), 'tools/mmcv_wheel.py', '--cache', str(settings.cache)]
    command += ['--build'] if settings.mmcv == 'build' else []
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SetupError(f'no mmcv with compiled operators, see above; if torch does not work, remove {settings.venv}')
    return done.stdout.strip()


def check_imports(settings: Settings) -> None:
    """Import all that this package is built on, and say which versions these are."""
    found = settings.installed()
    advice = f'remove {settings.venv}' + (f' and {settings.cache / "wheels"}' if settings.mmcv == 'build' else '')
    check = BUILD_CHECK if 'mmcv' in found else FINAL_CHECK
    run([str(settings.python), '-c', check], f'the environment does not work; {advice} and run this again')
    names = ('torch', *MMDETECTION, 'numpy', *OPENCV, 'mmdet-dino')
    say(', '.join(f'{name} {found[name]}' for name in names if name in found))


def set_up(settings: Settings, stamp: Path) -> None:
    """Do all steps; the stamp, written last, says that none was cut short."""
    preflight(settings)
    stamp.unlink(missing_ok=True)
    cost = 'already there' if 'torch' in settings.installed() else 'about 90 seconds, 5.5 GB'
    title = {'': 'mmcv-lite', 'build': 'mmcv with compiled operators', 'forks': "MMDetection's forks"}[settings.mmcv]
    steps = (
        (f'preparing {settings.venv}', create_venv),
        ('checking the package index', check_index),
        (f'installing {settings.torch_spec} ({cost})', install_torch),
        (f'installing {title}, the tools and this package', install_packages),
        ('checking the imports', check_imports),
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
