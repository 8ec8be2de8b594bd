"""Numbers that are not finite: no step is taken with them, whatever they come from and whoever meets them."""

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from commands import ROOT, TINY, options
from faults import tiny, write_config
from forked import run_tool
from mmengine.runner import Runner

from dino_mm.datasets.digits import make_digits
from dino_mm.engine import SkipNotFiniteHook
from dino_mm.engine.launch import build_runner
from dino_mm.engine.skip_not_finite_hook import SKIPPED

KINDS = ['nan_gradient', 'infinite_gradient', 'nan_picture', 'infinite_logits', 'infinite_loss']
#: What the log says of the kinds that show in losses.
SAID = {
    'nan_picture': 'all losses not finite; images: image id',
    'infinite_loss': ': d0.loss_iou, loss_iou, enc_loss_iou, d0.dn_loss_iou, dn_loss_iou not finite',
    'infinite_logits': 'The predictions of layer 1 for image id',
}
#: Of processes: the faults' module is found, and threads do not fight.
ENV = dict(PYTHONPATH=f'{ROOT}:{ROOT}/tests', OMP_NUM_THREADS='1')


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_digits(tmp_path_factory.mktemp('digits') / 'data', num_train=8, num_val=2)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads of so small a model wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(data: Path, folder: Path, hooks: list[dict], **settings: object) -> Runner:
    """Train with faults; every iteration writes a checkpoint, none is evaluated."""
    config = write_config(folder.with_suffix('.py'), data, hooks)
    more = {'default_hooks.checkpoint.interval': 1, 'train_cfg.val_interval': 100} | settings
    more.pop('clip_grad', None)
    cfg = tiny(config, folder, more)
    if 'clip_grad' in settings:
        cfg.optim_wrapper.clip_grad = settings['clip_grad']
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    runner = build_runner(cfg)
    runner.train()
    return runner


def fault(kind: str, *at: int) -> dict:
    return dict(type='FaultHook', kind=kind, at=list(at))


def read(folder: Path, iteration: int) -> dict:
    return torch.load(folder / f'iter_{iteration}.pth', weights_only=True)


def log_of(folder: Path) -> str:
    return next(folder.glob('*/*.log')).read_text()


def assert_finite(*states: dict) -> None:
    for state in states:
        assert all(tensor.isfinite().all() for tensor in state.values() if isinstance(tensor, torch.Tensor))


def same(first: dict, second: dict) -> bool:
    return all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize('kind', KINDS)
def test_a_step_that_is_not_finite_leaves_all_as_it_was(kind: str, data: Path, tmp_path: Path) -> None:
    """Weights, their average and Adam's moments; the batch norms learn from pictures that are finite."""
    ema = dict(type='EMAHook')
    runner = train(data, tmp_path / 'run', [fault(kind, 2, 4), ema])
    states = {iteration: read(tmp_path / 'run', iteration) for iteration in (1, 2, 3, 4)}
    own = {iteration: state['ema_state_dict'] for iteration, state in states.items()}
    weights = {name for name, _ in runner.model.named_parameters()}
    for before, after, stays in ((1, 2, True), (2, 3, False), (3, 4, True)):
        first, second = ({n: own[i][f'module.{n}'] for n in weights} for i in (before, after))
        assert same(first, second) == stays, after
    assert_finite(*(state['state_dict'] for state in states.values()), *own.values())
    for state in states[4]['optimizer']['state'].values():
        assert int(state['step']) == 2
        assert_finite(state)
    assert runner.message_hub.get_info(SKIPPED) == 2
    assert states[4]['message_hub']['runtime_info'][SKIPPED] == 2
    first, second = (line for line in log_of(tmp_path / 'run').splitlines() if 'the step is skipped' in line)
    assert 'Iteration 2: the step is skipped, number 1 of the training, 1 in a row: ' in first
    assert 'Iteration 4: the step is skipped, number 2 of the training, 1 in a row: ' in second
    for line in (first, second):
        assert line.count(f' ({data}/train/') >= 2
        assert SAID.get(kind, "the gradients are not finite, this process's losses are; images: image id") in line


@pytest.mark.parametrize(('more', 'last'), [({}, 3), ({'max_skipped': 3, 'max_share': 0.002}, 5)])
def test_too_many_skips_end_the_run_and_leave_the_last_checkpoint(
    more: dict, last: int, data: Path, tmp_path: Path
) -> None:
    """Ten in a row as it is; by the share, here more than two in a thousand, although none follows another."""
    at = (2, 4, 6) if more else range(4, 30)
    settings = {f'default_hooks.numbers.{key}': value for key, value in more.items()}
    with pytest.raises(FloatingPointError) as error:
        train(data, tmp_path / 'run', [fault('nan_gradient', *at)], **{'train_cfg.max_iters': 30} | settings)
    end = at[2] if more else 13
    assert str(error.value).startswith(f'Training ends at iteration {end}: {1 if more else 10} steps in a row and ')
    assert f'The latest checkpoint is {tmp_path}/run/iter_{end - 1}.pth.' in str(error.value)
    assert '\n' not in str(error.value)
    assert (tmp_path / 'run' / 'last_checkpoint').read_text().endswith(f'iter_{end - 1}.pth')
    assert_finite(read(tmp_path / 'run', end - 1)['state_dict'])
    weights = {name for name, _ in read(tmp_path / 'run', 1)['state_dict'].items() if 'running' not in name}
    first, second = (read(tmp_path / 'run', i)['state_dict'] for i in (last, end - 1))
    assert all(torch.equal(first[n], second[n]) for n in weights if 'num_batches' not in n)


@pytest.mark.parametrize(
    ('kind', 'clip'), [('infinite_gradient', None), ('nan_gradient', dict(type='value', clip_value=1.0))]
)
def test_without_clipping_by_norm_too(kind: str, clip: dict | None, data: Path, tmp_path: Path) -> None:
    runner = train(data, tmp_path / 'run', [fault(kind, 2)], clip_grad=clip, **{'train_cfg.max_iters': 2})
    assert runner.message_hub.get_info(SKIPPED) == 1
    assert_finite(read(tmp_path / 'run', 2)['state_dict'])


def test_a_step_of_several_iterations_is_skipped_as_one(data: Path, tmp_path: Path) -> None:
    """Of three steps of two iterations, the second meets a picture of NaN in its first iteration, 3."""
    settings = {'optim_wrapper.accumulative_counts': 2, 'train_cfg.max_iters': 6}
    runner = train(data, tmp_path / 'run', [fault('nan_picture', 3)], **settings)
    states = [read(tmp_path / 'run', iteration)['state_dict'] for iteration in range(1, 7)]
    parameters = [name for name, _ in runner.model.named_parameters()]
    changed = [not all(torch.equal(a[n], b[n]) for n in parameters) for a, b in pairwise(states)]
    assert changed == [True, False, False, False, True]
    assert_finite(*states)
    assert 'Iteration 4: the step is skipped, number 1' in log_of(tmp_path / 'run')
    assert 'iteration 3: all losses not finite; images: image id' in log_of(tmp_path / 'run')


def test_several_optimizers_are_refused() -> None:
    runner = type('Runner', (), dict(optim_wrapper=dict()))
    with pytest.raises(TypeError, match=r'watches one optimizer.*out of .default_hooks'):
        SkipNotFiniteHook().before_train(runner)


def test_the_tool_ends_with_one_line(data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / 'config.py', data, [fault('nan_picture', *range(3, 30))])
    settings = options(TINY | {'train_cfg.max_iters': 20, 'train_cfg.val_interval': 100})
    done = run_tool('tools/train.py', config, '--work-dir', tmp_path / 'run', *settings, status=1, **ENV)
    assert done.stderr.splitlines()[-1].startswith('error: Training ends at iteration 12: 10 steps in a row')
    assert 'Traceback' not in done.stderr
    saved = read(tmp_path / 'run', 10)
    assert_finite(saved['state_dict'])
    assert math.isnan(saved['message_hub']['log_scalars']['train/loss']['mmengine.HistoryBuffer'][0][-1])
