"""All that is claimed of a GPU, in one command of less than 8 minutes: ``python tools/gpu_report.py``.

Versions; training steps and inference against MMDetection's DINO, in turns, in float32, TF32, float16 and bfloat16;
where the host waits for the GPU; kernel launches; equality with detrex; the largest model of each family; ours
compiled. Every part runs in a process of its own with a time limit, prints as it goes, and is in the JSON file as far
as it came. ``--small`` runs all of it in a minute on a CPU, with a tiny model, to see that it runs.
"""

import argparse
import functools
import importlib
import json
import multiprocessing
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

os.environ.setdefault('PYTORCH_NVML_BASED_CUDA_CHECK', '1')  # no part finds a GPU that its parent has begun to use

import dino_mm  # noqa: F401  (first, for it says what does not fit)

# isort: split
from dino_mm.benchmark import device_parity, gpu_parts
from dino_mm.benchmark.gpu_parts import Plan, Row

TESTS = Path(__file__).resolve().parents[1] / 'tests'
#: Seconds of the whole report; a part gets what is left of it, if that is less than its own limit.
TIME_LIMIT = 470


class Part(NamedTuple):
    """A part of the report."""

    run: Callable[[Plan], Iterator[Row]]
    limit: int
    """Seconds."""


def goldens() -> ModuleType | None:
    """What reads detrex's numbers, in a checkout."""
    if not (TESTS / 'parity.py').is_file():
        return None
    sys.path.insert(0, str(TESTS))
    return importlib.import_module('parity')


def parts(small: bool) -> dict[str, Part]:
    """All parts by name, the most telling first."""
    parity = functools.partial(device_parity.parity, goldens=None if small else goldens())
    return {
        'versions': Part(gpu_parts.versions, 60),
        'launches': Part(gpu_parts.launches, 50),
        'speed': Part(gpu_parts.speed, 150),
        'waits': Part(gpu_parts.waits, 50),
        'parity': Part(parity, 100),
        'zoo': Part(gpu_parts.zoo, 120),
        'compiled': Part(gpu_parts.compiled, 150),
    }


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--out', type=Path, default=Path('gpu_report.json'), help='JSON file to write (%(default)s)')
    parser.add_argument('--small', action='store_true', help='a tiny model on the CPU')
    parser.add_argument('--parts', nargs='+', choices=parts(True), help='run these only')
    return parser.parse_args()


def send_rows(connection: Any, part: Part, plan: Plan) -> None:
    """In the process of a part: send what it finds, an error as the last row."""
    gpu_parts.prepare(plan)
    try:
        for row in part.run(plan):
            connection.send(row)
    except Exception as error:
        connection.send(Row(traceback.format_exc(), dict(error=f'{type(error).__name__}: {error}')))


def run_part(part: Part, plan: Plan, limit: float) -> list[Row]:
    """Print what a part finds within ``limit`` seconds, and return it."""
    # Forked, so that nothing is imported again, which takes 20 seconds on a fresh machine.
    context = multiprocessing.get_context('fork')
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=send_rows, args=(sender, part, plan))
    process.start()
    sender.close()
    rows: list[Row] = []

    def add(row: Row) -> None:
        rows.append(row)
        print(row.text, flush=True)

    end = time.monotonic() + limit
    try:
        while receiver.poll(max(0.0, end - time.monotonic())):
            add(receiver.recv())
        process.kill()
        add(Row(f'CUT OFF after {limit:.0f} s', dict(error='cut off')))
        process.join()
    except EOFError:  # it has ended
        process.join()
        if process.exitcode:
            add(Row(f'ENDED with status {process.exitcode}', dict(error='ended', status=process.exitcode)))
    return rows


def failed(row: dict[str, Any]) -> bool:
    """Whether something of ours did not run, or is not equal."""
    return 'error' in row or 'error' in row.get('ours', {}) or not row.get('equal', True)


def main() -> int:
    """Run all parts, print, write.

    Returns:
        The exit status: 1 if a part failed, was cut off or found a difference to detrex.
    """
    args = parse_args()
    plan = gpu_parts.SMALL if args.small else gpu_parts.FULL
    report: dict[str, Any] = {}
    start = time.monotonic()
    for name, part in parts(args.small).items():
        if args.parts and name not in args.parts:
            continue
        begin = time.monotonic()
        print(f'== {name}', flush=True)
        rows = run_part(part, plan, min(part.limit, TIME_LIMIT - (begin - start)))
        report[name] = dict(seconds=time.monotonic() - begin, rows=[row.data for row in rows])
        args.out.write_text(json.dumps(report, indent=2) + '\n')
    print(f'== {time.monotonic() - start:.0f} s, {args.out}')
    found = [row for part in report.values() for row in part['rows']]
    return int(any(map(failed, found)))


if __name__ == '__main__':
    raise SystemExit(main())
