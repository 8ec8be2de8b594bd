"""Resizing equals detectron2's and Pillow's; the training pipeline gives what the head needs."""

import random
from fractions import Fraction

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mmcv.transforms import Compose
from mmengine.config import Config
from mmengine.registry import TRANSFORMS, init_default_scope
from PIL import Image

import dino_mm
from dino_mm.datasets.transforms import shortest_edge_size


@given(height=st.integers(1, 3000), width=st.integers(1, 3000), shorter=st.integers(100, 900))
def test_size_keeps_shape_and_limits(height: int, width: int, shorter: int) -> None:
    new_width, new_height = shortest_edge_size(height, width, shorter, 1333)
    exact = min(Fraction(shorter, min(height, width)), Fraction(1333, max(height, width)))
    assert abs(new_height - exact * height) <= Fraction(1, 2) + Fraction(1, 1000)
    assert abs(new_width - exact * width) <= Fraction(1, 2) + Fraction(1, 1000)


@pytest.mark.parametrize(
    ('height', 'width', 'shorter', 'limit', 'expected'),
    [
        (480, 640, 800, 1333, (1067, 800)),
        (640, 480, 800, 1333, (800, 1067)),
        (427, 640, 800, 1333, (1199, 800)),
        (300, 1000, 800, 1333, (1333, 400)),
        (500, 500, 600, 100000, (600, 600)),
        (100, 1000, 600, 100000, (6000, 600)),
    ],
)
def test_sizes_of_known_images(height, width, shorter, limit, expected) -> None:
    assert shortest_edge_size(height, width, shorter, limit) == expected


def test_pixels_are_pillows_and_boxes_follow() -> None:
    init_default_scope('mmdet')
    image = np.random.default_rng(0).integers(0, 256, (50, 70, 3), dtype=np.uint8)
    resize = TRANSFORMS.build(dict(type='dino_mm.ResizeShortestEdge', scale=(25, 1000)))
    result = resize(dict(img=image, img_shape=(50, 70), gt_bboxes=np.float32([[10, 20, 30, 45]])))
    assert result['img_shape'] == (25, 35)
    assert result['scale_factor'] == (0.5, 0.5)
    np.testing.assert_array_equal(result['img'], np.array(Image.fromarray(image).resize((35, 25), Image.BILINEAR)))
    np.testing.assert_allclose(result['gt_bboxes'], [[5, 10, 15, 22.5]])


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
