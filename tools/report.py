"""Report what went wrong in a test: ``dino-mm report PREDICTIONS --ann FILE --images DIR --out DIR``."""

import argparse
from pathlib import Path

import dino_mm  # noqa: F401  (first, for it says what does not fit)

# isort: split
from dino_mm.datasets.coco_file import read_coco_file, require_annotation_file
from dino_mm.datasets.coco_rules import AnnotationError
from dino_mm.evaluation.report import analyse
from dino_mm.visualization.report_page import writable_folder, write_report


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'predictions',
        metavar='PREDICTIONS',
        type=Path,
        help="boxes in COCO's result format (.json), as `dino-mm test ... --report` writes them",
    )
    parser.add_argument('--ann', required=True, metavar='FILE', help='COCO annotation file of the test')
    parser.add_argument('--images', required=True, metavar='DIR', help='folder of the pictures')
    parser.add_argument('--out', required=True, metavar='DIR', help='folder of the report')
    parser.add_argument('--classes', nargs='+', metavar='NAME', help="names of the classes; by default the file's own")
    parser.add_argument(
        '--curve', type=Path, metavar='SCALARS.json', help='vis_data/scalars.json of the training, to draw its curve'
    )
    return parser.parse_args()


def main() -> None:
    """Analyse, write, and print the figures that matter."""
    args = parse_args()
    try:
        require_annotation_file(args.ann, '--ann')
        writable_folder(args.out)
        file = read_coco_file(args.ann, needs_annotations=False)
        analysis = analyse(args.predictions, file, args.images, args.classes)
        page = write_report(analysis, args.out, args.curve)
    except (AnnotationError, OSError) as error:
        raise SystemExit(f'error: {error}') from None
    print(', '.join(f'{name} {value:.3f}' for name, value in analysis.summary.items()))
    print(f'report: {page}')


if __name__ == '__main__':
    main()
