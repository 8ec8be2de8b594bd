"""A sign of life for those who watch a training from outside, and a log that does not grow without end."""

import json
import logging
import math
import os
import socket
import time
from pathlib import Path
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.runner import Runner

from dino_mm.registry import HOOKS

#: The file's name in the work directory.
FILE = 'heartbeat.json'
#: Iterations over which the loader's share is taken, after as many that do not count: workers are starting then.
WINDOW = 50
#: Share of an iteration that waiting for data may have.
MAX_WAITING = 0.1


@HOOKS.register_module()
class HeartbeatHook(Hook):
    """Writes ``heartbeat.json`` into the work directory, warns of a slow data loader, and bounds the log's history.

    The file is replaced as a whole. It holds ``iteration``, ``max_iters``, ``time`` (seconds since 1970), ``loss``
    (None if not finite), ``memory_mib`` (largest use of the GPU, None without one), ``host`` and ``pid``.

    If more than a tenth of the time is spent on waiting for data, one warning tells how many workers would do.

    mmengine keeps every value that it ever logged, copies all of them in each iteration, and writes them into each
    checkpoint. ``history`` values are enough for the means in the log. Means over a longer window become means of
    these.

    Args:
        seconds: Least time between two writes.
        history: Values of each scalar that are kept.
    """

    # After the log has the iteration's values, before checkpoints hold its history.
    priority = 'LOW'

    def __init__(self, seconds: float = 15.0, history: int = 2000) -> None:
        self.seconds = seconds
        self.history = history
        self._written = -math.inf
        self._is_failing = False
        self._began = 0

    def before_train(self, runner: Runner) -> None:
        """Remember where this run began."""
        self._began = runner.iter

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Bound the history, and now and then write the file."""
        for values in runner.message_hub.log_scalars.values():
            values.max_length = self.history
        if runner.rank:
            return
        if runner.iter - self._began + 1 == 2 * WINDOW:
            warn_of_slow_loader(runner)
        if time.monotonic() - self._written >= self.seconds or runner.iter + 1 == runner.max_iters:
            self._written = time.monotonic()
            self._write(runner)

    def _write(self, runner: Runner) -> None:
        scalars = runner.message_hub.log_scalars
        loss = scalars['train/loss'].current() if 'train/loss' in scalars else math.nan
        content = dict(
            iteration=runner.iter + 1,
            max_iters=runner.max_iters,
            time=time.time(),
            loss=loss if math.isfinite(loss) else None,
            memory_mib=torch.cuda.max_memory_allocated() // 2**20 if torch.cuda.is_available() else None,
            host=socket.gethostname(),
            pid=os.getpid(),
        )
        path = Path(runner.work_dir) / FILE
        fresh = path.with_suffix('.tmp')
        try:
            fresh.write_text(json.dumps(content))
            os.replace(fresh, path)
            self._is_failing = False
        except OSError as error:
            if not self._is_failing:  # once, not every few seconds
                print_log(f'Cannot write {path}: {error}. Training goes on.', 'current', logging.WARNING)
            self._is_failing = True


def warn_of_slow_loader(runner: Runner) -> None:
    """Say how many workers the data loader should have if the training waits for it."""
    scalars = runner.message_hub.log_scalars
    if not {'train/time', 'train/data_time'} <= scalars.keys():
        return
    whole, waiting = (scalars[f'train/{name}'].mean(WINDOW) for name in ('time', 'data_time'))
    if waiting <= MAX_WAITING * whole:
        return
    workers = runner.train_dataloader.num_workers
    # A batch takes so long to make: all of the waiting without workers, else what the workers made it in.
    making = workers * whole if workers else waiting
    needed = max(math.ceil(round(making / max(whole - waiting, 1e-6), 3)), workers + 1)
    print_log(
        f'{waiting / whole:.0%} of the training time is spent on waiting for data: {waiting:.3f} s of {whole:.3f} s in '
        f'each of the last {WINDOW} iterations. Set `train_dataloader.num_workers` to {needed} instead of {workers}'
        f'{", and `persistent_workers=True`" if not workers else ""}, if there are cores for them.',
        'current',
        logging.WARNING,
    )
