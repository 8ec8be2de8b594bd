"""What would go wrong hours later, found before the first iteration."""

from collections.abc import Iterator
from typing import Any

from mmengine.hooks import Hook
from mmengine.runner import EpochBasedTrainLoop, Runner
from torch import nn

from dino_mm.registry import HOOKS
from dino_mm.settings import SettingError

from ..datasets.coco import CheckedCocoDataset
from ..models import DINO
from .loops import require_epochs_that_end, require_equal_batches


@HOOKS.register_module()
class CheckRunHook(Hook):
    """Refuses to train by epochs that never end or have no batch, and to train, validate or test without all pictures.

    Annotation files are verified when data sets and metrics are built, for training and validation alike, before this.
    """

    def before_train(self, runner: Runner) -> None:
        """Check training and validation.

        Raises:
            AnnotationError: Pictures are missing.
            SettingError: The model has another number of classes than a data set; the sampler never ends, so neither
                does an epoch; or an epoch has no batch, or not equally many in each process.
        """
        if isinstance(runner.train_loop, EpochBasedTrainLoop):
            require_epochs_that_end(runner.train_loop)
            require_equal_batches(runner.train_loop)
        loops = [runner.train_loop] if runner.val_loop is None else [runner.train_loop, runner.val_loop]
        for loop in loops:
            require_classes(runner.model, loop.dataloader.dataset)
            require_pictures(loop.dataloader.dataset)

    def before_test(self, runner: Runner) -> None:
        """Check the test's pictures."""
        require_pictures(runner.test_loop.dataloader.dataset)


def require_classes(model: nn.Module, dataset: Any) -> None:
    """Raise SettingError if our detector has another number of classes than a data set, or than one that it wraps."""
    detector = next((module for module in model.modules() if isinstance(module, DINO)), None)
    if detector is None:
        return
    number = detector.bbox_head.num_classes
    for part in parts_of(dataset):
        classes = getattr(part, 'metainfo', {}).get('classes')
        if isinstance(classes, tuple | list) and len(classes) != number:
            names = ', '.join(map(str, classes[:5])) + (', ...' if len(classes) > 5 else '')
            raise SettingError(
                f'`model.bbox_head.num_classes` is {number}, but the data set has {len(classes)} classes ({names}). '
                "State them in each data set's `metainfo=dict(classes=(...))`, and their number in the model."
            )


def require_pictures(dataset: Any) -> None:
    """Raise AnnotationError if a data set, or one of those that it wraps, misses pictures."""
    for part in parts_of(dataset):
        if isinstance(part, CheckedCocoDataset):
            part.require_pictures()


def parts_of(dataset: Any) -> Iterator[Any]:
    """The data sets within wrappers such as ``ConcatDataset`` and ``RepeatDataset``; else the data set itself."""
    inner = getattr(dataset, 'datasets', None) or [getattr(dataset, 'dataset', None)]
    if inner == [None]:
        yield dataset
    else:
        for part in inner:
            yield from parts_of(part)
