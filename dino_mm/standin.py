"""What has to be there before dino_mm is imported: mmcv's operators, and the names of our configs in ``_base_``.

``mmcv._ext`` are mmcv's compiled operators. mmcv-lite has the Python side of each, but fails to import it. With the
stand-in, ``import mmcv.ops`` and ``import mmdet`` work; an operator complains when it is called. What Python finds by
itself comes first: compiled operators are never hidden.

mmengine reads ``_base_ = 'mmdet::FOLDER/NAME.py'``, of OpenMMLab's own packages alone. Here it learns ``dino_mm::``,
and to apply the settings of configs that inherit ours (:mod:`dino_mm.settings`).

This file is also loaded by path as Python starts, so it imports nothing but Python's own.
"""

from __future__ import annotations

import importlib.machinery
import sys
import types

TYPE_CHECKING = False  # `typing` is not loaded as Python starts
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from torch import Tensor

MODULE = 'mmcv._ext'
CONFIGS = 'mmengine.config.config'
PREFIX = 'dino_mm::'
WAY_OUT = (
    '`make setup MMCV=build` in a checkout of dino_mm compiles them; elsewhere: '
    '`pip uninstall -y mmcv-lite`, then `pip install --no-build-isolation mmcv==2.1.0` with a C++ compiler.'
)


class MissingOperators(types.ModuleType):
    """A module with a function for whatever operator it is asked for; names with an underscore are none."""

    def __getattr__(self, name: str) -> Callable:
        """Make the function of an operator."""
        if name.startswith('_'):
            raise AttributeError(f'module {self.__name__!r} has no attribute {name!r}')
        return self.__dict__.setdefault(name, missing_operator(name))


def missing_operator(name: str) -> Callable:
    """A function that says how to get this operator."""

    def missing(*args: object, **kwargs: object) -> None:
        raise RuntimeError(f"mmcv's operator {name!r} is missing: this mmcv has no compiled operators. {WAY_OUT}")

    missing.__module__, missing.__name__, missing.__qualname__ = MODULE, name, name
    return missing


def nms(bboxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Non-maximum suppression by torchvision, as mmcv's operator does it; test-time augmentation needs it.

    Args:
        bboxes: (num_boxes, 4), xyxy.
        scores: (num_boxes,).
        iou_threshold: A box goes if it overlaps one of a higher score by more.
        offset: 1 if the last pixel belongs to a box, or 0.

    Returns:
        (num_kept,) int64 indices, the highest score first.
    """
    from torchvision.ops import nms as torchvision_nms

    return torchvision_nms(bboxes + bboxes.new_tensor([0, 0, offset, offset]), scores, iou_threshold)


def not_available() -> str:
    """What mmcv's reports say of a compiler that there was not."""
    return 'not available'


class Finder:
    """Finds the stand-in, and makes it; Python asks it last."""

    marker = 'dino_mm.standin'

    @staticmethod
    def find_spec(
        fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """For ``mmcv._ext`` alone."""
        if fullname != MODULE:
            return None
        return importlib.machinery.ModuleSpec(MODULE, Finder, origin=Finder.marker)  # type: ignore[arg-type]

    @staticmethod
    def create_module(spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        """The module, which :func:`is_standin` recognises by its mark."""
        module = MissingOperators(spec.name, __doc__)
        module.__dict__['__standin__'] = Finder.marker
        return module

    @staticmethod
    def exec_module(module: types.ModuleType) -> None:
        """Add what needs no compiler."""
        module.__dict__.update(nms=nms, get_compiler_version=not_available, get_compiling_cuda_version=not_available)


class ConfigFinder:
    """Finds mmengine's module of configs as Python does, to call :func:`teach_names` on it; Python asks it first."""

    marker = 'dino_mm.names'

    @staticmethod
    def find_spec(
        fullname: str, path: Sequence[str] | None = None, target: types.ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """For mmengine's module alone."""
        if fullname != CONFIGS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module: types.ModuleType) -> None:
                execute(module)
                teach_names(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


def teach_names(module: types.ModuleType) -> None:
    """Let mmengine read ``dino_mm::NAME`` in ``_base_`` and in its hub, for every name that ``dino_mm.cfg`` takes.

    Its own code would demand a folder without a hyphen, setuptools before 82, and types of this package alone.

    Args:
        module: ``mmengine.config.config``, imported.
    """
    utils = sys.modules[module.__name__.rpartition('.')[0] + '.utils']
    try:
        names, get_path, split = utils.MODULE2PACKAGE, module.Config._get_cfg_path, utils._get_package_and_cfg_path
    except AttributeError:  # another mmengine, which is not to fail for the sake of our names
        return
    if 'dino_mm' in names:
        return
    names['dino_mm'] = 'dino_mm'

    def get_cfg_path(cfg_path: str, filename: str) -> tuple[str, str | None]:
        if not cfg_path.startswith(PREFIX):
            return get_path(cfg_path, filename)
        from dino_mm.shipped import cfg

        return cfg(cfg_path[len(PREFIX) :]), None

    def get_package_and_cfg_path(cfg_path: str) -> tuple[str, str]:
        if not cfg_path.startswith(PREFIX):
            return split(cfg_path)
        from dino_mm.shipped import find

        return 'dino_mm', find(cfg_path[len(PREFIX) :])

    module.Config._get_cfg_path = staticmethod(get_cfg_path)
    utils._get_package_and_cfg_path = get_package_and_cfg_path  # type: ignore[attr-defined]
    teach_settings(module)


def teach_settings(module: types.ModuleType) -> None:
    """Let ``mmengine.Config.fromfile`` apply the settings of a config that inherits ours; others stay as they are.

    Args:
        module: ``mmengine.config.config``, imported.
    """
    read = module.Config.fromfile

    def fromfile(*args: object, **kwargs: object) -> object:
        config = read(*args, **kwargs)
        if 'image_size' in config and 'val_interval' in config:  # most likely one of ours, which takes a closer look
            from dino_mm.settings import apply_settings, has_settings

            if has_settings(config):
                apply_settings(config)
        return config

    fromfile.__wrapped__, fromfile.__doc__ = read, read.__doc__  # type: ignore[attr-defined]
    module.Config.fromfile = staticmethod(fromfile)


def is_standin(module: types.ModuleType) -> bool:
    """Whether ``module``, mmcv's ``_ext``, is this stand-in, from whichever copy of this file."""
    return getattr(module, '__standin__', None) == Finder.marker


def install() -> None:
    """Have Python find both; any number of times, and from any number of copies of this file."""
    present = {getattr(finder, 'marker', None) for finder in sys.meta_path}
    if Finder.marker not in present:
        sys.meta_path.append(Finder)
    if CONFIGS in sys.modules:
        teach_names(sys.modules[CONFIGS])
    elif ConfigFinder.marker not in present:
        sys.meta_path.insert(0, ConfigFinder)
