"""The formats: how each is written, and run for the check."""

import importlib.util
import json
import shutil
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..ops.deformable_sampling import Sampler, by_gathers, by_operator, by_pytorch, recorded_as
from .check import Run
from .description import Description
from .errors import ExportError
from .network import INPUTS, OUTPUTS, ExportNetwork
from .plugin import in_onnx_files, with_body

OPSETS = range(16, 21)
Example = tuple[Tensor, Tensor]


class Plan(NamedTuple):
    """What is asked for, besides the model."""

    format: str
    description: Description
    opset: int = 17
    dynamo: bool = False
    """Write ONNX by torch.export; else by a trace."""
    gridsample: bool = True
    tensorrt_plugin: bool = False

    @property
    def sampler(self) -> Sampler:
        """What the file has in place of deformable sampling."""
        if self.tensorrt_plugin:
            return by_operator
        # AOTInductor takes `grid_sample` apart; with dynamic sizes its code then keeps g++ busy for half an hour.
        return by_pytorch if self.gridsample and self.format != 'aoti' else by_gathers


class Format(NamedTuple):
    """A kind of file."""

    ending: str
    libraries: tuple[str, ...]
    """What is needed besides torch, by the name that pip knows."""
    write: Callable[[ExportNetwork, Example, Path, Plan], None]
    load: Callable[[Path, Plan], Run]


@contextmanager
def recording(network: ExportNetwork, plan: Plan) -> Iterator[None]:
    """What holds while a network is recorded, whatever the format."""
    device = next(network.parameters()).device.type
    with (
        torch.no_grad(),
        recorded_as(plan.sampler),
        torch.autocast(device, torch.float16, enabled=plan.description.half, cache_enabled=False),
        warnings.catch_warnings(),
    ):
        warnings.simplefilter('ignore')  # a trace warns of every shape, and that is what the check is for
        yield


def trace(network: ExportNetwork, example: Example, plan: Plan) -> torch.jit.ScriptModule:
    """The network as TorchScript."""
    with recording(network, plan):
        return torch.jit.trace(network, example, check_trace=False)


def export_program(network: ExportNetwork, example: Example, plan: Plan) -> torch.export.ExportedProgram:
    """The network as a program of torch.export."""
    description, dim = plan.description, torch.export.Dim.DYNAMIC
    images: dict[int, Any] = {}
    if description.batch is None:
        images[0] = dim
    if description.height is None:
        images |= {2: dim, 3: dim}
    sizes = {0: dim} if description.batch is None else None
    with recording(network, plan):
        return torch.export.export(network, example, dynamic_shapes=(images or None, sizes))


def write_torchscript(network: ExportNetwork, example: Example, path: Path, plan: Plan) -> None:
    """Write a trace."""
    entries = json.dumps(plan.description._asdict())
    torch.jit.save(trace(network, example, plan), str(path), _extra_files={'dino_mm.json': entries})


def load_torchscript(path: Path, plan: Plan) -> Run:
    """Run a trace on the device that it was written on."""
    return torch.jit.load(str(path))


def write_program(network: ExportNetwork, example: Example, path: Path, plan: Plan) -> None:
    """Write an exported program."""
    entries = json.dumps(plan.description._asdict())
    torch.export.save(export_program(network, example, plan), str(path), extra_files={'dino_mm.json': entries})


def load_program(path: Path, plan: Plan) -> Run:
    """Run an exported program."""
    return torch.export.load(str(path)).module()


def write_package(network: ExportNetwork, example: Example, path: Path, plan: Plan) -> None:
    """Compile by AOTInductor, for the processor at hand."""
    if example[0].device.type == 'cpu' and not any(map(shutil.which, ('g++', 'clang++'))):
        raise ExportError('--format aoti needs a C++ compiler on a CPU: `apt-get install g++`.')
    program = export_program(network, example, plan)
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def load_package(path: Path, plan: Plan) -> Run:
    """Run compiled code."""
    return torch._inductor.aoti_load_package(str(path))


def write_onnx(network: ExportNetwork, example: Example, path: Path, plan: Plan) -> None:
    """Write an ONNX file, its description among its metadata."""
    import onnx

    weights = sum(parameter.numel() for parameter in network.parameters()) * 4
    if weights > 1.9e9:
        raise ExportError(
            f'The model has {weights / 1e9:.1f} GB of weights, an ONNX file holds 2: choose --format exported-program.'
        )
    names: Any = dict(input_names=INPUTS, output_names=OUTPUTS, opset_version=plan.opset)
    if plan.dynamo:
        program = export_program(network, example, plan)
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            torch.onnx.export(program, (), str(path), **names, dynamo=True, external_data=False, verbose=False)
    else:
        with recording(network, plan), in_onnx_files(plan.opset):
            torch.onnx.export(network, example, str(path), **names, dynamo=False, dynamic_axes=_axes(plan))
    model = onnx.load(str(path))
    onnx.helper.set_model_props(model, plan.description.entries())
    onnx.save(model, str(path))


def _axes(plan: Plan) -> dict[str, dict[int, str]]:
    """Names of the axes that change."""
    description = plan.description
    axes: dict[str, dict[int, str]] = {name: {} for name in (*INPUTS, *OUTPUTS)}
    if description.batch is None:
        axes = {name: {0: 'batch'} for name in axes}
    if description.height is None:
        axes['images'] |= {2: 'height', 3: 'width'}
    return axes


def load_onnx(path: Path, plan: Plan) -> Run:
    """Run an ONNX file by onnxruntime, on a CPU."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4  # errors are raised too
    options.intra_op_num_threads = torch.get_num_threads()
    content: Any = str(path)
    if plan.tensorrt_plugin:
        content = with_body(onnx.load(content), plan.opset).SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=['CPUExecutionProvider'])

    def run(images: Tensor, sizes: Tensor) -> list[Tensor]:
        arrays = dict(zip(INPUTS, (images.cpu().numpy(), sizes.cpu().numpy()), strict=True))
        return [torch.from_numpy(output) for output in session.run(list(OUTPUTS), arrays)]

    return run


FORMATS = {
    'onnx': Format('.onnx', ('onnx', 'onnxruntime'), write_onnx, load_onnx),
    'torchscript': Format('.pt', (), write_torchscript, load_torchscript),
    'exported-program': Format('.pt2', (), write_program, load_program),
    'aoti': Format('.pt2', (), write_package, load_package),
}


def check_plan(plan: Plan, device: torch.device) -> None:
    """Refuse what cannot be, before anything is built.

    Raises:
        ExportError: A library is missing, or options contradict one another.
    """
    needed = FORMATS[plan.format].libraries + (('onnxscript',) if plan.dynamo else ())
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f'--format {plan.format} needs {" and ".join(missing)}: `pip install {" ".join(missing)}`.')
    if plan.format != 'onnx' and (plan.dynamo or plan.tensorrt_plugin):
        option = '--dynamo' if plan.dynamo else '--tensorrt-plugin'
        raise ExportError(f'{option} is for --format onnx, not {plan.format}: leave it out.')
    if plan.tensorrt_plugin and (plan.dynamo or not plan.gridsample):
        raise ExportError(
            '--tensorrt-plugin goes with neither --dynamo nor --gridsample off: the plugin samples by itself.'
        )
    if plan.opset not in OPSETS:
        raise ExportError(f'--opset {plan.opset}: choose {OPSETS[0]} to {OPSETS[-1]}.')
    if plan.dynamo and plan.opset < 18:
        raise ExportError(f'--dynamo writes opset 18 and newer, not {plan.opset}: give --opset 18, or drop --dynamo.')
    if plan.description.half:
        _check_half(device)


def _check_half(device: torch.device) -> None:
    """Refuse half precision where torch does not compute in it."""
    try:
        with torch.autocast(device.type, torch.float16):
            layer = torch.nn.Conv2d(3, 4, 3, device=device)
            torch.nn.functional.linear(layer(torch.zeros(1, 3, 8, 8, device=device)), torch.ones(2, 6, device=device))
    except RuntimeError as error:
        raise ExportError(
            f'--half: torch {torch.__version__} does not compute in float16 on this {device.type} '
            f'({str(error).splitlines()[0]}): use --device cuda, or drop --half.'
        ) from None
