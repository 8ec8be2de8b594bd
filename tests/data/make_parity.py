"""Cut ``tests/data/parity`` from the full set of goldens: ``python tests/data/make_parity.py FULL``.

Arrays of more than ``LIMIT`` elements become ``<name>__sample``, ``SAMPLES`` values at evenly spaced flat indices.
"""

import json
import shutil
import sys
from pathlib import Path

import numpy as np

SMALL = Path(__file__).parent / 'parity'
LIMIT, SAMPLES = 4096, 2048
REDUCED = ('eval/dino_r50_4scale.npz', 'eval/dino_r50_4scale__250x333.npz', 'edge/eval_std.npz')
COPIED = (
    'edge/post.npz',
    'edge/train_std.json',
    'init_stats_dino_r50_4scale.json',
    'keys/dino_r50_4scale.json',
    'optim_groups/dino_r50_4scale_12ep.json',
    'train/dino_r50_4scale.json',
)
RECIPES = ('dino-resnet/dino_r50_4scale_12ep.py',)


def sample(array: np.ndarray, count: int = SAMPLES) -> np.ndarray:
    """``count`` values at evenly spaced flat indices, the first and last included."""
    return array.reshape(-1)[np.linspace(0, array.size - 1, count).astype(np.int64)]


def reduce(source: Path, target: Path) -> None:
    """Write an ``.npz`` whose large arrays are sampled."""
    with np.load(source) as arrays:
        kept = {k: v for k, v in arrays.items() if v.size <= LIMIT}
        kept |= {f'{k}__sample': sample(v) for k, v in arrays.items() if v.size > LIMIT}
    np.savez_compressed(target, **kept)


def main(full: Path) -> None:
    """Make the small set anew."""
    shutil.rmtree(SMALL, ignore_errors=True)
    cdn = [str(path.relative_to(full)) for path in sorted((full / 'cdn').iterdir())]
    for name in (*REDUCED, *COPIED, *cdn):
        (SMALL / name).parent.mkdir(parents=True, exist_ok=True)
        (reduce if name in REDUCED else shutil.copyfile)(full / name, SMALL / name)
        (SMALL / name).chmod(0o644)
    recipes = json.loads((full / 'recipes.json').read_text())
    (SMALL / 'recipes.json').write_text(json.dumps({name: recipes[name] for name in RECIPES}, indent=1))


if __name__ == '__main__':
    main(Path(sys.argv[1]))
