"""Loading, wherever it is done: every ``load_state_dict`` of our modules recognises, converts and checks first.

The work is done in a hook of the module itself, so it is the same through mmengine's runner (``load_from``,
``resume``), MMDetection's tools and inferencers, ``init_cfg=dict(type='Pretrained', ...)`` and plain torch.

What a state dict may lack depends on who loads it. Torch says ``strict`` to ``load_state_dict``, but not to hooks: the
detector keeps it in ``load_strictly`` meanwhile. Whoever else loads cannot be told apart: mmengine, which warns of what
lacks and goes on, and modules around the detector.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from mmengine.logging import print_log
from torch import Tensor, nn

from .architecture import describe, fitting_configs
from .classes import num_classes
from .contents import Contents, take_apart
from .conversion import Converted, convert_backbone, convert_detector, shorten
from .detectors import OURS
from .errors import CheckpointError
from .finite import require_finite

CLASS_TRANSFER = "default_hooks = dict(loading=dict(type='dino_mm.LoadCheckpointHook', class_transfer=True))"


def convert_detectors_on_load(model: nn.Module) -> None:
    """Let ``model``, a DINO, load the checkpoints of any known library, and nothing that does not fit."""
    _register(model, _before_detector)


@contextmanager
def loading(model: nn.Module, strict: bool) -> Iterator[None]:
    """Tell the hook of ``model``, a DINO, what ``strict`` its ``load_state_dict`` was given."""
    model.load_strictly = strict  # type: ignore[assignment]
    try:
        yield
    finally:
        del model.load_strictly


def convert_backbones_on_load(backbone: nn.Module) -> None:
    """Let ``backbone`` load its authors' checkpoints, and nothing that does not fit; a second call does nothing."""
    if not getattr(backbone, '_converts_on_load', False):
        backbone._converts_on_load = True  # type: ignore[assignment]
        _register(backbone, _before_backbone)


def _register(module: nn.Module, hook: Callable) -> None:
    module._register_load_state_dict_pre_hook(hook, with_module=True)


def _before_detector(
    module: nn.Module,
    state_dict: dict[str, Any],
    prefix: str,
    metadata: dict,
    always_true: bool,
    missing: list[str],
    unexpected: list[str],
    errors: list[str],
) -> None:
    """Put what the model takes into ``state_dict``; the arguments are those of ``_load_from_state_dict``."""
    entries = {name.removeprefix(prefix): value for name, value in state_dict.items() if name.startswith(prefix)}
    if prefix and not entries:
        return  # the state dict of something around the detector, without it
    strict = getattr(module, 'load_strictly', None)
    contents = take_apart(entries, may_be_empty=strict is False)
    require_finite(contents.tensors)
    if strict is False:
        unexpected += _replace_what_fits(state_dict, contents, module)
        return
    converted = convert_detector(contents.tensors, module)
    lacking = check_detector(converted, module, contents.tensors, may_be_part=strict is None)
    _replace(state_dict, prefix, converted, module)
    if lacking and not prefix:
        # mmengine, which raises these if it was told to be strict, and warns of them otherwise.
        errors.append(lacking)
        own = module.state_dict()
        state_dict.update({name: own[name] for name in converted.differences.missing})


def _replace_what_fits(state_dict: dict[str, Any], contents: Contents, module: nn.Module) -> list[str]:
    """Put those of a detector's tensors that have a place where the checkpoint's were; the names of the others.

    Torch itself finds out what is missing or of another shape.
    """
    converted = convert_detector(contents.tensors, module, default=OURS)
    _check_position(converted, module)
    without_place = [contents.names[name] for name in converted.differences.unexpected] + contents.others
    own = module.state_dict()
    result = converted.conversion
    state_dict.clear()
    state_dict.update({name: tensor for name, tensor in result.tensors.items() if name in own})
    if converted.source is not OURS:  # others need not have them
        state_dict.update({name: own[name] for name in result.filled.keys() - result.tensors.keys()})
    return without_place


def _before_backbone(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    if prefix:
        return  # part of a detector, whose own hook was there before
    contents = take_apart(state_dict)
    converted = convert_backbone(contents.tensors, module)
    if converted.problems:
        raise CheckpointError(
            f'The checkpoint is {converted.title}, and does not fit {type(module).__name__} as it is configured. '
            + '; '.join(converted.problems)
        )
    report(converted)
    _replace(state_dict, prefix, converted, module)


def _replace(state_dict: dict[str, Any], prefix: str, converted: Converted, module: nn.Module) -> None:
    """Put converted tensors where the checkpoint's were; what stays as it is is loaded from the module itself."""
    own = module.state_dict()
    for name in [name for name in state_dict if name.startswith(prefix)]:
        del state_dict[name]
    state_dict.update({prefix + name: tensor for name, tensor in converted.conversion.tensors.items()})
    left = converted.conversion.filled.keys() - converted.conversion.tensors.keys()
    state_dict.update({prefix + name: own[name] for name in left})


def check_detector(
    converted: Converted, model: nn.Module, checkpoint: dict[str, Tensor], may_be_part: bool = False
) -> str | None:
    """Raise CheckpointError unless ``converted`` fits ``model`` in every tensor and in its position embedding.

    Args:
        converted: What became of ``checkpoint``.
        model: A DINO.
        checkpoint: The checkpoint's name -> tensor, to find a config that fits it.
        may_be_part: Let a checkpoint pass that only lacks tensors, unless it is a whole one for a shipped config.

    Returns:
        With ``may_be_part``, what is missing, in words; None if nothing is.
    """
    _check_position(converted, model)
    if not converted.problems:
        return None
    intro = f'The checkpoint is {describe(converted)}. '
    if converted.fits_but_for_classes(model):
        raise CheckpointError(
            f'{intro}The model has {num_classes(model.state_dict())} classes. To keep the classes that both have and '
            f'start the others anew, add this to the config: {CLASS_TRANSFER}'
        )
    levels = converted.conversion.tensors.get('level_embed')
    fitting = [] if levels is None or levels.ndim != 2 else fitting_configs(checkpoint, len(levels))
    missing = converted.differences.missing
    if may_be_part and converted.differences.only_missing and not fitting:
        return f'{intro}{len(missing)} tensors of the model are not in it and stay as they are: {shorten(missing)}.'
    raise CheckpointError(
        f'{intro}It does not fit the model: {"; ".join(converted.problems)}. '
        + (f'It fits {", ".join(fitting)}.' if fitting else 'It fits no shipped config as it is.')
    )


def _check_position(converted: Converted, model: nn.Module) -> None:
    """Position embeddings have no tensors: a wrong one would only show in the AP."""
    source, position = converted.source, model.positional_encoding
    if source is None or source is OURS or source.temperature is None:
        return
    found = (getattr(position, 'temperature', None), getattr(position, 'offset', None))
    if found != (source.temperature, source.offset):
        raise CheckpointError(
            f'The checkpoint is {converted.title}, whose position embedding has temperature {source.temperature:g} and '
            f'offset {source.offset}; the model has {found[0]} and {found[1]}. Set `model.positional_encoding='
            f'dict(temperature={source.temperature:g}, offset={source.offset})`, as dino_r50_4scale_24ep.py has it.'
        )


def report(converted: Converted) -> None:
    """Log what a checkpoint was, and what was left out of it."""
    if converted.source is OURS:
        return
    result = converted.conversion
    lines = [f'The checkpoint is {converted.title}: {len(result.tensors)} tensors loaded.']
    lines += [f'  dropped: {count} {reason}' for reason, count in count_reasons(result.dropped).items()]
    lines += [f'  not in it: {count} {reason}' for reason, count in count_reasons(result.filled).items()]
    print_log('\n'.join(lines), logger='current')


def count_reasons(reasons: dict[str, str]) -> dict[str, int]:
    """How often each reason stands."""
    counts: dict[str, int] = {}
    for reason in reasons.values():
        # Aliases name the tensor they stand for; one line is enough for them.
        key = 'the same tensor under a second name' if reason.startswith('the same tensor as') else reason
        counts[key] = counts.get(key, 0) + 1
    return counts
