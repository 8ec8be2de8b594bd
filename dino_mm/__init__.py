"""DINO for MMDetection 3.x as registered modules and mmengine configs, numerically equal to detrex's."""

from .compat import allow_mmengine_checkpoints, check_versions
from .shipped import cfg
from .version import __version__

check_versions()
allow_mmengine_checkpoints()

from .checkpoints.files import register_formats  # noqa: E402  (imports the libraries checked above)

register_formats()

__all__ = ['__version__', 'cfg']
