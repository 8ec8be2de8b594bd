"""Trainings that are told to stop save what they have learnt first."""

import logging
import os
import signal
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from mmengine.hooks import CheckpointHook, EMAHook, Hook
from mmengine.logging import print_log
from mmengine.runner import Runner
from torch import Tensor

from dino_mm.registry import HOOKS

#: Exit status of a program whose training ended early, with a checkpoint: EX_TEMPFAIL, "try again".
EXIT_STATUS = 75
#: Slurm and Kubernetes send the first, Slurm on request the second, Ctrl-C the third, a terminal that is closed the
#: fourth; Windows lacks the second and the fourth.
SIGNALS = [getattr(signal, name) for name in ('SIGTERM', 'SIGUSR1', 'SIGINT', 'SIGHUP') if hasattr(signal, name)]
HANGUP = getattr(signal, 'SIGHUP', None)
#: Seconds after which another SIGINT ends the program at once. Launchers pass on what the terminal sends as well.
PATIENCE = 3


class Stopped(SystemExit):
    """A training has ended early, with a checkpoint; the program ends with status ``EXIT_STATUS``."""

    def __init__(self) -> None:
        super().__init__(EXIT_STATUS)


@HOOKS.register_module()
class PreemptionHook(Hook):
    """Saves a checkpoint and ends the program when it is told to by a signal, or after some hours.

    On SIGTERM, SIGUSR1, SIGINT or SIGHUP the present step is finished, by several processes one more: all of them stop
    after the same one, whichever got the signal. The runner's ``CheckpointHook`` writes the checkpoint, unless it has
    just done so, and the program ends with status 75. A validation is left at once, and not taken up again. A second
    SIGINT, at least 3 s after the first, ends the program without a checkpoint. SIGHUP stays ignored under ``nohup``.

    Workers of data loaders outlive these signals: clusters send them to all processes of a job.

    Args:
        max_hours: End the program that long after it was set up; None: never.

    Raises:
        ValueError: ``max_hours`` is not above 0.
    """

    # After the checkpoint of the same iteration.
    priority = 'LOWEST'

    def __init__(self, max_hours: float | None = None) -> None:
        if max_hours is not None and not max_hours > 0:
            raise ValueError(f'`max_hours` of the PreemptionHook is {max_hours:g}; it must be above 0.')
        self.max_hours = max_hours
        self._began = time.monotonic()
        self._reason: str | None = None
        self._told_at = 0.0
        self._is_training = False
        self._old_handlers: dict[int, Any] = {}
        self._group: Any = None
        self._pending: tuple[Any, Tensor] | None = None

    def before_train(self, runner: Runner) -> None:
        """Listen to signals."""
        self._is_training = True
        # Python lets no other thread do so. There the clock still counts.
        if threading.current_thread() is threading.main_thread():
            listened = [number for number in SIGNALS if number != HANGUP or signal.getsignal(number) != signal.SIG_IGN]
            self._old_handlers = {number: signal.signal(number, self._on_signal) for number in listened}
        if runner.world_size > 1:
            # The flags go from host to host, so that no device is waited for.
            self._group = dist.new_group(backend='gloo')
        for loop in filter(None, (runner.train_loop, runner.val_loop)):
            loader = loop.dataloader
            loader.worker_init_fn = partial(start_worker, init=loader.worker_init_fn)

    def after_train(self, runner: Runner) -> None:
        """Leave the signals as they were."""
        for number, handler in self._old_handlers.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._old_handlers = {}
        self._is_training = False

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Stop if a process was told to."""
        if self._agrees():
            self._stop(runner, runner.iter + 1)

    def after_val_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: Any = None) -> None:
        """Stop within the validation of a training."""
        loader = runner.val_dataloader
        # So many batches every process has: they must ask each other equally often.
        common = len(loader.dataset) // (runner.world_size * (loader.batch_size or len(loader.dataset)))
        if self._is_training and batch_idx < common and self._agrees():
            for hook in runner.hooks:
                if isinstance(hook, EMAHook):
                    hook.after_val_epoch(runner)  # gives the model its own weights back
            self._stop(runner, runner.iter)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._reason is None:
            self._reason, self._told_at = signal.Signals(number).name, time.monotonic()
        elif number == signal.SIGINT and time.monotonic() - self._told_at > PATIENCE:
            signal.default_int_handler(number, frame)

    def _is_told(self) -> bool:
        hours = (time.monotonic() - self._began) / 3600
        if self._reason is None and self.max_hours is not None and hours > self.max_hours:
            self._reason = f'{self.max_hours:g} hours are over'
        return self._reason is not None

    def _agrees(self) -> bool:
        """Whether a process was told to stop when this was last asked; of a single one, whether it is now."""
        told = self._is_told()
        if self._group is None:
            return told
        agreed = False
        if self._pending is not None:
            work, flag = self._pending
            work.wait()  # sent off one step ago
            agreed = bool(flag)
        flag = torch.tensor(int(told))
        self._pending = None if agreed else (dist.all_reduce(flag, dist.ReduceOp.MAX, self._group, True), flag)
        return agreed

    def _stop(self, runner: Runner, iteration: int) -> None:
        saved = save_checkpoint(runner, iteration)
        what = f'with {saved}; `--resume` goes on from there' if saved else 'and nothing is saved: no CheckpointHook'
        print_log(
            f'Training stops after iteration {iteration} ({self._reason or "another process was told to"}), {what}.',
            logger='current',
            level=logging.WARNING,
        )
        if self._group is not None:
            dist.barrier(self._group)  # launchers end all processes after the first one's end
        raise Stopped


def save_checkpoint(runner: Runner, iteration: int) -> str | None:
    """Have the runner's checkpoint hook save the state after ``iteration``; where it is, None without such a hook."""
    hooks = [hook for hook in runner.hooks if isinstance(hook, CheckpointHook)]
    if not hooks:
        return None
    hook = next((hook for hook in hooks if not hook.by_epoch), hooks[0])
    if hook.by_epoch:
        # Its own files are named by epochs, and this one lies within an epoch.
        hook = type(hook)(interval=-1, by_epoch=False, backend_args=hook.backend_args)
        hook.before_train(runner)
    if hook.last_ckpt is None or Path(hook.last_ckpt).name != hook.filename_tmpl.format(iteration):
        hook._save_checkpoint_with_step(runner, iteration, meta=dict(epoch=runner.epoch, iter=iteration))
    return hook.last_ckpt


def start_worker(worker_id: int, init: Callable[[int], None] | None = None) -> None:
    """Begin a worker of a data loader that ends with its parent, not with the signals that the parent saves on."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN if number != signal.SIGTERM else signal.SIG_DFL)
    if hasattr(signal, 'sigwaitinfo'):
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])
        threading.Thread(target=_end_with_parent, daemon=True).start()
    if init is not None:
        init(worker_id)


def _end_with_parent() -> None:
    """End the process on its parent's SIGTERM."""
    while signal.sigwaitinfo([signal.SIGTERM]).si_pid != os.getppid():
        pass
    os._exit(0)
