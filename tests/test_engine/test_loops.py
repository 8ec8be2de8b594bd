"""Loops: a resumed training is the one that was never stopped, draw by draw; epochs end."""

import itertools
import pickle
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import mmengine.runner.runner
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from commands import ROOT, TINY, options, python, run, scalars
from mmengine.config import Config
from mmengine.dataset import BaseDataset, pseudo_collate
from mmengine.model import BaseModel
from mmengine.registry import DATASETS
from mmengine.runner import Runner
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, SequentialSampler

import dino_mm
from dino_mm.datasets.digits import make_digits
from dino_mm.engine.loops import Batch, FromHere, NumberedBatches, Purpose, Source

NAMES = itertools.count()


def draw() -> tuple[float, ...]:
    """A number from each global generator."""
    return random.random(), float(np.random.rand()), float(torch.rand(()))


class Pictures(BaseDataset):
    """Pictures, some wide, some high, with random augmentation; every one that is opened is noted in a file."""

    METAINFO = dict(classes=('a',))

    def __init__(self, opened: Path, number: int = 11, **more) -> None:
        self.opened, self.number = opened, number
        super().__init__(**more)

    def load_data_list(self) -> list[dict]:
        return [dict(img_id=i, width=1 + i % 3, height=2) for i in range(self.number)]

    def prepare_data(self, idx: int) -> dict:
        info = self.get_data_info(idx)
        with self.opened.open('a') as file:
            file.write(f'{info["img_id"]}\n')
        return dict(img_id=info['img_id'], drawn=torch.tensor(draw()))


class Model(BaseModel):
    """Notes what it is trained on and draws, and learns something of it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(3))
        self.seen: list[tuple] = []

    def forward(self, img_id: list[int], drawn: list[Tensor], mode: str) -> dict[str, Tensor]:
        noise = draw()
        self.seen.append((img_id, [one.tolist() for one in drawn], noise))
        return dict(loss=(self.weight * (sum(drawn) - torch.tensor(noise))).square().sum())

    def ids(self) -> list[int]:
        return [i for ids, _, _ in self.seen for i in ids]


LENGTH = 11
BY_ITERATIONS = dict(type='dino_mm.IterBasedTrainLoop', max_iters=13)
BY_EPOCHS = dict(type='dino_mm.EpochBasedTrainLoop', max_epochs=3)
ASPECT = dict(type='mmdet.AspectRatioBatchSampler')
INFINITE, FINITE = dict(type='InfiniteSampler', shuffle=True), dict(type='DefaultSampler', shuffle=True)
MULTI_SOURCE = dict(type='mmdet.MultiSourceSampler', batch_size=2, source_ratio=[1, 1])
WORKERS = dict(num_workers=2, persistent_workers=True)


def twice(dataset: dict) -> dict:
    return dict(type='RepeatDataset', times=1, dataset=dict(type='ConcatDataset', datasets=[dataset, dataset]))


def torchs(dataset: dict) -> DataLoader:
    return DataLoader(DATASETS.build(dataset), batch_size=2, shuffle=True, collate_fn=pseudo_collate)


CASES = {
    'iterations': (BY_ITERATIONS, dict(sampler=INFINITE)),
    'iterations-aspect-workers': (BY_ITERATIONS, dict(sampler=INFINITE, batch_sampler=ASPECT, **WORKERS)),
    'iterations-finite': (BY_ITERATIONS, dict(sampler=FINITE, batch_sampler=ASPECT)),
    'iterations-finite-workers': (BY_ITERATIONS, dict(sampler=FINITE, drop_last=True, **WORKERS)),
    'iterations-within': (BY_ITERATIONS, dict(sampler=INFINITE, batch_sampler=ASPECT, dataset=twice)),
    # A data loader that is no config, and whose sampler draws from torch's global generator.
    'iterations-torch': (BY_ITERATIONS, torchs),
    'epochs': (BY_EPOCHS, dict(sampler=FINITE)),
    'epochs-workers': (BY_EPOCHS, dict(sampler=FINITE, batch_sampler=ASPECT, **WORKERS)),
    'epochs-new-workers': (BY_EPOCHS, dict(sampler=FINITE, num_workers=1)),
    # Three of the pictures are high, five are wide, so that there is a batch less than the loader's length says.
    'epochs-dropped': (BY_EPOCHS, dict(sampler=FINITE, batch_sampler=dict(ASPECT, drop_last=True), number=8)),
    'epochs-part': (BY_EPOCHS, dict(sampler=FINITE, num_batch_per_epoch=3)),
    'epochs-torch': (BY_EPOCHS, torchs),
}
PLACES = {'iterations': ('iter_1', 'iter_6', 'iter_8'), 'epochs': ('iter_2', 'iter_6', 'iter_7', 'epoch_1', 'epoch_2')}


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """One thread, as much is small; no look at compilers and drivers for the log of each run."""
    monkeypatch.setattr('mmengine.runner.runner.collect_env', dict)
    monkeypatch.setenv('OMP_NUM_THREADS', '1')
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(2)


def make_runner(work_dir: Path, loop: dict, loader: object, checkpoint: Path | None = None, **more) -> Runner:
    """A runner that writes a checkpoint after every iteration and epoch, and notes opened pictures in its folder."""
    work_dir.mkdir(exist_ok=True)
    dataset = dict(type=Pictures, opened=work_dir / 'opened')
    if callable(loader):
        loader = loader(dataset)
    else:
        loader = dict(batch_size=2, num_workers=0) | loader
        dataset |= dict(number=loader.pop('number', LENGTH))
        loader['dataset'] = loader.get('dataset', dict)(dataset)
    hooks = [dict(type='CheckpointHook', by_epoch=True, interval=1)] if loop['type'] == BY_EPOCHS['type'] else []
    saving = dict(type='CheckpointHook', by_epoch=False, interval=1)
    settings = dict(default_scope='mmengine', custom_hooks=hooks, default_hooks=dict(checkpoint=saving)) | more
    return Runner(
        model=Model(),
        work_dir=str(work_dir),
        train_dataloader=loader,
        train_cfg=loop,
        optim_wrapper=dict(optimizer=dict(type='AdamW', lr=0.1)),
        load_from=None if checkpoint is None else str(checkpoint),
        resume=checkpoint is not None,
        experiment_name=f'loops{next(NAMES)}',
        log_level='ERROR',
        **settings,
    )


def train(*args, **more) -> Model:
    runner = make_runner(*args, **more)
    runner.train()
    if (workers := runner.train_dataloader._iterator) is not None:
        workers._shutdown_workers()  # the garbage collector waits five seconds for each
    return runner.model


def opened(work_dir: Path) -> list[int]:
    """Pictures that were opened, in order."""
    path = work_dir / 'opened'
    return [int(line) for line in path.read_text().split()] if path.exists() else []


@pytest.mark.parametrize('case', CASES)
def test_resumed_draws_what_straight_training_draws(case: str, tmp_path: Path) -> None:
    """Pictures, augmentation, noise, and so weights, from wherever a checkpoint was written; no seed is configured."""
    loop, loader = CASES[case]
    straight = train(tmp_path / 'straight', loop, loader)
    assert len({noise for *_, noise in straight.seen}) == len(straight.seen)
    assert len({tuple(one) for _, drawn, _ in straight.seen for one in drawn}) == len(straight.ids())
    for place in PLACES[case.split('-')[0]]:
        checkpoint, folder = tmp_path / 'straight' / f'{place}.pth', tmp_path / place
        resumed = train(folder, loop, loader, checkpoint=checkpoint)
        done = torch.load(checkpoint, weights_only=True)['meta']['iter']
        assert resumed.seen == straight.seen[done:], place
        assert torch.equal(resumed.weight, straight.weight), place
        if isinstance(loader, dict) and loader.get('num_workers'):
            assert len(opened(folder)) <= len(resumed.ids()) + 2 * 4  # what two workers prefetch
            loader = loader | dict(num_workers=0, persistent_workers=False)  # their number does not matter
        else:
            assert opened(folder) == resumed.ids()  # none for nothing


@pytest.mark.parametrize('place', [4, 6, 9])
def test_each_picture_once_an_epoch(place: int, tmp_path: Path) -> None:
    loop, loader = CASES['epochs']
    straight = train(tmp_path / 'straight', loop, loader)
    resumed = train(tmp_path / 'on', loop, loader, checkpoint=tmp_path / f'straight/iter_{place}.pth')
    batches = [ids for ids, *_ in straight.seen[:place] + resumed.seen]
    epochs = [list(itertools.chain(*batches[i : i + 6])) for i in range(0, len(batches), 6)]
    assert [sorted(ids) for ids in epochs] == [list(range(LENGTH))] * 3
    assert epochs[0] != epochs[1] != epochs[2]


@pytest.mark.parametrize('place', ['iter_4', 'epoch_1', 'iter_9'])
def test_pictures_go_on_after_mmengines_loop(place: str, tmp_path: Path) -> None:
    """Its checkpoints do not say with which iteration the epoch began."""
    loader, saving = dict(sampler=FINITE), [dict(type='CheckpointHook', by_epoch=True, interval=1)]
    before = train(tmp_path / 'old', BY_EPOCHS | dict(type='EpochBasedTrainLoop'), loader, custom_hooks=saving)
    checkpoint = tmp_path / 'old' / f'{place}.pth'
    after = train(tmp_path / 'new', BY_EPOCHS, loader, checkpoint=checkpoint)
    assert [ids for ids, *_ in after.seen] == [ids for ids, *_ in before.seen[-len(after.seen) :]]
    assert len(after.seen) == 18 - torch.load(checkpoint, weights_only=True)['meta']['iter']


def test_a_loop_opens_nothing_before_it_runs(tmp_path: Path) -> None:
    """Neither pictures nor workers, for where to begin is known with the checkpoint alone."""
    for case in ('iterations-aspect-workers', 'epochs-workers'):
        runner = make_runner(tmp_path / case, *CASES[case])
        assert runner.train_dataloader.dataset.metainfo['classes'] == ('a',)
        assert isinstance(runner.train_dataloader, DataLoader)
        assert runner.train_dataloader._iterator is None
        assert not mp.active_children()
        assert opened(tmp_path / case) == []


class Stream(IterableDataset):
    def __iter__(self) -> None: ...


@pytest.mark.parametrize(
    ('loader', 'error', 'words'),
    [
        (
            dict(sampler=FINITE, batch_size=12, drop_last=True),
            ValueError,
            r'The training data have no batch.*`drop_last`',
        ),
        (lambda _: DataLoader(Stream()), TypeError, r"IterableDataset.*`train_cfg.type='IterBasedTrainLoop'`"),
    ],
    ids=['no batch', 'no indices'],
)
def test_data_that_cannot_be_trained_on(loader: object, error: type, words: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=words):
        train(tmp_path, BY_ITERATIONS, loader)


@pytest.mark.parametrize('type_', ['dino_mm.EpochBasedTrainLoop', 'EpochBasedTrainLoop'])
@pytest.mark.parametrize(
    'sampler',
    [INFINITE, dict(type='mmdet.MultiSourceSampler', batch_size=2, source_ratio=[1, 1])],
    ids=lambda s: s['type'],
)
def test_epochs_that_never_end_are_refused(type_: str, sampler: dict, tmp_path: Path) -> None:
    loader = dict(sampler=sampler, dataset=lambda dataset: twice(dataset)['dataset'])
    words = r"max_epochs=2.*`train_dataloader.sampler=dict\(type='DefaultSampler', shuffle=True\)`"
    with pytest.raises(ValueError, match=words):
        train(tmp_path, dict(type=type_, max_epochs=2), loader, custom_hooks=[dict(type='dino_mm.CheckRunHook')])


def test_places_have_draws_of_their_own() -> None:
    """Seed, process, purpose and iteration each make another place; a place is the same in any order."""
    places = list(itertools.product((0, 1, 2**31), (0, 1, 7), Purpose, (0, 1, 375000)))
    draws = []
    for seed, rank, *place in places + places[::-1]:
        Source(seed, rank).restart(*place)
        draws.append(draw())
    assert draws == draws[::-1]
    for numbers in zip(*draws, strict=True):
        assert len(set(numbers)) == len(places)


def test_batches_and_data_set_reach_spawned_workers(tmp_path: Path) -> None:
    """Both are pickled there."""
    runner = make_runner(tmp_path, *CASES['iterations'])
    dataset, batch = pickle.loads(pickle.dumps((runner.train_dataloader.dataset, Batch([3, 1], Source(5, 1), 8))))
    assert (batch, batch.source, batch.iteration) == ([3, 1], (5, 1), 8)
    samples = [dataset.__getitems__(batch) for _ in range(2)]
    assert [sample['img_id'] for sample in samples[0]] == [3, 1]
    assert torch.equal(samples[0][1]['drawn'], samples[1][1]['drawn'])
    assert not torch.equal(samples[0][0]['drawn'], samples[0][1]['drawn'])


def ask_for_each(batches: FromHere) -> None:
    assert [next(batches) for _ in range(3)] == [None] * 3


@pytest.mark.parametrize('way', [ask_for_each, lambda batches: batches.skip_iter(3)], ids=['mmengine', 'forks'])
def test_what_was_trained_on_is_passed_over_and_never_fetched(way: Callable[[FromHere], None]) -> None:
    fetched = []
    batches = FromHere((fetched.append(number) or number for number in range(3, 6)), trained=3)
    way(batches)
    assert fetched == []
    assert list(batches) == [3, 4, 5]


def test_batches_that_were_not_started_are_those_within() -> None:
    """For whoever else goes through the data loader."""
    batches = NumberedBatches(BatchSampler(SequentialSampler(range(5)), 2, False))
    batches.start(Source(0, 0), iteration=7, skip=1)
    numbered = list(batches)
    assert numbered == [[2, 3], [4]]
    assert [batch.iteration for batch in numbered] == [7, 8]
    assert list(batches) == [[0, 1], [2, 3], [4]]


def run_rank(rank: int, folder: Path) -> None:
    torch.set_num_threads(1)
    mmengine.runner.runner.collect_env = dict
    dist.init_process_group('gloo', init_method=f'file://{folder}/meeting', rank=rank, world_size=2)
    out = {}
    for case, diff in (('epochs', False), ('iterations', True)):
        more = dict(randomness=dict(seed=None, diff_rank_seed=diff))
        straight = train(folder / case, *CASES[case], **more)
        dist.barrier()
        resumed = train(folder / f'{case}on', *CASES[case], checkpoint=folder / case / 'iter_4.pth', **more)
        out[case] = (straight.seen, resumed.seen)
    torch.save(out, folder / f'{rank}.pth')
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.slow
def test_each_of_two_processes_goes_on_where_it_was(tmp_path: Path) -> None:
    """Also with seeds that mmengine makes differ; together they deal out each picture once, and draw differently."""
    mp.spawn(run_rank, (tmp_path,), nprocs=2)
    ranks = [torch.load(tmp_path / f'{rank}.pth') for rank in range(2)]
    for case in ('epochs', 'iterations'):
        (first, first_on), (second, second_on) = (rank[case] for rank in ranks)
        assert (first_on, second_on) == (first[4:], second[4:])
        assert not {noise for *_, noise in first} & {noise for *_, noise in second}
        together = [i for ids, *_ in first[:3] + second[:3] for i in ids]
        assert set(together) == set(range(LENGTH))
        assert len(together) == LENGTH + 1  # the twelfth is of the next round


# Digits with augmentation, dropout and no seed.
CONFIG = """
_base_ = '{base}'
model = dict(encoder=dict(dropout=0.1), decoder=dict(dropout=0.1))
pipeline = [
    dict(type='LoadImageFromFile', imdecode_backend='pillow'),
    dict(type='LoadAnnotations', with_bbox=True),
    dict(type='RandomFlip', prob=0.5),
    dict(type='RandomChoiceResize', scales=[(48, 48), (64, 64)], keep_ratio=True),
    dict(type='PackDetInputs'),
]
train_dataloader = dict(num_workers=2, persistent_workers=True, dataset=dict(data_root='{data}/', pipeline=pipeline))
randomness = dict(seed=None)
val_cfg = val_dataloader = val_evaluator = None
"""
SETTINGS = {key: value for key, value in TINY.items() if not key.startswith('train_cfg')}
BY_EPOCH = 'dino-resnet/by_epoch/dino_r50_4scale_12ep_by_epoch.py'


@pytest.fixture(scope='module')
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp('digits')
    data = make_digits(folder / 'data', num_train=9, num_val=2)
    (folder / 'config.py').write_text(CONFIG.format(base=dino_mm.cfg('dino-demo/dino_digits.py'), data=data))
    return folder / 'config.py'


def train_here(config: Path, work_dir: Path, checkpoint: Path | None = None, **settings) -> Runner:
    cfg = Config.fromfile(config)
    cfg.merge_from_dict(SETTINGS | {'model.neck.in_channels': [8, 16, 32]} | settings)
    cfg.update(work_dir=str(work_dir), experiment_name=f'loops{next(NAMES)}')
    cfg.update(resume=checkpoint is not None, load_from=checkpoint and str(checkpoint))
    runner = Runner.from_cfg(cfg)
    runner.train()
    runner.train_dataloader._iterator._shutdown_workers()
    return runner


def assert_same_weights(first: Path, second: Path) -> None:
    states = [torch.load(path, weights_only=True)['state_dict'] for path in (first, second)]
    assert states[0].keys() == states[1].keys()
    for name, tensor in states[0].items():
        torch.testing.assert_close(states[1][name], tensor, rtol=0, atol=1e-6, msg=name)


def kill_after(checkpoint: Path, *command: str | Path) -> None:
    """Start a training, and kill it as soon as a checkpoint is there."""
    process = subprocess.Popen([sys.executable, *command], cwd=ROOT, stderr=subprocess.DEVNULL)
    note = checkpoint.parent / 'last_checkpoint'  # written after the checkpoint
    while process.poll() is None and not (note.exists() and note.read_text()):
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert note.parent / note.read_text() == checkpoint


@pytest.mark.slow
def test_a_killed_training_goes_on_as_if_nothing_had_happened(config: Path, tmp_path: Path) -> None:
    killed, straight = tmp_path / 'killed', tmp_path / 'straight'
    length = {'train_cfg.max_iters': 20, 'default_hooks.checkpoint.interval': 10}
    command = ('tools/train.py', config, '--work-dir', killed, *options(SETTINGS | length))
    kill_after(killed / 'iter_10.pth', *command)
    seed = torch.load(killed / 'iter_10.pth', weights_only=True)['meta']['seed']
    python(*command, '--resume', OMP_NUM_THREADS='1')
    assert [line['step'] for line in scalars(killed) if 'loss' in line] == list(range(11, 21))
    train_here(config, straight, **length, randomness=dict(seed=seed))
    for name in ('iter_10.pth', 'iter_20.pth'):
        assert_same_weights(killed / name, straight / name)


@pytest.mark.slow
def test_distributed_training_goes_on_as_if_nothing_had_happened(config: Path, tmp_path: Path) -> None:
    settings = options(SETTINGS | {'train_cfg.max_iters': 8, 'default_hooks.checkpoint.interval': 4})
    for name, more in (('straight', []), ('on', ['--resume', tmp_path / 'straight/iter_4.pth'])):
        command = ('tools/dist_train.sh', config, '2', '--work-dir', tmp_path / name, *more, *settings)
        run(*command, PORT='29619', OMP_NUM_THREADS='1')
    assert_same_weights(tmp_path / 'straight/iter_8.pth', tmp_path / 'on/iter_8.pth')


def test_the_lines_by_epochs_go_over_any_config(config: Path, tmp_path: Path) -> None:
    """Three epochs of digits, which end, and resume from the second."""
    lines = [line for line in Path(dino_mm.cfg(BY_EPOCH)).read_text().splitlines() if line and line[0] != '#']
    assert lines.pop(0).startswith('_base_ = ')
    assert len(lines) <= 10
    (tmp_path / 'epochs.py').write_text('\n'.join([f'_base_ = {str(config)!r}', *lines]))
    settings = {'train_cfg.max_epochs': 3, 'param_scheduler.0.milestones': [1], 'default_hooks.checkpoint.interval': 1}
    for name, checkpoint in (('straight', None), ('on', tmp_path / 'straight/epoch_2.pth')):
        runner = train_here(tmp_path / 'epochs.py', tmp_path / name, checkpoint, **settings)
        assert (runner.epoch, runner.iter) == (3, 3 * 5)
        assert runner.optim_wrapper.get_lr()['lr'] == [pytest.approx(1.5e-4)] * 2
    assert_same_weights(tmp_path / 'straight/epoch_3.pth', tmp_path / 'on/epoch_3.pth')
