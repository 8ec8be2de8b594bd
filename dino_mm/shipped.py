"""Where the files are that come with the package: configs by name, and tools."""

from __future__ import annotations

import difflib
from pathlib import Path, PurePosixPath

PACKAGE = Path(__file__).resolve().parent
#: Folder of what configs are made of, which have no short names.
PARTS = '_base_'
#: Keys of our configs that reach many places, see :mod:`dino_mm.settings`.
SETTINGS = ('image_size', 'batch_size', 'epochs', 'max_iters', 'val_interval')


class UnknownConfigError(FileNotFoundError):
    """No shipped config has this name, or several have; the message names them."""


def config_root() -> Path:
    """The folder of shipped configs: the repository's in a checkout, else the installed package's."""
    for root in (PACKAGE.parent / 'configs', PACKAGE / '.mim' / 'configs'):
        if (root / '_base_' / 'models' / 'dino_r50.py').is_file():
            return root
    raise FileNotFoundError(
        f'No configs beside {PACKAGE} and none in {PACKAGE / ".mim"}: install the package again '
        'with `pip install .`, which adds them.'
    )


def cfg(name: str) -> str:
    """Path of a shipped config, for another project's ``_base_``.

    Example:
        ``_base_ = __import__('dino_mm').cfg('dino_r50_4scale_12ep')``

    Args:
        name: Path below ``configs/``, with or without folder and ending.

    Raises:
        UnknownConfigError: There is no such config, or several; names the closest ones, or those.
    """
    return str(config_root() / find(name))


def find(name: str) -> str:
    """Path of a shipped config below ``configs/``, with ``/``; see :func:`cfg`."""
    known = [path.relative_to(config_root()).as_posix() for path in sorted(config_root().glob('**/*.py'))]
    wanted = PurePosixPath(name.replace('\\', '/')).as_posix().removesuffix('.py')
    if f'{wanted}.py' in known:
        return f'{wanted}.py'
    whole = [path for path in known if not path.startswith(f'{PARTS}/')]
    found = [path for path in whole if f'/{path}'.endswith(f'/{wanted}.py')]
    if len(found) == 1:
        return found[0]
    if found:
        raise UnknownConfigError(f'dino_mm ships several configs {name!r}: {", ".join(found)}. Give the folder too.')
    near = _closest(wanted, known, whole)
    names = near if '/' in wanted else [PurePosixPath(path).stem for path in near]
    hint = f'Near to it: {", ".join(names)}; `dino-mm models` lists all' if near else f'It has: {", ".join(whole)}'
    missing = f'There is no file {name!r}. ' if name.endswith('.py') else ''
    raise UnknownConfigError(f'{missing}dino_mm ships no config {name!r}. {hint}.')


def find_config(name: str | Path) -> str:
    """Path of a config: ``name`` itself if it is a file, else the shipped one of this name."""
    return str(name) if Path(name).is_file() else cfg(str(name))


def _closest(wanted: str, known: list[str], whole: list[str]) -> list[str]:
    """Those of ``known`` that ``wanted`` may mean: by its path, or by its last part alone; a few at most."""
    by_path = difflib.get_close_matches(f'{wanted}.py', known, 3)
    if '/' in wanted and by_path:
        return by_path
    last = wanted.rpartition('/')[2]
    stems = {PurePosixPath(path).stem: path for path in whole}
    containing = [stem for stem in stems if last and last in stem][:3]
    return [stems[stem] for stem in difflib.get_close_matches(last, stems, 3) or containing] or by_path
