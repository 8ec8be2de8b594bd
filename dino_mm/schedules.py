"""The length of a training: loop, learning rate schedules, hooks and sampler of one ``epochs`` or ``max_iters``."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mmengine.config import Config

#: Arguments of schedules that are times.
TIMES = ('begin', 'end', 'T_max', 'milestones')


def set_length(config: Config, total: int, by_epoch: bool) -> None:
    """Let a config train for ``total`` epochs or iterations; one that does so already is left as it is.

    Schedules keep their shares of the training. By epochs, each ends with a validation and a checkpoint; by iterations
    the intervals of both are bounded by the length.

    Args:
        config: Changed in place.
        total: Epochs or iterations, at least 1.
        by_epoch: Which of them.
    """
    loop = config.train_cfg
    was_by_epoch = 'max_epochs' in loop
    before = loop.max_epochs if was_by_epoch else loop.max_iters
    if (before, was_by_epoch) == (total, by_epoch):
        return
    schedules = config.get('param_scheduler') or []
    if isinstance(schedules, Mapping):
        schedules = [schedules]
    config.param_scheduler = [_rescaled(schedule, before, was_by_epoch, total, by_epoch) for schedule in schedules]
    checkpoint = config.get('default_hooks', {}).get('checkpoint') or {}
    if was_by_epoch != by_epoch:
        config.train_cfg = dict(type='dino_mm.EpochBasedTrainLoop' if by_epoch else 'dino_mm.IterBasedTrainLoop')
        _set_unit(config, by_epoch)
        config.train_cfg.val_interval = 1 if by_epoch else total
        checkpoint.update(by_epoch=by_epoch, interval=1 if by_epoch else total)
    config.train_cfg['max_epochs' if by_epoch else 'max_iters'] = total
    config.train_cfg.val_interval = min(config.train_cfg.get('val_interval', 1), total)
    if 'interval' in checkpoint:
        checkpoint['interval'] = min(checkpoint['interval'], total)


def _set_unit(config: Config, by_epoch: bool) -> None:
    """Let sampler and log count by epochs or by iterations."""
    sampler = config.get('train_dataloader', {}).get('sampler', {})
    if by_epoch and sampler.get('type') == 'InfiniteSampler':  # its epochs do not end
        sampler.type = 'DefaultSampler'
    logger = config.get('default_hooks', {}).get('logger')
    if logger:
        logger.log_metric_by_epoch = by_epoch
    if 'log_processor' in config:
        config.log_processor.by_epoch = by_epoch


def _rescaled(schedule: dict[str, Any], before: int, was_by_epoch: bool, total: int, by_epoch: bool) -> dict[str, Any]:
    """A schedule of the same share of a training of another length.

    A warm-up by iterations has no share of a training by epochs: it keeps its iterations.
    """
    schedule = copy.deepcopy(schedule)
    own = schedule.get('by_epoch', True)
    warms_up = schedule.get('end', before) < before
    if own != was_by_epoch or (by_epoch and not own and warms_up):
        if not by_epoch and not own and 'end' in schedule:
            schedule['end'] = min(schedule['end'], max(1, total // 10))
        return schedule

    def moved(time: float) -> int:
        return int(time * total / before + 0.5)

    for key in TIMES:
        value = schedule.get(key)
        if key == 'milestones' and value is not None:
            # A drop at the very end would not happen.
            schedule[key] = sorted({max(1, min(moved(time), total - 1)) for time in value})
        elif value is not None:
            schedule[key] = moved(value) if key == 'begin' else max(1, moved(value))
    schedule['by_epoch'] = by_epoch
    if not by_epoch:
        schedule.pop('convert_to_iter_based', None)
    return schedule
