"""``python -m dino_mm``: the command line, as ``dino-mm``."""

from .cli import main

if __name__ == '__main__':
    raise SystemExit(main())
