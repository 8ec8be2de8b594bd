"""Build the parts of a detector from configs, with messages that say which key is at fault."""

import copy
import difflib
import inspect
from collections.abc import Collection, Mapping
from typing import Any

from mmdet.registry import MODELS


def build_part(name: str, cfg: Mapping[str, Any], **handed_down: Any) -> Any:
    """Build one part of the detector.

    The registry is mmdet's, so unscoped types mean mmdet's even where no default scope is set. The config stays as it
    is: parts get a copy.

    Args:
        name: The part's key in the detector's config, for messages.
        cfg: The part's config.
        **handed_down: Arguments that the detector states for all its parts.

    Raises:
        TypeError: The config has a key that the part does not take.
        ValueError: The config states what the detector hands down, differently.
    """
    own = copy.deepcopy(dict(cfg))
    for key, value in handed_down.items():
        if own.setdefault(key, value) != value:
            raise ValueError(
                f'`{name}.{key}` is {own[key]!r}, but the detector states {value!r} for all its parts. '
                f'Remove `{name}.{key}`.'
            )
    _check_keys(name, own, set(handed_down))
    return MODELS.build(own)


def _check_keys(name: str, cfg: dict[str, Any], handed_down: set[str]) -> None:
    """Refuse keys that the class does not take, naming those it does."""
    cls = MODELS.get(cfg['type']) if isinstance(cfg.get('type'), str) else cfg.get('type')
    if not inspect.isclass(cls):
        return  # the registry's own message says what is wrong with `type`
    parameters = inspect.signature(cls).parameters
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return
    known = sorted(set(parameters) - handed_down)
    refuse_unknown_keys(name, [key for key in cfg if key not in parameters and key != 'type'], known, cls.__name__)


def refuse_unknown_keys(name: str, keys: Collection[str], known: Collection[str], taker: str) -> None:
    """Raise TypeError unless all ``keys`` of the config ``name`` are among those ``known`` to its ``taker``."""
    for key in keys:
        if key not in known:
            close = difflib.get_close_matches(key, known, 1)
            hint = f' Did you mean `{close[0]}`?' if close else ''
            raise TypeError(f'`{name}` has an unknown key `{key}`.{hint} {taker} takes: {", ".join(known)}.')
