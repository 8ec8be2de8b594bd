"""Detect objects on pictures and videos: ``dino-mm predict MODEL SOURCE... --weights FILE``."""

import argparse
import os
import sys
from pathlib import Path

os.environ.setdefault('OPENCV_FFMPEG_LOGLEVEL', '-8')  # quiet: damaged videos are reported in one line

import dino_mm  # noqa: F401  (first, for it says what does not fit)

# isort: split
from dino_mm.inference.command import Request, UsageError, predict_to_folder
from dino_mm.inference.outputs import FORMATS


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('model', metavar='MODEL', help='name of a model (`dino-mm models`), or path of a config')
    add(
        'sources',
        metavar='SOURCE',
        nargs='+',
        help="picture, folder, pattern such as 'data/**/*.jpg', video, address, or number of a webcam",
    )
    add(
        '--weights', required=True, help="path or address of a checkpoint, a training's folder (its best one), or 'zoo'"
    )
    add('--out', type=Path, default=Path('work_dirs/predict'), help='folder for all results (%(default)s)')
    add('--save', nargs='+', choices=FORMATS, default=[], metavar='FORMAT', help=f'also as {", ".join(FORMATS)}')
    add('--no-pictures', action='store_true', help='write no annotated pictures and videos')
    add('--score-thr', type=float, default=0.3, metavar='SCORE', help='the least score (%(default)s)')
    add('--classes', nargs='+', metavar='NAME', help='the only classes to keep; all by default')
    add('--batch-size', type=int, default=1, metavar='N', help='pictures at once (%(default)s)')
    add('--device', help='such as cpu or cuda:1; a GPU by default if there is one')
    add('--amp', action='store_true', help='run in half precision')
    add('--tiles', type=int, metavar='PIXELS', help='cut pictures into square tiles of this side, with sahi')
    add('--overlap', type=float, default=0.2, metavar='PART', help='of neighbouring tiles (%(default)s)')
    return parser.parse_args()


def main() -> int:
    """Predict."""
    options = vars(parse_args())
    options['formats'], options['pictures'] = options.pop('save'), not options.pop('no_pictures')
    try:
        return predict_to_folder(Request(**options))
    except UsageError as error:
        raise SystemExit(f'error: {error}') from None


if __name__ == '__main__':
    sys.exit(main())
