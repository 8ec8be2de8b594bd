"""Where the configs are that come with the package."""

import difflib
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent


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
        ``_base_ = __import__('dino_mm').cfg('dino-resnet/dino_r50_4scale_12ep.py')``

    Args:
        name: Path below ``configs/``.

    Raises:
        FileNotFoundError: There is no such config; names the closest ones.
    """
    root = config_root()
    path = root / name
    if path.is_file():
        return str(path)
    known = [str(p.relative_to(root)) for p in sorted(root.glob('**/*.py'))]
    close = difflib.get_close_matches(name, known, 3) or [k for k in known if not k.startswith('_base_')]
    raise FileNotFoundError(f'dino_mm ships no config {name!r}. It has: {", ".join(close)}.')
