"""Numbers of the host on their way to the device."""

from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode

from dino_mm.benchmark.profiling import OperatorCounter
from dino_mm.ops.transfer import to_device

CPU = torch.device('cpu')


@pytest.mark.parametrize('dtype', [torch.int64, torch.float32, torch.float64])
def test_tables_arrive_as_they_are(dtype: torch.dtype) -> None:
    tables = [[(3, 4), (5, 6)], 7, np.arange(6).reshape(1, 2, 3), (1 / 3, 2**24 + 1)]
    with OperatorCounter() as counter:
        arrived = to_device(tables, CPU, dtype)
    assert counter.waits == {}
    for tensor, table in zip(arrived, tables, strict=True):
        assert tensor.is_contiguous()
        assert tensor.dtype is dtype
        assert torch.equal(tensor, torch.tensor(np.asarray(table), dtype=dtype))


def test_a_gpu_gets_one_copy_from_pinned_memory_that_nobody_waits_for() -> None:
    pinned: list[Tensor] = []
    with (
        FakeTensorMode(),
        mock.patch.object(torch, 'from_numpy', lambda array: torch.empty(array.shape, dtype=torch.int64)),
        mock.patch.object(Tensor, 'pin_memory', lambda host: pinned.append(host) or host),
        OperatorCounter(torch.device('cuda')) as counter,
    ):
        sizes, counts = to_device([[(3, 4), (5, 6)], [7]], torch.device('cuda'))
    assert [tuple(host.shape) for host in pinned] == [(5,)]
    assert sizes.is_cuda
    assert (sizes.shape, counts.shape) == ((2, 2), (1,))
    assert counter.calls['_to_copy'] == 1
    assert counter.waits == {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_a_gpu_reads_what_was_meant_however_late() -> None:
    """The host's memory is given back and written anew while the GPU is still busy with what was queued before."""
    device = torch.device('cuda')
    to_device([[0]], device)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode('error')
    try:
        torch.cuda._sleep(10**8)
        arrived = [to_device([[i] * 1000], device)[0] for i in range(50)]
    finally:
        torch.cuda.set_sync_debug_mode('default')
    assert [tensor.unique().tolist() for tensor in arrived] == [[i] for i in range(50)]


def test_a_trace_keeps_sizes_that_are_not_constant() -> None:
    def areas(image: Tensor) -> Tensor:
        height, width = image.shape
        (table,) = to_device([[(height, width), (2, 3)]], image.device)
        return table.prod(1)

    traced = torch.jit.trace(areas, torch.zeros(4, 5))
    assert traced(torch.zeros(7, 8)).tolist() == [56, 6]
