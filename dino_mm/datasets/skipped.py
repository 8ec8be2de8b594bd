"""Pictures of a training that cannot be read: counted over all workers of a process, and no more than a few."""

import logging

import torch
from mmengine.logging import print_log
from torch.utils.data import get_worker_info

from .coco_rules import Id

#: Share of the pictures read that may be skipped, of no fewer than so many.
MAX_SHARE, MIN_READ = 0.01, 1000
#: Rows of the counts: each worker has its own, so that none waits for another.
MAX_WORKERS = 256


class TooManyUnreadableError(RuntimeError):
    """More than 1 % of the pictures cannot be read: the storage or the data set is at fault, not a picture."""


class SkippedPictures:
    """Counts of a process and of its workers, which share memory.

    Args:
        length: Images of the data set.
    """

    def __init__(self, length: int) -> None:
        self._counts = torch.zeros(MAX_WORKERS, 2, dtype=torch.int64).share_memory_()
        self._named = torch.zeros(length, dtype=torch.bool).share_memory_()

    @property
    def read(self) -> int:
        """Pictures that were asked for so far."""
        return int(self._counts[:, 0].sum())

    @property
    def skipped(self) -> int:
        """Those of them that could not be read."""
        return int(self._counts[:, 1].sum())

    def count_read(self) -> None:
        """Count a picture that was read."""
        self._own[0].add_(1)

    def skip(self, index: int, img_id: Id, error: OSError) -> None:
        """Count and name a picture that cannot be read.

        Args:
            index: Its place in the data set.
            img_id: Its image.
            error: What reading it raised; names the file.

        Raises:
            TooManyUnreadableError: There are too many of them.
        """
        self._own.add_(1)
        read, skipped = self.read, self.skipped
        if not self._named[index]:
            self._named[index] = True
            # At a level that other processes than the first print, too.
            print_log(
                f'Image id {img_id} is skipped, another takes its place ({skipped} of {read} so far). {error}',
                logger='current',
                level=logging.ERROR,
            )
        if skipped > MAX_SHARE * max(read, MIN_READ):
            raise TooManyUnreadableError(
                f'{skipped} of {read} pictures could not be read, the last one of image id {img_id}. {error} More than '
                f'{MAX_SHARE:.0%} is no accident: look at the storage, and run `dino-mm check` over the data set.'
            )

    @property
    def _own(self) -> torch.Tensor:
        worker = get_worker_info()
        return self._counts[0 if worker is None else (worker.id + 1) % MAX_WORKERS]
