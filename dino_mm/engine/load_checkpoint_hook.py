"""Checkpoints through mmengine's runner: other classes, averaged weights, parts of models, resuming."""

import difflib
import logging
import re
from typing import Any

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import BaseLoop, Runner
from torch import nn

from dino_mm.registry import HOOKS

from ..checkpoints.classes import class_tensors, classes_of_rows, num_classes, plan_transfer
from ..checkpoints.contents import Contents, take_apart
from ..checkpoints.conversion import Converted, compare, convert_detector
from ..checkpoints.detectors import OURS
from ..checkpoints.errors import CheckpointError
from ..checkpoints.loading import check_detector, report
from ..models.detectors.dino import DINO
from .plain_checkpoints import PlainCheckpointHook, from_plain, restore_dataset_meta
from .resume import choose_checkpoint
from .resumed_settings import advance, let_config_count

#: Lines of a config that say where a run starts and what it writes to, not what it does.
PLACES = re.compile(r'^(load_from|resume|work_dir|launcher) = .*\n', re.MULTILINE)
#: How many differences of two configs are logged, and how many characters of each.
SHOWN, WIDTH = 6, 120


@HOOKS.register_module()
class LoadCheckpointHook(Hook):
    """Makes of any DINO checkpoint what mmengine's runner expects.

    The detector itself converts and checks whatever it loads; this hook adds what needs the runner. It lets a training
    start from part of a model, and no test. The text of a config that lies in a checkpoint is taken out, since
    mmengine would run it as Python to resume. What it saves is plain data, see :mod:`.plain_checkpoints`.

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

    def before_run(self, runner: Runner) -> None:
        """Let checkpoints be written as plain data, by a hook after all that add to them; find the one to resume."""
        if not any(isinstance(hook, PlainCheckpointHook) for hook in runner.hooks):
            runner.register_hook(PlainCheckpointHook())
        if not _is_testing(runner):
            choose_checkpoint(runner)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Rewrite ``checkpoint`` in place before the model loads it."""
        resuming = bool(getattr(runner, '_resume', False))
        from_plain(checkpoint)
        if resuming:
            restore_dataset_meta(checkpoint, getattr(runner.train_dataloader.dataset, 'metainfo', None))
        _take_out_config(runner, checkpoint, resuming)
        model = runner.model
        while not isinstance(model, DINO):  # within DDP, test-time augmentation, or both
            model = getattr(model, 'module', None)
            if model is None:
                return
        contents = take_apart(checkpoint, self.ema)
        converted = convert_detector(contents.tensors, model)
        own_way = converted.source is OURS and (resuming or not (self.class_transfer or self.ema))
        if own_way and not converted.differences.missing:
            if resuming:
                let_config_count(runner, checkpoint)
            return  # the runner's own, which it reads best
        if self.class_transfer:
            self._transfer_classes(converted, contents, model, runner)
        lacking = check_detector(
            converted, model, contents.tensors, may_be_part=not resuming and not _is_testing(runner)
        )
        report(converted)
        if lacking:
            print_log(lacking, logger='current', level=logging.WARNING)
        checkpoint_meta = checkpoint.get('meta')
        checkpoint.clear()
        checkpoint['state_dict'] = {**model.state_dict(), **converted.conversion.tensors}
        checkpoint['meta'] = dict(checkpoint_meta) if isinstance(checkpoint_meta, dict) else {}
        if resuming:
            self._resume_elsewhere(runner, checkpoint, contents)

    def _transfer_classes(self, converted: Converted, contents: Contents, model: nn.Module, runner: Runner) -> None:
        options = self.class_transfer if isinstance(self.class_transfer, dict) else {}
        result, own = converted.conversion, model.state_dict()
        if not class_tensors(result.tensors):
            return  # part of a model, without rows to transfer
        target = (runner.visualizer.dataset_meta or {}).get('classes', ())
        if len(target) != num_classes(own):
            raise CheckpointError(
                f'The data set has {len(target)} classes, the model {num_classes(own)}. State the classes in the data '
                "set's `metainfo=dict(classes=(...))` and their number in `model.bbox_head.num_classes`."
            )
        source = classes_of_rows(num_classes(result.tensors), options.get('classes', contents.classes))
        transfer = plan_transfer(target, source, options.get('renamed'))
        transfer.apply(result.tensors, own)
        converted.differences = compare(result, own)
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
        checkpoint['message_hub'] = runner.message_hub.state_dict()
        advance(runner.param_schedulers or (), iteration, epoch)
        print_log(
            f"Resumes another library's training after {iteration} iterations, with its weights and its place in the "
            "schedule. The optimizer's moments are not taken over, they build up anew.",
            logger='current',
        )


def _take_out_config(runner: Runner, checkpoint: dict[str, Any], resuming: bool) -> None:
    """Remove the text of a config from ``checkpoint``, which is compared at most, never run."""
    meta = checkpoint.get('meta')
    meta = meta if isinstance(meta, dict) else {}
    text = meta.pop('config', meta.get('cfg'))  # mmengine writes `cfg`, which it does not run
    if not resuming:
        return
    own = runner.cfg.pretty_text
    if text is not None and PLACES.sub('', str(text)) != PLACES.sub('', own):
        print_log(
            "The config that lies in the checkpoint differs from this run's. It is not read: this run's config counts. "
            f'Lines of the checkpoint (-) and of this run (+):\n{_differences(str(text), own)}',
            logger='current',
        )
    hub = checkpoint.get('message_hub')
    run_info = hub.get('runtime_info') if isinstance(hub, dict) else None
    if isinstance(run_info, dict) and 'cfg' in run_info:
        run_info['cfg'] = own  # mmengine would write the other into the next checkpoints


def _differences(theirs: str, own: str) -> str:
    """The first lines that differ; the text is a stranger's, so what could steer a terminal is written out."""
    old, new = (PLACES.sub('', text).splitlines() for text in (theirs, own))
    changed = [line for line in [*difflib.unified_diff(old, new, n=0)][2:] if not line.startswith('@@')]
    shown = [ascii(line[:WIDTH])[1:-1] for line in changed[:SHOWN]]
    return '\n'.join([*shown, f'and {len(changed) - SHOWN} more'] if len(changed) > SHOWN else shown)


def _is_testing(runner: Runner) -> bool:
    """Whether the runner evaluates and does not train: it builds the loops of what it is told to do first."""
    train, *others = (getattr(runner, name, None) for name in ('_train_loop', '_val_loop', '_test_loop'))
    return not isinstance(train, BaseLoop) and any(isinstance(loop, BaseLoop) for loop in others)
