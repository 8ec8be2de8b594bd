"""How the command-line tools end."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed

from dino_mm.checkpoints.errors import CheckpointError
from dino_mm.engine.launch import ends_cleanly


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
def test_a_checkpoint_s_error_does_not_wait_for_other_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """They may never come to a barrier."""
    monkeypatch.setattr(torch.distributed, 'barrier', lambda: pytest.fail('waits'))
    with pytest.raises(SystemExit, match=r'^error: no such file$'), ends_cleanly():
        raise CheckpointError('no such file')
