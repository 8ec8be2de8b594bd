"""The check finds every kind of difference, and a file that fails it does not stay."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from export_cases import Exported, exported_once
from PIL import Image

import dino_mm
from dino_mm import ExportError, export_detector
from dino_mm.export import formats
from dino_mm.export.check import FULL, compare
from dino_mm.export.network import ExportNetwork
from dino_mm.export.pictures import make_batch, read_pictures
from dino_mm.models import DINO


@pytest.fixture(scope='module')
def exported() -> Exported:
    return exported_once()


def moved(outputs, boxes=0.0, logits=0.0):
    found, scores, labels = outputs
    return found + boxes, (scores.double().logit() + logits).sigmoid(), labels


def without_the_best(outputs):
    return [output[:, 1:] for output in outputs]


def relabelled(outputs):
    boxes, scores, labels = outputs
    return boxes, scores, (labels + 1) % 5


#: What a file may do -> whether it may stay. The image has 160 columns: 1e-4 of them are 0.016 pixels.
FAULTS = {
    'nothing': (lambda x: x, True),
    'small steps': (lambda x: moved(x, 0.005, 5e-4), True),
    'moved boxes': (lambda x: moved(x, 0.1), False),
    'other scores': (lambda x: moved(x, 0.0, 5e-3), False),
    'a detection missing': (without_the_best, False),
    'other labels': (relabelled, False),
    'no detection': (lambda x: [output[:, :0] for output in x], False),
    'NaN': (lambda x: moved(x, torch.nan), False),
}


@pytest.mark.parametrize('fault', FAULTS.values(), ids=FAULTS.keys())
@torch.no_grad()
def test_differences_are_found(fault, exported) -> None:
    change, may_stay = fault
    network = ExportNetwork(exported.model)
    inputs, samples = make_batch(exported.model, read_pictures(None, 2), (128, 160), 2)
    result = compare(exported.model, lambda *x: change(network(*x)), inputs, samples, FULL)
    assert result.is_within(FULL) is may_stay
    assert result.sure > 0


@torch.no_grad()
def pixels_on_both_sides_of_a_tie(model: DINO, one: torch.Tensor, two: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Mixtures of two images, nearly the same, whose queries come in another order."""
    chosen = []
    with model.query_selector.register_forward_hook(lambda *args: chosen.append(args[-1].reference)):
        for _ in range(40):
            middle = (one + two) / 2
            chosen.clear()
            for image in (one, middle, two):
                model.forward_transformer(model.extract_feat(image))
            steps = [(chosen[1] - chosen[i]).abs().max() for i in (0, 2)]
            # A way that is smooth gets shorter by half; one that jumps does not.
            one, two = (one, middle) if steps[0] > steps[1] else (middle, two)
    return one, two


@pytest.mark.parametrize(('shift', 'may_stay'), [(0.0, True), (0.1, False)])
@torch.no_grad()
def test_queries_that_nearly_tie_may_change_places_and_nothing_else_may(shift, may_stay, exported) -> None:
    inputs, samples = make_batch(exported.model, read_pictures(None, 2), (128, 160), 1)
    one, two = pixels_on_both_sides_of_a_tie(exported.model, inputs, inputs.flip(3))
    assert (one - two).abs().max() < 1e-6
    network = ExportNetwork(exported.model)
    result = compare(exported.model, lambda _, sizes: moved(network(two, sizes), shift), one, samples, FULL)
    assert result.undecided > 0 or shift
    assert result.is_within(FULL._replace(share=0.0)) is may_stay


def test_a_file_that_detects_something_else_is_removed(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / 'model.onnx'
    path.write_text('an older file')
    form = formats.FORMATS['onnx']

    def load(written: Path, plan: formats.Plan):
        run = form.load(written, plan)
        return lambda *inputs: moved(run(*inputs), 1.0)

    monkeypatch.setitem(formats.FORMATS, 'onnx', form._replace(load=load))
    with pytest.raises(ExportError, match=r'^The file does not detect what the model does, and is removed\. batch 1, '):
        export_detector(exported.model, path, size=(64, 96), tell=list)
    assert path.read_text() == 'an older file'
    assert list(tmp_path.iterdir()) == [path]


def test_a_network_that_cannot_be_recorded_leaves_nothing(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_):
        raise IndexError('no such operator\nsecond line')

    form = formats.FORMATS['onnx']
    monkeypatch.setitem(formats.FORMATS, 'onnx', form._replace(write=fail))
    with pytest.raises(ExportError) as caught:
        export_detector(exported.model, tmp_path / 'm.onnx', size=(64, 96), tell=list)
    assert 'IndexError: no such operator' in str(caught.value)
    assert '\n' not in str(caught.value)
    assert not list(tmp_path.iterdir())


REFUSED = [
    (dict(format='onxx'), 'There is no format'),
    (dict(opset=15), '--opset 15: choose 16 to 20'),
    (dict(opset=21), '--opset 21'),
    (dict(dynamo=True, opset=17), '--opset 18'),
    (dict(dynamic=('depth',)), 'depth cannot be dynamic'),
    (dict(size=(16, 24)), '--size 16x24: feature maps have fewer pixels than the 12 queries'),
    (dict(format='torchscript', tensorrt_plugin=True), 'leave it out'),
    (dict(format='aoti', dynamo=True), '--dynamo is for --format onnx'),
    (dict(gridsample=False, tensorrt_plugin=True), 'goes with neither'),
    (dict(images='nowhere'), '--images nowhere is no folder'),
]


@pytest.mark.parametrize(('options', 'message'), REFUSED, ids=[message for _, message in REFUSED])
def test_what_cannot_be_is_one_line(options: dict, message: str, exported: Exported, tmp_path: Path) -> None:
    with pytest.raises(ExportError) as caught:
        export_detector(exported.model, tmp_path / 'm.onnx', **options)
    assert message in str(caught.value)
    assert '\n' not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ('options', 'missing'),
    [(dict(), 'onnxruntime'), (dict(), 'onnx'), (dict(dynamo=True, opset=18), 'onnxscript')],
)
def test_a_missing_library_has_its_command(
    options: dict, missing: str, exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, 'find_spec', lambda name: None if name == missing else find(name))
    with pytest.raises(ExportError, match=f'`pip install {missing}`'):
        export_detector(exported.model, tmp_path / 'm.onnx', **options)


def test_half_precision_is_refused_where_torch_has_none(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_, **__):
        raise RuntimeError('"slow_conv2d_cpu" not implemented for \'Half\'')

    monkeypatch.setattr(torch.nn.functional, 'linear', refuse)
    with pytest.raises(ExportError, match=r'^--half: torch .* use --device cuda, or drop --half\.$'):
        export_detector(exported.model, tmp_path / 'm.onnx', half=True)


def test_the_output_must_be_a_file_in_a_folder(exported: Exported, tmp_path: Path) -> None:
    (tmp_path / 'file').write_text('')
    (tmp_path / 'folder.onnx').mkdir()
    for path, message in (
        (tmp_path / 'file' / 'm.onnx', 'cannot be written'),
        (tmp_path / 'folder.onnx', 'is a folder'),
    ):
        with pytest.raises(ExportError, match=message):
            export_detector(exported.model, path)


def test_pictures_come_from_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match='has no picture'):
        read_pictures(tmp_path, 2)
    Image.fromarray(np.full((4, 6, 3), (200, 100, 50), np.uint8)).save(tmp_path / 'a.png')
    pictures = read_pictures(tmp_path, 2)
    assert [picture.shape for picture in pictures] == [(4, 6, 3)] * 2
    assert (pictures[0] == (50, 100, 200)).all()  # BGR
    (tmp_path / 'a.png').write_bytes(b'no picture')
    with pytest.raises(ExportError, match='Cannot read the picture'):
        read_pictures(tmp_path, 2)


def test_names_are_public() -> None:
    assert dino_mm.export_detector is export_detector
    assert dino_mm.ExportError is ExportError
