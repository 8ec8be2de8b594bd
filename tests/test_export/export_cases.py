"""Small detectors of all families, ready for export."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import torch
from conftest import tiny_model_cfg
from mmengine.config import Config
from timm.models import register_model
from timm.models.focalnet import _create_focalnet

import dino_mm
from dino_mm import export_detector
from dino_mm.models import DINO

NAMES = tuple('abcde')
#: (shorter edge, limit of the longer one) of the test pipeline.
EDGES = (128, 200)


@register_model
def focalnet_exported(pretrained=False, **kwargs):
    """A FocalNet smaller than any of timm's, whose sizes are not arguments."""
    sizes = dict(embed_dim=8, depths=(1, 1, 2, 1), focal_levels=(2, 2, 2, 2))
    return _create_focalnet('focalnet_tiny_lrf', pretrained, **sizes, **kwargs)


LAST_THREE = dict(out_indices=(1, 2, 3))
VIT = dict(embed_dims=16, depth=3, num_heads=2, window_size=4, img_size=128, pretrain_img_size=64)
#: Family -> backbone and the channels of its maps.
BACKBONES = {
    'resnet': (None, (8, 16, 32)),
    'swin': (
        dict(type='dino_mm.SwinTransformer', embed_dims=8, num_heads=(1, 2, 4, 8), window_size=4, **LAST_THREE),
        (16, 32, 64),
    ),
    'focalnet': (
        dict(type='dino_mm.TIMMBackbone', model_name='focalnet_exported', output_norm=dict(type='LN'), **LAST_THREE),
        (16, 32, 64),
    ),
    'convnext': (
        dict(
            type='dino_mm.TIMMBackbone',
            model_name='convnext_tiny',
            dims=(8, 16, 32, 64),
            depths=(1, 1, 2, 1),
            output_norm=dict(type='LN', eps=1e-6),
            **LAST_THREE,
        ),
        (16, 32, 64),
    ),
    'vitdet': (
        dict(
            type='dino_mm.SimpleFeaturePyramid',
            backbone=dict(type='dino_mm.ViTDet', global_attn_indexes=(1,), **VIT),
            in_channels=16,
            out_channels=8,
            num_outs=3,
        ),
        (8, 8, 8),
    ),
    'internimage': (
        dict(type='dino_mm.InternImage', channels=8, depths=(1, 1, 2, 1), groups=(1, 2, 4, 8), **LAST_THREE),
        (16, 32, 64),
    ),
}


def config_of(family: str) -> Config:
    """A config whose model is small, of five classes."""
    config = Config.fromfile(dino_mm.cfg('dino_digits'))
    config.model = tiny_model_cfg()
    backbone, channels = BACKBONES[family]
    if backbone is not None:
        config.model.backbone = backbone
    config.model.neck.in_channels = list(channels)
    config.test_dataloader.dataset.metainfo = dict(classes=NAMES)
    for transform in config.test_dataloader.dataset.pipeline:
        if transform['type'] == 'Resize':
            transform['scale'] = EDGES
    return config


def write_config(family: str, folder: Path) -> Path:
    """The config as a file."""
    path = folder / f'tiny_{family}.py'
    config_of(family).dump(path)
    return path


def build(family: str, folder: Path) -> DINO:
    """A detector with weights of which none is zero, so that its detections differ in score and place."""
    model = dino_mm.get_model(write_config(family, folder), device='cpu')
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 and 'norm' in name else 0.0, 0.2)
    return model


class Exported(NamedTuple):
    """A detector, its ONNX file for all sizes and batches, and what was told of the check."""

    model: DINO
    path: Path
    lines: list[str]
    folder: TemporaryDirectory
    """It is there as long as this is."""


@cache
def exported_once() -> Exported:
    """One of the smallest, for all tests of a session."""
    folder = TemporaryDirectory()
    model, lines = build('resnet', Path(folder.name)), []
    path = export_detector(model, Path(folder.name) / 'model.onnx', dynamic=('batch', 'size'), tell=lines.append)
    return Exported(model, path, lines, folder)
