"""``dino-mm COMMAND``: the tools under one name, and the list of models.

A command hands its arguments to its tool as they are; what the tools do and which options they have stands there. This
module starts without torch.
"""

from __future__ import annotations

import argparse
import difflib
import importlib
import sys
from types import ModuleType
from typing import NamedTuple

from .settings import SettingError
from .shipped import UnknownConfigError, config_root
from .version import __version__
from .zoo import list_models, zoo_models

PROGRAM = 'dino-mm'


class Command(NamedTuple):
    """A command of ``dino-mm``.

    Attributes:
        title: What it does, for the overview.
        example: Arguments as one would type them.
        tool: Its file in ``tools/``; '' where dino_mm has a function for it.
    """

    title: str
    example: str
    tool: str = ''


COMMANDS = {
    'models': Command('list the models of the zoo', "'swin*'"),
    'new': Command(
        'make a project that fine-tunes a model on your data',
        'my_project --model dino_r50_4scale_12ep --data DIR',
        'new.py',
    ),
    'train': Command('train a detector', 'dino_r50_4scale_12ep --amp', 'train.py'),
    'test': Command('evaluate a checkpoint', 'dino_r50_4scale_12ep CHECKPOINT', 'test.py'),
    'report': Command(
        'report what went wrong in a test', 'predictions.bbox.json --ann ANN --images DIR --out report', 'report.py'
    ),
    'predict': Command(
        'detect objects on pictures and videos', 'dino_r50_4scale_12ep image.jpg --weights zoo', 'predict.py'
    ),
    'check': Command(
        'check a COCO data set before training', 'data/annotations/train.json data/images', 'check_dataset.py'
    ),
    'convert': Command(
        'show what a checkpoint is, or make one of ours of it', 'CHECKPOINT --inspect', 'convert_checkpoint.py'
    ),
    'export': Command(
        'export a detector to other runtimes, and check the file',
        'dino_r50_4scale_12ep --dynamic batch,size',
        'export.py',
    ),
    'benchmark': Command("measure a DINO against MMDetection's", '--sweep batch=1,4', 'benchmark.py'),
    'env': Command('report what is installed and what is missing', ''),
}


def main() -> int:
    """Run the command of ``sys.argv``; the exit status, unless the tool ends the program itself."""
    name, arguments = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ('', [])
    if name in ('-h', '--help'):
        print(overview())
        return 0
    if name == '--version':
        print(f'{PROGRAM} {__version__}')
        return 0
    if name not in COMMANDS:
        print(_unknown(name) if name else overview(), file=sys.stderr)
        return 2
    sys.argv = [f'{PROGRAM} {name}', *arguments]  # the name in the usage that argparse prints
    if name == 'models':
        return models(arguments)
    if name == 'env':
        return report(arguments)
    try:
        return _run(name)
    finally:
        if {'-h', '--help'} & set(arguments):
            print(f'\n{_example(name)}')


def overview() -> str:
    """What ``dino-mm --help`` prints."""
    width = max(map(len, COMMANDS))
    lines = [f'  {name:<{width}}  {command.title}' for name, command in COMMANDS.items()]
    return '\n'.join(
        [
            f'usage: {PROGRAM} COMMAND [ARGUMENTS]',
            '',
            *lines,
            '',
            f'`{PROGRAM} COMMAND --help` tells its arguments. On several GPUs:',
            'torchrun --nproc_per_node=GPUS -m dino_mm train CONFIG --launcher pytorch',
            '',
            f'example: {PROGRAM} train {COMMANDS["train"].example}',
        ]
    )


def _parser(name: str) -> argparse.ArgumentParser:
    """A parser for a command that is no tool."""
    return argparse.ArgumentParser(description=f'{COMMANDS[name].title.capitalize()}.', epilog=_example(name))


def report(arguments: list[str]) -> int:
    """Print the report of :mod:`dino_mm.env`; its exit status."""
    _parser('env').parse_args(arguments)
    from . import env

    return env.main()


def models(arguments: list[str]) -> int:
    """Print the models that fit a pattern: name, box AP, weights; 1 if there is none."""
    parser = _parser('models')
    parser.add_argument('pattern', nargs='?', default='*', help="as of files, such as 'swin*'; all models without")
    pattern = parser.parse_args(arguments).pattern
    names = list_models(pattern)
    if not names:
        print(f'error: no model fits {pattern!r}; `{PROGRAM} models` lists all.', file=sys.stderr)
        return 1
    width, heading = max(map(len, names)), 'box AP (detrex)'
    print(f'{"name":<{width}}  {heading}  weights')
    for name in names:
        _, box_ap, weights = zoo_models()[name]
        stated = '-' if box_ap is None else f'{box_ap:.1f}'
        print(f'{name:<{width}}  {stated:>{len(heading)}}  {"yes" if weights else "no"}')
    return 0


def _run(name: str) -> int:
    """Run a tool in this process, after the checks of ``import dino_mm``."""
    try:
        importlib.reload(sys.modules[__package__])  # with the checks that it left out for this command
    except ImportError as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    tool = config_root().parent / 'tools' / COMMANDS[name].tool
    # Not by runpy, which would put the file's name into `sys.argv`. Processes that the tool starts look for `__main__`.
    module = sys.modules['__main__'] = ModuleType('__main__')
    module.__file__ = str(tool)
    try:
        exec(compile(tool.read_bytes(), tool, 'exec'), module.__dict__)
    except (SettingError, UnknownConfigError) as error:
        print(f'error: {error}', file=sys.stderr)
        return 1
    return 0


def _example(name: str) -> str:
    return f'example: {PROGRAM} {name} {COMMANDS[name].example}'.rstrip()


def _unknown(name: str) -> str:
    """The one line on a command that there is not."""
    close = difflib.get_close_matches(name, COMMANDS, 2, 0.5)
    hint = f'did you mean {" or ".join(close)}?' if close else f'there are {", ".join(COMMANDS)}.'
    return f'error: {PROGRAM} has no command {name!r}; {hint}'
