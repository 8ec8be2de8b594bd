"""The estimate of memory: known sums, the stand-ins for a GPU's operators, the largest batch, a whole run."""

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from commands import options
from forked import run_tool
from test_benchmark import TINY
from torch._subclasses.fake_tensor import FakeTensorMode

from dino_mm.benchmark.comparison import Setting, read_config
from dino_mm.benchmark.memory import (
    LiveBytes,
    Peak,
    attend,
    checkpointed,
    largest_batch,
    sample,
    training_peak,
    usable,
)
from dino_mm.models.structures import FeatureLevels
from dino_mm.ops.deformable_sampling import sample_levels

CONFIG = 'dino-resnet/dino_r50_4scale_12ep.py'
KIB = 1024


@pytest.mark.parametrize('without_data', [False, True])
def test_bytes_are_counted_while_they_are_there(without_data: bool) -> None:
    with FakeTensorMode() if without_data else torch.enable_grad(), LiveBytes() as live:
        x = torch.ones(2 * KIB)  # 8 KiB
        y = x + 1
        assert live.now == 16 * KIB
        z = y[::2].view(2, -1).add_(1)
        assert live.now == 16 * KIB  # views, and a change in place
        del x
        assert live.now == 8 * KIB
        del y
        assert live.now == 8 * KIB  # its view is still there
        del z
        assert live.now == 0
        tiny = torch.ones(3)
        assert (live.now, live.peak) == (512, 16 * KIB)
        del tiny


def test_the_peak_of_a_backward_pass() -> None:
    """A chain of exponentials, each kept, then gradients: one is let go when the next is there."""
    with FakeTensorMode(), LiveBytes() as live:
        x = torch.ones(KIB, requires_grad=True)  # 4 KiB
        y = x.exp().exp().exp()
        assert live.now == 4 * 4 * KIB
        y.backward(torch.ones(KIB))
    assert live.peak == (4 + 3) * 4 * KIB  # the given gradient, that of the last but one and of the one before
    assert live.now == 3 * 4 * KIB  # x, y, the gradient of x


def kept_by(function, *args) -> tuple[torch.Tensor, list[tuple[int, ...]]]:
    kept: list[tuple[int, ...]] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(tuple(t.shape)) or t, lambda t: t):
        return function(*args), kept


def test_sampling_keeps_what_mmcvs_operator_keeps() -> None:
    shapes = torch.tensor([[4, 6], [2, 3]])
    levels = FeatureLevels(((4, 6), (2, 3)), shapes, torch.tensor([0, 24]), shapes.flip(1), torch.ones(2, 2, 2))
    inputs = torch.rand(2, 30, 2, 8), torch.rand(2, 5, 2, 2, 4, 2), torch.rand(2, 5, 2, 2, 4)
    for tensor in inputs:
        tensor.requires_grad_()
    output, kept = kept_by(sample, *inputs, levels)
    assert output.shape == sample_levels(*inputs, levels).shape
    assert kept == [tensor.shape for tensor in inputs]
    assert [grad.shape for grad in torch.autograd.grad(output.sum(), inputs)] == kept


@pytest.mark.parametrize('mask', [None, torch.rand(40, 50) > 0.5, torch.rand(2, 4, 40, 50)])
def test_attention_keeps_no_weights(mask: torch.Tensor | None) -> None:
    with FakeTensorMode(allow_non_fake_inputs=True):
        query, key, value = (torch.rand(2, 4, n, 8, requires_grad=True) for n in (40, 50, 50))
        output, kept = kept_by(attend, query, key, value, mask)
        assert output.shape == F.scaled_dot_product_attention(query, key, value, mask).shape
        output.sum().backward()
        assert (query.grad.shape, key.grad.shape) == (query.shape, key.shape)
    large = [shape for shape in kept if shape[-2:] == (40, 50)]
    assert len(large) == (mask is not None)


def test_the_largest_batch() -> None:
    def straight(images: int) -> Peak:
        return Peak(100, 50 * images)

    def bent(images: int) -> Peak:  # another moment is the highest from the third image on
        return Peak(100, max(50 * images, 90 * images - 100))

    assert [largest_batch(straight, budget) for budget in (149, 150, 199, 200, 1000)] == [0, 1, 1, 2, 18]
    assert [largest_batch(bent, budget) for budget in (249, 270, 359, 360, 1000)] == [2, 3, 3, 4, 11]
    assert usable(24 * 2**30) == int(0.95 * 24 * 2**30) - 2**30


def test_a_step_of_a_tiny_model() -> None:
    setting = Setting(CONFIG, TINY | {'model.neck.in_channels': [16, 32, 64]}, 128, 192, batch=2)
    config = read_config(setting.config, setting.cfg_options).model
    plain, half = training_peak(config, setting), training_peak(config, setting, half=True)
    saving = training_peak(checkpointed(config, transformer=True, backbone=False), setting)
    more = training_peak(checkpointed(config, transformer=True, backbone=True), setting)
    assert plain.model == half.model == saving.model == more.model
    assert more.step < saving.step < plain.step
    assert half.step < plain.step
    # Nothing of the stand-ins is left.
    assert F.scaled_dot_product_attention is torch.nn.functional.scaled_dot_product_attention is not attend
    assert torch.ones(2).softmax(0).tolist() == [0.5, 0.5]
    # AdamW's two moments of what is trained, and all weights and buffers.
    from dino_mm.registry import MODELS

    model = MODELS.build(config)
    tensors = [*model.parameters(), *model.buffers()]
    trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    weights = sum(-(-t.nbytes // 512) * 512 for t in tensors)
    assert plain.model == weights + 2 * trained


@pytest.mark.slow
def test_the_command_prints_a_table(tmp_path: Path) -> None:
    out = tmp_path / 'report.json'
    arguments = ('--memory', CONFIG, '--gpu-memory', '1.13', '--size', '64x96', '--out', out)
    done = run_tool('tools/benchmark.py', *arguments, *options(TINY))
    found = json.loads(out.read_text())['memory']
    assert found['setting']['height'] == 64
    rows = {(row['way'], row['amp']): row for row in found['rows']}
    assert len(rows) == 6
    for (way, amp), row in rows.items():
        assert f'{way:<16} {"AMP" if amp else "float32":<9}' in done.stdout
        assert row['largest_batch'] >= rows['as configured', amp]['largest_batch'] > 1
    assert found['gpu_bytes'] == int(1.13 * 2**30)
