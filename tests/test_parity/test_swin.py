"""Swin backbones against the goldens of detrex."""

import pytest
from parity_backbones import assert_equals_golden, load_by_rule

from dino_mm.checkpoints.backbones.swin import ORIGINAL
from dino_mm.models.backbones.swin import SwinTransformer

TINY = dict(embed_dims=96, depths=(2, 2, 6, 2), num_heads=(3, 6, 12, 24), window_size=7)
SMALL = dict(TINY, depths=(2, 2, 18, 2))
BASE = dict(embed_dims=128, depths=(2, 2, 18, 2), num_heads=(4, 8, 16, 32), window_size=12)
LARGE = dict(embed_dims=192, depths=(2, 2, 18, 2), num_heads=(6, 12, 24, 48), window_size=12)


@pytest.mark.parametrize(
    ('arch', 'cfg', 'sizes'),
    [
        ('dino_swin_tiny_224_4scale', TINY, [(256, 320), (250, 333)]),
        ('dino_swin_small_224_4scale', SMALL, [(256, 320)]),
        pytest.param('dino_swin_base_384_4scale', BASE, [(256, 320)], marks=pytest.mark.slow),
        pytest.param('dino_swin_large_224_4scale', dict(LARGE, window_size=7), [(256, 320)], marks=pytest.mark.slow),
        pytest.param('dino_swin_large_384_4scale', LARGE, [(256, 320)], marks=pytest.mark.slow),
        pytest.param('dino_swin_large_384_5scale', LARGE, [(256, 320)], marks=pytest.mark.slow),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_backbone_equals_golden(arch, cfg, sizes):
    out_indices = (0, 1, 2, 3) if '5scale' in arch else (1, 2, 3)
    backbone = SwinTransformer(**cfg, out_indices=out_indices)
    load_by_rule(backbone, arch, ORIGINAL)
    for size in sizes:
        assert_equals_golden(backbone, arch, size)
