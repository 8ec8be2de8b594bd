"""The config of a project, as text."""

import ast
import os
from pathlib import Path
from typing import NamedTuple

from .parts import Part

#: Images that a training sees by default: few epochs of many images, many of few.
SEEN_IMAGES = 40_000
MIN_EPOCHS, MAX_EPOCHS = 12, 100
PATIENCE = 15

TEMPLATE = """\
# Fine-tunes {model} on {what}.
# Train it: {command}
_base_ = 'dino_mm::{base}'

# Each of these reaches every place that depends on it; docs/own_data.md has the rules.
image_size = {image_size}  # shorter edge in pixels: smaller is faster, larger finds smaller objects
epochs = {epochs}  # each ends with a validation
# Images of each GPU. The learning rate is {lr:g} for {base_batch} images a step and follows their number:
# {scaled_lr:.3g} for {gpus} x {batch_size}.
batch_size = {batch_size}

# Label i is classes[i].
classes = {classes}
data_root = {data_root!r}
dataset = dict(data_root=data_root, metainfo=dict(classes=classes))
train_dataloader = dict(dataset=dict(**dataset, {train}))
val_dataloader = dict(dataset=dict(**dataset, {val}))
val_evaluator = dict(ann_file={val_file})
{test}
{start}
default_hooks = dict(
    {loading}# The best checkpoint by box AP is kept, and the last.
    checkpoint=dict(save_best='coco/bbox_mAP', rule='greater', max_keep_ckpts=1),
)
custom_hooks = [
    dict(type='NumClassCheckHook'),
    # Averaged weights are validated and saved.
    dict(type='EMAHook', ema_type='ExpMomentumEMA', momentum=0.001, update_buffers=True, priority=49),
    # Ends when the box AP has not grown by 0.001 for so many validations.
    dict(type='EarlyStoppingHook', monitor='coco/bbox_mAP', rule='greater', min_delta=0.001, patience={patience}),
]
work_dir = '{{{{ fileDirname }}}}/work_dir'
"""

START = """\
# Starts from the zoo's weights. Classes that COCO has by the same name keep theirs, the others start anew.
model = dict({model})
load_from = {weights!r}
"""
START_ANEW = """\
# The zoo has no weights of this model: only its backbone starts pretrained.
model = dict({model})
"""


class Recipe(NamedTuple):
    """What a project takes from the model that it fine-tunes.

    Attributes:
        model: As the user names it.
        base: Its config's path below ``configs/``.
        weights: Address of its checkpoint, or None.
        lr: Learning rate, for steps of ``base_batch`` images.
        base_batch: See ``lr``.
        has_init_cfg: Whether the backbone loads weights of its own, which a checkpoint makes needless.
        image_size: Shorter edge of a test, pixels.
        batch_size: Images of each GPU.
    """

    model: str
    base: str
    weights: str | None
    lr: float
    base_batch: int
    has_init_cfg: bool
    image_size: int
    batch_size: int


def default_epochs(num_images: int) -> int:
    """Epochs of a training on so many images."""
    return min(MAX_EPOCHS, max(MIN_EPOCHS, round(SEEN_IMAGES / max(1, num_images))))


def launch_command(config: str, gpus: int) -> str:
    """How to train on so many GPUs, without a checkout."""
    if gpus <= 1:
        return f'dino-mm train {config}'
    return f'torchrun --nproc_per_node={gpus} -m dino_mm train {config} --launcher pytorch'


def config_text(
    recipe: Recipe,
    parts: dict[str, Part],
    classes: tuple[str, ...],
    data_root: Path,
    epochs: int,
    gpus: int,
    what: str,
    command: str,
) -> str:
    """The text of a config.

    Args:
        recipe: Of the model.
        parts: Split -> part; 'train' and 'val' at least. New annotation files lie in ``annotations/`` beside
            the config, the others below ``data_root``.
        classes: Names of the labels.
        data_root: Absolute folder of the pictures.
        epochs: Length of the training.
        gpus: Number of processes.
        what: What is trained on, in words.
        command: What starts the training.
    """
    files = {split: _ann_file(part, data_root) for split, part in parts.items()}
    data = {split: f'ann_file={files[split]}, {_prefix(part, data_root)}' for split, part in parts.items()}
    test = 'test_dataloader, test_evaluator = val_dataloader, val_evaluator\n'
    if 'test' in parts:
        test = f'test_dataloader = dict(dataset=dict(**dataset, {data["test"]}))\n'
        test += f'test_evaluator = dict(ann_file={_whole(files["test"])})\n'
    model = f'bbox_head=dict(num_classes={len(classes)})'
    if recipe.weights is not None and recipe.has_init_cfg:
        model += ', backbone=dict(init_cfg=None)'
    return TEMPLATE.format(
        **recipe._asdict(),
        what=what,
        command=command,
        epochs=epochs,
        gpus='1 GPU' if gpus == 1 else f'{gpus} GPUs',
        scaled_lr=recipe.lr * recipe.batch_size * gpus / recipe.base_batch,
        classes=_listed(classes),
        data_root=str(data_root),
        train=data['train'],
        val=data['val'],
        val_file=_whole(files['val']),
        test=test,
        start=(START_ANEW if recipe.weights is None else START).format(model=model, weights=recipe.weights),
        loading='' if recipe.weights is None else 'loading=dict(class_transfer=True),\n    ',
        patience=PATIENCE,
    )


def _ann_file(part: Part, data_root: Path) -> str:
    """An annotation file as a Python expression."""
    if part.is_new:
        return f"'{{{{ fileDirname }}}}/annotations/{part.ann_file.name}'"
    return repr(part.ann_file.relative_to(data_root).as_posix())


def _whole(ann_file: str) -> str:
    """The same for an evaluator, which knows no ``data_root``."""
    return ann_file if 'fileDirname' in ann_file else f'data_root + {"/" + ast.literal_eval(ann_file)!r}'


def _prefix(part: Part, data_root: Path) -> str:
    """The folder of the pictures as an argument."""
    relative = os.path.relpath(part.pictures, data_root)
    folder = '' if relative == '.' else relative
    return f'data_prefix=dict(img={folder!r})'


def _listed(classes: tuple[str, ...]) -> str:
    """A tuple, one name a line if they do not fit on one."""
    line = repr(tuple(classes))
    return line if len(line) <= 100 else '(\n' + ''.join(f'    {name!r},\n' for name in classes) + ')'
