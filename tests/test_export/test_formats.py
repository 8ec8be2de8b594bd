"""Every format gives what the detector gives, at all sizes and batches it is made for."""

import json
import re
from pathlib import Path

import onnx
import pytest
import torch
from conftest import make_samples
from export_cases import BACKBONES, NAMES, Exported, build, exported_once
from torch import Tensor

from dino_mm import export_detector
from dino_mm.export.description import describe
from dino_mm.export.formats import FORMATS, Plan
from dino_mm.export.network import ExportNetwork

BOTH = ('batch', 'size')
#: Neither those of the check, nor those that the file is made with.
SIZES = [(1, 96, 224), (3, 171, 140)]


@pytest.fixture(scope='module')
def exported() -> Exported:
    return exported_once()


def batch(bs: int, height: int, width: int) -> tuple[Tensor, Tensor]:
    """Images, all but the first with padding, and their sizes."""
    images = torch.randn(bs, 3, height, width, generator=torch.Generator().manual_seed(1))
    sizes = torch.tensor([[height - 9 * i, width - 17 * i] for i in range(bs)])
    for image, (rows, columns) in zip(images, sizes.tolist(), strict=True):
        image[:, rows:] = image[:, :, columns:] = 0
    return images, sizes


@torch.no_grad()
def assert_equal(run, model, sizes=SIZES) -> None:
    for size in sizes:
        inputs = batch(*size)
        boxes, scores, labels = run(*inputs)
        expected = ExportNetwork(model)(*inputs)
        torch.testing.assert_close(scores, expected[1], rtol=0, atol=1e-5)
        assert torch.equal(labels, expected[2])
        torch.testing.assert_close(boxes, expected[0], rtol=0, atol=1e-2)  # pixels


def loaded(path: Path, model, format: str = 'onnx', **more):
    return FORMATS[format].load(path, Plan(format, describe(model, None, BOTH, False), **more))


@torch.no_grad()
def test_the_network_gives_what_predict_gives(exported: Exported) -> None:
    images, samples = make_samples((0, 0), sizes=((96, 128), (70, 100)))
    sizes = torch.tensor([sample.img_shape for sample in samples])
    boxes, scores, labels = ExportNetwork(exported.model)(images, sizes)
    assert boxes.shape == (2, 10, 4)
    for i, sample in enumerate(exported.model.predict(images, samples, rescale=False)):
        kept = (boxes[i, :, 2:] > boxes[i, :, :2]).all(1)
        found = sample.pred_instances
        torch.testing.assert_close(boxes[i, kept], found.bboxes, rtol=0, atol=1e-3)
        torch.testing.assert_close(scores[i, kept], found.scores, rtol=0, atol=1e-6)
        assert torch.equal(labels[i, kept], found.labels)


def test_an_onnx_file_serves_all_sizes_and_batches(exported: Exported) -> None:
    assert_equal(loaded(exported.path, exported.model), exported.model)
    assert len(exported.lines) == 7
    for line in exported.lines[:6]:
        assert re.match(r'batch [12], \d+ x \d+: logits \S+, boxes \S+ of the image; \d+ detections above 0.3; ', line)
    assert exported.lines[6].startswith(f'written: {exported.path}')


def test_an_onnx_file_says_what_it_is(exported: Exported) -> None:
    model = onnx.load(exported.path)
    meta = {entry.key: json.loads(entry.value) for entry in model.metadata_props}
    assert meta == dict(
        classes=list(NAMES), mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375], channels='RGB',
        resize=dict(shorter=128, longer=200, backend='pillow'), divisor=1, queries=12,
        strides=[8, 16, 32], height=None, width=None,
        batch=None, half=False,
    )  # fmt: skip
    assert [value.name for value in model.graph.input] == ['images', 'sizes']
    assert [value.name for value in model.graph.output] == ['boxes', 'scores', 'labels']
    assert {opset.domain: opset.version for opset in model.opset_import}[''] == 17
    onnx.checker.check_model(model, full_check=True)


def test_gathers_are_no_gridsample_and_give_the_same(exported: Exported, tmp_path: Path) -> None:
    path = export_detector(exported.model, tmp_path / 'm.onnx', dynamic=BOTH, gridsample=False, opset=16, tell=list)
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    assert 'GridSample' not in kinds
    assert 'GridSample' in {node.op_type for node in onnx.load(exported.path).graph.node}
    assert_equal(loaded(path, exported.model, gridsample=False), exported.model)


def test_tensorrt_gets_a_node_for_each_layer(exported: Exported, tmp_path: Path) -> None:
    path = export_detector(exported.model, tmp_path / 'm.onnx', dynamic=BOTH, tensorrt_plugin=True, tell=list)
    model = onnx.load(path)
    producer = {output: node for node in model.graph.node for output in node.output}
    nodes = [node for node in model.graph.node if node.op_type == 'MultiscaleDeformableAttnPlugin_TRT']
    assert len(nodes) == 1 + 2  # layers of encoder and decoder
    assert not model.functions
    assert 'GridSample' not in {node.op_type for node in model.graph.node}
    for node in nodes:
        attributes = {attribute.name: onnx.helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert attributes == dict(plugin_version=b'1', plugin_namespace=b'')
        assert len(node.input) == 5
        for name in node.input[1:3]:
            assert producer[name].op_type == 'Cast'
            assert producer[name].attribute[0].i == onnx.TensorProto.INT32
    # Runs with a function in place of the plugin, whose inputs are those of the plugin.
    assert_equal(loaded(path, exported.model, tensorrt_plugin=True), exported.model)


def test_torchscript_serves_all_sizes_and_says_what_it_is(exported: Exported, tmp_path: Path) -> None:
    path = export_detector(exported.model, tmp_path / 'm.pt', 'torchscript', dynamic=BOTH, tell=list)
    assert_equal(loaded(path, exported.model, 'torchscript'), exported.model)
    extra = {'dino_mm.json': ''}
    torch.jit.load(str(path), _extra_files=extra)
    assert json.loads(extra['dino_mm.json'])['classes'] == list(NAMES)


def test_a_fixed_size_is_checked_and_others_are_named(exported: Exported, tmp_path: Path) -> None:
    lines: list[str] = []
    path = export_detector(exported.model, tmp_path / 'm.onnx', size=(96, 160), tell=lines.append)
    assert lines[0].startswith('batch 1, 96 x 160: ')
    assert lines[1].startswith('Another size, 128 x 224, is refused: ')
    assert len(lines) == 3
    shape = onnx.load(path).graph.input[0].type.tensor_type.shape.dim
    assert [dim.dim_value for dim in shape] == [1, 3, 96, 160]
    assert_equal(loaded(path, exported.model), exported.model, [(1, 96, 160)])


@pytest.mark.slow
def test_half_precision_is_in_convolutions_and_not_in_positions(exported: Exported, tmp_path: Path) -> None:
    path = export_detector(exported.model, tmp_path / 'm.onnx', size=(96, 160), half=True, tell=list)
    graph = onnx.shape_inference.infer_shapes(onnx.load(path)).graph
    types = {value.name: value.type.tensor_type.elem_type for value in (*graph.value_info, *graph.output)}
    types |= {tensor.name: tensor.data_type for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == 'Conv':
            assert types[node.output[0]] == onnx.TensorProto.FLOAT16, node.name
        if node.op_type == 'GridSample':
            assert types[node.input[1]] == onnx.TensorProto.FLOAT, node.name
    assert types['boxes'] == types['scores'] == onnx.TensorProto.FLOAT
    inputs = batch(1, 96, 160)
    _, scores, _ = loaded(path, exported.model)(*inputs)
    with torch.no_grad():
        torch.testing.assert_close(scores, ExportNetwork(exported.model)(*inputs)[1], rtol=0, atol=0.02)


@pytest.mark.slow
@pytest.mark.parametrize('format', ['exported-program', 'aoti'])
def test_programs_of_torch(format: str, exported: Exported, tmp_path: Path) -> None:
    path = export_detector(exported.model, tmp_path / 'm.pt2', format, dynamic=BOTH, tell=list)
    assert_equal(loaded(path, exported.model, format), exported.model)
    assert format == 'aoti' or 'dino_mm' not in str(torch.export.load(str(path)).graph)


@pytest.mark.slow
@pytest.mark.parametrize(('opset', 'dynamo'), [(16, False), (18, False), (19, False), (20, False), (18, True)])
def test_opsets(opset: int, dynamo: bool, exported: Exported, tmp_path: Path) -> None:
    path = export_detector(exported.model, tmp_path / 'm.onnx', dynamic=BOTH, opset=opset, dynamo=dynamo, tell=list)
    assert {entry.domain: entry.version for entry in onnx.load(path).opset_import}[''] == opset
    assert_equal(loaded(path, exported.model), exported.model)


@pytest.mark.slow
@pytest.mark.parametrize('family', list(BACKBONES))
@pytest.mark.parametrize('format', ['onnx', 'torchscript'])
def test_families(family: str, format: str, tmp_path: Path) -> None:
    model = build(family, tmp_path)
    path = export_detector(model, tmp_path / 'model', format, dynamic=BOTH, tell=list)
    assert_equal(loaded(path, model, format), model)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_sizes_of_padded_stages_stay_simple_for_torch_export(tmp_path: Path) -> None:
    """FocalNet rounds its sizes up four times in a row, which torch.export once thought about for minutes."""
    model = build('focalnet', tmp_path)
    path = export_detector(model, tmp_path / 'm.onnx', dynamic=BOTH, opset=18, dynamo=True, tell=list)
    assert_equal(loaded(path, model), model)
