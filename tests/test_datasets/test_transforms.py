"""Resizing equals detectron2's and Pillow's; the training pipeline gives what the head needs."""

import copy
import random
from fractions import Fraction
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from conftest import build_detector, tiny_model_cfg
from hypothesis import given
from hypothesis import strategies as st
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.registry import TRANSFORMS, init_default_scope
from PIL import Image

import dino_mm
from dino_mm.datasets.transforms import shortest_edge_size


def build(**more):
    init_default_scope('mmdet')
    return TRANSFORMS.build(dict(type='dino_mm.ResizeShortestEdge') | more)


def test_resize_is_its_second_name_in_our_scope_alone() -> None:
    init_default_scope('mmdet')
    ours = TRANSFORMS.build(dict(type='Resize', _scope_='dino_mm', scale=(25, 1000)))
    assert type(ours) is dino_mm.ResizeShortestEdge
    mmdets = TRANSFORMS.build(dict(type='Resize', scale=(25, 1000), keep_ratio=True))
    assert type(mmdets).__module__ == 'mmdet.datasets.transforms.transforms'


@given(height=st.integers(1, 3000), width=st.integers(1, 3000), shorter=st.integers(100, 900))
def test_size_keeps_shape_and_limits(height: int, width: int, shorter: int) -> None:
    new_width, new_height = shortest_edge_size(height, width, shorter, 1333)
    exact = min(Fraction(shorter, min(height, width)), Fraction(1333, max(height, width)))
    for new, old in ((new_height, height), (new_width, width)):
        assert new >= 1
        assert abs(new - max(exact * old, 1)) <= Fraction(1, 2) + Fraction(1, 1000)


@pytest.mark.parametrize(
    ('height', 'width', 'shorter', 'limit', 'expected'),
    [
        (480, 640, 800, 1333, (1067, 800)),
        (640, 480, 800, 1333, (800, 1067)),
        (427, 640, 800, 1333, (1199, 800)),
        (300, 1000, 800, 1333, (1333, 400)),
        (500, 500, 600, 100000, (600, 600)),
        (100, 1000, 600, 100000, (6000, 600)),
        (1, 3000, 800, 1333, (1333, 1)),
        (9000, 3, 800, 1333, (1, 1333)),
    ],
)
def test_sizes_of_known_images(height, width, shorter, limit, expected) -> None:
    assert shortest_edge_size(height, width, shorter, limit) == expected


def test_pixels_are_pillows_and_boxes_follow() -> None:
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    resize = build(scale=(25, 1000))
    result = resize(dict(img=image, img_shape=(50, 70), gt_bboxes=np.float32([[10, 20, 30, 45]])))
    assert result['img_shape'] == (25, 35)
    assert result['scale_factor'] == (0.5, 0.5)
    np.testing.assert_array_equal(result['img'], np.array(Image.fromarray(image).resize((35, 25), Image.BILINEAR)))
    np.testing.assert_allclose(result['gt_bboxes'], [[5, 10, 15, 22.5]])


@pytest.mark.parametrize('backend', ['pillow', 'cv2'])
@pytest.mark.parametrize('shape', [(1, 3000), (3000, 1)])
def test_extreme_images_keep_a_pixel(shape: tuple[int, int], backend: str) -> None:
    resize = build(scale=(800, 1333), backend=backend)
    image = np.zeros((*shape, 3), np.uint8)
    result = resize(dict(img=image, img_shape=shape, gt_bboxes=np.float32([[0, 0, shape[1], shape[0]]])))
    assert result['img'].shape == (*result['img_shape'], 3)
    assert sorted(result['img_shape']) == [1, 1333]
    np.testing.assert_allclose(result['gt_bboxes'], [[0, 0, *result['img_shape'][::-1]]], rtol=1e-6)


@pytest.mark.parametrize('shape', [(1, 3000), (3000, 1), (1, 1)])
def test_extreme_images_are_trained_on_and_predicted(shape: tuple[int, int], tmp_path: Path) -> None:
    """By the recipe of COCO, with its crops, beside an image as others are."""
    height, width = shape
    init_default_scope('mmdet')
    cfg = Config.fromfile(dino_mm.cfg('dino-resnet/dino_r50_4scale_12ep.py'))
    samples = []
    for number, (rows, columns) in enumerate([shape, (60, 80)]):
        path = tmp_path / f'{number}.png'
        Image.fromarray(np.full((rows, columns, 3), 99, np.uint8)).save(path)
        box = dict(bbox=[0, 0, columns, rows], bbox_label=1, ignore_flag=0)
        samples.append(dict(img_path=str(path), img_id=number, instances=[box]))
    model = build_detector(tiny_model_cfg()).float()
    pipeline, found = Compose(cfg.train_dataloader.dataset.pipeline), set()
    for seed in range(6):
        random.seed(seed)
        np.random.seed(seed)
        found.add(min(pipeline(copy.deepcopy(samples[0]))['inputs'].shape[1:]))
    assert (min(found) == 1) == (max(shape) > 1)  # the branch without a crop is among them
    batch = pseudo_collate([pipeline(copy.deepcopy(sample)) for sample in samples])
    losses = model(**model.data_preprocessor(batch, True), mode='loss')
    sum(losses.values()).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())
    with torch.no_grad():
        batch = pseudo_collate([Compose(cfg.test_dataloader.dataset.pipeline)(sample) for sample in samples])
        boxes = model.eval().test_step(batch)[0].pred_instances.bboxes
    assert boxes.shape == (10, 4)
    assert ((boxes >= 0) & (boxes <= torch.tensor([width, height] * 2))).all()


@pytest.mark.parametrize('interpolation', ['nearest', 'bilinear', 'bicubic', 'lanczos'])
@pytest.mark.parametrize('backend', ['pillow', 'cv2'])
@pytest.mark.parametrize('short', [25, 90])
def test_floats_are_resized_as_bytes_are(short: int, backend: str, interpolation: str) -> None:
    """But for the rounding of bytes, and overshoots that bytes cut off; fractions and values below zero remain."""
    image = np.random.default_rng(0).integers(60, 190, (50, 70, 3), dtype=np.uint8)
    resize = build(scale=(short, 1000), backend=backend, interpolation=interpolation)
    of_bytes, of_floats, of_shifted = (
        resize(dict(img=i, img_shape=(50, 70))) for i in (image, image.astype(np.float32), image / np.float32(4) - 40)
    )
    assert of_bytes['img'].dtype == np.uint8
    assert of_floats['img'].dtype == of_shifted['img'].dtype == np.float32
    # Both libraries round twice for bytes, once for each axis.
    np.testing.assert_allclose(of_floats['img'].clip(0, 255), of_bytes['img'], rtol=0, atol=1.5)
    np.testing.assert_allclose(of_shifted['img'], of_floats['img'] / 4 - 40, atol=1e-3)
    for key in ('img_shape', 'scale', 'scale_factor', 'keep_ratio'):
        assert of_floats[key] == of_bytes[key]


@pytest.mark.parametrize('dtype', [np.float64, np.float32, np.uint16])
@pytest.mark.parametrize('channels', [(), (1,), (2,), (3,), (4,)])
def test_any_number_of_channels_is_resized(channels: tuple[int, ...], dtype: type) -> None:
    """A plane that rises evenly goes on doing so."""
    rows = np.arange(40, dtype=dtype).reshape(40, *[1] * (1 + len(channels)))
    image = np.broadcast_to(rows * 1000, (40, 60, *channels))
    result = build(scale=(20, 1000))(dict(img=image, img_shape=(40, 60)))['img']
    assert result.shape == (20, 30, *channels)
    assert result.dtype == np.float32
    inner = (np.arange(20) * 2000 + 500).reshape(20, *[1] * (1 + len(channels)))
    np.testing.assert_allclose(result[2:-2], np.broadcast_to(inner, result.shape)[2:-2], rtol=1e-5)


@pytest.mark.parametrize('backend', ['pillow', 'cv2'])
@pytest.mark.parametrize('change', ['none', 'to_float32', 'distorted before', 'distorted after'])
def test_training_pipeline_takes_floats(change: str, backend: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes, boxes and types are as without the change; without a distortion, so are the pixels."""
    monkeypatch.setenv('IMAGE_BACKEND', backend)
    init_default_scope('mmdet')
    pipeline = Config.fromfile(dino_mm.cfg('dino-resnet/dino_r50_4scale_12ep.py')).train_dataloader.dataset.pipeline
    changed = [dict(step) for step in pipeline]
    changed[0] |= dict(to_float32=change != 'none')
    if change.startswith('distorted'):
        changed.insert(2 if change.endswith('before') else 4, dict(type='PhotoMetricDistortion'))
    pixels = cv2.GaussianBlur(np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8), (0, 0), 4)
    Image.fromarray(pixels).save(tmp_path / 'a.png')
    boxes = [[10, 20, 60, 90], [100, 100, 310, 230]]
    instances = [dict(bbox=b, bbox_label=i, ignore_flag=0) for i, b in enumerate(boxes)]
    cropped = 0
    for seed in range(12):
        packed = []
        for steps in (pipeline, changed):
            random.seed(seed)
            np.random.seed(seed)
            sample = dict(img_path=str(tmp_path / 'a.png'), img_id=3, instances=instances)
            packed.append(Compose(steps)(sample))
        plain, floats = packed
        assert floats['inputs'].dtype == (torch.uint8 if change == 'none' else torch.float32)
        assert torch.isfinite(floats['inputs'].float()).all()
        assert floats['inputs'].shape[1:] == floats['data_samples'].img_shape
        assert min(floats['data_samples'].img_shape) in range(480, 801, 32)
        assert floats['inputs'].float().std() > 1
        if not change.startswith('distorted'):
            torch.testing.assert_close(floats['inputs'].float(), plain['inputs'].float(), atol=2.5, rtol=0)
            boxes_found, boxes_expected = (p['data_samples'].gt_instances.bboxes.tensor for p in (floats, plain))
            assert torch.equal(boxes_found, boxes_expected)
        cropped += floats['data_samples'].img_shape[0] * 4 != floats['data_samples'].img_shape[1] * 3
    assert cropped  # both branches are taken


def test_training_pipeline_of_the_r50_config(tmp_path) -> None:
    """50 draws: sizes are detrex's, boxes stay inside and keep an area, all paths are taken."""
    init_default_scope('mmdet')
    cfg = Config.fromfile(dino_mm.cfg('dino-resnet/dino_r50_4scale_12ep.py'))
    pipeline = Compose([TRANSFORMS.build(t) for t in cfg.train_dataloader.dataset.pipeline])
    pixels = np.random.default_rng(0).integers(0, 256, (240, 320, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'a.png')
    random.seed(0)
    np.random.seed(0)
    sizes, flips, counts = set(), set(), set()
    for _ in range(50):
        boxes = [[10, 20, 60, 90], [100, 100, 310, 230], [0, 0, 8, 8]]
        instances = [dict(bbox=b, bbox_label=i, ignore_flag=0) for i, b in enumerate(boxes)]
        packed = pipeline(dict(img_path=str(tmp_path / 'a.png'), img_id=3, instances=instances))
        sample = packed['data_samples']
        height, width = sample.img_shape
        assert packed['inputs'].shape == (3, height, width)
        gts = sample.gt_instances.bboxes.tensor
        assert ((gts[:, 2:] - gts[:, :2]) > 1e-5).all()
        assert (gts >= 0).all()
        assert (gts[:, 2] <= width).all()
        assert (gts[:, 3] <= height).all()
        assert len(gts) == len(sample.gt_instances.labels)
        sizes.add(min(height, width))
        flips.add(sample.flip)
        counts.add(len(gts))
    # Not even the widest crop, 384 x 600, passes 1333 at the shorter edge 800.
    assert sizes <= set(range(480, 801, 32))
    assert len(sizes) > 5
    assert flips == {True, False}
    assert max(counts) == 3
    assert min(counts) < 3  # some crops lose a box


@pytest.mark.parametrize('backend', ['pillow', 'cv2'])
def test_one_variable_switches_decoding_and_resizing(backend: str, tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv('IMAGE_BACKEND', backend)
    init_default_scope('mmdet')
    cfg = Config.fromfile(dino_mm.cfg('dino-swin/dino_swin_tiny_224_4scale_12ep.py'))
    assert cfg.image_backend == backend
    pixels = np.random.default_rng(0).integers(0, 256, (1600, 1600, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / 'a.png')
    expected = {
        'pillow': lambda: np.array(Image.fromarray(pixels).resize((800, 800), Image.BILINEAR)),
        'cv2': lambda: cv2.resize(pixels, (800, 800), interpolation=cv2.INTER_LINEAR),
    }[backend]()
    pipeline = Compose(cfg.test_dataloader.dataset.pipeline)
    image = pipeline(dict(img_path=str(tmp_path / 'a.png'), img_id=3, instances=[]))['inputs']
    np.testing.assert_array_equal(image.numpy()[::-1], expected.transpose(2, 0, 1))  # BGR to RGB

    branches = Compose(cfg.train_dataloader.dataset.pipeline).transforms[3].transforms
    resizes = [step.resize for branch in branches for step in branch.transforms if hasattr(step, 'resize')]
    assert [resize.backend for resize in resizes] == [backend] * 3
