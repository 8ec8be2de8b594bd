"""What the command-line tools share: arguments, the config, distributed training with and without GPUs."""

import argparse
import os
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import torch
import torch.distributed
from mmdet.utils import setup_cache_size_limit_of_dynamo
from mmengine.config import Config, ConfigDict, DictAction
from mmengine.registry import RUNNERS, build_functions
from mmengine.runner import Runner
from torch.distributed.elastic.multiprocessing.errors import get_error_handler

from dino_mm.checkpoints.errors import CheckpointError
from dino_mm.checkpoints.files import register_safe_loaders
from dino_mm.settings import SettingError, read_config
from dino_mm.shipped import cfg as shipped_config

from ..datasets.coco_rules import AnnotationError
from ..datasets.skipped import TooManyUnreadableError
from ..models import builder
from .check_hook import CheckRunHook
from .load_checkpoint_hook import LoadCheckpointHook
from .output import output_may_be_lost
from .preemption_hook import Stopped
from .run_lock import FolderInUseError, one_run
from .safe_files import NO_ROOM, NO_WAY, writable_file, writable_folder

#: What tells the number of a process, by launcher.
RANKS = {'pytorch': 'RANK', 'slurm': 'SLURM_PROCID', 'mpi': 'OMPI_COMM_WORLD_RANK'}
#: What gloo says where another process has closed its connection.
LOST = ('Connection closed by peer', 'Connection reset by peer', 'Broken pipe')
#: Seconds in which torchrun, which looks every tenth of one, notices that a process has died.
GRACE = 3.0


class OptionsAction(DictAction):
    """``--cfg-options`` as mmengine reads them. A value without ``=`` is an error of one line."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: Any = None) -> None:
        """Add the values to those that are there."""
        for value in values:
            if '=' not in value:
                parser.error(f'{option_string} {value}: write key=value, without spaces around `=`')
        super().__call__(parser, namespace, values, option_string)


def add_common_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of both training and test."""
    parser.add_argument('config', help='config file, or the name of a shipped one')
    parser.add_argument('--work-dir', help='where logs and results go; ./work_dirs/<config name> by default')
    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=OptionsAction,
        help='settings that override the config, key=value; lists as key="[a,b]" or key=a,b',
    )
    parser.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none', help='job launcher')
    parser.add_argument(
        '--trust', action='store_true', help='open checkpoints that are more than data: runs the code they contain'
    )
    # torchrun sets the environment variable; older launchers pass the argument.
    parser.add_argument('--local_rank', '--local-rank', type=int, default=0, help=argparse.SUPPRESS)


def load_config(args: argparse.Namespace) -> Config:
    """Read the config, apply the common arguments; from here on checkpoints are opened safely, or with --trust."""
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    register_safe_loaders(args.trust)
    path = args.config if Path(args.config).is_file() else shipped_config(args.config)
    try:
        config = read_config(path, args.cfg_options)
    except SettingError as error:
        raise SystemExit(f'error: {error}') from None
    config.launcher = args.launcher
    if args.work_dir is not None:
        config.work_dir = args.work_dir
    elif config.get('work_dir') is None:
        config.work_dir = str(Path('work_dirs') / Path(path).stem)
    return config


def add_compile_hook(config: Config, **options: Any) -> None:
    """Have the detector compiled; what the config's own ``default_hooks.compile`` says counts more."""
    hooks = config.setdefault('default_hooks', ConfigDict())
    hooks.compile = dict(type='dino_mm.CompileHook') | options | dict(hooks.get('compile') or {})


def build_runner(config: Config) -> Runner:
    """Build the runner of a config, with gloo where there is no GPU, and with the hooks that our tools rely on.

    mmengine's hooks of checkpoints and logs become ours, which take the same arguments.

    Without :class:`LoadCheckpointHook`, mmengine runs the config inside a checkpoint. mmengine's own ``compile`` is
    refused: it is for training steps as wholes, whose assignments the host solves. So is its ``FlexibleRunner``, which
    neither clips gradients nor writes and resumes checkpoints as our hooks need it.
    """
    if config.get('compile'):
        raise SystemExit(
            "error: `compile` of the config would compile a training step as one, which DINO's matching breaks into "
            "pieces. Use --compile, or `default_hooks = dict(compile=dict(type='dino_mm.CompileHook'))`."
        )
    if str(config.get('runner_type')).rpartition('.')[2] == 'FlexibleRunner':
        raise SystemExit(
            "error: `runner_type = 'FlexibleRunner'` (FSDP, DeepSpeed): each process would clip its "
            'own part of the gradients, and --resume would not work. Take the line out. --amp, `model.encoder.num_cp` '
            'and `model.backbone.with_cp` save memory.'
        )
    _require_outputs(config)
    _write_safely(config)
    setup_cache_size_limit_of_dynamo()
    if config.launcher == 'pytorch' and not torch.cuda.is_available():
        _use_gloo(config)
    runner = RUNNERS.build(config) if 'runner_type' in config else Runner.from_cfg(config)
    for needed in (CheckRunHook, LoadCheckpointHook):
        if not any(isinstance(hook, needed) for hook in runner.hooks):
            runner.register_hook(needed())
    return runner


@contextmanager
def only_run(config: Config, force: bool) -> Iterator[None]:
    """Keep other runs out of the work directory meanwhile, see :func:`.run_lock.one_run`; the first process does.

    Where the program prints to may be full or gone: the log in the work directory has it all.
    """
    writable_folder(config.work_dir, '--work-dir')
    is_first = not int(os.environ.get(RANKS.get(config.launcher, ''), 0))
    with output_may_be_lost(), one_run(config.work_dir, force) if is_first else nullcontext():
        yield


def _require_outputs(config: Config) -> None:
    """See before any work that what the config writes can be written."""
    writable_folder(config.work_dir, '--work-dir')
    for key in ('val_evaluator', 'test_evaluator'):
        metrics = config.get(key) or []
        for metric in [metrics] if isinstance(metrics, dict) else metrics:
            if metric.get('outfile_prefix') is not None:
                writable_file(f'{metric["outfile_prefix"]}.bbox.json', f'{key}.outfile_prefix')


def _write_safely(config: Config) -> None:
    """Have our hooks write checkpoints and logs, where the config names mmengine's or none."""
    hooks = config.setdefault('default_hooks', ConfigDict())
    for key, name in (('checkpoint', 'CheckpointHook'), ('logger', 'LoggerHook')):
        hooks.setdefault(key, dict(type=name, interval=1 if key == 'checkpoint' else 10))  # mmengine's defaults
        own = hooks[key]
        if own is not None and own.get('type') in (name, f'mmengine.{name}'):
            own['type'] = f'dino_mm.{name}'


@contextmanager
def ends_cleanly() -> Iterator[None]:
    """End the program with one line where it cannot go on; processes leave together otherwise.

    It cannot where checkpoint, data, config or disk do not fit, or where numbers are not finite.

    torchrun gets each error with its file and line. It reports the process that failed first, not those whose
    connections this broke.

    A thread of gloo drops the tensors of what was last sent some time after it was sent. If Python is ending by then,
    the thread cannot take the interpreter's lock, and the process aborts: its threads are joined before.
    """
    try:
        with _launcher_is_told():
            yield
    except (AnnotationError, CheckpointError, FolderInUseError, FloatingPointError, SettingError) as error:
        raise SystemExit(f'error: {error}') from None
    except OSError as error:
        if error.errno not in NO_ROOM | NO_WAY:
            raise
        advice = 'Free some space' if error.errno in NO_ROOM else 'See to the file system'
        raise SystemExit(f'error: {error}. {advice}, then run again.') from None
    except (KeyError, TypeError, ValueError) as error:
        if not _is_mistake_of_config(error):
            raise
        raise SystemExit(f'error: {error.args[0]}') from None
    except TooManyUnreadableError as error:
        # A worker's words come with its traceback before them.
        raise SystemExit(f'error: {str(error).rpartition(f"{type(error).__name__}: ")[2].strip()}') from None
    except Stopped:
        _leave_together()
        raise
    _leave_together()


@contextmanager
def _launcher_is_told() -> Iterator[None]:
    try:
        yield
    except Exception as error:
        if _is_lost_connection(error):
            time.sleep(GRACE)  # another process has died, which the launcher is to notice before it reads of this one
        with suppress(OSError):  # the first error counts
            get_error_handler().record_exception(error)  # does nothing where torchrun has not started the process
        raise


def _is_lost_connection(error: Exception) -> bool:
    """Whether an error only says that another process is gone."""
    if not torch.distributed.is_initialized():
        return False
    return isinstance(error, torch.distributed.DistError) or any(words in str(error) for words in LOST)


def _is_mistake_of_config(error: Exception) -> bool:
    """Whether a part of the config has an unknown type, or arguments that its class does not take or lacks.

    True if what builds parts has raised the error, called by nothing but MMDetection, its libraries and dino_mm. Others
    need the traceback, to see where they build their parts.
    """
    modules = [frame.f_globals.get('__name__', '') for frame, _ in traceback.walk_tb(error.__traceback__)]
    start = next((i for i, name in enumerate(modules) if name.startswith('mmengine.')), len(modules))
    is_ours = all(
        name.partition('.')[0] in ('mmengine', 'mmdet', 'mmcv', 'dino_mm', 'torch') for name in modules[start:]
    )
    return is_ours and modules[-1] in (build_functions.__name__, builder.__name__)


def _leave_together() -> None:
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
        torch.distributed.destroy_process_group()


def _use_gloo(config: Config) -> None:
    """Set up processes on CPUs: mmengine's own set-up selects a GPU first and fails without one."""
    config.model_wrapper_cfg = {
        'type': 'MMDistributedDataParallel',
        'broadcast_buffers': False,
        'find_unused_parameters': config.get('find_unused_parameters', False),
        **config.get('model_wrapper_cfg', {}),
        'device_ids': None,  # mmengine's default is a GPU's number
    }
    torch.distributed.init_process_group('gloo')
