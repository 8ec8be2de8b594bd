"""From a detector to a checked file."""

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from ..models.detectors.dino import DINO
from .check import FULL, HALF, Comparison, Run, compare
from .description import DYNAMIC, Description, describe, num_tokens
from .errors import ExportError
from .formats import FORMATS, Plan, check_plan
from .network import ExportNetwork
from .pictures import make_batch, read_pictures, sizes_of

Size = tuple[int, int]


def export_detector(
    model: DINO,
    path: str | Path,
    format: str = 'onnx',
    *,
    dynamic: Sequence[str] = (),
    size: Size | None = None,
    opset: int = 17,
    dynamo: bool = False,
    half: bool = False,
    gridsample: bool = True,
    tensorrt_plugin: bool = False,
    images: str | Path | None = None,
    tell: Callable[[str], None] = print,
) -> Path:
    """Write a detector to a file that needs neither dino_mm nor mmdet, and check that it detects the same.

    The file takes ``images`` (bs, 3, height, width), normalised and padded at the bottom and right, and ``sizes``
    (bs, 2) int64, (height, width) of each image without padding. It gives ``boxes`` (bs, n, 4), xyxy in pixels of
    ``images``, ``scores`` (bs, n) and ``labels`` (bs, n); n is ``max_per_img``.

    Args:
        model: As :func:`dino_mm.get_model` makes it.
        path: Of the file; nothing is there if the check fails.
        format: 'onnx', 'torchscript', 'exported-program' or 'aoti'.
        dynamic: 'batch' and 'size', what may change from call to call.
        size: (height, width) in pixels, where it is fixed; by default the shorter and the longer edge that the config
            resizes to.
        opset: Of ONNX.
        dynamo: Write ONNX by torch.export instead of a trace.
        half: Convolutions and most matrix products in float16; inputs, positions and outputs stay float32.
        gridsample: Sample feature maps by ``grid_sample``; else by gathers.
        tensorrt_plugin: Sample by TensorRT's plugin.
        images: Folder of pictures for the check; by default they are drawn.
        tell: Takes each line on the check.

    Returns:
        The path.

    Raises:
        ExportError: Something cannot be, the network cannot be recorded, or the file does not detect the same.
    """
    if format not in FORMATS:
        raise ExportError(f'There is no format {format!r}: choose {", ".join(FORMATS)}.')
    path, device = Path(path), next(model.parameters()).device
    unknown = set(dynamic) - set(DYNAMIC)
    if unknown:
        raise ExportError(f'{", ".join(sorted(unknown))} cannot be dynamic: choose of {", ".join(DYNAMIC)}.')
    description = describe(model, size, tuple(dynamic), half)
    plan = Plan(format, description, opset, dynamo, gridsample, tensorrt_plugin)
    check_plan(plan, device)
    pictures = read_pictures(None if images is None else Path(images), 2)
    with tempfile.TemporaryDirectory(dir=_writable_folder(path), prefix='.export-') as folder:
        written = Path(folder) / f'model{FORMATS[format].ending}'
        run = _write(model, written, plan, pictures)
        _check(model, run, plan, pictures, tell)
        os.replace(written, path)
    tell(f'written: {path}, {path.stat().st_size / 1e6:.1f} MB')
    return path


def _writable_folder(path: Path) -> Path:
    """The folder of ``path``, made if it is missing."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ExportError(f'{path} cannot be written ({error.strerror}): give --out another path.') from None
    if path.is_dir():
        raise ExportError(f'{path} is a folder: give --out the path of a file.')
    return path.parent


def _write(model: DINO, path: Path, plan: Plan, pictures: Sequence) -> Run:
    """Record the network, write it, and read it back."""
    sizes, batches = check_sizes(plan.description), _batches(plan.description)
    inputs, samples = make_batch(model, pictures, sizes[0], batches[-1])
    example = (inputs, sizes_of(samples).to(inputs.device))
    try:
        FORMATS[plan.format].write(ExportNetwork(model), example, path, plan)
        return FORMATS[plan.format].load(path, plan)
    except ExportError:
        raise
    except Exception as error:  # torch, onnx and onnxruntime have each their own
        raise ExportError(
            f'{plan.format} cannot hold this model, nothing is written: {_first_line(error)}. Try another --format, '
            'or fixed sizes.'
        ) from error


def _check(model: DINO, run: Run, plan: Plan, pictures: Sequence, tell: Callable[[str], None]) -> None:
    """Compare file and model at all sizes and batches it is for, and tell what it does with another size."""
    tolerance = HALF if plan.description.half else FULL
    for size in check_sizes(plan.description):
        for bs in _batches(plan.description):
            result = _compare(model, run, pictures, size, bs, plan)
            place = f'batch {bs}, {size[0]} x {size[1]}'
            if isinstance(result, str):
                raise ExportError(f'The file fails at {place} and is removed: {result}')
            tell(f'{place}: {result}')
            if not result.is_within(tolerance):
                raise ExportError(
                    f'The file does not detect what the model does, and is removed. {place}: {result}. Allowed are '
                    f'{tolerance.logits} for logits and {tolerance.boxes} for boxes. Try another --format.'
                )
    height, width = plan.description.height, plan.description.width
    if height is not None and width is not None:
        other = (height + 32, width + 64)
        result = _compare(model, run, pictures, other, 1, plan)
        place = f'Another size, {other[0]} x {other[1]}'
        if isinstance(result, str):
            tell(f'{place}, is refused: {result}')
        else:
            verdict = 'gives the same' if result.is_within(tolerance) else 'gives WRONG detections without an error'
            tell(f'{place}, {verdict}: {result}')


def _compare(model: DINO, run: Run, pictures: Sequence, size: Size, bs: int, plan: Plan) -> Comparison | str:
    """The comparison, or how the file refuses the batch."""
    inputs, samples = make_batch(model, pictures, size, bs)
    try:
        return compare(model, run, inputs, samples, HALF if plan.description.half else FULL)
    except Exception as error:
        return _first_line(error)


def check_sizes(description: Description) -> list[Size]:
    """(height, width): the fixed one, or three that no stride divides but the first's, in both orientations."""
    if description.height is not None and description.width is not None:
        return [(description.height, description.width)]
    edge = -(-(description.resize['shorter'] if description.resize else 640) // 32) * 32
    while num_tokens(edge, edge, description.strides) < description.queries:
        edge += 32
    return [(edge, edge * 5 // 4 // 32 * 32), (edge * 5 // 4 + 13, edge + 1), (edge + 7, edge * 3 // 2 + 5)]


def _batches(description: Description) -> list[int]:
    return [1, 2] if description.batch is None else [description.batch]


def _first_line(error: BaseException) -> str:
    """Of the error that was the first: torch wraps it in advice."""
    while error.__cause__ is not None:
        error = error.__cause__
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f'{type(error).__name__}: {lines[0] if lines else ""}'[:300].rstrip('. ')
