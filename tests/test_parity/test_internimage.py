"""InternImage equals detrex's, in float64, from detrex's names."""

import pytest
import torch
from parity import golden
from parity_backbones import assert_equals_golden, load_by_rule
from torch import Tensor

from dino_mm.checkpoints.backbones.internimage import ORIGINAL
from dino_mm.models.backbones import internimage
from dino_mm.models.backbones.internimage import InternImage
from dino_mm.models.layers.dcnv3 import SamplingGrid, sampling_grid

SIZES = {
    'tiny': dict(channels=64, depths=(4, 4, 18, 4), groups=(4, 8, 16, 32)),
    'small': dict(channels=80, depths=(4, 4, 21, 4), groups=(5, 10, 20, 40), post_norm=True),
    'base': dict(channels=112, depths=(4, 4, 21, 4), groups=(7, 14, 28, 56), post_norm=True),
    'large': dict(channels=160, depths=(5, 5, 22, 5), groups=(10, 20, 40, 80), post_norm=True, offset_scale=2.0),
}


def build(size: str) -> InternImage:
    backbone = InternImage(**SIZES[size], out_indices=(1, 2, 3))
    load_by_rule(backbone, arch(size), ORIGINAL)
    return backbone


def arch(size: str) -> str:
    return f'dino_internimage_{size}_4scale'


def references_grid(feature: Tensor, stride: int = 1, offset_scale: float = 1.0) -> SamplingGrid:
    """Our grid, rounded as that of the goldens.

    They come from the reference's PyTorch code, which keeps the grid in float32 even in a float64 model, in [0, 1]
    of the map with its padding. This alone moves an output by up to 1e-6.
    """
    grid = sampling_grid(feature, stride, offset_scale)
    height, width = feature.shape[1:3]
    padded = torch.tensor([width + 2, height + 2])
    rows, columns = torch.arange(height) + 1.5, torch.arange(width) + 1.5
    centers = torch.cartesian_prod(rows / padded[1], columns / padded[0]).flip(-1)
    taps = torch.arange(-1.0, 2.0)
    kernel = torch.cartesian_prod(taps / padded[0], taps / padded[1])
    points = centers[:, None, None, None] + kernel * offset_scale
    assert points.dtype == torch.float32
    return grid._replace(points=(points.double() * padded - 1) / (padded - 2))


@pytest.mark.parametrize('offset_scale', [1.0, 2.0])
def test_grid_is_the_references_without_its_rounding(offset_scale: float) -> None:
    feature = torch.zeros(1, 23, 40, 1, dtype=torch.float64)
    ours = sampling_grid(feature, offset_scale=offset_scale)
    expected = references_grid(feature, offset_scale=offset_scale)
    torch.testing.assert_close(ours.points, expected.points, rtol=0, atol=1.5e-7)


def test_outputs_with_our_grid() -> None:
    assert_equals_golden(build('tiny'), arch('tiny'))


@pytest.mark.parametrize(
    'size', ['tiny', 'small', *(pytest.param(size, marks=pytest.mark.slow) for size in ('base', 'large'))]
)
def test_outputs_with_the_references_grid(size: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(internimage, 'sampling_grid', references_grid)
    assert_equals_golden(build(size), arch(size))


@pytest.mark.parametrize('size', SIZES)
def test_names_and_shapes_are_the_references(size: str) -> None:
    with torch.device('meta'):
        backbone = InternImage(**SIZES[size])
    theirs = {
        name.removeprefix('backbone.'): shape
        for name, shape in golden(f'keys/{arch(size)}.json')['tensors'].items()
        if name.startswith('backbone.')
    }
    assert ORIGINAL.matches(theirs)
    assert not [name for name in theirs if ORIGINAL.why_dropped(name)]
    ours = {name: list(tensor.shape) for name, tensor in backbone.state_dict().items()}
    assert {ORIGINAL.rename(name): shape for name, shape in theirs.items()} == ours
    assert len(theirs) == len(ours)


@pytest.mark.parametrize(
    ('name', 'reason'),
    [
        ('head.weight', 'classification head'),
        ('head.bias', 'classification head'),
        ('conv_head.0.weight', 'classification head'),
        ('conv_head.1.0.running_mean', 'classification head'),
        (
            'levels.0.blocks.0.dcn.center_feature_scale_proj_weight',
            'only InternImage-H and -G mix in the centre feature',
        ),
        ('levels.0.blocks.0.dcn.mask.weight', None),
        ('levels.3.norm.0.weight', None),
    ],
)
def test_what_a_release_has_besides(name: str, reason: str | None) -> None:
    assert ORIGINAL.why_dropped(name) == reason


@pytest.mark.parametrize(
    ('theirs', 'ours'),
    [
        ('patch_embed.conv1.weight', 'patch_embed.0.conv.weight'),
        ('patch_embed.norm2.1.bias', 'patch_embed.2.norm.bias'),
        ('levels.0.blocks.3.norm1.0.weight', 'stages.0.blocks.3.norm1.weight'),
        ('levels.2.blocks.11.dcn.dw_conv.0.weight', 'stages.2.blocks.11.dcn.depthwise.0.conv.weight'),
        ('levels.2.blocks.11.dcn.dw_conv.1.1.weight', 'stages.2.blocks.11.dcn.depthwise.0.norm.weight'),
        ('levels.0.downsample.conv.weight', 'stages.1.downsample.conv.weight'),
        ('levels.2.downsample.norm.1.bias', 'stages.3.downsample.norm.bias'),
        ('levels.3.norm.0.weight', 'stages.3.norm.weight'),
        ('levels.3.blocks.0.gamma2', 'stages.3.blocks.0.gamma2'),
    ],
)
def test_rename(theirs: str, ours: str) -> None:
    assert ORIGINAL.rename(theirs) == ours
