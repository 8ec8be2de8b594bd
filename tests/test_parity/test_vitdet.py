"""ViTDet and EVA-01 equal detrex's."""

import pytest
import torch
from parity import golden, rule_state
from parity_backbones import assert_equals_golden, load_by_rule
from torch import nn

from dino_mm.checkpoints.backbones.vitdet import DETREX
from dino_mm.checkpoints.names import convert
from dino_mm.registry import MODELS

NETS = {
    'dino_vitdet_base_4scale': dict(),
    'dino_vitdet_large_4scale': dict(
        embed_dims=1024, depth=24, num_heads=16, global_attn_indexes=(5, 11, 17, 23), drop_path_rate=0.4
    ),
    'dino_eva_01_4scale': dict(
        embed_dims=1408,
        depth=40,
        num_heads=16,
        mlp_ratio=6144 / 1408,
        img_size=1280,
        window_size=16,
        global_attn_indexes=tuple(range(3, 40, 4)),
        drop_path_rate=0.6,
        key_bias=False,
        frozen_stages=0,
    ),
}


def build(arch: str) -> nn.Module:
    net = dict(type='dino_mm.ViTDet', **NETS[arch])
    channels = net.get('embed_dims', 768)
    return MODELS.build(dict(type='dino_mm.SimpleFeaturePyramid', backbone=net, in_channels=channels))


@pytest.mark.parametrize(
    'arch', ['dino_vitdet_base_4scale', pytest.param('dino_vitdet_large_4scale', marks=pytest.mark.slow)]
)
def test_features(arch: str) -> None:
    backbone = build(arch)
    load_by_rule(backbone, arch, DETREX)
    assert_equals_golden(backbone, arch)


@pytest.mark.slow
def test_features_of_eva() -> None:
    """A billion parameters, 9 GB: the model is built without memory of its own, and takes over the rule's tensors."""
    arch, prefix = 'dino_eva_01_4scale', 'backbone.'
    with torch.device('meta'):
        backbone = build(arch).eval()
    tensors = {name.removeprefix(prefix): tensor for name, tensor in rule_state(arch, prefix).items()}
    backbone.load_state_dict(convert(DETREX, tensors, backbone.state_dict()).tensors, assign=True)
    del tensors
    assert_equals_golden(backbone, arch)


def test_eva_trains_what_detrex_trains() -> None:
    with torch.device('meta'):
        backbone = build('dino_eva_01_4scale')
    frozen = [f'backbone.{name}' for name, parameter in backbone.named_parameters() if not parameter.requires_grad]
    assert sorted(frozen) == sorted(golden('keys/dino_eva_01_4scale.json')['frozen_parameters'])
