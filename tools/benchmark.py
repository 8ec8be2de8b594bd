"""Measure ours against MMDetection's own DINO: ``python tools/benchmark.py``.

Both have the same weights, backbone, images and boxes, each lives in a process of its own, and they take turns: ours,
MMDetection's, ours, ... Ratios are taken pair by pair. Counts do not depend on the machine; times do. Examples:

  python tools/benchmark.py                                     # training step and inference, R50
  python tools/benchmark.py --component                         # parts of a training step
  python tools/benchmark.py --sweep boxes=1,8,60,100 size=320x480,480x640,640x960 --picture growth.png
  python tools/benchmark.py --memory dino-swin/dino_swin_tiny_224_4scale_12ep.py --gpu-memory 24  # how many images fit?
"""

import argparse
import dataclasses
import json
import sys
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import dino_mm  # noqa: F401  (first, for it says what does not fit)

# isort: split
import torch

from dino_mm.benchmark import memory
from dino_mm.benchmark.comparison import COMPONENTS, DTYPES, WHOLE, Setting, Side, largest_difference
from dino_mm.benchmark.machine import environment
from dino_mm.benchmark.profiling import LABEL_CHECK, Worker
from dino_mm.engine.launch import OptionsAction

SIDES = ('ours', 'mmdet')
#: Seconds before each timed run: OpenMP's threads of the other side still turn for a while after their last work.
REST = 0.05
DEFAULT_CONFIG = 'dino-resnet/dino_r50_4scale_12ep.py'


def size(text: str) -> tuple[int, int]:
    """``480x640``: height and width."""
    height, width = text.lower().split('x')
    return int(height), int(width)


def sweep(text: str) -> tuple[str, list[Any]]:
    """``boxes=1,8,60``: an axis and its values."""
    axis, _, values = text.partition('=')
    if axis not in ('size', 'boxes', 'queries', 'batch') or not values:
        raise argparse.ArgumentTypeError(f'{text!r} is not `size=`, `boxes=`, `queries=` or `batch=` and values')
    return axis, [(size if axis == 'size' else int)(value) for value in values.split(',')]


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--config', default=DEFAULT_CONFIG, help='config file, or the name of a shipped one')
    parser.add_argument('--cfg-options', nargs='+', action=OptionsAction, default={}, help='override the config')
    parser.add_argument(
        '--size', type=size, metavar='HxW', help='of all images (480x640; with --memory 800x1333, as COCO is trained)'
    )
    for name, default, text in (
        ('batch', 2, 'images'),
        ('boxes', 8, 'boxes in each image'),
        ('queries', None, "matching queries (the config's)"),
        ('threads', 2, 'threads'),
        ('repeats', 5, 'pairs of runs'),
        ('seed', 0, 'seed of weights, images, boxes and noise'),
    ):
        parser.add_argument(
            f'--{name}', type=int, default=default, help=text if default is None else f'{text} (%(default)s)'
        )
    parser.add_argument('--dtype', choices=DTYPES, default='float32', help='half types run under autocast')
    parser.add_argument(
        '--compile',
        nargs='?',
        choices=['parts', 'cuda-graphs'],
        const='parts',
        default='',
        help='compile ours as tools/test.py does; whole steps only, and CUDA graphs for inference only',
    )
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument('--component', nargs='*', choices=COMPONENTS, help='measure parts; all, if none is named')
    mode.add_argument('--memory', metavar='CONFIG', help='estimate how large a batch of this config trains on a GPU')
    parser.add_argument('--gpu-memory', type=float, default=24, help='with --memory: of the GPU, GiB (%(default)s)')
    parser.add_argument(
        '--sweep', nargs='+', type=sweep, default=[], metavar='AXIS=A,B', help='repeat for other values'
    )
    parser.add_argument('--out', type=Path, help='JSON file to write')
    parser.add_argument('--picture', type=Path, help='PNG file to write')
    args = parser.parse_args()
    if args.memory and (args.picture or args.sweep):
        parser.error('--memory has neither --picture nor --sweep')
    args.config = args.memory or args.config
    args.size = args.size or ((800, 1333) if args.memory else (480, 640))
    return args


def base_setting(args: argparse.Namespace) -> Setting:
    """The setting that the command line states."""
    shared = {f.name for f in dataclasses.fields(Setting)} & set(vars(args))
    return Setting(**{name: getattr(args, name) for name in shared}, height=args.size[0], width=args.size[1])


class Point(NamedTuple):
    """A setting, and where it stands on an axis of the picture."""

    setting: Setting
    axis: str | None = None
    position: float = 0
    label: str = ''


def points(base: Setting, sweeps: Sequence[tuple[str, list[Any]]]) -> Iterator[Point]:
    """The stated setting, then those that differ from it along one axis."""
    yield Point(base)
    for axis, values in sweeps:
        for value in values:
            if axis == 'size':
                height, width = value
                changed = dataclasses.replace(base, height=height, width=width)
                yield Point(changed, axis, height * width, f'{height}x{width}')
            else:
                yield Point(dataclasses.replace(base, **{axis: value}), axis, value, str(value))


def place(point: Point) -> dict[str, Any]:
    """Where a result stands in the picture."""
    return dict(axis=point.axis, position=point.position, label=point.label)


def measure_point(point: Point, works: Sequence[str], repeats: int) -> dict[str, Any]:
    """Measure both sides in one setting, in new processes."""
    ours, mmdet_side = (Worker(Side, side, point.setting) for side in SIDES)
    with closing(ours), closing(mmdet_side):
        workers = dict(zip(SIDES, (ours, mmdet_side), strict=True))
        measures = [measure for work in works for measure in measure_work(work, workers, repeats)]
        scores = [workers[side]('scores') for side in SIDES]
        num_queries = workers['ours']('num_queries')
    return dict(
        setting=dataclasses.asdict(point.setting) | dict(decoder_queries=num_queries),
        **place(point),
        largest_difference_of_scores=largest_difference(*scores),
        measures=measures,
    )


def measure_work(work: str, workers: dict[str, Worker], repeats: int) -> Iterator[dict[str, Any]]:
    """All measures of one work. Memory comes first: a process keeps much of what it once used."""
    name = work.replace('-', ' ')
    # Whole steps take so much that chance does not show: once is enough.
    memory = {
        side: [worker('memory', work) for _ in range(1 if work in WHOLE else repeats)]
        for side, worker in workers.items()
    }
    counts = {side: worker('count', work) for side, worker in workers.items()}
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in SIDES}
    for number in range(repeats):
        print(f'{name}: pair {number + 1} of {repeats}', file=sys.stderr)
        for side in SIDES:
            time.sleep(REST)
            if work not in WHOLE:
                workers[side]('time', work)  # wakes its threads, which would be much of a short time
            runs[side].append(workers[side]('time', work))
    passes = list(runs['ours'][0])
    whole = work in WHOLE
    if len(passes) > 1:
        for phase in passes:
            seconds = {side: [run[phase] for run in runs[side]] for side in SIDES}
            yield compare(f'{name}, {phase}', 's', seconds, shown=whole)
    yield compare(name, 's', {side: [sum(run.values()) for run in runs[side]] for side in SIDES}, drawn=True)
    if None not in memory['ours']:
        mebibytes = {side: [value / 2**20 for value in values] for side, values in memory.items()}
        yield compare(f'{name}, peak memory', 'MiB', mebibytes)
    for phase in passes:
        calls = {side: [counts[side][phase]['calls'].total()] for side in SIDES}
        yield compare(f'{name}, operator calls, {phase}', '', calls, shown=whole or phase == 'forward')
        waits = {side: counts[side][phase]['waits'] for side in SIDES}
        real = {side: [kinds.total() - kinds[LABEL_CHECK]] for side, kinds in waits.items()}
        yield compare(f'{name}, host waits, {phase}', '', real, shown=whole and phase == 'forward', kinds=waits)


def compare(
    name: str, unit: str, values: dict[str, list[float]], shown: bool = True, drawn: bool = False, **more: Any
) -> dict[str, Any]:
    """One row: medians of both sides, and their ratio pair by pair; no ratio where a side has nothing.

    Args:
        name: What the values are.
        unit: Their unit.
        values: Values of each side's runs.
        shown: Whether it is a row of the table and a bar of the picture; the JSON has all.
        drawn: Whether its growth is drawn.
        more: Further entries of the JSON.
    """
    ratios = [ours / theirs for ours, theirs in zip(values['ours'], values['mmdet'], strict=True) if theirs > 0]
    return dict(
        name=name,
        unit=unit,
        **{side: median(values[side]) for side in SIDES},
        ratio=median(ratios) if ratios else None,
        range=[min(ratios), max(ratios)] if ratios else None,
        shown=shown,
        drawn=drawn,
        runs=values,
        **more,
    )


def table(result: dict[str, Any], repeats: int) -> str:
    """One setting's measures as text."""
    setting = result['setting']
    lines = [
        f'{setting["config"]}: {setting["batch"]} images of {setting["height"]}x{setting["width"]}, '
        f'{setting["boxes"]} boxes each, {setting["decoder_queries"]} queries in training,',
        f'{setting["dtype"]} on {setting["device"]}{", ours compiled" * bool(setting["compile"])}, '
        f'{setting["threads"]} threads; medians of {repeats} pairs of runs; '
        f'the scores of both differ by {result["largest_difference_of_scores"]:.1e} at most',
        f'{"":<44} {"ours":>10} {"mmdet":>10}     {"ratio":>5}  range',
    ]
    for row in filter(lambda row: row['shown'], result['measures']):
        numbers = [f'{row[side]:>10.3f}' if row['unit'] == 's' else f'{row[side]:>10.0f}' for side in SIDES]
        ratio = ''
        if row['ratio'] is not None:
            low, high = row['range']
            ratio = f'{row["ratio"]:>5.2f}' + (f'  {low:.2f} - {high:.2f}' if low < high else '')
        lines.append(f'{row["name"]:<44} {" ".join(numbers)} {row["unit"]:<3} {ratio}'.rstrip())
    return '\n'.join(lines)


def run_comparison(args: argparse.Namespace, setting: Setting) -> list[dict[str, Any]]:
    """Measure and print every setting."""
    works = WHOLE if args.component is None else args.component or COMPONENTS
    if args.compile and args.component is not None:
        raise RuntimeError('--compile measures whole steps, not --component.')
    if args.compile == 'cuda-graphs':
        works = WHOLE[:1]
    results = []
    for point in points(setting, args.sweep):
        if results and point.setting == setting:  # the stated one is on the axes too, and measured already
            results.append(dict(results[0], **place(point)))
            continue
        results.append(measure_point(point, works, args.repeats))
        print(table(results[-1], args.repeats), end='\n\n', flush=True)
    if args.picture:
        from dino_mm.benchmark.picture import plot_comparison  # Matplotlib is needed for pictures only

        first = results[0]['setting']
        plot_comparison(
            results,
            args.picture,
            f'{Path(first["config"]).stem}, {first["batch"]} images of {first["height"]}x{first["width"]}, '
            f'{first["boxes"]} boxes each, {first["dtype"]} on {first["device"]}, {first["threads"]} threads',
        )
    return results


def run_memory(setting: Setting, gpu_bytes: int) -> dict[str, Any]:
    """Estimate the memory of training, print the table as it goes."""
    print(memory.heading(setting, gpu_bytes))
    rows = []
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # mmdet's ResNet leaves an argument of checkpointing out
        for row in memory.estimate(setting, gpu_bytes):
            print(memory.line(row), flush=True)
            rows.append(row)
    return dict(
        setting=dataclasses.asdict(setting),
        gpu_bytes=gpu_bytes,
        rows=[dict(row._asdict(), peak=row.peak._asdict()) for row in rows],
    )


def main() -> None:
    """Measure, print, write."""
    args = parse_args()
    setting = base_setting(args)
    try:
        if args.memory:
            found = dict(memory=run_memory(setting, int(args.gpu_memory * 2**30)))
        else:
            found = dict(results=run_comparison(args, setting))
    except (RuntimeError, FileNotFoundError) as error:
        raise SystemExit(f'error: {error}') from None
    if args.out:
        report = dict(environment=environment(), command=sys.argv[1:], repeats=args.repeats, **found)
        args.out.write_text(json.dumps(report, indent=2) + '\n')


if __name__ == '__main__':
    main()
