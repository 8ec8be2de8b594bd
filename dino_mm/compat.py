"""The libraries below: which distributions they come from, whether they fit together, and what mends them if not.

It runs before anything else is imported, on any Python: so it needs Python's own library alone until it has found the
others.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
import warnings
from dataclasses import dataclass
from importlib.metadata import distributions
from typing import Any, NamedTuple

from . import standin

#: By import name: the smallest version that fits, and the first that does not.
SUPPORTED = {
    'torch': ('2.1.0', '3.0.0'),
    'mmcv': ('2.0.0', '3.0.0'),
    'mmengine': ('0.10.4', '1.0.0'),
    'mmdet': ('3.3.0', '4.0.0'),
    'timm': ('1.0.16', '2.0.0'),
}
#: Distributions of an import name, where there is more than the one that is called like it.
DISTRIBUTIONS = {
    'mmcv': ('mmcv', 'mmcv-lite', 'mmcv-full', 'onedl-mmcv'),
    'mmengine': ('mmengine', 'onedl-mmengine'),
    'mmdet': ('mmdet', 'onedl-mmdetection'),
}
#: What pip is to install for an import name, with OpenMMLab's packages and with the forks.
OPENMMLAB = {
    'torch': 'torch torchvision',
    'mmcv': 'mmcv-lite==2.1.0',
    'mmengine': 'mmengine==0.10.7',
    'mmdet': 'mmdet==3.3.0',
    'timm': "'timm>=1.0.16,<2'",
}
FORKS = {
    **OPENMMLAB,
    'mmcv': 'onedl-mmcv==2.3.6',
    'mmengine': 'onedl-mmengine==0.10.12',
    'mmdet': 'onedl-mmdetection==3.5.1',
}
FORK_OF_MMDET = DISTRIBUTIONS['mmdet'][-1]
#: The first mmcv that OpenMMLab's mmdet refuses, by an assertion at its first lines.
MMCV_LIMIT_OF_MMDET = '2.2.0'
PYTHONS = ((3, 10), (3, 13))


class Found(NamedTuple):
    """A distribution that is installed here."""

    name: str
    version: str

    def __str__(self) -> str:
        """As pip lists it."""
        return f'{self.name} {self.version}'


@dataclass(frozen=True)
class FoundSet:
    """The libraries that are installed here."""

    names: dict[str, str]
    """Import name -> distribution, for mmcv, mmengine and mmdet; '' without one, as in a copied source tree."""
    versions: dict[str, str]
    """Import name -> version; '' without a distribution."""
    label: str
    """'OpenMMLab with compiled mmcv', 'OpenMMLab with mmcv-lite', 'forks' or 'other'."""
    tested: bool
    """Whether dino_mm's tests run with just these versions."""
    has_operators: bool
    """Whether mmcv's compiled operators are there."""

    def __str__(self) -> str:
        """The distributions and their versions, in one line."""
        with_operators = 'with' if self.has_operators else 'without'
        found = [f'{name or module} {self.versions[module] or "(unknown)"}' for module, name in self.names.items()]
        return f'{", ".join(found)} ({with_operators} compiled operators)'


#: Label -> distributions and versions of mmcv, mmengine, mmdet, and whether operators are compiled (None: either).
TESTED_SETS: dict[str, tuple[dict[str, str], bool | None]] = {
    'OpenMMLab with mmcv-lite': ({'mmcv-lite': '2.1.0', 'mmengine': '0.10.7', 'mmdet': '3.3.0'}, False),
    'OpenMMLab with compiled mmcv': ({'mmcv': '2.1.0', 'mmengine': '0.10.7', 'mmdet': '3.3.0'}, True),
    'forks': ({'onedl-mmcv': '2.3.6', 'onedl-mmengine': '0.10.12', 'onedl-mmdetection': '3.5.1'}, None),
}


def check_versions() -> None:
    """Raise ImportError, in one line and with the remedy, if a library is missing or does not fit.

    What no test has seen, but nothing speaks against, is a warning of one line.
    """
    check_python()
    found = {module: find_distribution(module) for module in SUPPORTED}
    for module, distribution in found.items():
        check_is_there(module, distribution)
    for module, distribution in found.items():
        if distribution is not None:  # else its version is unknown, which `found_set` calls untested
            check_version(module, distribution)
    check_mmcv_suits_mmdet(found['mmcv'], found['mmdet'])
    here = found_set()
    if not here.tested:
        tested = '; '.join(
            ', '.join(f'{name} {version}' for name, version in names.items()) for names, _ in TESTED_SETS.values()
        )
        warnings.warn(f'dino_mm has no tests with what is installed here, {here}. It has with: {tested}.', stacklevel=3)


def check_python() -> None:
    """Refuse a Python on which the code below does not run; warn of one that is newer than all tests."""
    version, (oldest, newest) = sys.version_info[:2], PYTHONS
    here, first, last = ('.'.join(map(str, numbers)) for numbers in (version, oldest, newest))
    if version < oldest:
        raise ImportError(
            f'dino_mm needs Python {first} or newer, but this is Python {here}: '
            f'make an environment with a newer one, as `python{last} -m venv .venv`.'
        )
    if version > newest:
        warnings.warn(
            f'dino_mm has no tests with Python {here}: if something fails, take Python {first} to {last}.', stacklevel=4
        )


def find_distribution(module: str) -> Found | None:
    """The distribution that ``import module`` meets first; None without one.

    Raises:
        ImportError: Several were installed over one another.
    """
    names = DISTRIBUTIONS.get(module, (module,))
    for folder in sys.path:
        found = [Found(name, d.version) for name in names for d in distributions(name=name, path=[folder])]
        if len(found) > 1:
            remove = ' '.join(dict.fromkeys(name for name, _ in found))
            raise ImportError(
                f'{" and ".join(map(str, found))} are installed over one another, all as `{module}`: '
                f'`pip uninstall -y {remove}`, then `{install_command(module)}`.'
            )
        if found:
            return found[0]
    return None


def install_command(module: str) -> str:
    """The command that installs what provides ``module``, from the same family as mmdet, or as mmcv and mmengine."""
    companions = [*DISTRIBUTIONS['mmdet'], *DISTRIBUTIONS['mmcv'], *DISTRIBUTIONS['mmengine']]
    there = (name for name in companions for _ in distributions(name=name))
    forks = next(there, '').startswith('onedl-')
    return f'pip install {(FORKS if forks else OPENMMLAB)[module]}'


def check_is_there(module: str, found: Found | None) -> None:
    """Raise ImportError if Python finds no code of a library; a source tree without a distribution will do."""
    spec = importlib.util.find_spec(module)
    if spec is not None and spec.origin is not None:  # what pip leaves of a package is a folder without a file
        return
    if found is None:
        raise ImportError(f'dino_mm needs {module}, which is not installed: `{install_command(module)}`.')
    raise ImportError(
        f'{found} is installed in part only, its code is missing: '
        f'`pip uninstall -y {found.name}`, then `{install_command(module)}`.'
    )


def check_version(module: str, found: Found) -> None:
    """Raise ImportError if a library is too old or too new."""
    from packaging.version import Version

    (lowest, limit), version = SUPPORTED[module], Version(found.version)
    if Version(lowest) <= version < Version(limit):
        return
    raise ImportError(
        f'dino_mm needs {module} >={lowest}, <{limit}, but {found} is installed, which is too '
        f'{"old" if version < Version(lowest) else "new"}: '
        f'`pip uninstall -y {found.name}`, then `{install_command(module)}`.'
    )


def check_mmcv_suits_mmdet(mmcv: Found | None, mmdet: Found | None) -> None:
    """Raise ImportError where OpenMMLab's mmdet would stop at an mmcv that is too new for it; its fork takes any."""
    from packaging.version import Version

    if mmcv is None or mmdet is None or mmdet.name == FORK_OF_MMDET:
        return
    if Version(mmcv.version) >= Version(MMCV_LIMIT_OF_MMDET):
        raise ImportError(
            f'{mmdet} asserts mmcv <{MMCV_LIMIT_OF_MMDET}, but {mmcv} is installed: '
            f'`pip uninstall -y {mmcv.name}`, then `{install_command("mmcv")}`.'
        )


def has_operators() -> bool:
    """Whether mmcv's compiled operators are there, and not :mod:`dino_mm.standin`.

    Raises:
        ImportError: They are there, but do not load, as after another torch was installed.
    """
    importlib.import_module('torch')  # they are linked against its libraries
    importlib.import_module('mmcv')
    try:
        return not standin.is_standin(importlib.import_module(standin.MODULE))
    except ImportError as error:
        torch: Any = sys.modules['torch']
        kind = f'for CUDA {torch.version.cuda}' if torch.version.cuda else 'for CPUs only'
        raise ImportError(
            f"mmcv's compiled operators do not load with torch {torch.__version__}, which is {kind} "
            f'({str(error).splitlines()[0]}): `pip uninstall -y mmcv onedl-mmcv`, then `{install_command("mmcv")}` '
            'runs without them; `make setup MMCV=build` in a checkout of dino_mm compiles them anew.'
        ) from None


def found_set() -> FoundSet:
    """The libraries that are installed here, as far as they are more than one project's.

    Raises:
        ImportError: They do not go together: see :func:`find_distribution` and :func:`has_operators`.
    """
    found = {module: find_distribution(module) or Found('', '') for module in DISTRIBUTIONS}
    names, versions = ({module: of[i] for module, of in found.items()} for i in (0, 1))
    operators = has_operators()
    for label, (tested, with_operators) in TESTED_SETS.items():
        if list(tested) == list(names.values()) and with_operators in (operators, None):
            return FoundSet(names, versions, label, list(tested.values()) == list(versions.values()), operators)
    return FoundSet(names, versions, 'other', False, operators)
