"""Checkpoints of other libraries through mmengine's runner: other classes, averaged weights, resuming."""

from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch import nn

from dino_mm.registry import HOOKS

from ..checkpoints.classes import classes_of_rows, num_classes, plan_transfer
from ..checkpoints.contents import Contents, take_apart
from ..checkpoints.conversion import Converted, compare, convert_detector
from ..checkpoints.detectors import OURS
from ..checkpoints.errors import CheckpointError
from ..checkpoints.loading import check_detector, report
from ..models.detectors.dino import DINO


@HOOKS.register_module()
class LoadCheckpointHook(Hook):
    """Makes of any DINO checkpoint what mmengine's runner expects.

    The detector itself converts and checks whatever it loads; this hook adds what needs the runner.

    Args:
        class_transfer: Keep the classes that checkpoint and data set both have, by name, and start the others anew. A
            dict may say more: ``renamed``, the data set's class -> the checkpoint's, where names differ; ``classes``,
            the checkpoint's classes in the order of its rows, where it does not tell them itself and they are not
            COCO's.
        ema: Load the exponential moving average of the weights that the checkpoint holds.
    """

    # Before hooks that read the weights, as EMAHook does.
    priority = 'VERY_HIGH'

    def __init__(self, class_transfer: bool | dict = False, ema: bool = False) -> None:
        unknown = set(class_transfer if isinstance(class_transfer, dict) else ()) - {'renamed', 'classes'}
        if unknown:
            raise ValueError(f'`class_transfer` has no {", ".join(sorted(unknown))}; it has `renamed` and `classes`.')
        self.class_transfer = class_transfer
        self.ema = ema

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Rewrite ``checkpoint`` in place before the model loads it."""
        model = getattr(runner.model, 'module', runner.model)  # within DDP, or test-time augmentation
        if not isinstance(model, DINO):
            return
        contents = take_apart(checkpoint, self.ema)
        converted = convert_detector(contents.tensors, model)
        resuming = bool(getattr(runner, '_resume', False))
        if converted.source is OURS and (resuming or not (self.class_transfer or self.ema)):
            return  # the runner's own, which it reads best
        if self.class_transfer:
            self._transfer_classes(converted, contents, model, runner)
        check_detector(converted, model, contents.tensors)
        report(converted)
        checkpoint_meta = checkpoint.get('meta')
        checkpoint.clear()
        checkpoint['state_dict'] = {**model.state_dict(), **converted.conversion.tensors}
        checkpoint['meta'] = dict(checkpoint_meta) if isinstance(checkpoint_meta, dict) else {}
        if resuming:
            self._resume_elsewhere(runner, checkpoint, contents)

    def _transfer_classes(self, converted: Converted, contents: Contents, model: nn.Module, runner: Runner) -> None:
        options = self.class_transfer if isinstance(self.class_transfer, dict) else {}
        result, own = converted.conversion, model.state_dict()
        target = (runner.visualizer.dataset_meta or {}).get('classes', ())
        if len(target) != num_classes(own):
            raise CheckpointError(
                f'The data set has {len(target)} classes, the model {num_classes(own)}. State the classes in the data '
                "set's `metainfo=dict(classes=(...))` and their number in `model.bbox_head.num_classes`."
            )
        source = classes_of_rows(num_classes(result.tensors), options.get('classes', contents.classes))
        transfer = plan_transfer(target, source, options.get('renamed'))
        transfer.apply(result.tensors, own)
        converted.problems[:] = compare(result, own)
        kept = sum(row is not None for row in transfer.rows)
        print_log(f'{kept} of {len(target)} classes are taken over:\n{transfer.table()}', logger='current')

    @staticmethod
    def _resume_elsewhere(runner: Runner, checkpoint: dict[str, Any], contents: Contents) -> None:
        """Go on where another library stopped: weights, iteration and schedule; its optimizer counts otherwise."""
        length = len(runner.train_dataloader)
        iteration = contents.iteration
        if iteration is None:
            if contents.epoch is None:
                raise CheckpointError(
                    'The checkpoint does not tell how long it was trained, so training cannot be resumed from it. '
                    'Start from its weights instead: `load_from`, without `resume`.'
                )
            iteration = contents.epoch * length
        epoch = iteration // length if contents.epoch is None else contents.epoch
        checkpoint['meta'].update(iter=iteration, epoch=epoch)
        checkpoint['meta'].pop('config', None)
        checkpoint['message_hub'] = runner.message_hub.state_dict()
        for scheduler in runner.param_schedulers or ():
            for _ in range(epoch if scheduler.by_epoch else iteration):
                scheduler.step()
        print_log(
            f"Resumes another library's training after {iteration} iterations, with its weights and its place in the "
            "schedule. The optimizer's moments are not taken over, they build up anew.",
            logger='current',
        )
