"""Which checkpoint a training goes on from: the newest of its folder that is whole and finite."""

import logging
import time
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmengine.dist import broadcast_object_list
from mmengine.runner import CheckpointLoader, Runner

from ..checkpoints.contents import take_apart
from ..checkpoints.errors import CheckpointError
from ..checkpoints.files import open_checkpoint
from ..checkpoints.finite import first_non_finite
from .checkpoint_hook import WRITTEN, CheckpointHook

#: ``resume`` of a config: go on from the newest checkpoint of the work directory, or else start from ``load_from``.
AUTO = 'auto'


@dataclass
class Found:
    """What there is to go on from.

    Attributes:
        path: The newest whole checkpoint.
        iteration: Iterations or, where it tells those instead, epochs that it was trained.
        passed: Newer files that were passed over: name -> reason.
        damaged: Whether one of them is a damaged checkpoint, not a file of another kind.
    """

    path: Path | None = None
    iteration: int | None = None
    passed: dict[str, str] = field(default_factory=dict)
    damaged: bool = False


class _OtherFileError(Exception):
    """A file that is whole, but no state of a training."""


def choose_checkpoint(runner: Runner) -> None:
    """Tell ``runner``, which resumes without being told from what, the newest whole checkpoint.

    The first process looks, and tells the others. Files that it passes over are logged. Without any checkpoint the
    runner starts from its ``load_from``, or from nothing.

    Raises:
        CheckpointError: There are checkpoints, and none is whole.
    """
    folders = _folders(runner)
    if not runner._resume:
        _tell_of_earlier(runner, folders[0])
    if runner._resume != AUTO and not (runner._resume and runner._load_from is None):
        return
    shared: list[Any] = [find_resumable(folders, _named(folders[0])) if runner.rank == 0 else None]
    broadcast_object_list(shared)
    found: Found = shared[0]
    for name, reason in found.passed.items():
        runner.logger.warning(f'--resume passes over {name}: {reason}.')
    if found.path is not None:
        runner._resume, runner._load_from = True, str(found.path)
        runner.logger.info(f'--resume goes on from {found.path}, the newest whole checkpoint.')
        return
    if found.damaged:
        reasons = '; '.join(f'{name}: {reason}' for name, reason in found.passed.items())
        raise CheckpointError(
            f'No checkpoint in {folders[0]} can be resumed ({reasons}). Name another with --resume FILE, or move these '
            'away to start anew.'
        )
    runner._resume = False
    start = runner._load_from
    source = f'`load_from`, {start}' if start else 'nothing, as the config has no `load_from`'
    runner.logger.info(f'--resume: there is no checkpoint in {folders[0]}. Training starts from {source}.')


def _tell_of_earlier(runner: Runner, folder: Path) -> None:
    """Say that a run starts anew beside the checkpoints of an earlier one."""
    left = sorted(path.name for pattern in ('iter_*.pth', 'epoch_*.pth') for path in folder.glob(pattern))
    if left and runner.rank == 0:
        runner.logger.warning(
            f'{folder} has checkpoints of an earlier run: {", ".join(left)}. This run starts anew, and its own replace '
            'those of the same name; --resume would go on from them.'
        )


def _folders(runner: Runner) -> list[Path]:
    """The work directory, and where hooks put checkpoints elsewhere."""
    folders = [Path(runner.work_dir)]
    for hook in runner.hooks:
        if isinstance(hook, CheckpointHook) and hook.out_dir is not None:
            folders.append(Path(hook.out_dir) / Path(runner.work_dir).name)
    return folders


def _named(work_dir: Path) -> Path | None:
    """The file that ``last_checkpoint`` names, which may lie elsewhere."""
    try:
        text = (work_dir / 'last_checkpoint').read_text().strip()
    except (OSError, UnicodeDecodeError):
        return None
    # mmengine writes paths relative to where it was started, our hook such as are relative to the work directory.
    return next((path for path in (work_dir / text, Path(text)) if text and path.is_file()), None)


def find_resumable(folders: Iterable[Path], named: Path | None = None) -> Found:
    """The newest whole and finite checkpoint of a training.

    Args:
        folders: Where checkpoints lie.
        named: One more file to look at.
    """
    found = Found()
    for path in sorted(_candidates(folders, named), key=_age, reverse=True):
        try:
            found.iteration = _progress(path)
        except _OtherFileError as error:
            found.passed[str(path)] = str(error)
        except Exception as error:  # reading arbitrary bytes can end in almost any
            found.passed[str(path)], found.damaged = _one_line(error, path), True
        else:
            found.path = path
            return found
    return found


def _candidates(folders: Iterable[Path], named: Path | None) -> Iterator[Path]:
    """Checkpoint files; the best ones lack the optimizer's state."""
    paths = [path for folder in folders for path in folder.glob('*.pth') if not path.name.startswith(('best_', '.'))]
    seen = set()
    for path in [*paths, *([named] if named else [])]:
        if path.is_file() and path.resolve() not in seen:
            seen.add(path.resolve())
            yield path


def _age(path: Path) -> tuple[float, int]:
    """When a checkpoint was written, in seconds since 1970, and its iteration, for those of the same second.

    A copy of a file has another time than the file. So the time within the file counts, where it can be read.
    """
    try:
        meta = open_checkpoint(str(path), lazily=True)['meta']
        if WRITTEN in meta:
            return float(meta[WRITTEN]), int(meta['iter'])
        return time.mktime(time.strptime(meta['time'], '%Y%m%d_%H%M%S')), int(meta['iter'])
    except Exception:  # damaged, or another library's
        return path.stat().st_mtime, 0


def _progress(path: Path) -> int:
    """How far a checkpoint was trained; an error if it is damaged, not finite, or no state of a training."""
    if path.stat().st_size == 0:
        raise CheckpointError('it is empty')
    if zipfile.is_zipfile(path):
        try:
            with zipfile.ZipFile(path) as file:
                damaged = file.testzip()  # torch does not compare the checksums
        except (zipfile.BadZipFile, zlib.error, EOFError) as error:
            raise CheckpointError(f'it is damaged ({error})') from None
        if damaged is not None:
            raise CheckpointError(f'it is damaged (in {damaged})')
    checkpoint = CheckpointLoader.load_checkpoint(str(path), map_location='cpu', logger=logging.getLogger('silent'))
    contents = take_apart(checkpoint)
    progress = contents.epoch if contents.iteration is None else contents.iteration
    # mmengine resumes from its own log, which copies of weights alone do not have.
    if progress is None or not {'message_hub', 'optimizer'} & checkpoint.keys():
        raise _OtherFileError('it holds weights alone, no state of a training')
    for weights in (contents.tensors, checkpoint.get('ema_state_dict', {})):
        name = first_non_finite(weights)
        if name is not None:
            raise CheckpointError(f'its tensor {name!r} holds NaN or infinity')
    return progress


def _one_line(error: Exception, path: Path) -> str:
    text = ' '.join(str(error).split()).removeprefix(f'{path}: ') or type(error).__name__
    return text.partition('; delete ')[0].rstrip('.')[:200]  # what cannot be fetched again is not to be deleted
