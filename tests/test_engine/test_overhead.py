"""What the hooks that watch over a training take of its time."""

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from faults import write_config
from mmengine.config import Config
from mmengine.runner import Runner

from dino_mm.datasets.digits import make_digits
from dino_mm.engine import CheckpointHook, HeartbeatHook, PreemptionHook, SkipNotFiniteHook
from dino_mm.engine.launch import build_runner

OURS = (CheckpointHook, HeartbeatHook, PreemptionHook, SkipNotFiniteHook)
#: Iterations, every second one with our hooks; the first are warm-up.
ITERATIONS, WARM_UP = 120, 20
POINTS = ('before_train_iter', 'after_train_iter')


class Turns:
    """Lets a runner call our hooks in every second iteration, and takes the time."""

    def __init__(self, runner: Runner) -> None:
        self.runner, self.is_on = runner, True
        self.steps: dict[bool, list[float]] = defaultdict(list)
        self.hooks: list[float] = []
        self._in_hooks = 0.0
        self._call_hook = runner.call_hook
        runner.call_hook = self.call_hook
        (self._numbers,) = (hook for hook in runner.hooks if isinstance(hook, SkipNotFiniteHook))
        self._before_step, self._numbers._before_step = self._numbers._before_step, self.before_step

    def call_hook(self, name: str, **arguments: Any) -> None:
        if name not in POINTS:
            self._call_hook(name, **arguments)
            return
        if name == POINTS[0]:
            self.is_on = self.runner.iter % 2 == 0
            for criterion in self._numbers._criteria:
                criterion.nan_where_not_finite = self.is_on
            self._in_hooks, self._began = 0.0, time.perf_counter()
        for hook in self.runner.hooks:
            if not isinstance(hook, OURS):
                getattr(hook, name)(self.runner, **arguments)
            elif self.is_on:
                with self.takes_time():
                    getattr(hook, name)(self.runner, **arguments)
        if name == POINTS[1]:
            self.steps[self.is_on].append(time.perf_counter() - self._began)
            if self.is_on:
                self.hooks.append(self._in_hooks)

    def before_step(self, *arguments: Any) -> None:
        if self.is_on:
            with self.takes_time():
                self._before_step(*arguments)

    @contextmanager
    def takes_time(self) -> Iterator[None]:
        began = time.perf_counter()
        yield
        self._in_hooks += time.perf_counter() - began


@pytest.mark.slow
def test_hooks_take_less_than_a_hundredth_of_a_step(tmp_path: Path) -> None:
    """Of the model of the demo on a CPU, between two checkpoints."""
    data = make_digits(tmp_path / 'data', num_train=32, num_val=1)
    cfg = Config.fromfile(write_config(tmp_path / 'config.py', data, []))
    cfg.merge_from_dict({'train_cfg.max_iters': ITERATIONS, 'default_hooks.checkpoint.interval': 10 * ITERATIONS})
    cfg.work_dir, cfg.experiment_name, cfg.launcher = str(tmp_path / 'work'), 'overhead', 'none'
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    runner = build_runner(cfg)
    turns = Turns(runner)
    runner.train()
    on, off = (np.array(turns.steps[is_on][WARM_UP // 2 :]) for is_on in (True, False))
    hooks = np.array(turns.hooks[WARM_UP // 2 : -1])  # the last one writes a checkpoint
    on, off = on[:-1], off[: len(on) - 1]
    share, ratio = np.median(hooks / on[: len(hooks)]), np.median(on / off)
    print(f'{torch.get_num_threads()} threads, a step takes {np.median(off):.3f} s without our hooks')
    print(f'hooks: {np.median(hooks) * 1000:.3f} ms a step, {share:.3%} of it; with to without, in turns: {ratio:.4f}')
    assert share < 0.01
