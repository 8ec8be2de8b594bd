"""TensorRT's plugin of deformable sampling in ONNX files, and a body for it with which other runtimes check them."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..ops import gather_sampling

NAME = 'MultiscaleDeformableAttnPlugin_TRT'
DOMAIN = 'trt.plugins'
OPERATOR = 'dino_mm::sample_levels'
#: In TensorRT since 8.4; from 10.11 on there is a second version with the same inputs.
VERSION = '1'
INPUTS = ['value', 'spatial_shapes', 'level_start_index', 'sampling_locations', 'attention_weights']


@contextmanager
def in_onnx_files(opset: int) -> Iterator[None]:
    """Have what a trace holds as our operator, ``dino_mm::sample_levels``, written as the plugin's node."""
    torch.onnx.register_custom_op_symbolic(OPERATOR, _node, opset)
    try:
        yield
    finally:
        torch.onnx.unregister_custom_op_symbolic(OPERATOR, opset)


def _node(graph: Any, value: Any, shapes: Any, starts: Any, locations: Any, weights: Any) -> Any:
    """The plugin, which wants integers of 32 bits and gives (bs, num_queries, num_heads, dim / num_heads)."""
    integers = [graph.op('Cast', x, to_i=torch.onnx.TensorProtoDataType.INT32) for x in (shapes, starts)]
    node = graph.op(
        f'{DOMAIN}::{NAME}', value, *integers, locations, weights, plugin_version_s=VERSION, plugin_namespace_s=''
    )
    return graph.op('Reshape', node, graph.op('Constant', value_t=torch.tensor([0, 0, -1])))


class _Body(nn.Module):
    def forward(self, *inputs: Tensor) -> Tensor:
        return gather_sampling.sample(*inputs)


def with_body(model: Any, opset: int) -> Any:
    """A copy of an ONNX model, for runtimes without the plugin: its nodes call a function that does what it does."""
    import onnx

    shapes, starts = torch.tensor([[4, 6], [2, 3]], dtype=torch.int32), torch.tensor([0, 24], dtype=torch.int32)
    example = (torch.randn(2, 30, 2, 3), shapes, starts, torch.rand(2, 5, 2, 2, 3, 2), torch.rand(2, 5, 2, 2, 3))
    file: Any = io.BytesIO()
    axes = {name: dict(enumerate('abcdef'[: tensor.ndim])) for name, tensor in zip(INPUTS, example, strict=True)}
    axes = {name: {i: f'{name}_{axis}' for i, axis in of.items()} for name, of in axes.items()}
    torch.onnx.export(
        _Body(), example, file, input_names=INPUTS, output_names=['output'], opset_version=opset,
        dynamic_axes=axes, dynamo=False,
    )  # fmt: skip
    graph = onnx.load_model_from_string(file.getvalue()).graph
    constants = [onnx.helper.make_node('Constant', [], [tensor.name], value=tensor) for tensor in graph.initializer]
    function = onnx.helper.make_function(
        DOMAIN, NAME, INPUTS, ['output'], [*constants, *graph.node], [onnx.helper.make_opsetid('', opset)],
        ['plugin_version', 'plugin_namespace'],
    )  # fmt: skip
    copy = onnx.ModelProto()
    copy.CopyFrom(model)
    copy.functions.append(function)
    return copy
