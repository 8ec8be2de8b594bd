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


@dataclass(frozen=True)
class Differences:
    """What of a checkpoint does not fit a model.

    Attributes:
        missing: Names of the model that the checkpoint lacks.
        unexpected: Names of the checkpoint without a place in the model.
        shapes: Names of the model, each with both shapes, that are of another shape in the checkpoint.
    """

    missing: list[str]
    unexpected: list[str]
    shapes: list[str]

    @property
    def only_missing(self) -> bool:
        """Whether tensors are missing, and all that are there fit."""
        return bool(self.missing) and not self.unexpected and not self.shapes

    def words(self) -> list[str]:
        """One clause for each kind; none if all fits."""
        counted = {
            'not in the checkpoint': self.missing,
            'without a place in the model': self.unexpected,
            'of another shape (checkpoint for model)': self.shapes,
        }
        return [f'{len(found)} tensors {what}: {shorten(found)}' for what, found in counted.items() if found]


@dataclass
class Converted:
    """A checkpoint under a model's names.

    Attributes:
        conversion: Tensors and account; fits the model only if there are no ``differences``.
        source: The library it is from; None for a bare backbone.
        backbone: The backbone's naming scheme; None if unknown, which leaves its names as they are.
        differences: What does not fit.
        part: Whether it lacks what whole detectors of ``source`` are recognised by.
    """

    conversion: Conversion
    source: Source | None
    backbone: NameMap | None
    differences: Differences
    part: bool = False

    @property
    def problems(self) -> list[str]:
        """What does not fit, in words."""
        return self.differences.words()

    @property
    def title(self) -> str:
        """What the checkpoint is, in words."""
        whole = 'part of a DINO detector' if self.part else 'a DINO detector'
        parts = [f'{whole} of {self.source.title}'] if self.source else ['a bare backbone']
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


def recognise_part(tensors: Mapping[str, Tensor], model: nn.Module) -> Source | None:
    """The library of whose DINO detectors ``tensors`` are a part; None if they are not part of ``model`` in any.

    More of them have to find their place in ``model`` than not. Those of a backbone count only where there are no
    others, as other detectors have the same backbones.
    """
    outside = {name for name in tensors if not name.startswith(BACKBONE)} or set(tensors)
    own = model.state_dict()

    def count(source: Source) -> tuple[int, int]:
        result, _ = _convert(tensors, source, model)
        placed = outside & {name for ours, name in result.origin.items() if ours in own}
        return len(placed), -len(outside - placed - result.dropped.keys())

    counts = {source.title: (*count(source), source) for source in (OURS, *SOURCES)}
    placed, others, best = max(counts.values(), key=lambda entry: entry[:2])
    return best if placed + others > 0 else None


def recognise_backbone(tensors: Iterable[str]) -> list[NameMap]:
    """The schemes that a bare backbone's names may be of."""
    tensors = list(tensors)
    return [scheme for scheme in BACKBONES if scheme.matches(tensors)]


def convert_detector(tensors: Mapping[str, Tensor], model: nn.Module, default: Source | None = None) -> Converted:
    """Convert a detector's tensors, or part of them, for ``model``, a DINO.

    Args:
        tensors: The checkpoint's name -> tensor.
        model: Gives names and shapes.
        default: Whose names they are taken for if nothing tells it; None makes that an error.

    Raises:
        CheckpointError: The tensors are not a DINO detector's.
    """
    whole = recognise_detector(tensors)
    source = whole or recognise_part(tensors, model) or default
    if source is None:
        raise CheckpointError(_not_a_detector(tensors))
    result, scheme = _convert(tensors, source, model)
    if source.category_ids:
        rows_of_categories(result, model.state_dict())
    return Converted(result, source, scheme, compare(result, model.state_dict()), part=whole is None)


def _convert(tensors: Mapping[str, Tensor], source: Source, model: nn.Module) -> tuple[Conversion, NameMap | None]:
    """The tensors by the names of ``source``, and the backbone's scheme."""
    own = model.state_dict()
    prepared = source.prepare(tensors, own) if source.prepare else {name: name for name in tensors}
    result = names.convert(source.scheme, {prepared[name]: tensor for name, tensor in tensors.items()}, own)
    given = {new: name for name, new in prepared.items()}
    result.origin = {ours: given[name] for ours, name in result.origin.items()}
    result.dropped = {given[name]: reason for name, reason in result.dropped.items()}
    scheme = _convert_backbone_within(result, own, dict(model.named_parameters()))
    return result, scheme


def _convert_backbone_within(
    result: Conversion, own: Mapping[str, Tensor], parameters: Mapping[str, Tensor]
) -> NameMap | None:
    """Convert what is under ``backbone.`` in place; there, no parameter may be left as it is, or resized."""
    inner = {name.removeprefix(BACKBONE): name for name in list(result.tensors) if name.startswith(BACKBONE)}
    own_inner = {name.removeprefix(BACKBONE): tensor for name, tensor in own.items() if name.startswith(BACKBONE)}
    origin = {short: result.origin.pop(name) for short, name in inner.items()}
    tensors = {short: result.tensors.pop(name) for short, name in inner.items()}
    scheme, converted = _best_fitting(_schemes_within(inner, own_inner), tensors, own_inner, resize=False)
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


def _schemes_within(inner: Iterable[str], own: Mapping[str, Tensor]) -> list[NameMap]:
    """The schemes that a detector's backbone may be of; any that keeps names apart if nothing tells it."""
    inner = set(inner)
    found = recognise_backbone(inner)
    if found or inner <= own.keys():
        return [*found, OWN_NAMES]
    return [OWN_NAMES, *(scheme for scheme in BACKBONES if len({scheme.rename(name) for name in inner}) == len(inner))]


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
    prepared = source.prepare(tensors, {}) if source.prepare else {}
    inner: dict[str, Tensor] = {}
    outer: dict[str, str] = {}
    for name, tensor in tensors.items():
        renamed = source.scheme.rename(prepared.get(name, name))
        if renamed.startswith(BACKBONE):
            inner[renamed.removeprefix(BACKBONE)] = tensor
        else:
            outer[name] = 'of the detector around the backbone'
    if not inner:
        raise CheckpointError(f'A DINO detector of {source.title} without anything under `{BACKBONE}`.')
    return inner, outer


def compare(result: Conversion, own: Mapping[str, Tensor]) -> Differences:
    """What does not fit: tensors missing, unexpected, of another shape."""
    return Differences(
        missing=[name for name in own if name not in result.tensors and name not in result.filled],
        unexpected=[result.origin.get(name, name) for name in result.tensors if name not in own],
        shapes=[
            f'{name} {tuple(tensor.shape)} for {tuple(own[name].shape)}'
            for name, tensor in result.tensors.items()
            if name in own and tensor.shape != own[name].shape
        ],
    )


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
