"""Other packages use our detectors as they use MMDetection's; each test is what docs/clients.md says."""

import os
import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from commands import ROOT
from conftest import tiny_model_cfg
from detectors import CLASSES, picture_of, tiny_model, write_tiny
from mmdet.apis import inference_detector, init_detector
from mmdet.utils import register_all_modules
from mmengine.registry import init_default_scope

import dino_mm

WIDTH, HEIGHT = 112, 64


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """Config and checkpoint; a picture of noise ``image.png`` is in the current folder."""
    monkeypatch.chdir(tmp_path)
    image = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    cv2.imwrite('image.png', image)
    return write_tiny(tmp_path)


def test_sahi(tiny: tuple[Path, Path], tmp_path: Path) -> None:
    sahi = pytest.importorskip('sahi')
    from sahi.predict import get_prediction, get_sliced_prediction

    model = sahi.AutoDetectionModel.from_pretrained(
        model_type='mmdet',
        config_path=str(tiny[0]),
        model_path=str(tiny[1]),
        confidence_threshold=0.3,
        device='cpu',
    )
    (expected,) = dino_mm.predict(tiny_model(tmp_path), 'image.png')
    found = get_prediction('image.png', model).object_prediction_list
    np.testing.assert_allclose([one.bbox.to_xyxy() for one in found], expected.boxes, atol=1e-3)
    np.testing.assert_allclose([one.score.value for one in found], expected.scores, atol=1e-5)
    assert [one.category.name for one in found] == expected.names

    tiles = get_sliced_prediction('image.png', model, 64, 64, verbose=0).object_prediction_list
    (own,) = dino_mm.predict(tiny_model(tmp_path), 'image.png', tiles=64)
    assert len(own.boxes) > len(found)
    ranked = sorted(tiles, key=lambda one: -one.score.value)
    np.testing.assert_allclose([one.bbox.to_xyxy() for one in ranked], own.boxes, atol=1e-3)


@pytest.mark.parametrize('image_size', [None, 64])
def test_sahi_sets_the_size_of_every_shipped_config(image_size: int | None) -> None:
    """It looks for a transform of the type ``Resize`` and writes the size into it."""
    pytest.importorskip('sahi')
    from sahi.models.mmdet import DetInferencerWrapper

    for name in ('dino_r50_4scale_12ep', 'dino_digits'):
        init_default_scope('mmdet')
        inferencer = DetInferencerWrapper.__new__(DetInferencerWrapper)
        inferencer.image_size = image_size
        pipeline = inferencer._init_pipeline(dino_mm.get_config(name))
        shape = pipeline(picture_of([], 100, 200))['inputs'].shape
        expected = {'dino_r50_4scale_12ep': (1333, 667), 'dino_digits': (128, 64)}[name]
        assert tuple(shape) == (3, *(expected if image_size is None else (64, 32)))


def test_supervision(tiny: tuple[Path, Path]) -> None:
    sv = pytest.importorskip('supervision')
    model = init_detector(str(tiny[0]), str(tiny[1]), device='cpu')
    image = cv2.imread('image.png')
    result = inference_detector(model, image)
    detections = sv.Detections.from_mmdetection(result)
    threshold = result.pred_instances.scores[4].item()
    detections = detections[detections.confidence >= threshold]
    kept = result.pred_instances[result.pred_instances.scores >= threshold]
    assert len(detections) == len(kept) == 5
    np.testing.assert_array_equal(detections.xyxy, kept.bboxes.numpy())
    np.testing.assert_array_equal(detections.class_id, kept.labels.numpy())
    names = [model.dataset_meta['classes'][label] for label in detections.class_id]
    drawn = sv.BoxAnnotator().annotate(image.copy(), detections)
    drawn = sv.LabelAnnotator().annotate(drawn, detections, names)
    assert drawn.shape == image.shape
    assert not np.array_equal(drawn, image)

    (found,) = dino_mm.predict(model, image, score_thr=threshold)
    ours = sv.Detections(found.boxes, confidence=found.scores, class_id=found.labels)
    np.testing.assert_array_equal(ours.xyxy, detections.xyxy)
    assert found.names == names


@pytest.mark.parametrize('by_name', [True, False])
def test_the_backend_of_label_studio(tiny: tuple[Path, Path], by_name: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """It builds the model while it is imported, from two environment variables, and then asks for one picture a time.

    From the result it takes slices of one object, whose fields have a length of 1.
    """
    config = tiny[0]
    if by_name:  # a config in the backend's own folder that has one of ours as its base
        config = Path('own.py')
        model_settings = dict(tiny_model_cfg().to_dict(), _delete_=True)
        config.write_text(f"_base_ = 'dino_mm::dino_digits'\nmodel = {model_settings!r}\n")
    monkeypatch.setenv('CONFIG_FILE', str(config))
    monkeypatch.setenv('CHECKPOINT_FILE', str(tiny[1]))
    register_all_modules()
    model = init_detector(os.environ['CONFIG_FILE'], os.environ['CHECKPOINT_FILE'], device='cpu')
    labels = [name.lower() for name in model.dataset_meta.get('classes', [])]
    assert labels == list(CLASSES)

    results = []
    for item in inference_detector(model, str(Path('image.png').absolute())).pred_instances:
        boxes, label, scores = item['bboxes'], item['labels'][0], item['scores']
        if float(scores[-1]) < 0.5:
            continue
        for box in boxes:
            left, top, right, bottom = list(box)[:4]
            percent = [
                float(left) / WIDTH,
                float(top) / HEIGHT,
                float(right - left) / WIDTH,
                float(bottom - top) / HEIGHT,
            ]
            results.append((model.dataset_meta['classes'][label], float(scores[-1]), [100 * part for part in percent]))
    (expected,) = dino_mm.predict(model, 'image.png', score_thr=0.5)
    assert [name for name, _, _ in results] == expected.names
    np.testing.assert_allclose([score for _, score, _ in results], expected.scores, atol=1e-6)
    corners = [[x, y, x + w, y + h] for _, _, (x, y, w, h) in results]
    np.testing.assert_allclose(np.array(corners) / 100 * [WIDTH, HEIGHT, WIDTH, HEIGHT], expected.boxes, atol=1e-3)


def test_page_has_a_section_for_each_and_its_code_is_python() -> None:
    page = (ROOT / 'docs/clients.md').read_text()
    assert re.findall(r'^## (.+)$', page, re.MULTILINE) == ['sahi', 'supervision', 'Label Studio']
    blocks = re.findall(r'```python\n(.*?)```', page, re.DOTALL)
    assert len(blocks) >= 2
    for block in blocks:
        compile(block, 'docs/clients.md', 'exec')
