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
#: So many times as large as when it was last logged the use of the GPU must be to be logged again.
GROWTH = 1.1


@HOOKS.register_module()
class HeartbeatHook(Hook):
    """Writes ``heartbeat.json`` into the work directory, warns of a slow data loader, and bounds the log's history.

    The file is replaced as a whole. It holds ``iteration``, ``max_iters``, ``time`` (seconds since 1970), ``loss``
    (None if not finite), ``memory_mib`` (largest use of the GPU so far, None without one), ``largest_batch`` (height
    and width in pixels of the largest batch so far), ``most_boxes`` (in an image), ``host`` and ``pid``.

    Whenever the largest use of the GPU has grown by a tenth, the log says which sizes came with it. All of this is of
    the first process.

    If more than a tenth of the time is spent on waiting for data, one warning tells how many workers would do.

    mmengine keeps every value that it ever logged, copies all of them in each iteration, and writes them into each
    checkpoint. ``history`` values are enough for the means in the log. Means over a longer window become means of
    these.

    Args:
        seconds: Least time between two writes.
        history: Values of each scalar that are kept.
    """

    # After IterTimerHook, whose values are read; before LoggerHook, which resets the GPU's largest use.
    priority = 55

    def __init__(self, seconds: float = 15.0, history: int = 2000) -> None:
        self.seconds = seconds
        self.history = history
        self._written = -math.inf
        self._is_failing = False
        self._began = 0
        self._has_gpu = False
        self._largest = Largest()

    def before_train(self, runner: Runner) -> None:
        """Remember where this run began."""
        self._began = runner.iter
        self._has_gpu = torch.cuda.is_available()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict | None = None
    ) -> None:
        """Bound the history, and now and then write the file."""
        for values in runner.message_hub.log_scalars.values():
            values.max_length = self.history
        if runner.rank:
            return
        grown = self._largest.add(data_batch, torch.cuda.max_memory_allocated() if self._has_gpu else 0)
        if grown:
            print_log(f'Iteration {runner.iter + 1}: {grown}', 'current')
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
            memory_mib=self._largest.memory // 2**20 if self._has_gpu else None,
            largest_batch=self._largest.batch,
            most_boxes=self._largest.boxes,
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


class Largest:
    """The largest batch so far, and the largest use of the GPU that it explains. Reads shapes alone.

    Attributes:
        memory: Largest use of the GPU, bytes.
        batch: Height and width of the batch with the most pixels, padded to its own largest image; None: no batch yet.
        boxes: Most boxes of an image.
    """

    def __init__(self) -> None:
        self.memory = 0
        self.batch: tuple[int, int] | None = None
        self.boxes = 0
        self._said = 0

    def add(self, data_batch: Any, memory: int) -> str | None:
        """Take a batch and the largest use after it, in bytes; what to log if the use has grown by a tenth."""
        inputs, samples = (data_batch or {}).get('inputs', ()), (data_batch or {}).get('data_samples', ())
        size, boxes = None, 0
        if len(inputs):
            height, width = (max(image.shape[i] for image in inputs) for i in (-2, -1))
            size = (height, width)
            self.batch = max(self.batch or (0, 0), size, key=math.prod)
            boxes = max((len(sample.gt_instances) for sample in samples), default=0)
            self.boxes = max(self.boxes, boxes)
        self.memory = max(self.memory, memory)
        if self.memory <= GROWTH * self._said:
            return None
        before, self._said = self._said, self.memory
        return (
            f'the largest use of the GPU is now {self.memory / 2**20:,.0f} MiB, not {before / 2**20:,.0f}. '
            f'This batch: {_text(size)} pixels, up to {boxes} boxes in an image. Largest so far: '
            f'{_text(self.batch)} pixels, {self.boxes} boxes.'
        )


def _text(size: tuple[int, int] | None) -> str:
    return 'unknown' if size is None else f'{size[0]} x {size[1]}'


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
