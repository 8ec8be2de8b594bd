"""Training loops that go on after a stop as if there had been none.

Whatever is drawn at random in training is drawn from a place of its own, which four things determine: the runner's
seed, the process, what the draw is for, and the iteration. mmengine's checkpoints hold seed and iteration, so nothing
has to be gathered and nothing replayed: a resumed training finds its place in every process and in every worker of a
data loader, however many workers there are. The order of the images is gone through up to that place by numbers alone;
no image is opened for it.

What no loop can promise: another number of processes or another batch size deals out the images differently; some
kernels of GPUs add in an order of their own; gradients that an ``accumulative_counts`` has summed up are in no
checkpoint, nor are the images that a transform such as ``CachedMosaic`` remembers. A transform must draw from Python's,
numpy's or torch's global generator.
"""

import random
from collections.abc import Iterator
from enum import IntEnum
from functools import partial
from itertools import count, islice
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.dist import all_gather_object
from mmengine.registry import DATA_SAMPLERS
from mmengine.runner import EpochBasedTrainLoop as EpochBasedLoop
from mmengine.runner import IterBasedTrainLoop as IterBasedLoop
from mmengine.runner import Runner
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset

from dino_mm.registry import LOOPS

from ..settings import SettingError

#: What a new data loader takes over from another one; older torch has no ``in_order``.
LOADER_OPTIONS = (
    *('dataset', 'num_workers', 'collate_fn', 'pin_memory', 'timeout', 'worker_init_fn', 'multiprocessing_context'),
    *('generator', 'prefetch_factor', 'persistent_workers', 'pin_memory_device', 'in_order'),
)
#: The message hub's entry, which checkpoints hold: an epoch and the iteration that it began with.
EPOCH_BEGAN = 'dino_mm_epoch_began'
NO_BATCH = (
    'The training data have no batch: `train_dataloader.dataset` is empty, or smaller than a batch that must be full. '
    'Check its `ann_file` and `filter_cfg`, and `drop_last`.'
)


class Purpose(IntEnum):
    """What random numbers are drawn for."""

    ORDER = 0
    DATA = 1
    MODEL = 2


class Source(NamedTuple):
    """Where a process takes its random numbers from.

    Attributes:
        seed: The same in all processes, at least 0.
        rank: Number of the process.
    """

    seed: int
    rank: int

    def restart(self, purpose: Purpose, iteration: int) -> None:
        """Seed the global generators of Python, numpy and torch; those of the devices for the model alone."""
        sequence = np.random.SeedSequence(self.seed, spawn_key=(self.rank, purpose, iteration))
        words = sequence.generate_state(4, np.uint64)
        random.seed(int(words[0]))
        np.random.seed(words[1:3].view(np.uint32))
        # A worker must not touch devices, not even to note a seed for later.
        seed_torch = torch.manual_seed if purpose is Purpose.MODEL else torch.default_generator.manual_seed
        seed_torch(int(words[3]))


class Batch(list):
    """Indices of a batch that knows its iteration, in a worker too.

    Args:
        indices: Of the data set.
        source: Of what is drawn to make the batch.
        iteration: The one that the batch is for.
    """

    def __init__(self, indices: list[int], source: Source, iteration: int) -> None:
        super().__init__(indices)
        self.source = source
        self.iteration = iteration


def fetch(dataset: Dataset, batch: list[int]) -> list:
    """Samples of a batch; a :class:`Batch` draws them as its iteration has it."""
    if isinstance(batch, Batch):
        batch.source.restart(Purpose.DATA, batch.iteration)
    own = getattr(type(dataset), '__getitems__', None)
    return [dataset[index] for index in batch] if own is None else own(dataset, batch)


class NumberedBatches:
    """A batch sampler that numbers another one's batches, from any of them on.

    Without :meth:`start` it yields just what the other one yields.

    Args:
        batch_sampler: The other one, which may be replaced until the batches are asked for.
    """

    def __init__(self, batch_sampler: Any) -> None:
        self.batch_sampler = batch_sampler
        self._started: dict | None = None

    @property
    def sampler(self) -> Any:
        """The sampler within, where hooks set the epoch."""
        return self.batch_sampler.sampler

    def __len__(self) -> int:
        return len(self.batch_sampler)

    def __iter__(self) -> Iterator[list[int]]:
        # Runs when the first batch is asked for: torch's loaders make two iterators and use one.
        started, self._started = self._started, None
        yield from self.batch_sampler if started is None else self._numbered(**started)

    def start(self, source: Source, iteration: int, skip: int, endless: bool = False) -> None:
        """Say where the next pass begins.

        Args:
            source: Of the random numbers.
            iteration: The one that the first batch is for.
            skip: Number of batches that are left out at the beginning.
            endless: Begin another pass after each.
        """
        self._started = dict(source=source, iteration=iteration, skip=skip, endless=endless)

    def _numbered(self, source: Source, iteration: int, skip: int, endless: bool) -> Iterator[Batch]:
        number = iteration - skip
        for done in count() if endless else (0,):
            if done and hasattr(self.sampler, 'set_epoch'):
                self.sampler.set_epoch(done)
            first, batches = number, iter(self.batch_sampler)
            while True:
                source.restart(Purpose.ORDER, number)  # for samplers that draw as they go
                indices = next(batches, None)
                if indices is None:
                    break
                if number >= iteration:
                    yield Batch(indices, source, number)
                number += 1
            if endless and number == first:
                raise SettingError(NO_BATCH)


def require_epochs_that_end(loop: EpochBasedLoop) -> None:
    """Check that the sampler of a loop by epochs comes to an end.

    Raises:
        SettingError: It does not, and names the settings to change.
    """
    sampler = loop.dataloader.batch_sampler.sampler
    if next(islice(sampler, len(sampler), None), None) is None:
        return
    raise SettingError(
        f'`train_cfg` trains by epochs (`max_epochs={loop.max_epochs}`), but `train_dataloader.sampler`, '
        f'{type(sampler).__name__}, never ends, so neither does an epoch. Either take a sampler that ends: '
        "`train_dataloader.sampler=dict(type='DefaultSampler', shuffle=True)`; or train by iterations: "
        "`train_cfg=dict(_delete_=True, type='dino_mm.IterBasedTrainLoop', max_iters=...)`."
    )


def require_equal_batches(loop: EpochBasedLoop) -> None:
    """Check that an epoch has batches, and equally many in each process: all must meet in each step.

    Raises:
        SettingError: There is none, or the numbers differ; names the settings to change.
    """
    counts = all_gather_object(len(loop.dataloader))
    if not all(counts):
        raise SettingError(NO_BATCH)
    if len(set(counts)) > 1:
        raise SettingError(
            f'The processes have {", ".join(map(str, counts))} batches in an epoch, so one would wait for the others '
            'without end. Set `train_dataloader.sampler.round_up=True`, or take a sampler that gives each process as '
            'many images.'
        )


class FromHere:
    """Batches, for a loop that first passes over those that were trained on, and need not be fetched.

    Args:
        batches: From the present iteration on.
        trained: Number of those before it. mmengine's ``run`` asks for each of them and drops it; that of the forks
            calls :meth:`skip_iter`.
    """

    def __init__(self, batches: Iterator[Any], trained: int) -> None:
        self._batches = batches
        self._trained = trained

    def __iter__(self) -> 'FromHere':
        return self

    def __next__(self) -> Any:
        if self._trained:
            self._trained -= 1
            return None
        return next(self._batches)

    def skip_iter(self, num_iters: int) -> None:
        """Pass over ``num_iters`` batches that were trained on."""
        self._trained -= num_iters


class _Exact:
    """What both loops share; comes before mmengine's loop among the bases."""

    runner: Runner
    dataloader: DataLoader

    def _number(self, runner: Runner, dataloader: DataLoader | dict) -> DataLoader:
        """The data loader of ``train_dataloader``, with numbered batches; nothing is fetched yet."""
        self._settings = dataloader
        loader = runner.build_dataloader(dataloader, seed=_shared_seed(runner))
        if loader.batch_sampler is None or isinstance(loader.dataset, IterableDataset):
            raise TypeError(
                f'dino_mm.{type(self).__name__} needs batches of indices, and `train_dataloader` has none: it has '
                f"an IterableDataset or no batch size. mmengine's `train_cfg.type='{type(self).__name__}'` takes it, "
                'but does not resume exactly.'
            )
        loader.dataset.__getitems__ = partial(fetch, loader.dataset)
        options = {name: getattr(loader, name) for name in LOADER_OPTIONS if hasattr(loader, name)}
        return DataLoader(batch_sampler=NumberedBatches(loader.batch_sampler), **options)

    def _begin(self) -> None:
        """With everything loaded: take the seed, which may be the checkpoint's, and order the images by it."""
        self._source = Source(_shared_seed(self.runner), self.runner.rank)
        if not isinstance(self._settings, dict) or not isinstance(self._settings['sampler'], dict):
            return  # the sampler is the user's own object
        sampler = DATA_SAMPLERS.build(
            self._settings['sampler'], default_args=dict(dataset=self.dataloader.dataset, seed=self._source.seed)
        )
        settings, size = self._settings.get('batch_sampler'), self._settings.get('batch_size', 1)
        self._batches.batch_sampler = (
            BatchSampler(sampler, size, self._settings.get('drop_last', False))
            if settings is None
            else DATA_SAMPLERS.build(settings, default_args=dict(sampler=sampler, batch_size=size))
        )

    @property
    def _batches(self) -> NumberedBatches:
        return self.dataloader.batch_sampler  # type: ignore[return-value]


@LOOPS.register_module()
class IterBasedTrainLoop(_Exact, IterBasedLoop):
    """mmengine's loop by iterations; resuming is exact and opens no image that was trained on.

    A sampler that ends starts again without its workers being started anew.

    Args:
        runner: The runner.
        dataloader: ``train_dataloader``.
        options: mmengine's: ``max_iters``, ``val_begin``, ``val_interval``, ``dynamic_intervals``.
    """

    def __init__(self, runner: Runner, dataloader: DataLoader | dict, **options: Any) -> None:
        loader = self._number(runner, dataloader)
        # mmengine's constructor starts the workers of what it gets, before there is a checkpoint's iteration.
        super().__init__(runner, DataLoader(loader.dataset), **options)
        self.dataloader = loader

    def run(self) -> nn.Module:
        """Train."""
        self._begin()
        is_passed_over = not getattr(self, 'fast_forward_on_resume', False)  # of the forks' mmengine
        self.dataloader_iterator = FromHere(self._from_here(), self._iter if is_passed_over else 0)
        return super().run()

    def _from_here(self) -> Iterator[Any]:
        self._batches.start(self._source, self._iter, skip=self._iter, endless=True)
        yield from self.dataloader

    def run_iter(self, data_batch: Any) -> None:
        """Train on a batch."""
        self._source.restart(Purpose.MODEL, self._iter)
        super().run_iter(data_batch)


@LOOPS.register_module()
class EpochBasedTrainLoop(_Exact, EpochBasedLoop):
    """mmengine's loop by epochs; resuming is exact, within an epoch too.

    Args:
        runner: The runner.
        dataloader: ``train_dataloader``, with a sampler that ends.
        options: mmengine's: ``max_epochs``, ``val_begin``, ``val_interval``, ``dynamic_intervals``.

    Raises:
        SettingError: The sampler does not end.
    """

    def __init__(self, runner: Runner, dataloader: DataLoader | dict, **options: Any) -> None:
        super().__init__(runner, self._number(runner, dataloader), **options)
        require_epochs_that_end(self)
        self._skip = 0

    def run(self) -> nn.Module:
        """Train."""
        self._begin()
        self._skip = self._trained_of_epoch()
        return super().run()

    def run_epoch(self) -> None:
        """Train an epoch, or what is left of it."""
        self.runner.message_hub.update_info(EPOCH_BEGAN, [self._epoch, self._iter - self._skip])
        self._batches.start(self._source, self._iter, skip=self._skip)
        super().run_epoch()
        self._skip = 0

    def run_iter(self, idx: int, data_batch: Any) -> None:
        """Train on a batch; ``idx`` counts from 0 where this run entered the epoch."""
        self._source.restart(Purpose.MODEL, self._iter)
        super().run_iter(self._skip + idx, data_batch)

    def _trained_of_epoch(self) -> int:
        """Batches of the present epoch that were trained on: some if the checkpoint was written within an epoch."""
        # An epoch may have a batch less than its data loader's length, so the length does not tell.
        epoch, began = self.runner.message_hub.runtime_info.get(EPOCH_BEGAN, (None, 0))
        if epoch == self._epoch:
            return max(self._iter - began, 0)
        length = len(self.dataloader)
        trained = self._iter - self._epoch * length
        # Another loop's checkpoint; outside of the epoch if data, batch size or processes have changed since.
        return trained if epoch is None and 0 <= trained < length else 0


def _shared_seed(runner: Runner) -> int:
    """The runner's seed, without what ``randomness.diff_rank_seed`` adds to it."""
    return runner.seed - runner.rank if runner._randomness_cfg.get('diff_rank_seed', False) else runner.seed
