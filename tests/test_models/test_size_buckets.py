"""Batches are padded to the smallest of a few sizes, and their samples tell so."""

import pytest
import torch
from conftest import make_samples
from mmdet.models import DetDataPreprocessor

SIZES = [(160, 160), (96, 128), (128, 96)]


def preprocessor() -> DetDataPreprocessor:
    augment = dict(type='dino_mm.PadToBuckets', sizes=SIZES)
    return DetDataPreprocessor(mean=[0, 0, 0], std=[255, 255, 255], batch_augments=[augment])


@pytest.mark.parametrize(
    ('sizes', 'expected'),
    [
        (((64, 96), (48, 64)), (96, 128)),
        (((96, 128), (96, 128)), (96, 128)),
        (((97, 20), (20, 96)), (128, 96)),
        (((97, 20), (20, 97)), (160, 160)),
    ],
)
def test_the_smallest_size_that_holds_the_batch(sizes: tuple, expected: tuple) -> None:
    samples = make_samples((1, 1), sizes=sizes)[1]
    images = [torch.full((3, *size), 255, dtype=torch.uint8) for size in sizes]
    data = preprocessor()(dict(inputs=images, data_samples=samples), training=True)
    assert data['inputs'].shape[-2:] == expected
    assert [sample.batch_input_shape for sample in data['data_samples']] == [expected] * 2
    for image, (height, width) in zip(data['inputs'], sizes, strict=True):
        assert (image[:, :height, :width] == 1).all()
        assert image.sum() == 3 * height * width


def test_a_batch_larger_than_all_is_named() -> None:
    samples = make_samples((1,), sizes=[(161, 30)])[1]
    images = [torch.zeros(3, 161, 30, dtype=torch.uint8)]
    with pytest.raises(ValueError, match=r'holds a batch of 161 x 30 .*96 x 128, 128 x 96, 160 x 160'):
        preprocessor()(dict(inputs=images, data_samples=samples), training=True)
