"""Export a detector to ONNX, TorchScript, a program of torch.export or compiled code, and check the file."""

import argparse
import difflib
from pathlib import Path

import dino_mm
from dino_mm.checkpoints.errors import CheckpointError
from dino_mm.export import ExportError, export_detector
from dino_mm.export.formats import FORMATS, OPSETS
from dino_mm.settings import SettingError


def parse_args() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('model', metavar='MODEL', help='name of a shipped config, or the path of a config')
    parser.add_argument(
        '--checkpoint',
        metavar='FILE',
        help="path or address of any DINO's checkpoint, a training's folder (its best one), or `zoo`",
    )
    parser.add_argument('--out', type=Path, metavar='FILE', help='MODEL with the ending of the format by default')
    parser.add_argument('--format', type=known_format, default='onnx', metavar='|'.join(FORMATS), help='of the file')
    parser.add_argument('--dynamic', default='', metavar='batch,size', help='what changes from call to call')
    parser.add_argument('--size', type=height_and_width, metavar='HxW', help='height and width where they are fixed')
    parser.add_argument('--opset', type=int, default=17, help=f'of ONNX, {OPSETS[0]} to {OPSETS[-1]} (%(default)s)')
    parser.add_argument('--dynamo', action='store_true', help='write ONNX by torch.export instead of a trace')
    parser.add_argument('--half', action='store_true', help='convolutions and most matrix products in float16')
    parser.add_argument('--gridsample', choices=['on', 'off'], default='on', help='off: gathers instead of GridSample')
    parser.add_argument('--tensorrt-plugin', action='store_true', help="nodes of TensorRT's deformable attention")
    parser.add_argument('--images', metavar='DIR', help='pictures for the check; drawn ones by default')
    parser.add_argument('--device', default='cpu', help='where the file is written and checked (%(default)s)')
    return parser.parse_args()


def known_format(text: str) -> str:
    """A format, or an error that names the nearest."""
    if text in FORMATS:
        return text
    close = difflib.get_close_matches(text, FORMATS, 1)
    hint = f'did you mean {close[0]}?' if close else f'there are {", ".join(FORMATS)}.'
    raise argparse.ArgumentTypeError(f'there is no format {text!r}; {hint}')


def height_and_width(text: str) -> tuple[int, int]:
    """'800x1333' as numbers."""
    height, _, width = text.lower().partition('x')
    if not (height.isdigit() and width.isdigit() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f'{text!r} is no size: write HEIGHTxWIDTH, such as 800x1333.')
    return int(height), int(width)


def main() -> None:
    """Export."""
    args = parse_args()
    out = args.out or Path(f'{Path(args.model).stem}{FORMATS[args.format].ending}')
    if args.checkpoint is None:
        print('There is no --checkpoint: the file will hold random weights.')
    try:
        model = dino_mm.get_model(args.model, args.checkpoint, device=args.device)
        export_detector(
            model,
            out,
            args.format,
            dynamic=[name for name in args.dynamic.split(',') if name],
            size=args.size,
            opset=args.opset,
            dynamo=args.dynamo,
            half=args.half,
            gridsample=args.gridsample == 'on',
            tensorrt_plugin=args.tensorrt_plugin,
            images=args.images,
        )
    except (ExportError, CheckpointError, SettingError, dino_mm.UnknownConfigError) as error:
        raise SystemExit(f'error: {error}') from None


if __name__ == '__main__':
    main()
