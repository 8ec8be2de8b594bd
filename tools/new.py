"""Make a project that fine-tunes a model on your data: ``dino-mm new PROJECT --data DIR``."""

import argparse
from pathlib import Path

import dino_mm  # noqa: F401  (first, for it says what does not fit)

# isort: split
import torch

from dino_mm.projects import make_project
from dino_mm.projects.errors import ProjectError


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('project', type=Path, metavar='PROJECT', help='folder to make')
    add('--data', type=Path, required=True, metavar='DIR', help='pictures with COCO JSON, YOLO or Pascal VOC labels')
    add('--model', default='dino_r50_4scale_12ep', help='model of the zoo (%(default)s)')
    add('--classes', nargs='+', metavar='NAME', help="names of the labels, in order; the data's own by default")
    add('--epochs', type=positive, help='12 to 100 by default, fewer for more images')
    add('--image-size', type=positive, help="shorter edge in pixels; the recipe's by default")
    add('--batch-size', type=positive, help="images of each GPU; the recipe's by default")
    add('--gpus', type=positive, default=max(1, torch.cuda.device_count()), help='those found by default, 1 on a CPU')
    add('--seed', type=int, default=0, help='of the validation set, where the data have none (%(default)s)')
    return parser.parse_args()


def positive(text: str) -> int:
    """A whole number from 1 on."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f'{number} is not a whole number from 1 on')
    return number


def main() -> None:
    """Make the project, and tell what was found."""
    options = vars(parse_args())
    try:
        project = make_project(options.pop('project'), **options)
    except (ProjectError, OSError) as error:  # an unknown model is one of the latter
        raise SystemExit(f'error: {error}') from None
    print(project.report)
    print(f'written: {project.config}\ntrain it: {project.command}')


if __name__ == '__main__':
    main()
