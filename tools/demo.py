#!/usr/bin/env python3
"""Train the smallest DINO on handwritten digits, test it and draw the results; ``make demo``.

The demo runs on a CPU within minutes and without any download. It uses the same commands as any
other training: it makes the data set, runs ``tools/train.py`` and ``tools/test.py`` with the demo
config, and leaves in its work directory

    metrics.json         box AP of the test run, times, versions and the commands
    learning_curve.png   losses and box AP over the iterations
    contact_sheet.png    validation images with true and predicted boxes
    results.bbox.json    the predictions in COCO's result format

It fails, with exit status 1, if the box AP stays below the expected one.
"""

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

from dino_mm.compat import found_set
from dino_mm.datasets.digits import NUM_TRAIN, NUM_VAL, make_digits
from dino_mm.visualization import draw_contact_sheet, plot_learning_curve

ROOT = Path(__file__).resolve().parents[1]
DATA_DIR = ROOT / 'data' / 'digits'
DISTRIBUTIONS = ('mmdet-dino', 'torch', 'numpy')
MAP, AP50 = 'coco/bbox_mAP', 'coco/bbox_mAP_50'


class DemoError(Exception):
    """A problem that ends the demo, in one line."""


@dataclass(frozen=True)
class Artefacts:
    """The files that a run leaves in its work directory."""

    work_dir: Path

    @property
    def metrics(self) -> Path:
        """Box AP, times in seconds, versions and commands."""
        return self.work_dir / 'metrics.json'

    @property
    def learning_curve(self) -> Path:
        """Losses and box AP over the iterations."""
        return self.work_dir / 'learning_curve.png'

    @property
    def contact_sheet(self) -> Path:
        """Validation images with boxes."""
        return self.work_dir / 'contact_sheet.png'

    @property
    def results(self) -> Path:
        """Predictions in COCO's result format."""
        return self.work_dir / 'results.bbox.json'

    def clear(self) -> None:
        """Remove the files of an earlier run, so that they cannot pass for those of this one."""
        for path in (self.metrics, self.learning_curve, self.contact_sheet, self.results):
            path.unlink(missing_ok=True)


@dataclass
class Journal:
    """What was run and how long it took.

    Attributes:
        start: ``time.monotonic()`` at the beginning, in seconds.
        seconds: Duration of each step that is over.
        commands: The commands as a user would type them in the repository root.
    """

    start: float = field(default_factory=time.monotonic)
    seconds: dict[str, float] = field(default_factory=dict)
    commands: list[str] = field(default_factory=list)

    def elapsed(self) -> float:
        """Seconds since the beginning."""
        return time.monotonic() - self.start

    @contextmanager
    def step(self, name: str, description: str) -> Iterator[None]:
        """Announce a step and note its duration."""
        print(f'[{self.elapsed():6.1f} s] {name}: {description}', flush=True)
        begin = self.elapsed()
        yield
        self.seconds[name] = round(self.elapsed() - begin, 1)
        print(f'[{self.elapsed():6.1f} s] {name}: took {self.seconds[name]} s', flush=True)

    def run(self, script: str, *arguments: str) -> None:
        """Run a script of the repository with this Python, its output to the terminal."""
        command = shlex.join(['python', script, *arguments])
        self.commands.append(command)
        print(f'$ {command}', flush=True)
        status = subprocess.run([sys.executable, script, *arguments], cwd=ROOT).returncode
        if status != 0:
            raise DemoError(f'{script} ended with exit status {status}; its output is above')


def parse_arguments(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line; paths in the result are absolute."""
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])

    def path(text: str) -> Path:
        return Path(text).resolve()

    add = parser.add_argument

    config = ROOT / 'configs' / 'dino-demo' / 'dino_digits.py'
    work_dir = ROOT / 'work_dirs' / 'demo'
    add('--config', type=path, default=config, help=f'config file ({shown(config)})')
    add('--work-dir', type=path, default=work_dir, help=f'for all output ({shown(work_dir)})')
    add('--data-dir', type=path, default=DATA_DIR, help=f'made if missing ({shown(DATA_DIR)})')
    add('--num-train', type=int, default=NUM_TRAIN, help='training images (%(default)s)')
    add('--num-val', type=int, default=NUM_VAL, help='validation images (%(default)s)')
    add('--min-map', type=float, default=0.60, help='least mAP to succeed (%(default)s)')
    add('--min-ap50', type=float, default=0.70, help='least AP50 to succeed (%(default)s)')
    add(
        '--cfg-options',
        nargs='+',
        default=[],
        metavar='KEY=VALUE',
        help='config overrides for training and test, such as train_cfg.max_iters=20',
    )
    return parser.parse_args(arguments)


def run_demo(options: argparse.Namespace) -> None:
    """Run all steps; raise DemoError where one fails or the box AP is too low."""
    journal, files = Journal(), Artefacts(options.work_dir)
    files.clear()
    with journal.step('data', f'digits in {shown(options.data_dir)}'):
        make_data(options)
    with journal.step('train', f'{shown(options.config)}, log in {shown(options.work_dir)}'):
        journal.run(
            'tools/train.py',
            shown(options.config),
            *('--work-dir', shown(options.work_dir)),
            *cfg_options(data_overrides(options.data_dir) + options.cfg_options),
        )
    checkpoint = last_checkpoint(options.work_dir)
    with journal.step('test', shown(checkpoint)):
        prefix = shown(files.results).removesuffix('.bbox.json')
        journal.run(
            'tools/test.py',
            shown(options.config),
            shown(checkpoint),
            *('--work-dir', shown(options.work_dir / 'test')),
            *cfg_options(
                [
                    *data_overrides(options.data_dir),
                    f'test_evaluator.outfile_prefix={prefix}',
                    *options.cfg_options,
                ]
            ),
        )
    metrics = read_metrics(options.work_dir / 'test')
    with journal.step('pictures', 'learning curve and contact sheet'):
        draw_pictures(files, options.data_dir)
    iterations = trained_iterations(checkpoint)
    write_metrics(files.metrics, metrics, iterations, journal)
    print(summary(files, checkpoint, metrics, iterations, journal, options))
    check_floors(metrics, options)


def make_data(options: argparse.Namespace) -> None:
    """Make the data set at ``options.data_dir`` unless it is there."""
    try:
        make_digits(options.data_dir, options.num_train, options.num_val)
    except (ModuleNotFoundError, FileExistsError, ValueError) as error:
        raise DemoError(str(error)) from error


def data_overrides(data_dir: Path) -> list[str]:
    """Config overrides for a data set at another place than the config says."""
    if data_dir == DATA_DIR:
        return []
    annotations = f'{shown(data_dir)}/annotations/val.json'
    loaders = ('train_dataloader', 'val_dataloader', 'test_dataloader')
    return [
        *(f'{loader}.dataset.data_root={shown(data_dir)}/' for loader in loaders),
        f'val_evaluator.ann_file={annotations}',
        f'test_evaluator.ann_file={annotations}',
    ]


def cfg_options(overrides: list[str]) -> list[str]:
    """Command line arguments for config overrides."""
    return ['--cfg-options', *overrides] if overrides else []


def shown(path: Path) -> str:
    """``path`` as typed in the repository root: relative to it where it lies inside."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


def last_checkpoint(work_dir: Path) -> Path:
    """Path of the checkpoint that the training in ``work_dir`` wrote last."""
    pointer = work_dir / 'last_checkpoint'
    if not pointer.is_file():
        raise DemoError(f'the training wrote no checkpoint: there is no {shown(pointer)}')
    return work_dir / pointer.read_text().strip()


def newest(folder: Path, pattern: str) -> Path:
    """Of the files of several runs that of the last one; mmengine names runs by their time."""
    found = sorted(folder.glob(pattern))
    if not found:
        raise DemoError(f'there is no {pattern} in {shown(folder)}: the run logged nothing')
    return found[-1]


def read_metrics(test_dir: Path) -> dict[str, float]:
    """Box AP values, from 0 to 1, of the last test run in ``test_dir``."""
    log = newest(test_dir, '*/*.json')
    metrics = {k: v for k, v in json.loads(log.read_text()).items() if k.startswith('coco/bbox_')}
    if not {MAP, AP50} <= metrics.keys():
        raise DemoError(f'the test reported no box AP in {shown(log)}; were there no predictions?')
    return metrics


def draw_pictures(files: Artefacts, data_dir: Path) -> None:
    """Draw the learning curve and the contact sheet."""
    plot_learning_curve(newest(files.work_dir, '*/vis_data/scalars.json'), files.learning_curve)
    annotations = data_dir / 'annotations' / 'val.json'
    draw_contact_sheet(annotations, data_dir / 'val', files.results, files.contact_sheet)


def trained_iterations(checkpoint: Path) -> int:
    """Tell from a checkpoint's name, such as ``iter_600.pth``, how long the training was."""
    match = re.fullmatch(r'iter_(\d+)', checkpoint.stem)
    if match is None:
        raise DemoError(f'{checkpoint.name} is not named by iterations: the config trains by epochs')
    return int(match[1])


def write_metrics(path: Path, metrics: dict[str, float], iterations: int, journal: Journal) -> None:
    """Write the metrics and what is needed to judge and repeat them."""
    content = {
        'metrics': metrics,
        'iterations': iterations,
        'seconds': {**journal.seconds, 'total': round(journal.elapsed(), 1)},
        'commands': journal.commands,
        'versions': {
            'python': platform.python_version(),
            **{name: version(name) for name in DISTRIBUTIONS},
            'mmdetection': str(found_set()),
        },
        'cpus': os.cpu_count(),
    }
    path.write_text(json.dumps(content, indent=2) + '\n')


def summary(
    files: Artefacts,
    checkpoint: Path,
    metrics: dict[str, float],
    iterations: int,
    journal: Journal,
    options: argparse.Namespace,
) -> str:
    """Table of the results and of the files."""
    rows = [
        ('mAP', f'{metrics[MAP]:.3f} (at least {options.min_map:.2f} expected)'),
        ('AP50', f'{metrics[AP50]:.3f} (at least {options.min_ap50:.2f} expected)'),
        ('iterations', str(iterations)),
        ('time', f'{journal.elapsed():.0f} s'),
        ('metrics', shown(files.metrics)),
        ('learning curve', shown(files.learning_curve)),
        ('contact sheet', shown(files.contact_sheet)),
        ('predictions', shown(files.results)),
        ('checkpoint', shown(checkpoint)),
    ]
    return '\n' + '\n'.join(f'{name:<16}{value}' for name, value in rows)


def check_floors(metrics: dict[str, float], options: argparse.Namespace) -> None:
    """Raise DemoError if the box AP is too low."""
    floors = (('mAP', metrics[MAP], options.min_map), ('AP50', metrics[AP50], options.min_ap50))
    missed = [f'{name} {value:.3f} < {floor:g}' for name, value, floor in floors if value < floor]
    if missed:
        raise DemoError(f'box AP below what is expected: {", ".join(missed)}')


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the demo and return its exit status."""
    try:
        run_demo(parse_arguments(arguments))
    except DemoError as error:
        print(f'demo failed: {error}', file=sys.stderr)
        return 1
    return 0


if __name__ == '__main__':
    sys.exit(main())
