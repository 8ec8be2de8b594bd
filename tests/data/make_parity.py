"""Cut ``tests/data/parity`` from the full set of goldens: ``python tests/data/make_parity.py FULL``.

Arrays of more than ``LIMIT`` elements become ``<name>__sample``, evenly spaced values; texts are compressed.
"""

import gzip
import json
import shutil
import sys
from pathlib import Path

import numpy as np

SMALL = Path(__file__).parent / 'parity'
#: Of R50 4-scale: goldens with many values of each array.
RICH = ('eval/dino_r50_4scale.npz', 'eval/dino_r50_4scale__250x333.npz', 'edge/eval_std.npz')
RICH_LIMIT, RICH_SAMPLES = 4096, 2048
#: Of every other architecture.
LIMIT, SAMPLES = 300, 128
COPIED = ('edge/post.npz',)
TEXTS = (
    'edge/train_std.json',
    'init_stats_dino_r50_4scale.json',
    'keys/*.json',
    'optim_groups/*.json',
    'recipes.json',
    'train/*.json',
    'zoo.json',
)


def sample(array: np.ndarray, count: int) -> np.ndarray:
    """``count`` values at evenly spaced flat indices, the first and last included."""
    return array.reshape(-1)[np.linspace(0, array.size - 1, count).astype(np.int64)]


def reduce(source: Path, target: Path, limit: int, count: int) -> None:
    """Write an ``.npz`` whose large arrays are sampled."""
    with np.load(source) as arrays:
        kept = {k: v for k, v in arrays.items() if v.size <= limit}
        kept |= {f'{k}__sample': sample(v, count) for k, v in arrays.items() if v.size > limit}
    np.savez_compressed(target, **kept)


def compress(source: Path, target: Path) -> None:
    """Write a JSON file without white space, compressed, the same bytes every time."""
    text = json.dumps(json.loads(source.read_text()), separators=(',', ':'))
    target.write_bytes(gzip.compress(text.encode(), mtime=0))


def main(full: Path) -> None:
    """Make the small set anew."""
    shutil.rmtree(SMALL, ignore_errors=True)
    for pattern in (*COPIED, 'cdn/*', 'eval/*.npz', *RICH, *TEXTS):
        for source in sorted(full.glob(pattern)):
            target = SMALL / source.relative_to(full)
            target.parent.mkdir(parents=True, exist_ok=True)
            name = source.relative_to(full).as_posix()
            if pattern in TEXTS:
                compress(source, target.with_name(f'{target.name}.gz'))
            elif pattern in COPIED or pattern == 'cdn/*':
                target.write_bytes(source.read_bytes())
            elif name in RICH:
                reduce(source, target, RICH_LIMIT, RICH_SAMPLES)
            else:
                reduce(source, target, LIMIT, SAMPLES)


if __name__ == '__main__':
    main(Path(sys.argv[1]))
