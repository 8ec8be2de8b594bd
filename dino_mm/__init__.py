"""DINO for MMDetection 3.x as registered modules and mmengine configs, numerically equal to detrex's."""

import sys

from . import standin, threads
from .compat import check_versions
from .shipped import cfg
from .version import __version__

standin.install()
threads.bound_spinning()
# `python -m dino_mm.env` reports what is wrong where the rest fails; while it looks for the module, this is `argv`.
if not (sys.argv[:1] == ['-m'] and 'dino_mm.env' in getattr(sys, 'orig_argv', ())):
    check_versions()

    from .checkpoints.files import register_formats
    from .checkpoints.runner_types import allow_mmengine_checkpoints

    allow_mmengine_checkpoints()
    register_formats()

__all__ = ['__version__', 'cfg']
