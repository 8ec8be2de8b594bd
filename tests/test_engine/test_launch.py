"""How the command-line tools end."""

import errno
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed
from conftest import tiny_model_cfg
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from torch import nn

from dino_mm.checkpoints.errors import CheckpointError
from dino_mm.engine import launch
from dino_mm.engine.launch import _write_safely, ends_cleanly
from dino_mm.registry import MODELS


@pytest.fixture
def _group() -> Iterator[None]:
    torch.distributed.init_process_group('gloo', store=torch.distributed.HashStore(), rank=0, world_size=1)
    yield
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@pytest.mark.usefixtures('_group')
def test_gloo_s_threads_end_before_the_program() -> None:
    with ends_cleanly():
        torch.distributed.broadcast(torch.ones(3), 0)
    assert not torch.distributed.is_initialized()


@pytest.mark.usefixtures('_group')
@pytest.mark.parametrize(
    ('error', 'waits'),
    [
        (RuntimeError('[pair.cc:545] Read error [127.0.0.1]:1707: Connection reset by peer. This is typically'), True),
        (RuntimeError('[pair.cc:534] Connection closed by peer [127.0.0.1]:20342'), True),
        (torch.distributed.DistBackendError('NCCL error: remote process exited or there was a network error'), True),
        (RuntimeError('CUDA out of memory'), False),
        (ValueError('a fault of its own'), False),
    ],
)
@pytest.mark.parametrize('processes', [1, 2])
def test_who_has_lost_another_process_speaks_after_it(
    error: Exception, waits: bool, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launcher takes the first that it hears of for the cause."""
    done: list[object] = []
    monkeypatch.setattr(torch.distributed, 'is_initialized', lambda: processes > 1)
    monkeypatch.setattr(launch.time, 'sleep', done.append)
    monkeypatch.setattr(launch, 'get_error_handler', lambda: SimpleNamespace(record_exception=done.append))
    with pytest.raises(type(error)), launch.ends_cleanly():
        raise error
    assert done == [*([launch.GRACE] if waits and processes > 1 else []), error]


def test_a_checkpoint_s_error_does_not_wait_for_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may never come to a barrier."""
    monkeypatch.setattr(torch.distributed, 'barrier', lambda: pytest.fail('waits'))
    with pytest.raises(SystemExit, match=r'^error: no such file$'), ends_cleanly():
        raise CheckpointError('no such file')


@pytest.mark.parametrize('number', [errno.EROFS, errno.EIO, errno.ESTALE])
def test_a_file_system_that_is_gone_ends_the_program_with_one_line(number: int) -> None:
    with pytest.raises(SystemExit, match=r'^error: .*work/a\.log.*See to the file system, then'), ends_cleanly():
        raise OSError(number, os.strerror(number), 'work/a.log')


def test_a_full_disk_ends_the_program_with_one_line() -> None:
    """Other errors of files keep their traceback."""
    with pytest.raises(SystemExit, match=r'^error: .*No space left on device.* Free some space'), ends_cleanly():
        Path('/dev/full').write_text('a')
    with pytest.raises(FileNotFoundError), ends_cleanly():
        Path('/nowhere').read_text()


def build_model(**changes: object) -> None:
    cfg = tiny_model_cfg()
    cfg.update(changes)
    MODELS.build(cfg)


def build_optimizer(**arguments: object) -> None:
    build_optim_wrapper(
        nn.Linear(1, 1), dict(type='OptimWrapper', constructor='dino_mm.ParamGroupConstructor', optimizer=arguments)
    )


@pytest.mark.parametrize(
    ('build', 'arguments', 'said'),
    [
        (build_model, dict(type='DINOO'), 'DINOO is not in the .*registry'),
        (build_model, dict(backbone=dict(type='mmdet.ResNett')), 'mmdet.ResNett is not in the mmdet::model registry'),
        (build_model, dict(encoder=dict(num_layer=3)), '`encoder` has an unknown key `num_layer`. Did you mean'),
        (build_model, dict(decoder=dict(embed_dims=7)), '`decoder.embed_dims` is 7, but the detector states 16'),
        (build_model, dict(num_querys=3), r"DINO.__init__\(\) got an unexpected keyword argument 'num_querys'"),
        (build_optimizer, dict(type='AdamW', learning_rate=1), "unexpected keyword argument 'learning_rate'"),
        (
            build_optimizer,
            dict(type='AdamWW'),
            r'no optimizer AdamWW. Correct `optim_wrapper\.optimizer\.type`',
        ),
    ],
)
def test_a_mistake_of_a_config_ends_the_program_with_one_line(
    build: Callable[..., None], arguments: dict, said: str
) -> None:
    with pytest.raises(SystemExit, match=f'^error: .*{said}') as caught, ends_cleanly():
        build(**arguments)
    assert '\n' not in caught.value.code


@pytest.mark.parametrize('error', [KeyError('key'), TypeError('got an unexpected keyword argument'), ValueError('7')])
def test_errors_of_a_part_s_own_code_keep_their_traceback(error: Exception) -> None:
    class Part:
        def __init__(self) -> None:
            raise error

    with pytest.raises(type(error)), ends_cleanly():
        MODELS.build(dict(type=Part))


def test_a_part_that_builds_another_wrongly_keeps_its_traceback() -> None:
    class Part:
        def __init__(self) -> None:
            MODELS.build(dict(type='mmdet.ResNet', depht=50))

    with pytest.raises(TypeError, match='depht'), ends_cleanly():
        MODELS.build(dict(type=Part))


@pytest.mark.parametrize('arguments', [dict(), dict(type='AdamW', lr='1e-4', weight_decay=0)])
def test_optimizers_that_fail_otherwise_keep_their_traceback(arguments: dict) -> None:
    with pytest.raises((KeyError, TypeError)), ends_cleanly():
        build_optimizer(**arguments)


@pytest.mark.parametrize(
    ('hooks', 'checkpoint'),
    [
        (None, dict(type='dino_mm.CheckpointHook', interval=1)),
        (dict(checkpoint=dict(type='CheckpointHook', interval=7)), dict(type='dino_mm.CheckpointHook', interval=7)),
        (dict(checkpoint=dict(type='mmengine.CheckpointHook')), dict(type='dino_mm.CheckpointHook')),
        (dict(checkpoint=dict(type='mine.Hook')), dict(type='mine.Hook')),
        (dict(checkpoint=None), None),
    ],
)
def test_any_config_s_checkpoints_are_written_by_our_hook(hooks: dict | None, checkpoint: dict | None) -> None:
    """Unless it has one of its own, or none."""
    config = Config(dict() if hooks is None else dict(default_hooks=hooks))
    _write_safely(config)
    assert config.default_hooks.checkpoint == checkpoint
    assert config.default_hooks.logger.type == 'dino_mm.LoggerHook'
