"""Trainings that are told to stop: one more checkpoint, status 75, and they go on as if nothing had happened."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import ROOT, TINY, options, run
from faults import SMALLER, tiny, write_config
from forked import run_tool
from mmengine.runner import Runner

import dino_mm
from dino_mm.datasets.digits import make_digits
from dino_mm.engine import PreemptionHook
from dino_mm.engine import preemption_hook as module
from dino_mm.engine.launch import build_runner
from dino_mm.engine.preemption_hook import EXIT_STATUS, Stopped
from dino_mm.engine.skip_not_finite_hook import SKIPPED

ENV = dict(PYTHONPATH=f'{ROOT}:{ROOT}/tests', OMP_NUM_THREADS='1')
#: Far from each other, so that none but the signal's checkpoint is there.
RARE = {'default_hooks.checkpoint.interval': 1000, 'train_cfg.val_interval': 1000}
WORKERS = {'train_dataloader.num_workers': 2, 'train_dataloader.persistent_workers': True}


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_digits(tmp_path_factory.mktemp('digits') / 'data', num_train=9, num_val=4)


@pytest.fixture(autouse=True)
def _as_before() -> Iterator[None]:
    """One thread, for several wait for each other longer than they work; the signals as they were."""
    threads, handlers = torch.get_num_threads(), {number: signal.getsignal(number) for number in module.SIGNALS}
    torch.set_num_threads(1)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # the tests themselves may run under nohup
    yield
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)


def train(data: Path, folder: Path, hooks: list[dict], by_epoch: bool = False, **settings) -> Runner:
    """Train in this process."""
    config = write_config(folder.with_suffix('.py'), data, hooks)
    if by_epoch:
        lines = Path(dino_mm.cfg('dino-resnet/by_epoch/dino_r50_4scale_12ep_by_epoch.py')).read_text().splitlines()
        own = [f'_base_ = {str(config)!r}', *(line for line in lines if not line.startswith('_base_'))]
        config = folder.with_suffix('.epochs.py')
        config.write_text('\n'.join(own))
    runner = build_runner(tiny(config, folder, settings))
    runner.train()
    return runner


def told(kind: str, *at: int, **more: object) -> dict:
    return dict(type='FaultHook', kind=kind, at=list(at), **more)


def read(path: Path) -> dict:
    return torch.load(path, weights_only=True)


def assert_same_weights(first: Path, second: Path) -> None:
    states = [read(path)['state_dict'] for path in (first, second)]
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=0, atol=1e-6, msg=name)


def kill_group_after(iteration: int, sent: signal.Signals, folder: Path, *command: str | Path) -> tuple[int, str]:
    """Start a training, send a signal to all of its processes as clusters do; its status and what it said."""
    with (folder.with_suffix('.log')).open('w+') as log:
        process = subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            env=os.environ | ENV,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        while process.poll() is None and f'Iter(train) [{iteration:>4}/1000]' not in Path(log.name).read_text():
            time.sleep(0.02)
        began = time.monotonic()
        os.killpg(process.pid, sent)
        status = process.wait(timeout=100)
        assert time.monotonic() - began < 30
    return status, Path(log.name).read_text()


def test_a_signal_to_all_processes_saves_and_the_training_goes_on_exactly(data: Path, tmp_path: Path) -> None:
    """With workers of the data loader, which get the signal too."""
    folder = tmp_path / 'run'
    config = write_config(tmp_path / 'config.py', data, [])
    settings = TINY | SMALLER | RARE | WORKERS
    command = ('tools/train.py', config, '--work-dir', folder)
    status, said = kill_group_after(
        3, signal.SIGTERM, folder, *command, *options(settings | {'train_cfg.max_iters': 1000})
    )
    assert status == EXIT_STATUS == 75, said
    assert 'Traceback' not in said
    stopped = int(re.search(r'Training stops after iteration (\d+) \(SIGTERM\), with .*--resume', said)[1])
    assert (folder / 'last_checkpoint').read_text().endswith(f'iter_{stopped}.pth')
    assert [path.name for path in folder.glob('*.pth')] == [f'iter_{stopped}.pth']
    assert read(folder / f'iter_{stopped}.pth')['meta']['iter'] == stopped
    length = {'train_cfg.max_iters': stopped + 2}
    run_tool(*command, '--resume', *options(settings | length), **ENV)
    train(data, tmp_path / 'straight', [], **RARE, **length)
    assert_same_weights(folder / f'iter_{stopped + 2}.pth', tmp_path / 'straight' / f'iter_{stopped + 2}.pth')


@pytest.mark.slow
@pytest.mark.parametrize('sent', [signal.SIGUSR1, signal.SIGINT])
def test_other_signals_to_all_processes(sent: signal.Signals, data: Path, tmp_path: Path) -> None:
    config = write_config(tmp_path / 'config.py', data, [])
    settings = TINY | SMALLER | RARE | WORKERS | {'train_cfg.max_iters': 1000}
    command = ('tools/train.py', config, '--work-dir', tmp_path / 'run', *options(settings))
    status, said = kill_group_after(3, sent, tmp_path / 'run', *command)
    assert status == 75, said
    assert f'({sent.name}), with {tmp_path}/run/iter_' in said
    assert 'Traceback' not in said


def test_one_of_two_processes_meets_nan_and_a_signal(data: Path, tmp_path: Path) -> None:
    """Both skip the step, both stop after the same one, and the launcher hears of it."""
    hooks = [told('nan_picture', 2, rank=1), told('SIGTERM', 4, rank=1)]
    config = write_config(tmp_path / 'config.py', data, hooks)
    settings = options(TINY | SMALLER | RARE | {'train_cfg.max_iters': 30})
    done = run('tools/dist_train.sh', config, '2', '--work-dir', tmp_path, *settings, status=1, PORT='29627', **ENV)
    assert 'Training stops after iteration 5 (another process was told to), with ' in done.stdout
    assert 'exitcode  : 75' in done.stderr
    assert 'SIGABRT' not in done.stderr
    saved = read(tmp_path / 'iter_5.pth')
    assert all(tensor.isfinite().all() for tensor in saved['state_dict'].values())
    assert {int(state['step']) for state in saved['optimizer']['state'].values()} == {4}
    assert saved['message_hub']['runtime_info'][SKIPPED] == 1
    assert 'Iteration 2: the step is skipped, number 1 of the training, 1 in a row: the gradients are not finite, this'
    assert 'iteration 2: all losses not finite; images: image id' in done.stdout  # the second process's words


@pytest.mark.parametrize('kind', ['SIGTERM', 'SIGUSR1', 'SIGINT', 'SIGHUP'])
def test_the_step_of_the_signal_is_the_last(kind: str, data: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped) as error:
        train(data, tmp_path / 'run', [told(kind, 2)], **RARE)
    assert error.value.code == 75
    assert [path.name for path in (tmp_path / 'run').glob('*.pth')] == ['iter_2.pth']


def test_a_closed_terminal_stays_ignored_where_it_was(data: Path, tmp_path: Path) -> None:
    """As under ``nohup``."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        runner = train(data, tmp_path / 'run', [told('SIGHUP', 1)], **RARE | {'train_cfg.max_iters': 2})
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)
    assert runner.iter == 2


@pytest.mark.parametrize('kind', ['SIGTERM', pytest.param('SIGINT', marks=pytest.mark.slow)])
def test_a_validation_is_left_with_the_weights_of_the_training(kind: str, data: Path, tmp_path: Path) -> None:
    """Not with the average that is being validated."""
    ema = dict(type='EMAHook', momentum=0.5)
    settings = RARE | {'train_cfg.max_iters': 4, 'train_cfg.val_interval': 2, 'val_dataloader.batch_size': 1}
    with pytest.raises(Stopped):
        train(data, tmp_path / 'left', [ema, told(kind, 2, in_validation=True)], **settings)
    train(data, tmp_path / 'straight', [ema], **RARE | {'train_cfg.max_iters': 2})
    left, straight = (read(tmp_path / name / 'iter_2.pth') for name in ('left', 'straight'))
    for part in ('state_dict', 'ema_state_dict'):
        for name, tensor in straight[part].items():
            torch.testing.assert_close(left[part][name], tensor, rtol=0, atol=1e-6, msg=name)
    assert left['meta']['iter'] == 2


@pytest.mark.slow
@pytest.mark.parametrize('last', [7, 5], ids=['within', 'at its end'])
def test_within_an_epoch(last: int, data: Path, tmp_path: Path) -> None:
    """The hook that writes checkpoints by epochs writes one by iterations; the rest of the epoch is trained.

    An epoch has five iterations. Where all are done, the next run ends it.
    """
    settings = {'train_cfg.max_epochs': 2, 'param_scheduler.0.milestones': [1], 'default_hooks.checkpoint.interval': 1}
    settings |= {'train_cfg.val_interval': 100}
    folder = tmp_path / 'run'
    with pytest.raises(Stopped):
        train(data, folder, [told('SIGTERM', last)], by_epoch=True, **settings)
    assert (folder / 'last_checkpoint').read_text().endswith(f'iter_{last}.pth')
    train(data, folder, [], by_epoch=True, resume=True, **settings)
    train(data, tmp_path / 'straight', [], by_epoch=True, **settings)
    assert_same_weights(folder / 'epoch_2.pth', tmp_path / 'straight' / 'epoch_2.pth')


def test_hours_end_a_training(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / 'tools')
    import train as tool

    monkeypatch.setattr('sys.argv', ['train.py', 'x.py', '--max-hours', '0'])
    with pytest.raises(SystemExit) as error:
        tool.parse_args()
    assert error.value.code == 2
    with pytest.raises(ValueError, match='`max_hours` of the PreemptionHook is -1; it must be above 0'):
        PreemptionHook(max_hours=-1)
    config = write_config(tmp_path / 'config.py', data, [])
    monkeypatch.setattr('sys.argv', ['train.py', 'x.py', '--max-hours', '0.0001'])
    cfg = tiny(config, tmp_path / 'run', RARE | {'train_cfg.max_iters': 1000})
    tool.apply_training_arguments(cfg, tool.parse_args())
    runner = build_runner(cfg)
    with pytest.raises(Stopped):
        runner.train()
    said = next((tmp_path / 'run').glob('*/*.log')).read_text()
    assert re.search(r'Training stops after iteration \d+ \(0\.0001 hours are over\), with', said)
    assert (tmp_path / 'run' / 'last_checkpoint').exists()


def test_a_second_interrupt_ends_at_once_but_not_the_launchers_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    monkeypatch.setattr(module.time, 'monotonic', lambda: now[0])
    hook = PreemptionHook()
    for sent in (signal.SIGINT, signal.SIGINT, signal.SIGTERM):
        hook._on_signal(sent, None)
    now[0] += module.PATIENCE + 1
    hook._on_signal(signal.SIGTERM, None)
    with pytest.raises(KeyboardInterrupt):
        hook._on_signal(signal.SIGINT, None)


def test_signals_are_as_before_after_a_training(data: Path, tmp_path: Path) -> None:
    before = [signal.getsignal(number) for number in module.SIGNALS]
    train(data, tmp_path / 'run', [], **RARE | {'train_cfg.max_iters': 1})
    assert [signal.getsignal(number) for number in module.SIGNALS] == before


def write_fake(folder: Path, name: str, script: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f'#!/usr/bin/env bash\n{script}\n')
    (folder / name).chmod(0o755)


@pytest.mark.parametrize('status', [0, 1, 75])
def test_slurm_script_requeues_what_was_stopped(status: int, tmp_path: Path) -> None:
    fakes = tmp_path / 'bin'
    write_fake(fakes, 'srun', f'printf "%s\\n" "$@" > {tmp_path}/srun; exit {status}')
    write_fake(fakes, 'scontrol', f'echo "$@" > {tmp_path}/scontrol')
    # As Slurm does: options, then the script, which runs with SLURM_JOB_ID.
    write_fake(
        fakes,
        'sbatch',
        f'printf "%s\\n" "$@" > {tmp_path}/sbatch; cat > {tmp_path}/job; SLURM_JOB_ID=41 bash {tmp_path}/job',
    )
    path = f'{fakes}:{os.environ["PATH"]}'
    arguments = ('part', 'my job', 'a config.py', 'work', '--amp')
    script = ROOT / 'tools' / 'slurm_train.sh'
    run(script, '--requeue', *arguments, status=status, PATH=path, GPUS='4', PYTHON='py')
    said = (tmp_path / 'sbatch').read_text().splitlines()
    assert {'--requeue', '--signal=USR1@120', '--open-mode=append', '--job-name=my job', '--ntasks=4'} <= set(said)
    ran = (tmp_path / 'srun').read_text().splitlines()
    where = ['-u', f'{ROOT}/tools/train.py', 'a config.py', '--work-dir', 'work', '--launcher', 'slurm']
    assert ran[-9:] == [*where, '--resume', '--amp']
    assert (tmp_path / 'scontrol').exists() == (status == 75)
    if status == 75:
        assert (tmp_path / 'scontrol').read_text() == 'requeue 41\n'
    run(script, *arguments, status=status, PATH=path)
    assert '--resume' not in (tmp_path / 'srun').read_text()
