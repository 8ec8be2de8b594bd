"""Trainings that go on with another config: what has changed counts, or is refused in one line."""

import copy
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from faults import tiny, write_config
from mmengine.runner import Runner

from dino_mm.checkpoints.errors import CheckpointError
from dino_mm.datasets.digits import make_digits
from dino_mm.engine import checkpoint_hook
from dino_mm.engine.launch import build_runner
from dino_mm.engine.resume import AUTO, find_resumable

#: What a first training has done when the second goes on, and what that one comes to.
FIRST, SECOND = 3, 5
EMA = dict(type='EMAHook', momentum=0.5)
#: As the config has it.
WARM_UP = dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30)


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_digits(tmp_path_factory.mktemp('digits') / 'data', num_train=8, num_val=1)


@pytest.fixture(scope='module', autouse=True)
def _one_thread() -> Iterator[None]:
    """Threads of so small a model wait for each other longer than they work."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def train(data: Path, folder: Path, length: int, hooks: list[dict] | None = None, **settings: object) -> Runner:
    """Train to iteration ``length`` from the newest checkpoint in ``folder``, if there is one."""
    config = write_config(folder.with_suffix('.py'), data, hooks or [])
    optimizer = settings.pop('optimizer', None)
    cfg = tiny(config, folder, {'train_cfg.max_iters': length, 'default_hooks.checkpoint.interval': 1} | settings)
    if optimizer is not None:
        cfg.optim_wrapper.optimizer = optimizer
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    cfg.resume = settings.get('resume', AUTO)
    runner = build_runner(cfg)
    runner.train()
    return runner


@pytest.fixture(scope='module')
def first(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('first') / 'first'
    train(data, folder, FIRST)
    return folder


@pytest.fixture
def work(first: Path, tmp_path: Path) -> Path:
    """A copy of the first training's folder."""
    shutil.copytree(first, tmp_path / 'work')
    return tmp_path / 'work'


def read(folder: Path, iteration: int) -> dict:
    return torch.load(folder / f'iter_{iteration}.pth', weights_only=True)


def log_of(folder: Path) -> str:
    return max(folder.glob('*/*.log')).read_text()


def of_optimizer(runner: Runner) -> list[dict]:
    """Settings of each group of parameters, and the one that stands for all in the log."""
    wrapper = runner.optim_wrapper
    groups = [*wrapper.optimizer.param_groups, wrapper.base_param_settings]
    return [{name: value for name, value in group.items() if name != 'params'} for group in groups]


#: Changed settings -> how the log names the change.
CHANGES: dict[str, tuple[dict, str]] = {
    'learning rate': ({'optim_wrapper.optimizer.lr': 1e-6}, 'lr 0.0015 -> 1e-06'),
    'weight decay': ({'optim_wrapper.optimizer.weight_decay': 0.5}, 'weight_decay 0.0001 -> 0.5'),
    'betas': ({'optim_wrapper.optimizer.betas': (0.5, 0.9)}, 'betas [0.9, 0.999] -> [0.5, 0.9]'),
    'rate by batch size': (
        {'auto_scale_lr': dict(enable=True, base_batch_size=4)},
        'lr 0.0015 -> 0.00075',
    ),
    'length of the warm-up': ({'param_scheduler.0.end': 4, 'param_scheduler.1.begin': 4}, 'end of LinearLR'),
    'kind of schedule': (
        {'param_scheduler': [WARM_UP, dict(type='MultiStepLR', milestones=[4], by_epoch=False)]},
        'a MultiStepLR in place of another schedule',
    ),
    'number of schedules': ({'param_scheduler': [dict(type='ConstantLR', by_epoch=False)]}, '2 -> 1 schedules'),
}


@pytest.mark.parametrize('change', CHANGES)
def test_what_the_config_changes_counts(change: str, work: Path, data: Path, tmp_path: Path) -> None:
    """From there on, rates are those of a training that had the settings from the beginning."""
    settings, said = CHANGES[change]
    resumed = train(data, work, SECOND, **copy.deepcopy(settings))
    seldom = {'default_hooks.checkpoint.interval': SECOND}
    straight = train(data, tmp_path / 'straight', SECOND, **copy.deepcopy(settings), **seldom)
    for own, other in zip(of_optimizer(resumed), of_optimizer(straight), strict=True):
        assert own == other
    for own, other in zip(resumed.param_schedulers, straight.param_schedulers, strict=True):
        assert own.state_dict() == other.state_dict()
    steps = {int(state['step']) for state in resumed.optim_wrapper.optimizer.state.values()}
    assert steps == {SECOND}  # its moments stay
    (line,) = (line for line in log_of(work).splitlines() if "differ from the checkpoint's" in line)
    assert said in line
    assert 'The config counts from here.' in line


def test_what_is_as_before_stays_as_it_is(work: Path, data: Path, tmp_path: Path) -> None:
    resumed, straight = train(data, work, SECOND), train(data, tmp_path / 'straight', SECOND)
    assert "differ from the checkpoint's" not in log_of(work)
    assert of_optimizer(resumed) == of_optimizer(straight)
    for name, tensor in read(tmp_path / 'straight', SECOND)['state_dict'].items():
        torch.testing.assert_close(read(work, SECOND)['state_dict'][name], tensor, rtol=0, atol=0, msg=name)


OTHERS: dict[str, tuple[dict, str]] = {
    'kind': (
        dict(optimizer=dict(type='SGD', lr=0.1, weight_decay=1e-4, momentum=0.9)),
        'has settings betas, eps, lr, weight_decay, that of this config dampening, lr, momentum, weight_decay',
    ),
    'groups': ({'optim_wrapper.paramwise_cfg.norm_decay_mult': 1.0}, r'has groups of \d+ \+ \d+ parameters, that of'),
}


@pytest.mark.parametrize('other', OTHERS)
def test_another_optimizer_is_refused(other: str, work: Path, data: Path) -> None:
    settings, said = OTHERS[other]
    with pytest.raises(CheckpointError, match=rf'^The optimizer cannot be resumed: .*{said}.*`load_from`') as error:
        train(data, work, SECOND, **settings)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('lost', ['meta', 'message_hub'])
def test_weights_alone_are_not_resumed(lost: str, work: Path, data: Path) -> None:
    content = read(work, FIRST)
    del content[lost]
    torch.save(content, work / 'weights.pth')
    with pytest.raises(CheckpointError, match=r'^The checkpoint holds weights alone, no state.*load_from'):
        train(data, work, SECOND, resume=True, load_from=str(work / 'weights.pth'))


def test_a_checkpoint_without_the_optimizer_says_so(work: Path, data: Path) -> None:
    content = read(work, FIRST)
    del content['optimizer']
    torch.save(content, work / 'best.pth')
    runner = train(data, work, SECOND, resume=True, load_from=str(work / 'best.pth'))
    assert 'its moments build up anew' in log_of(work)
    assert {int(state['step']) for state in runner.optim_wrapper.optimizer.state.values()} == {SECOND - FIRST}


@pytest.mark.parametrize('length', [FIRST, 1])
def test_a_training_that_has_its_iterations_does_no_more_and_says_so(length: int, work: Path, data: Path) -> None:
    runner = train(data, work, length)
    said = f'Nothing is left to train: the checkpoint has {FIRST} iterations, and `train_cfg.max_iters` is {length}.'
    assert said in log_of(work)
    assert runner.iter == FIRST
    assert not (work / f'iter_{FIRST + 1}.pth').exists()


def test_averages_come_and_go_with_their_hook(data: Path, tmp_path: Path) -> None:
    """Without the hook the weights that were trained go on, which mmengine keeps in the average's place."""
    work = tmp_path / 'work'
    train(data, work, FIRST, [EMA])
    saved = read(work, FIRST)
    runner = train(data, work, FIRST)
    assert 'the training goes on from the weights that were trained' in log_of(work)
    differing = 0
    for name, tensor in runner.model.state_dict().items():
        assert torch.equal(tensor, saved['ema_state_dict'][f'module.{name}']), name
        differing += not torch.equal(tensor, saved['state_dict'][name])
    assert differing > 10
    train(data, work, FIRST + 1)
    train(data, work, SECOND, [EMA])
    assert read(work, SECOND)['ema_state_dict']['steps'] == 1


def test_losses_are_scaled_or_not(data: Path, tmp_path: Path) -> None:
    """As fp16 needs it: the moments stay, and a scale begins anew."""
    work, scaled = tmp_path / 'work', {'optim_wrapper.type': 'ScaledOptimWrapper'}
    for length, settings in ((1, {}), (2, scaled), (3, {}), (4, scaled)):
        runner = train(data, work, length, **settings)
        assert {int(state['step']) for state in runner.optim_wrapper.optimizer.state.values()} == {length}
        assert ('loss_scaler' in read(work, length)['optimizer']) == bool(settings)
    assert "differ from the checkpoint's" not in log_of(work)


def test_the_clock_may_be_set_back(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within a run and between two: the newest checkpoint is the last one."""
    work, now = tmp_path / 'work', [2e9]
    monkeypatch.setattr(checkpoint_hook.time, 'time', lambda: now[0])
    train(data, work, 1)
    for length in (3, 4):
        now[0] -= 86_400
        train(data, work, length)
        assert find_resumable([work]).path == work / f'iter_{length}.pth'
    times = [read(work, iteration)['meta']['written_at'] for iteration in (1, 2, 3, 4)]
    assert times == sorted(set(times))
    assert 2e9 <= times[0] < times[-1] < 2e9 + 1
