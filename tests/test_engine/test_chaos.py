"""Thirty faults strike one training, in processes of its own, and it ends as it should."""

import random
import time
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import torch
from commands import TINY, options
from faults import SMALLER, write_config
from forked import Tool, full_disk, killed_at_change

from dino_mm.checkpoints.files import register_safe_loaders
from dino_mm.datasets.digits import make_digits
from dino_mm.engine.preemption_hook import EXIT_STATUS
from dino_mm.engine.resume import find_resumable
from dino_mm.engine.skip_not_finite_hook import SKIPPED

LENGTH, INTERVAL, KEPT, FAULTS = 200, 4, 3, 30
#: Faults that end a process. After each the training goes on with ``--resume``.
FATAL = ['SIGKILL', 'SIGTERM', 'killed', 'killed at a change', 'full disk', 'disk full once', 'truncated']
#: Faults that the training lives through, in the process that the next fatal one ends.
MILD = ['nan_picture', 'unreadable picture']
#: Bytes: more than a log has, less than a checkpoint.
ROOM = 250_000
SETTINGS = {
    'train_cfg.max_iters': LENGTH,
    'train_cfg.val_interval': 60,
    'default_hooks.checkpoint.interval': INTERVAL,
    'default_hooks.checkpoint.max_keep_ckpts': KEPT,
    'train_dataloader.dataset.on_unreadable': 'skip',
}


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    register_safe_loaders()
    return make_digits(tmp_path_factory.mktemp('digits') / 'data', num_train=9, num_val=1)


@dataclass
class Training:
    """A training in a folder, session by session; each is a process that resumes what the former one left.

    Attributes:
        folder: Holds the config, what was said, and the work directory.
        data: The data set, of which pictures may be damaged for a session.
        chance: Draws faults and their moments.
    """

    folder: Path
    data: Path
    chance: random.Random
    number: int = 0
    said: list[str] = field(default_factory=list)
    damaged: set[Path] = field(default_factory=set)

    @property
    def work(self) -> Path:
        return self.folder / 'work'

    def iteration(self) -> int:
        """What it goes on from."""
        return find_resumable([self.work]).iteration or 0

    def run(
        self, status: int, *hooks: dict, fault: Callable[[], None] | None = None, seconds: float | None = None
    ) -> None:
        """A process that ends with ``status``, killed after some ``seconds``; what it leaves is whole and finite."""
        self.number += 1
        config = write_config(self.folder / 'config.py', self.data, list(hooks))
        settings = options(TINY | SMALLER | SETTINGS)
        command = ('tools/train.py', config, '--work-dir', self.work, '--resume', *settings)
        tool = Tool(self.folder / f'{self.number}.txt', *command, fault=partial(one_thread, fault))
        if seconds is not None:
            time.sleep(seconds)
            tool.kill()
        self.said.append(tool.wait(status))
        self.damaged = {path for path in self.damaged if path.exists() and not zipfile.is_zipfile(path)}
        for path in set(self.work.glob('*.pth')) - self.damaged:  # a session may have written one anew
            assert_whole(path)

    def strike(self, kind: str, mild: list[str]) -> None:
        """A session that a fatal fault ends, with mild ones before."""
        began = self.iteration()
        hooks = [hook('nan_picture', began + self.chance.randint(1, 3)) for one in mild if one == 'nan_picture']
        picture = self.data / 'train' / f'00000{self.chance.randint(1, 8)}.png'
        content = picture.read_bytes()
        if 'unreadable picture' in mild:
            picture.write_bytes(content[: len(content) // 2])
        getattr(self, kind.replace(' ', '_').lower())(began, hooks)
        picture.write_bytes(content)

    def sigkill(self, began: int, hooks: list[dict]) -> None:
        """At the beginning of an iteration: what came since the last checkpoint is lost, no more."""
        last = began + self.chance.randint(1, 14)
        self.run(-9, *hooks, hook('SIGKILL', last))
        assert self.iteration() == max(began, (last - 1) // INTERVAL * INTERVAL)

    def sigterm(self, began: int, hooks: list[dict]) -> None:
        """Nothing is lost."""
        last = began + self.chance.randint(1, 14)
        self.run(EXIT_STATUS, *hooks, hook('SIGTERM', last))
        assert self.iteration() == last

    def killed(self, began: int, hooks: list[dict]) -> None:
        """At any moment: while it starts or while it trains."""
        self.run(-9, *hooks, hook('SIGKILL', began + 11), seconds=self.chance.uniform(0, 4))
        assert began <= self.iteration() <= began + 10

    def killed_at_a_change(self, began: int, hooks: list[dict]) -> None:
        """Of any file in the work directory: logs, checkpoints, the record of who runs there."""
        self.run(-9, *hooks, fault=killed_at_change(self.chance.randint(0, 40), f'{self.work}/'))
        assert self.iteration() >= began

    def full_disk(self, began: int, hooks: list[dict]) -> None:
        """Two checkpoints in a row fail, which ends it."""
        self.run(1, *hooks, fault=full_disk(ROOM))
        assert self.said[-1].strip().splitlines()[-1].startswith('error: ')
        assert self.iteration() == began

    def disk_full_once(self, began: int, hooks: list[dict]) -> None:
        """One checkpoint fails, the next one is written."""
        last = (began // INTERVAL + 2) * INTERVAL + 1
        self.run(-9, *hooks, hook('SIGKILL', last), fault=full_disk(ROOM, writes=1))
        assert self.iteration() == last - 1

    def truncated(self, began: int, hooks: list[dict]) -> None:
        """The newest checkpoint, by a machine that went down: the training goes on from the one before."""
        last = (began // INTERVAL + 2) * INTERVAL
        self.run(-9, *hooks, hook('SIGKILL', last + self.chance.randint(1, INTERVAL)))
        newest = self.work / f'iter_{last}.pth'
        content = newest.read_bytes()
        newest.write_bytes(content[: self.chance.randrange(len(content))])
        self.damaged.add(newest)
        assert self.iteration() == last - INTERVAL


def hook(kind: str, at: int) -> dict:
    return dict(type='FaultHook', kind=kind, at=[at])


def one_thread(fault: Callable[[], None] | None) -> None:
    """So small a model is slower with more; the order of its sums is the same in all processes."""
    torch.set_num_threads(1)
    if fault is not None:
        fault()


def assert_whole(path: Path) -> None:
    assert zipfile.ZipFile(path).testzip() is None, path
    content = torch.load(path, weights_only=True)
    assert content['meta']['iter'] == int(path.stem.removeprefix('iter_'))
    for name, tensor in content['state_dict'].items():
        assert tensor.isfinite().all(), f'{path}: {name}'


def draw(seed: int, kinds: list[str]) -> list[str]:
    """``FAULTS`` kinds; a fatal one is the last, and each is among them."""
    chance = random.Random(seed)
    drawn = kinds + chance.choices(kinds, k=FAULTS - len(kinds) - 1)
    chance.shuffle(drawn)
    return [*drawn, 'SIGKILL']


@pytest.fixture(scope='module')
def undisturbed(data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, torch.Tensor]:
    """Weights of the training that nothing befalls."""
    training = Training(tmp_path_factory.mktemp('undisturbed'), data, random.Random(0))
    training.run(0)
    return torch.load(training.work / f'iter_{LENGTH}.pth', weights_only=True)['state_dict']


@pytest.mark.slow
@pytest.mark.parametrize(('seed', 'kinds'), [(11, FATAL + MILD), (12, FATAL)], ids=['all faults', 'faults that end it'])
def test_thirty_faults_change_nothing(seed: int, kinds: list[str], data: Path, tmp_path: Path, request) -> None:
    """Neither the number of iterations nor, without those that take a batch away, the weights."""
    training = Training(tmp_path, data, random.Random(seed))
    mild: list[str] = []
    for kind in draw(seed, kinds):
        if kind in MILD:
            mild.append(kind)
            continue
        training.strike(kind, mild)
        mild = []
    assert training.iteration() < LENGTH
    training.run(0)
    last = torch.load(training.work / f'iter_{LENGTH}.pth', weights_only=True)
    skipped = last['message_hub']['runtime_info'].get(SKIPPED, 0)
    assert {int(state['step']) for state in last['optimizer']['state'].values()} == {LENGTH - skipped}
    assert f'iter_{LENGTH + 1}' not in ''.join(training.said)
    said = '\n'.join(training.said)
    if kinds != FATAL:
        assert 'the step is skipped' in said
        assert 'is skipped, another takes its place' in said
        return
    assert skipped == 0
    for name, tensor in request.getfixturevalue('undisturbed').items():
        torch.testing.assert_close(last['state_dict'][name], tensor, rtol=0, atol=1e-6, msg=name)
