"""What a resumed training takes from its config, where the config has changed since the checkpoint was written."""

import copy
import logging
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

from mmengine.hooks import EMAHook
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from mmengine.runner import EpochBasedTrainLoop, Runner

from ..checkpoints.errors import CheckpointError

#: What a scheduler counts, in place of what a config states.
PROGRESS = {'last_step', '_global_step', '_last_value', 'verbose'}
#: Ways to compute a step, which depend on the machine.
MACHINE = {'fused', 'foreach', 'capturable', 'differentiable', 'maximize', 'decoupled_weight_decay'}
#: How many changed settings are named.
SHOWN = 6


def let_config_count(runner: Runner, checkpoint: dict[str, Any]) -> None:
    """Rewrite ``checkpoint``, which is to be resumed, so that the config's optimizer settings and schedule count.

    mmengine resumes with the checkpoint's learning rate, weight decay and schedule, and says nothing if the config
    has others. Without a difference ``checkpoint`` stays as it is. Weights that an ``EMAHook`` has averaged become the
    trained ones again if the config has no such hook any more.

    Raises:
        CheckpointError: There is no state of a training; or the optimizer is of another kind, or has other groups of
            parameters.
    """
    _require_training(checkpoint)
    _drop_average(runner, checkpoint)
    _warn_of_the_end(runner, checkpoint['meta'])
    wrapper, schedulers = runner.optim_wrapper, runner.param_schedulers
    if 'optimizer' not in checkpoint:
        print_log(
            'The checkpoint has no state of the optimizer, as the best ones have none: its moments build up anew.',
            logger='current',
            level=logging.WARNING,
        )
    if 'optimizer' not in checkpoint or not isinstance(wrapper, OptimWrapper):
        return
    _require_same_groups(wrapper, checkpoint['optimizer'])
    schedulers = schedulers if isinstance(schedulers, list) else []
    if any(getattr(scheduler, 'need_step_args', False) for scheduler in schedulers):
        return  # such a schedule follows metrics, which cannot be gone through again
    changed = [*_changed_settings(wrapper, checkpoint['optimizer'])]
    changed += [name for name in _changed_schedule(schedulers, checkpoint) if name not in changed]
    if not changed:
        return
    advance(schedulers, checkpoint['meta']['iter'], checkpoint['meta']['epoch'])
    for group, own in zip(checkpoint['optimizer']['param_groups'], wrapper.optimizer.param_groups, strict=True):
        group.update({name: value for name, value in own.items() if name != 'params'})
    checkpoint['optimizer']['base_param_settings'] = copy.deepcopy(wrapper.base_param_settings)
    checkpoint['param_schedulers'] = [copy.deepcopy(scheduler.state_dict()) for scheduler in schedulers]
    shown = ', '.join([*changed[:SHOWN], *(['...'] if len(changed) > SHOWN else [])])
    print_log(
        f"Optimizer or schedule differ from the checkpoint's: {shown}. The config counts from here.",
        logger='current',
        level=logging.WARNING,
    )


def advance(schedulers: Sequence[Any], iterations: int, epochs: int) -> None:
    """Bring schedules that are new to where a training stands."""
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # no step of the optimizer comes between
        for by_epoch, steps in ((False, iterations), (True, epochs)):
            own = [scheduler for scheduler in schedulers if scheduler.by_epoch == by_epoch]
            for _ in range(steps):
                for scheduler in own:
                    scheduler.step()


def _require_training(checkpoint: dict[str, Any]) -> None:
    meta = checkpoint.get('meta')
    if not isinstance(meta, dict) or not {'iter', 'epoch'} <= meta.keys() or 'message_hub' not in checkpoint:
        raise CheckpointError(
            'The checkpoint holds weights alone, no state of a training, so it cannot be resumed. Start from its '
            'weights: `load_from`, without --resume.'
        )


def _drop_average(runner: Runner, checkpoint: dict[str, Any]) -> None:
    """Put the trained weights where the average is, unless there is a hook that does so."""
    if 'ema_state_dict' not in checkpoint or any(isinstance(hook, EMAHook) for hook in runner.hooks):
        return
    trained = checkpoint.pop('ema_state_dict')
    for name in checkpoint['state_dict']:
        if f'module.{name}' in trained:
            checkpoint['state_dict'][name] = trained[f'module.{name}']
    print_log(
        'The checkpoint has averaged weights, and the config has no EMAHook: the training goes on from the weights '
        'that were trained, and the average is left behind.',
        logger='current',
        level=logging.WARNING,
    )


def _warn_of_the_end(runner: Runner, meta: dict[str, Any]) -> None:
    by_epoch = isinstance(runner.train_loop, EpochBasedTrainLoop)
    key, name = ('epoch', 'epochs') if by_epoch else ('iter', 'iterations')
    last = runner.max_epochs if by_epoch else runner.max_iters
    if meta[key] >= last:
        limit = 'max_epochs' if by_epoch else 'max_iters'
        print_log(
            f'Nothing is left to train: the checkpoint has {meta[key]} {name}, and `train_cfg.{limit}` is {last}.',
            logger='current',
            level=logging.WARNING,
        )


def _require_same_groups(wrapper: OptimWrapper, state: dict[str, Any]) -> None:
    own, theirs = wrapper.optimizer.param_groups, state['param_groups']
    sizes = [[len(group['params']) for group in groups] for groups in (theirs, own)]
    kinds = [', '.join(sorted(_numbers(groups[0]))) for groups in (theirs, own)]
    if sizes[0] == sizes[1] and kinds[0] == kinds[1]:
        return
    what = (
        f'has settings {kinds[0]}, that of this config {kinds[1]}'
        if kinds[0] != kinds[1]
        else f'has groups of {_list(sizes[0])} parameters, that of this config of {_list(sizes[1])}'
    )
    raise CheckpointError(
        f'The optimizer cannot be resumed: that of the checkpoint {what}. Restore the `optim_wrapper` of the config, '
        'or start from the weights alone: `load_from`, without --resume.'
    )


def _list(sizes: list[int]) -> str:
    return ' + '.join(map(str, sizes))


def _numbers(group: dict[str, Any]) -> set[str]:
    """Names of the settings of a group that have numbers."""
    kept = {name for name, value in group.items() if isinstance(value, int | float | tuple | list)}
    switches = {name for name, value in group.items() if isinstance(value, bool)}
    return {name for name in kept - switches - {'params'} if not name.startswith('initial_')}


def _changed_settings(wrapper: OptimWrapper, state: dict[str, Any]) -> Iterator[str]:
    seen = set()
    for own, theirs in zip(wrapper.optimizer.param_groups, state['param_groups'], strict=True):
        for name in own.keys() & theirs.keys() - MACHINE - {'params'}:
            if f'initial_{name}' in own:  # what a schedule changes
                continue
            old, new = _plain(theirs[name]), _plain(own[name])
            text = f'{name.removeprefix("initial_")} {old} -> {new}'
            if old != new and text not in seen:
                seen.add(text)
                yield text


def _changed_schedule(schedulers: Sequence[Any], checkpoint: dict[str, Any]) -> Iterator[str]:
    theirs = checkpoint.get('param_schedulers') or []
    if len(theirs) != len(schedulers):
        yield f'{len(theirs)} -> {len(schedulers)} schedules'
        return
    for scheduler, saved in zip(schedulers, theirs, strict=True):
        own = scheduler.state_dict()
        if own.keys() != saved.keys():
            yield f'a {type(scheduler).__name__} in place of another schedule'
            continue
        for name in own.keys() - PROGRESS - {'base_values'}:  # the settings of the optimizer
            if _plain(own[name]) != _plain(saved[name]):
                yield f'{name} of {type(scheduler).__name__}'


def _plain(value: Any) -> Any:
    """A value that can be compared with what a file gives for it."""
    return list(value) if isinstance(value, tuple) else value
