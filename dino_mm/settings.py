"""Settings: one value of a config that reaches every place which depends on it.

Configs of ours have five of them, in ``_base_/default_runtime.py``: ``image_size``, ``batch_size``, ``epochs``,
``max_iters`` and ``val_interval``. None keeps what the recipe states. ``mmengine.Config.fromfile`` applies them to a
config that inherits ours, and :func:`read_config` to the options of a command line too. The rules stand in
``docs/own_data.md``.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .schedules import set_length
from .shipped import SETTINGS

if TYPE_CHECKING:
    from mmengine.config import Config

#: Arguments of transforms that are lengths in pixels.
LENGTHS = {
    'ResizeShortestEdge': ('scale',),
    'Resize': ('scale',),
    'FixScaleResize': ('scale',),
    'RandomResize': ('scale',),
    'RandomChoiceResize': ('scales',),
    'RandomCrop': ('crop_size',),
    'Pad': ('size',),
    'Mosaic': ('img_scale',),
    'CachedMosaic': ('img_scale',),
    'MixUp': ('img_scale',),
    'CachedMixUp': ('img_scale',),
}
#: Of these, the ones that set the size of a test.
RESIZES = ('ResizeShortestEdge', 'Resize', 'FixScaleResize')
LOADERS = ('train_dataloader', 'val_dataloader', 'test_dataloader')
#: Where the present size of a test is read.
TESTED = ('test_dataloader', 'val_dataloader', 'test_pipeline')
PIPELINES = ('train_pipeline', 'test_pipeline', 'tta_pipeline')


class SettingError(ValueError):
    """A setting has no sensible value, or nothing that it could reach; the message says the way out."""


def has_settings(config: Mapping[str, Any]) -> bool:
    """Whether a config inherits ours: it has all settings, set or not."""
    return all(name in config for name in SETTINGS)


@contextmanager
def reading(path: str | Path) -> Iterator[None]:
    """Raise a SettingError that names ``path`` if the config is not valid Python, or does not fit its ``_base_``."""
    try:
        yield
    except TypeError as error:
        if 'cannot inherit from base' not in str(error):
            raise
        raise SettingError(f'{path}: {error}') from None
    except SyntaxError as error:
        line = '' if error.lineno is None else f' (line {error.lineno})'
        raise SettingError(f'{path}, or a file of its `_base_`, is not valid Python: {error.msg}{line}.') from None
    except FileNotFoundError as error:
        raise SettingError(f'{path}: {error}') from None


def read_config(path: str | Path, options: Mapping[str, Any] | None = None) -> Config:
    """Read a config, merge the options of a command line, and apply the settings of both.

    Args:
        path: The config's file.
        options: Key -> value, as ``--cfg-options`` gives them. ``epochs`` replaces the file's ``max_iters``, and the
            other way round.

    Raises:
        SettingError: A setting is wrong, or the file is no config.
    """
    from mmengine.config import Config

    options = dict(options or {})
    with reading(path):
        # The file's settings wait for the options: a length that is set twice would be rounded twice.
        config = getattr(Config.fromfile, '__wrapped__', Config.fromfile)(path)
    named = [name for name in SETTINGS if options.get(name) is not None]
    if named and not has_settings(config):
        raise SettingError(f'{path}: `{named[0]}` is a setting of configs that inherit dino_mm. This one does not.')
    _refuse_misspelt_options(config, options)
    for name, other in (('epochs', 'max_iters'), ('max_iters', 'epochs')):
        if name in named:
            options.setdefault(other, None)
    with reading(path):
        config.merge_from_dict(options)
    if has_settings(config):
        apply_settings(config)
        _require_one_length(config, options)
        # What the command line says of a place goes over what a setting makes of it.
        config.merge_from_dict({key: value for key, value in options.items() if key not in SETTINGS})
    return config


def _refuse_misspelt_options(config: Config, options: Mapping[str, Any]) -> None:
    """Raise SettingError if an option would make a new key that looks like one that is there, and have no effect."""
    known = {*config, *_keys_of_runner()}
    for key in options:
        root = key.partition('.')[0]
        meant = _nearest(root, known)
        if meant is not None:
            raise SettingError(
                f'{config.filename} has no key `{root}`, so the option would have no effect. Did you mean `{meant}`?'
            )


def _refuse_misspelt_keys(config: Config) -> None:
    """Raise SettingError if a file sets what looks like a setting or a key of the runner, and nothing reads it.

    Configs may have variables of any name, but then another line reads them. A config without a base, as a run writes
    it down, states what its variables led to, and may keep them.
    """
    if '_base_' not in config.text:
        return
    known = {*SETTINGS, *_keys_of_runner()}
    for key in config:
        meant = _nearest(key, known)
        if meant is not None and len(re.findall(rf'\b{re.escape(key)}\b', config.text)) == 1:
            raise SettingError(f'{config.filename}: nothing reads `{key}`. Did you mean `{meant}`?')


def _keys_of_runner() -> tuple[str, ...]:
    from mmengine.runner import Runner

    return tuple(inspect.signature(Runner.__init__).parameters)


def _nearest(key: str, known: Collection[str]) -> str | None:
    """The known key that a misspelt one may mean; None for a known one, and if there is none."""
    return None if key in known else next(iter(difflib.get_close_matches(key, known, 1, 0.8)), None)


def _require_one_length(config: Config, options: Mapping[str, Any]) -> None:
    """Raise SettingError if an option of the loop contradicts a setting."""
    length = next((name for name in ('epochs', 'max_iters') if config[name] is not None), None)
    for key, name in (('train_cfg.max_epochs', 'epochs'), ('train_cfg.max_iters', 'max_iters')):
        if length is not None and key in options:
            raise SettingError(
                f'{config.filename}: `{key}` contradicts the setting `{length}={config[length]}`. '
                f'Give `{name}={options[key]}` instead.'
            )


def apply_settings(config: Config) -> None:
    """Write the settings of a config into every place that depends on them; a second time changes nothing.

    Args:
        config: A config that inherits ours.

    Raises:
        SettingError: A setting is no positive whole number, ``epochs`` and ``max_iters`` are both set, the config has
            no place for one, or a key of its file is misspelt.
    """
    file = config.filename or 'the config'
    _refuse_misspelt_keys(config)
    for name in SETTINGS:
        value = config[name]
        if value is not None and (type(value) is not int or value < 1):
            raise SettingError(f'{file}: `{name}` is {value!r}. It is a whole number from 1 on, or None.')
    if config.epochs is not None and config.max_iters is not None:
        raise SettingError(
            f'{file}: `epochs` is {config.epochs} and `max_iters` {config.max_iters}. Set one of them to None.'
        )
    if config.image_size is not None:
        _set_image_size(config, config.image_size, file)
    if config.batch_size is not None:
        _set_batch_size(config, config.batch_size, file)
    if 'train_cfg' in config and (config.epochs or config.max_iters):
        set_length(config, config.epochs or config.max_iters, by_epoch=config.epochs is not None)
    if 'train_cfg' in config and config.val_interval is not None:
        config.train_cfg.val_interval = config.val_interval
        checkpoint = config.get('default_hooks', {}).get('checkpoint')
        if checkpoint:
            checkpoint.interval = config.val_interval


def _set_image_size(config: Config, size: int, file: str) -> None:
    """Multiply all lengths of all pipelines, so that a test resizes to a shorter edge of ``size`` pixels."""
    holders = list(_holders(config))
    tested = [holder[key] for wanted in TESTED for name, holder, key in holders if name == wanted]
    current = _shorter_edge(tested)
    if current is None:
        raise SettingError(f'{file}: `image_size` needs a test pipeline with one of {", ".join(RESIZES)}.')
    if current != size:
        for _, holder, key in holders:
            holder[key] = _scaled(holder[key], size / current)


def _set_batch_size(config: Config, size: int, file: str) -> None:
    """Set the images of a process in training; mmengine scales the learning rate with those of all processes."""
    import os

    if 'base_batch_size' not in config.get('auto_scale_lr', {}):
        raise SettingError(
            f'{file}: `batch_size` needs `auto_scale_lr.base_batch_size`, the batch of the learning rate.'
        )
    config.auto_scale_lr.enable = True
    loader = config.get('train_dataloader')
    if loader is None:
        return
    loader.batch_size = size
    workers = loader.get('num_workers', 0)
    if workers:
        loader.num_workers = max(workers, min(size, os.cpu_count() or 1))


def _holders(config: Config) -> Iterator[tuple[str, Any, str]]:
    """Where pipelines stand: the name of the part, the dict, and its key; each once."""
    seen = set()
    for name in PIPELINES:
        if name in config:
            yield name, config, name
    for name in LOADERS:
        for dataset in _datasets(config.get(name) or {}):
            if 'pipeline' in dataset and id(dataset) not in seen:
                seen.add(id(dataset))
                yield name, dataset, 'pipeline'


def _datasets(holder: Mapping[str, Any]) -> Iterator[Any]:
    """The data sets of a loader, those that others wrap included."""
    inner = [holder['dataset']] if holder.get('dataset') else list(holder.get('datasets') or [])
    for dataset in inner:
        yield dataset
        yield from _datasets(dataset)


def _type_name(transform: Mapping[str, Any]) -> str:
    """Name of a transform without its scope."""
    kind = transform.get('type', '')
    return kind.rpartition('.')[2] if isinstance(kind, str) else kind.__name__


def _shorter_edge(node: Any) -> int | None:
    """Shorter edge of the first resize of a pipeline, pixels."""
    if isinstance(node, Mapping):
        scale = node.get('scale')
        if _type_name(node) in RESIZES and isinstance(scale, tuple | list):
            return int(min(scale))
        return _shorter_edge(list(node.values()))
    if isinstance(node, list | tuple):
        return next((edge for edge in map(_shorter_edge, node) if edge is not None), None)
    return None


def _scaled(node: Any, factor: float) -> Any:
    """A copy of a pipeline, or of a part of one, with all lengths multiplied."""
    if isinstance(node, Mapping):
        lengths = LENGTHS.get(_type_name(node), ())
        if not str(node.get('crop_type', 'absolute')).startswith('absolute'):
            lengths = ()  # shares of the picture
        parts = {k: _multiplied(v, factor) if k in lengths else _scaled(v, factor) for k, v in node.items()}
        return type(node)(parts)  # type: ignore[call-arg]
    if isinstance(node, list | tuple):
        return type(node)(_scaled(part, factor) for part in node)
    return node


def _multiplied(value: Any, factor: float) -> Any:
    if isinstance(value, list | tuple):
        return type(value)(_multiplied(part, factor) for part in value)
    is_length = isinstance(value, int | float) and not isinstance(value, bool) and value > 0
    return max(1, int(value * factor + 0.5)) if is_length else value
