"""Several processes over gloo train as one process with the same batch, and none waits for one that is gone."""

import os
import re
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from itertools import islice
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from commands import ROOT, TINY, options, run
from conftest import make_samples, tiny_model_cfg
from faults import SMALLER, write_config
from forked import CONTEXT, Tool
from mmengine.config import Config
from mmengine.registry import DATA_SAMPLERS
from torch.nn.parallel import DistributedDataParallel

from dino_mm.datasets.digits import make_digits
from dino_mm.engine.launch import build_runner
from dino_mm.engine.loops import require_equal_batches
from dino_mm.registry import MODELS
from dino_mm.settings import SettingError

ENV = dict(PYTHONPATH=f'{ROOT}:{ROOT}/tests', OMP_NUM_THREADS='1')


def build_model(with_denoising: bool = False):
    cfg = tiny_model_cfg()
    if not with_denoising:
        cfg.denoising = None  # its groups depend on the boxes of the local batch
    cfg.backbone.norm_eval = True  # batch statistics too
    torch.manual_seed(0)
    model = MODELS.build(cfg)
    model.init_weights()
    for branch in model.bbox_head.reg_branches:
        torch.nn.init.normal_(branch[-1].weight, std=0.1)  # zero at first: it would hide gradients
    return model.double().train()


def make_batch(*counts: int):
    torch.manual_seed(1)
    inputs, samples = make_samples(counts)
    return inputs.double(), samples


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(('127.0.0.1', 0))
        return sock.getsockname()[1]


@contextmanager
def member(rank: int, size: int, port: int) -> Iterator[None]:
    """Be process ``rank`` of ``size``; one that waits for another for a minute ends with an error."""
    os.environ.update(MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    dist.init_process_group('gloo', timeout=timedelta(minutes=1))
    yield
    dist.destroy_process_group()


def spawn(function: Callable[[int, int, int, Path], None], size: int, out: Path) -> None:
    """``size`` processes, forked from one that has imported everything."""
    mp.start_processes(function, (size, free_port(), out), nprocs=size, start_method=CONTEXT.get_start_method())


def run_rank(rank: int, size: int, port: int, out: Path) -> None:
    with member(rank, size, port):
        model = build_model()
        inputs, samples = make_batch(*COUNTS)
        part = slice(rank * len(COUNTS) // size, (rank + 1) * len(COUNTS) // size)
        model.forward = model.loss
        parallel = DistributedDataParallel(model)  # must live until the gradients are reduced
        losses = parallel(inputs[part], samples[part])
        sum(losses.values()).backward()
        gradients = {k: p.grad for k, p in model.named_parameters()}
        torch.save(({k: v.detach() for k, v in losses.items()}, gradients), out / f'{rank}.pth')


#: Boxes of each image: the last of three processes has none at all.
COUNTS = (3, 1, 2, 1, 0, 0)


@pytest.mark.parametrize('size', [2, 3])
def test_several_processes_equal_one(size: int, tmp_path: Path) -> None:
    spawn(run_rank, size, tmp_path)
    ranks = [torch.load(tmp_path / f'{rank}.pth') for rank in range(size)]

    model = build_model()
    losses = model.loss(*make_batch(*COUNTS))
    sum(losses.values()).backward()
    for name, value in losses.items():
        mean = sum(own[name] for own, _ in ranks) / size
        torch.testing.assert_close(mean, value.detach(), rtol=1e-10, atol=0)
    norms = []
    for name, parameter in model.named_parameters():
        for _, gradients in ranks:
            torch.testing.assert_close(gradients[name], ranks[0][1][name], rtol=0, atol=0)
        torch.testing.assert_close(ranks[0][1][name], parameter.grad, rtol=1e-8, atol=1e-12, msg=name)
        norms.append(parameter.grad.norm().item())
    # A new ResNet's residual branches end in zeros, so that their convolutions have no gradient yet.
    assert sum(n > 0 for n in norms) > 0.5 * len(norms)


def take_turns(rank: int, size: int, port: int, out: Path) -> None:
    """Three steps: one process without boxes, then the other, then both."""
    with member(rank, size, port):
        model = build_model(with_denoising=True)
        model.forward = model.loss
        parallel = DistributedDataParallel(model)
        optimizer = torch.optim.SGD(model.parameters(), 1e-3)
        for counts in ((2, 0), (0, 2), (0, 0)):
            losses = parallel(*make_batch(counts[rank], 0))
            optimizer.zero_grad()
            sum(losses.values()).backward()
            assert all(parameter.grad is not None for parameter in model.parameters())
            optimizer.step()
        torch.save(model.state_dict(), out / f'{rank}.pth')


def test_a_process_without_boxes_holds_nobody_up(tmp_path: Path) -> None:
    """With denoising, whose queries it has none of."""
    spawn(take_turns, 2, tmp_path)
    first, second = (torch.load(tmp_path / f'{rank}.pth') for rank in range(2))
    for name, tensor in first.items():
        assert tensor.isfinite().all(), name
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=0, msg=name)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return make_digits(tmp_path / 'data', num_train=9, num_val=1)


@pytest.mark.parametrize(
    ('kind', 'cause'),
    [
        ('exception', r'faults\.py", line \d+, in exception\n.*RuntimeError: this process has met its fault'),
        pytest.param('SIGKILL', r'exitcode  : -9 .*Signal 9 \(SIGKILL\) received', marks=pytest.mark.slow),
    ],
    ids=['by an error', 'by a signal'],
)
def test_a_process_that_dies_ends_all_and_is_named(kind: str, cause: str, data: Path, tmp_path: Path) -> None:
    """Rank, file and line of the first error stand last, below what it led to in other processes."""
    config = write_config(tmp_path / 'config.py', data, [dict(type='FaultHook', kind=kind, at=[2], rank=1)])
    settings = options(TINY | SMALLER | {'train_cfg.max_iters': 100_000})
    command = ('tools/dist_train.sh', config, '2', '--work-dir', tmp_path / 'work', *settings)
    done = run(*command, status=1, PORT=str(free_port()), **ENV)
    ended = time.time()
    struck = max((tmp_path / 'work').glob('*/vis_data/scalars.json')).stat().st_mtime  # the iteration before
    print(f'all processes have ended after {ended - struck:.1f} s')
    assert ended - struck < 30
    root = done.stderr.partition('Root Cause (first observed failure):')[2]
    assert re.search(rf'rank      : 1 .*{cause}', root, re.DOTALL), done.stderr[-5000:]


def test_processes_that_meet_other_faults_stay_together(data: Path, tmp_path: Path) -> None:
    """Gradients too large for fp16 in one, then in the other, then a picture of NaN; one picture cannot be read.

    Each skips the same steps with the same scale, though not the same pictures.
    """
    hooks = [
        dict(type='FaultHook', kind='infinite_gradient', at=[2], rank=1),
        dict(type='FaultHook', kind='infinite_gradient', at=[3], rank=0),
        dict(type='FaultHook', kind='nan_picture', at=[5], rank=1),
        dict(type='WriteDownHook', folder=str(tmp_path)),
    ]
    picture = data / 'train' / '000003.png'
    picture.write_bytes(picture.read_bytes()[:40])
    config = write_config(tmp_path / 'config.py', data, hooks)
    settings = TINY | SMALLER | {'train_cfg.max_iters': 8, 'train_cfg.val_interval': 100}
    settings |= {'train_dataloader.dataset.on_unreadable': 'skip', 'optim_wrapper.type': 'ScaledOptimWrapper'}
    command = ('tools/dist_train.sh', config, '2', '--work-dir', tmp_path / 'work', *options(settings))
    done = run(*command, PORT=str(free_port()), **ENV)
    first, second = (torch.load(tmp_path / f'{rank}.pth') for rank in range(2))
    for name, tensor in first.pop('model').items():
        assert torch.equal(second['model'][name], tensor), name
    for found in (first, second):
        assert (found['steps'], found['skipped'], found['scale']) == ({5}, 3, 2.0**9)
    assert first['unreadable'] + second['unreadable'] > 0
    assert 'Image id 4 is skipped, another takes its place' in done.stdout + done.stderr
    assert 'Iteration 3: the step is skipped, number 2 of the training' in done.stdout


#: Batches of an epoch in each of two processes -> what is said of them.
UNEQUAL = {(3, 2): 'have 3, 2 batches in an epoch.*round_up=True', (0, 0): 'no batch', (1, 0): 'no batch', (2, 2): None}


def compare_batches(rank: int, size: int, port: int, out: Path) -> None:
    with member(rank, size, port):
        for counts, said in UNEQUAL.items():
            loop = SimpleNamespace(dataloader=range(counts[rank]))
            with nullcontext() if said is None else pytest.raises(SettingError, match=said) as error:
                require_equal_batches(loop)
            assert said is None or '\n' not in str(error.value)


def test_processes_with_other_numbers_of_batches_are_refused() -> None:
    """Or without any: the first would wait for the others' gradients without end. Each of them says so."""
    spawn(compare_batches, 2, Path())


@pytest.mark.parametrize('kind', ['InfiniteSampler', 'DefaultSampler'])
@pytest.mark.parametrize(('images', 'size'), [(1, 4), (3, 8), (5, 2), (7, 7)])
def test_every_process_has_images(kind: str, images: int, size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are more processes than images, too; by epochs each has equally many."""
    found = []
    for rank in range(size):
        monkeypatch.setattr('mmengine.dataset.sampler.get_dist_info', lambda rank=rank: (rank, size))
        sampler = DATA_SAMPLERS.build(dict(type=kind, dataset=range(images), seed=0))
        found.append(list(islice(sampler, 2 * images)))
    assert all(set(indices) <= set(range(images)) for indices in found)
    ends = kind == 'DefaultSampler'
    assert {len(indices) for indices in found} == {-(-images // size) if ends else 2 * images}
    assert set().union(*found) == set(range(images))


def test_an_epoch_without_a_batch_is_refused_in_one_line(data: Path, tmp_path: Path) -> None:
    """By epochs a training would end at once, with status 0."""
    loader = dict(
        dataset=dict(data_root=f'{data}/'),
        batch_size=10,
        batch_sampler=dict(drop_last=True),
        sampler=dict(type='DefaultSampler'),
    )
    epochs = dict(_delete_=True, type='dino_mm.EpochBasedTrainLoop', max_epochs=2)
    config = write_config(tmp_path / 'config.py', data, [], train_cfg=epochs, train_dataloader=loader)
    settings = {key: value for key, value in (TINY | SMALLER).items() if not key.startswith('train_')}
    tool = Tool(tmp_path / 'out.txt', 'tools/train.py', config, '--work-dir', tmp_path / 'work', *options(settings))
    assert tool.wait(1).strip().splitlines()[-1].startswith('error: The training data have no batch: ')


def test_flexible_runner_is_refused(data: Path, tmp_path: Path) -> None:
    for name in ('FlexibleRunner', 'mmengine.FlexibleRunner'):
        config = write_config(tmp_path / 'config.py', data, [], runner_type=name, strategy=dict(type='FSDPStrategy'))
        with pytest.raises(SystemExit, match=r"^error: `runner_type = 'FlexibleRunner'`.*--amp") as error:
            build_runner(Config.fromfile(config))
        assert '\n' not in str(error.value)


#: How a process is started on each of two machines; the variables are those that clusters set.
STARTS: dict[str, Callable[[str, str], tuple[list[str], dict[str, str]]]] = {
    'torchrun': lambda rank, port: (
        ['tools/dist_train.sh', '{config}', '1'],
        dict(NNODES='2', NODE_RANK=rank, PORT=port, PYTHON=sys.executable),
    ),
    'variables': lambda rank, port: (
        [sys.executable, 'tools/train.py', '{config}', '--launcher', 'pytorch'],
        dict(WORLD_SIZE='2', RANK=rank, LOCAL_RANK='0', MASTER_PORT=port),
    ),
}


@pytest.fixture(scope='module')
def one_machine(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str], dict]:
    """Config and options of a training, and the weights that two processes of one machine come to."""
    folder = tmp_path_factory.mktemp('one')
    config = write_config(folder / 'config.py', make_digits(folder / 'data', num_train=9, num_val=1), [])
    settings = options(TINY | SMALLER | {'train_cfg.max_iters': 4, 'train_cfg.val_interval': 100})
    command = ('tools/dist_train.sh', config, '2', '--work-dir', folder, *settings)
    run(*command, PORT=str(free_port()), **ENV)
    return config, settings, torch.load(folder / 'iter_4.pth', weights_only=True)['state_dict']


@pytest.mark.slow
@pytest.mark.parametrize('start', STARTS)
def test_two_machines_train_as_one(start: str, one_machine: tuple, tmp_path: Path) -> None:
    """With a work directory each, of which the first one's has the checkpoints."""
    config, settings, weights = one_machine
    port, machines = str(free_port()), []
    for rank in ('0', '1'):
        command, variables = STARTS[start](rank, port)
        env = os.environ | dict(MASTER_ADDR='127.0.0.1', **ENV) | variables
        command = [part.format(config=config) for part in command] + ['--work-dir', str(tmp_path / rank), *settings]
        with (tmp_path / f'{rank}.txt').open('w') as log:
            machines.append(subprocess.Popen(command, cwd=ROOT, env=env, stdout=log, stderr=subprocess.STDOUT))
    for rank, machine in enumerate(machines):
        assert machine.wait(timeout=200) == 0, (tmp_path / f'{rank}.txt').read_text()[-3000:]
    found = torch.load(tmp_path / '0' / 'iter_4.pth', weights_only=True)['state_dict']
    for name, tensor in weights.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6, msg=name)
    assert not list((tmp_path / '1').glob('*.pth'))
