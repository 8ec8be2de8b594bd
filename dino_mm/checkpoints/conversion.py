"""From a checkpoint's tensors to a model's: recognise, convert, and account for every tensor."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from . import names
from .backbones import BACKBONES, timm
from .classes import class_tensors, rows_of_categories
from .detectors import OURS, SOURCES, Source
from .errors import CheckpointError
from .names import Conversion, NameMap

BACKBONE = 'backbone.'
OWN_NAMES = NameMap("the model's own names", ())
#: Match any names: tried besides those that a checkpoint is recognised by.
UNMARKED = (OWN_NAMES, timm.ANY)
#: Names of a scheme's own in an error message.
SHOWN = 4


@dataclass
class Converted:
    """A checkpoint under a model's names.

    Attributes:
        conversion: Tensors and account; fits the model only if ``problems`` is empty.
        source: The library it is from; None for a bare backbone.
        backbone: The backbone's naming scheme; None if unknown, which leaves its names as they are.
        problems: What does not fit, in words.
    """

    conversion: Conversion
    source: Source | None
    backbone: NameMap | None
    problems: list[str]

    @property
    def title(self) -> str:
        """What the checkpoint is, in words."""
        parts = [f'a DINO detector of {self.source.title}'] if self.source else ['a bare backbone']
        if self.backbone is not None:
            parts.append(self.backbone.title)
        return ', '.join(parts)

    def fits_but_for_classes(self, model: nn.Module) -> bool:
        """Whether the numbers of classes are the only difference from ``model``, if there is any."""
        own, found = model.state_dict(), self.conversion.tensors
        if own.keys() - found.keys() - self.conversion.filled.keys() or found.keys() - own.keys():
            return False
        differing = [name for name, tensor in found.items() if tensor.shape != own[name].shape]
        return set(differing) <= set(class_tensors(own)) and all(
            found[name].shape[1:] == own[name].shape[1:] for name in differing
        )


def recognise_detector(tensors: Iterable[str]) -> Source | None:
    """The library whose DINO detectors have these names; None if they are no DINO detector's."""
    tensors = list(tensors)
    return next((source for source in SOURCES if source.scheme.matches(tensors)), None)


def recognise_backbone(tensors: Iterable[str]) -> list[NameMap]:
    """The schemes that a bare backbone's names may be of."""
    tensors = list(tensors)
    return [scheme for scheme in BACKBONES if scheme.matches(tensors)]


def convert_detector(tensors: Mapping[str, Tensor], model: nn.Module) -> Converted:
    """Convert a whole detector's tensors for ``model``, a DINO.

    Raises:
        CheckpointError: The tensors are not a DINO detector's.
    """
    source = recognise_detector(tensors)
    if source is None:
        raise CheckpointError(_not_a_detector(tensors))
    own = model.state_dict()
    prepared = source.prepare(dict(tensors)) if source.prepare else tensors
    result = names.convert(source.scheme, prepared, own)
    scheme = _convert_backbone_within(result, own, dict(model.named_parameters()))
    if source.category_ids:
        rows_of_categories(result, own)
    return Converted(result, source, scheme, compare(result, own))


def _convert_backbone_within(
    result: Conversion, own: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> NameMap | None:
    """Convert what is under ``backbone.`` in place; there, no parameter may be left as it is, or resized."""
    inner = {name.removeprefix(BACKBONE): name for name in list(result.tensors) if name.startswith(BACKBONE)}
    schemes = [*recognise_backbone(inner), OWN_NAMES]
    own_inner = {name.removeprefix(BACKBONE): tensor for name, tensor in own.items() if name.startswith(BACKBONE)}
    origin = {short: result.origin.pop(name) for short, name in inner.items()}
    tensors = {short: result.tensors.pop(name) for short, name in inner.items()}
    scheme, converted = _best_fitting(schemes, tensors, own_inner, resize=False)
    for short, tensor in converted.tensors.items():
        result.tensors[BACKBONE + short] = tensor
        if short in converted.origin:
            result.origin[BACKBONE + short] = origin[converted.origin[short]]
    result.dropped.update({origin[short]: reason for short, reason in converted.dropped.items()})
    result.filled.update(
        {
            BACKBONE + short: reason
            for short, reason in converted.filled.items()
            if short in converted.tensors or BACKBONE + short not in parameters
        }
    )
    return None if scheme is OWN_NAMES else scheme


def convert_backbone(tensors: Mapping[str, Tensor], backbone: nn.Module) -> Converted:
    """Convert a bare backbone's tensors for ``backbone``; a whole detector's backbone is taken out of it.

    Raises:
        CheckpointError: A whole detector without a backbone.
    """
    own = backbone.state_dict()
    source = recognise_detector(tensors)
    outer: dict[str, str] = {}
    if source is not None:
        tensors, outer = _backbone_of(tensors, source)
    scheme, result = _best_fitting([*recognise_backbone(tensors), *UNMARKED], tensors, own)
    result.dropped.update(outer)
    return Converted(result, source, scheme, compare(result, own))


def _best_fitting(
    schemes: list[NameMap], tensors: Mapping[str, Tensor], own: Mapping[str, Tensor], resize: bool = True
) -> tuple[NameMap, Conversion]:
    """The scheme that leaves the fewest tensors without a counterpart, the first of several, and what it gives."""
    results = [(scheme, names.convert(scheme, tensors, own, resize)) for scheme in schemes]
    return min(results, key=lambda pair: len(own.keys() ^ (pair[1].tensors.keys() | pair[1].filled.keys())))


def _backbone_of(tensors: Mapping[str, Tensor], source: Source) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A detector's backbone, and the names around it with why they were dropped."""
    prepared = source.prepare(dict(tensors)) if source.prepare else tensors
    inner: dict[str, Tensor] = {}
    outer: dict[str, str] = {}
    for name, tensor in prepared.items():
        renamed = source.scheme.rename(name)
        if renamed.startswith(BACKBONE):
            inner[renamed.removeprefix(BACKBONE)] = tensor
        else:
            outer[name] = 'of the detector around the backbone'
    if not inner:
        raise CheckpointError(f'A DINO detector of {source.title} without anything under `{BACKBONE}`.')
    return inner, outer


def compare(result: Conversion, own: Mapping[str, Tensor]) -> list[str]:
    """What does not fit: tensors missing, unexpected, of another shape."""
    missing = [name for name in own if name not in result.tensors and name not in result.filled]
    unexpected = [name for name in result.tensors if name not in own]
    shapes = [
        f'{name} {tuple(tensor.shape)} for {tuple(own[name].shape)}'
        for name, tensor in result.tensors.items()
        if name in own and tensor.shape != own[name].shape
    ]
    counted = {
        'not in the checkpoint': missing,
        'without a place in the model': [result.origin.get(name, name) for name in unexpected],
        'of another shape (checkpoint for model)': shapes,
    }
    return [f'{len(found)} tensors {what}: {shorten(found)}' for what, found in counted.items() if found]


def shorten(found: list[str]) -> str:
    """The first of many."""
    return ', '.join(found[:SHOWN]) + (f' and {len(found) - SHOWN} more' if len(found) > SHOWN else '')


def _not_a_detector(tensors: Mapping[str, Tensor]) -> str:
    schemes = recognise_backbone(tensors)
    if schemes:
        return (
            f'The checkpoint is a bare backbone, {schemes[0].title}, where a whole detector is expected. Give it to '
            "`model.backbone.init_cfg=dict(type='Pretrained', checkpoint=...)` instead."
        )
    known = ', '.join(source.title for source in SOURCES if source is not OURS)
    return (
        f'The checkpoint is not a DINO detector of {known} or of this package; it begins with {shorten(list(tensors))}.'
    )
