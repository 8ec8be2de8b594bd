"""Settings and fixtures of all tests."""

import os

os.environ.setdefault('OMP_NUM_THREADS', '2')

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DefaultScope

import dino_mm

torch.set_num_threads(2)


@pytest.fixture(autouse=True)
def _clean_state() -> None:
    """Same random numbers in every test, and no default scope left from another one."""
    torch.manual_seed(0)
    DefaultScope._instance_dict.clear()


@pytest.fixture
def tiny_cfg() -> Config:
    """Config of a detector small enough for logic tests: 16 channels, 3 levels, 5 classes, 12 queries."""
    return tiny_model_cfg()


def tiny_model_cfg() -> Config:
    """See :func:`tiny_cfg`."""
    cfg = Config.fromfile(dino_mm.cfg('dino-demo/dino_digits.py')).model
    cfg.merge_from_dict({
        'num_queries': 12,
        'embed_dims': 16,
        'backbone.base_channels': 4,
        'neck.in_channels': [8, 16, 32],
        'neck.out_channels': 16,
        'neck.norm_cfg.num_groups': 4,
        'positional_encoding.num_feats': 8,
        'encoder.num_layers': 1,
        'encoder.num_heads': 2,
        'encoder.feedforward_channels': 32,
        'decoder.num_layers': 2,
        'decoder.num_heads': 2,
        'decoder.feedforward_channels': 32,
        'denoising.num_dn_queries': 6,
        'bbox_head.num_classes': 5,
        'test_cfg.max_per_img': 10,
    })
    return cfg
