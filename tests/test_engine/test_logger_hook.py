"""A log that cannot be written ends nothing."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest

from dino_mm.engine import LoggerHook


def full(*_: object, **__: object) -> None:
    Path('/dev/full').write_text('a')


def test_the_text_log_says_once_that_it_cannot_be_written(capsys: pytest.CaptureFixture) -> None:
    """In place of a traceback for each line."""
    logger = logging.Logger('full')
    logger.addHandler(logging.FileHandler('/dev/full'))
    hook, runner = LoggerHook(), SimpleNamespace(logger=logger, timestamp='now')
    hook.before_run(runner)
    for _ in range(3):
        logger.info('a line')
    said = capsys.readouterr().err
    assert said == ('The log is not written to /dev/full: [Errno 28] No space left on device. The run goes on.\n')


def test_values_of_training_and_evaluation_may_be_lost_and_those_of_a_test_not() -> None:
    said: list[str] = []
    logger = SimpleNamespace(info=lambda _: None, warning=said.append)
    processor = SimpleNamespace(
        get_log_after_iter=lambda *_: ({}, ''), get_log_after_epoch=lambda *_, **__: ({}, ''), window_size=1
    )
    runner = SimpleNamespace(
        logger=logger, log_processor=processor, visualizer=SimpleNamespace(add_scalars=full), train_dataloader=range(9)
    )
    runner.val_dataloader = runner.test_dataloader = range(9)
    runner.iter, runner._train_loop, runner.log_dir, runner.experiment_name = 0, None, '/dev', 'a'
    hook = LoggerHook(interval=1, log_metric_by_epoch=False)
    hook._silent, hook.json_log_path = False, 'full'
    for batch in range(2):
        hook.after_train_iter(runner, batch)
    hook.after_val_epoch(runner)
    assert [line.partition(':')[0] for line in said] == ['The values of the log are not written']
    runner.visualizer.add_scalars = lambda *_, **__: 1 / 0  # other errors are errors
    with pytest.raises(ZeroDivisionError):
        hook.after_val_epoch(runner)
