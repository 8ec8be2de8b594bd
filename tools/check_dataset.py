"""Check a COCO data set before training: ``python tools/check_dataset.py ANN IMG_DIR``; exits 1 if it has faults."""

import argparse
import sys
from pathlib import Path

from dino_mm.datasets.check import check_dataset
from dino_mm.datasets.coco_rules import AnnotationError
from dino_mm.visualization import draw_dataset


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('annotations', metavar='ANN', help='COCO annotation file')
    parser.add_argument(
        'images', metavar='IMG_DIR', nargs='?', help='folder of the pictures; without, they are not read'
    )
    parser.add_argument('--classes', nargs='+', metavar='NAME', help="names of the labels; by default the file's own")
    parser.add_argument('--pixels', action='store_true', help='decode every picture too')
    parser.add_argument('--fix', type=Path, metavar='OUT.json', help='write the annotations without their faults')
    parser.add_argument(
        '--picture', type=Path, metavar='OUT.png', help='where to draw; work_dirs/check/<name of ANN>.png by default'
    )
    return parser.parse_args()


def main() -> int:
    """Check, draw, and write a clean file if asked."""
    args = parse_args()
    try:
        check = check_dataset(args.annotations, args.images, args.classes, args.pixels)
    except (AnnotationError, OSError) as error:
        raise SystemExit(f'error: {error}') from None
    print(check.report())
    picture = args.picture or Path('work_dirs/check') / f'{Path(args.annotations).stem}.png'
    draw_dataset(check, picture)
    print(f'picture: {picture}')
    if args.fix is None:
        return int(check.has_faults)
    try:
        check.write_clean(args.fix)
    except AnnotationError as error:
        raise SystemExit(f'error: nothing is written. {error}') from None
    print(f'written: {args.fix}, repaired and without the faulty entries that the lines above name')
    return 0


if __name__ == '__main__':
    sys.exit(main())
