"""Convert a checkpoint: ``python tools/convert_checkpoint.py IN OUT`` makes ours of any known DINO's or backbone's.

Nothing needs this: configs, tools and ``load_state_dict`` take the same files as they are. It shows what a checkpoint
is (``--inspect``), and writes a copy of plain tensors that any torch opens with ``weights_only=True``.
"""

import argparse
import sys

import dino_mm  # first, for it says what does not fit

# isort: split
import torch
from torch import nn

from dino_mm.checkpoints.architecture import describe, fitting_configs
from dino_mm.checkpoints.classes import COCO_CLASSES
from dino_mm.checkpoints.contents import Contents, take_apart
from dino_mm.checkpoints.conversion import (
    Converted,
    convert_backbone,
    convert_detector,
    recognise_backbone,
    recognise_detector,
)
from dino_mm.checkpoints.errors import CheckpointError
from dino_mm.checkpoints.files import open_checkpoint
from dino_mm.checkpoints.loading import check_detector, count_reasons
from dino_mm.registry import MODELS

#: How the known libraries call the embedding of levels.
LEVEL_EMBEDDINGS = ('level_embed', 'level_embeds')


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', metavar='IN', help='path or address of a checkpoint')
    parser.add_argument('out', metavar='OUT', nargs='?', help='file to write; not with --inspect')
    parser.add_argument('--config', help='the model it is for; a detector finds its own among the shipped configs')
    parser.add_argument('--inspect', action='store_true', help='print only')
    parser.add_argument('--tensors', action='store_true', help='print every tensor, not only how many')
    parser.add_argument('--ema', action='store_true', help='take the exponential moving average of the weights')
    parser.add_argument('--trust', action='store_true', help='run the code that the file may contain to open it')
    args = parser.parse_args()
    if args.inspect == (args.out is not None):
        parser.error('give OUT, or --inspect')
    return args


def build(config: str) -> nn.Module:
    """The model of a config, without pretrained weights."""
    return MODELS.build(dino_mm.get_config(config).model)


def convert(contents: Contents, config: str | None) -> tuple[Converted, str]:
    """Convert for the model of ``config``, or of the shipped config that fits; and which one that was."""
    if recognise_detector(contents.tensors) is None and recognise_backbone(contents.tensors):
        return _convert_backbone(contents, config)
    if config is None:
        levels = next((t.shape[0] for name, t in contents.tensors.items() if name.endswith(LEVEL_EMBEDDINGS)), 0)
        fitting = fitting_configs(contents.tensors, levels)
        if not fitting:
            raise CheckpointError('No shipped config fits this checkpoint; give the one of its model with --config.')
        config = fitting[0]
    model = build(config)
    converted = convert_detector(contents.tensors, model)
    if not converted.fits_but_for_classes(model):
        check_detector(converted, model, contents.tensors)
    return converted, config


def _convert_backbone(contents: Contents, config: str | None) -> tuple[Converted, str]:
    if config is None:
        scheme = recognise_backbone(contents.tensors)[0]
        raise CheckpointError(f'A bare backbone, {scheme.title}: give a config with its size with --config.')
    converted = convert_backbone(contents.tensors, build(config).backbone)
    if converted.problems:
        raise CheckpointError(
            f'{converted.title}, does not fit the backbone of {config}: ' + '; '.join(converted.problems)
        )
    return converted, config


def print_table(converted: Converted, contents: Contents, config: str, every_tensor: bool) -> None:
    """What the checkpoint is, and what became of its tensors."""
    result = converted.conversion
    kind = describe(converted) if converted.source else converted.title
    rows = [
        ('checkpoint', kind + (', averaged (EMA) weights' if contents.averaged else '')),
        ('config', config),
        ('mapped', f'{len(result.origin)} of {len(contents.tensors)} tensors'),
        *(('dropped', f'{count}: {reason}') for reason, count in count_reasons(result.dropped).items()),
        *(('not in it', f'{count}: {reason}') for reason, count in count_reasons(result.filled).items()),
    ]
    print('\n'.join(f'{what:<10}  {value}' for what, value in rows))
    if every_tensor:
        print('\n'.join(f'  {origin} -> {ours}' for ours, origin in result.origin.items()))
        print('\n'.join(f'  {name} dropped: {reason}' for name, reason in result.dropped.items()))


def write(converted: Converted, contents: Contents, path: str) -> None:
    """Save plain tensors, and the names of the classes where they are known."""
    tensors = {name: tensor.detach().clone() for name, tensor in converted.conversion.tensors.items()}
    meta: dict = dict(converted_from=converted.title, dino_mm_version=dino_mm.__version__)
    classes = contents.classes
    if classes is None and tensors.get('bbox_head.cls_branches.0.bias', torch.empty(0)).shape[0] == len(COCO_CLASSES):
        classes = COCO_CLASSES
    if classes is not None:
        meta['dataset_meta'] = dict(classes=classes)
    torch.save(dict(state_dict=tensors, meta=meta), path)
    print(f'{"written":<10}  {path}')


def main() -> None:
    """Convert or inspect."""
    args = parse_args()
    try:
        contents = take_apart(open_checkpoint(args.checkpoint, args.trust), args.ema)
        converted, config = convert(contents, args.config)
    except CheckpointError as error:
        sys.exit(f'{args.checkpoint}: {str(error).removeprefix(f"{args.checkpoint}: ")}')
    print_table(converted, contents, config, args.tensors)
    if args.out is not None:
        write(converted, contents, args.out)


if __name__ == '__main__':
    main()
