"""A log that cannot be written ends no training."""

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mmengine.hooks
from mmengine.runner import Runner

from dino_mm.registry import HOOKS


@HOOKS.register_module()
class LoggerHook(mmengine.hooks.LoggerHook):
    """mmengine's hook, with the same arguments. If the log cannot be written, it says so once and goes on.

    The results of a test are an exception, as they are what a test is for.
    """

    def before_run(self, runner: Runner) -> None:
        """Let the text log say once that it cannot be written, in place of a traceback for each line."""
        super().before_run(runner)
        self._silent = False
        for handler in runner.logger.handlers:
            if isinstance(handler, logging.FileHandler):
                handler.handleError = _SayOnce(handler.baseFilename)  # type: ignore[method-assign]

    def after_train_iter(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Log an iteration."""
        with self._goes_on(runner):
            super().after_train_iter(runner, *args, **kwargs)

    def after_val_epoch(self, runner: Runner, *args: Any, **kwargs: Any) -> None:
        """Log an evaluation."""
        with self._goes_on(runner):
            super().after_val_epoch(runner, *args, **kwargs)

    @contextmanager
    def _goes_on(self, runner: Runner) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if not self._silent:
                runner.logger.warning(
                    f'The values of the log are not written: {error.strerror or error}. The training goes on without '
                    'them, and tries to save checkpoints as ever. See to the disk and the work directory.'
                )
            self._silent = True


class _SayOnce:
    """What a handler of ``logging`` does with an error: name its file once."""

    def __init__(self, file: str) -> None:
        self.file, self.said = file, False

    def __call__(self, record: logging.LogRecord) -> None:
        if not self.said:
            error = sys.exc_info()[1]
            print(f'The log is not written to {self.file}: {error}. The run goes on.', file=sys.stderr, flush=True)
        self.said = True
