"""DINO for MMDetection 3.x: the detrex model zoo as registered modules and mmengine configs."""

from .compat import allow_mmengine_checkpoints, check_versions
from .shipped import cfg
from .version import __version__

check_versions()
allow_mmengine_checkpoints()

__all__ = ['__version__', 'cfg']
