"""Settings and fixtures of all tests."""

import os
import random
from collections.abc import Sequence

# Processes of tests that run side by side (pytest-xdist) have one thread each.
os.environ.setdefault('OMP_NUM_THREADS', '1' if 'PYTEST_XDIST_WORKER' in os.environ else '2')

import numpy as np
import pytest
import torch
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.structures import InstanceData
from torch import Tensor

import dino_mm
from dino_mm.models import DINO
from dino_mm.registry import MODELS

torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))


@pytest.fixture(autouse=True)
def _clean_state() -> None:
    """Same random numbers in every test, whoever draws them, and no default scope left from another one."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    DefaultScope._instance_dict.clear()


@pytest.fixture
def tiny_cfg() -> Config:
    """Config of a detector small enough for logic tests: 16 channels, 3 levels, 5 classes, 12 queries."""
    return tiny_model_cfg()


def tiny_model_cfg() -> Config:
    """See :func:`tiny_cfg`."""
    cfg = Config(dict(model=Config.fromfile(dino_mm.cfg('dino-demo/dino_digits.py')).model))
    changes = {
        'num_queries': 12,
        'embed_dims': 16,
        'backbone.base_channels': 4,
        'neck.in_channels': [8, 16, 32],
        'neck.out_channels': 16,
        'neck.norm_cfg.num_groups': 4,
        'encoder.num_layers': 1,
        'encoder.num_heads': 2,
        'encoder.feedforward_channels': 32,
        'decoder.num_layers': 2,
        'decoder.num_heads': 2,
        'decoder.feedforward_channels': 32,
        'denoising.num_dn_queries': 6,
        'bbox_head.num_classes': 5,
        'test_cfg.max_per_img': 10,
    }
    cfg.merge_from_dict({f'model.{key}': value for key, value in changes.items()})
    return cfg.model


def make_samples(
    counts: Sequence[int], sizes: Sequence[tuple[int, int]] | None = None, ori_scale: int = 1
) -> tuple[Tensor, list[DetDataSample]]:
    """A batch of random images with ``counts[i]`` random boxes, at most 5 classes.

    Args:
        counts: Boxes of each image.
        sizes: (height, width) of each image, 64 x 96 by default; the batch is padded to the largest.
        ori_scale: The original images are so many times larger.
    """
    sizes = sizes or [(64, 96)] * len(counts)
    batch_shape = tuple(max(size[i] for size in sizes) for i in (0, 1))
    inputs, samples = torch.zeros(len(counts), 3, *batch_shape), []
    for i, (count, (height, width)) in enumerate(zip(counts, sizes, strict=True)):
        inputs[i, :, :height, :width] = torch.randn(3, height, width)
        corner = torch.rand(count, 2) * 20
        boxes = torch.cat([corner, corner + 5 + torch.rand(count, 2) * 25], 1)
        meta = dict(
            img_id=i,
            img_path=f'{i}.jpg',
            img_shape=(height, width),
            ori_shape=(height * ori_scale, width * ori_scale),
            batch_input_shape=batch_shape,
            scale_factor=(1 / ori_scale, 1 / ori_scale),
        )
        sample = DetDataSample(metainfo=meta)
        sample.gt_instances = InstanceData(bboxes=boxes, labels=torch.randint(5, (count,)))
        samples.append(sample)
    return inputs, samples


def build_detector(cfg: Config) -> DINO:
    """A detector in float64 whose head has some effect; the same random numbers come after it every time."""
    torch.manual_seed(0)
    model = MODELS.build(cfg).double()
    for parameter in model.bbox_head.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model
