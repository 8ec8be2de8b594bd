"""DCNv3 against its formula, InternImage's contract as a backbone."""

import math
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_mm.models.backbones.internimage import InternImage
from dino_mm.models.layers import dcnv3
from dino_mm.models.layers.dcnv3 import DCNv3, sampling_grid
from dino_mm.registry import MODELS


def randomize(module: nn.Module) -> nn.Module:
    """Draw all parameters, so that offsets and weights differ from point to point."""
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.5)
    return module


def dcnv3_by_loops(layer: DCNv3, x: Tensor, offset_scale: float) -> Tensor:
    """InternImage, equation 2: y(p0) = sum over g, k of m_gk x_g(p0 + p_k + dp_gk), between the projections."""
    value, query = layer.input_proj(x), layer.depthwise(x)
    bs, dim = len(x), x.shape[-1]
    output = torch.zeros(bs, *query.shape[1:3], dim, dtype=x.dtype)
    per_group = dim // layer.groups
    for b, i, j, g in product(range(bs), range(query.shape[1]), range(query.shape[2]), range(layer.groups)):
        offsets = layer.offset(query[b, i, j]).view(layer.groups, 9, 2)[g]
        weights = layer.mask(query[b, i, j]).view(layer.groups, 9)[g].softmax(0)
        channels = slice(g * per_group, (g + 1) * per_group)
        for k, (dx, dy) in enumerate(product((-1, 0, 1), (-1, 0, 1))):
            px = j + offset_scale * (dx + offsets[k, 0].item())
            py = i + offset_scale * (dy + offsets[k, 1].item())
            output[b, i, j, channels] += weights[k] * bilinear(value[b, :, :, channels], px, py)
    return layer.output_proj(output)


def bilinear(feature: Tensor, px: float, py: float) -> Tensor:
    """Value of ``feature`` (height, width, dim) at pixel (px, py), counted from the centre of the first; 0 outside."""
    height, width, dim = feature.shape
    total = torch.zeros(dim, dtype=feature.dtype)
    for y, x in product((math.floor(py), math.floor(py) + 1), (math.floor(px), math.floor(px) + 1)):
        if 0 <= y < height and 0 <= x < width:
            total += (1 - abs(py - y)) * (1 - abs(px - x)) * feature[y, x]
    return total


@pytest.mark.parametrize('groups', [1, 3])
@pytest.mark.parametrize('offset_scale', [1.0, 2.0])
def test_dcnv3_is_its_formula(groups: int, offset_scale: float) -> None:
    layer = randomize(DCNv3(6, groups).double())
    x = torch.randn(2, 4, 5, 6, dtype=torch.float64)
    with torch.no_grad():
        output = layer(x, sampling_grid(x, offset_scale))
        expected = dcnv3_by_loops(layer, x, offset_scale)
    torch.testing.assert_close(output, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(('height', 'width'), [(1, 1), (5, 4), (7, 9)])
def test_dcnv3_starts_as_a_mean(height: int, width: int) -> None:
    layer = DCNv3(8, 2).double()
    x = torch.randn(1, height, width, 8, dtype=torch.float64)
    value = layer.input_proj(x).permute(0, 3, 1, 2)
    mean = F.avg_pool2d(value, 3, 1, padding=1).permute(0, 2, 3, 1)
    torch.testing.assert_close(layer(x, sampling_grid(x)), layer.output_proj(mean), rtol=0, atol=1e-12)


def test_points_are_counted_column_by_column() -> None:
    grid = sampling_grid(torch.zeros(1, 3, 4, 1), offset_scale=2.0)
    size = torch.tensor([4.0, 3.0])
    expected = [[x, y] for x in (0.5, 2.5, 4.5) for y in (-0.5, 1.5, 3.5)]
    torch.testing.assert_close(grid.points[1 * 4 + 2, 0, 0] * size, torch.tensor(expected))
    torch.testing.assert_close(grid.step * size, torch.tensor([2.0, 2.0]))
    assert grid.levels.shapes == ((3, 4),)
    assert grid.levels.shape_tensor.tolist() == [[3, 4]]
    assert grid.levels.start_index.tolist() == [0]


def test_dcnv3_refuses_groups_that_do_not_divide() -> None:
    with pytest.raises(ValueError, match='64 channels into 5 groups'):
        DCNv3(64, 5)


@pytest.mark.parametrize('how', ['autocast', 'half model'])
def test_sampling_stays_float32_in_half_precision(how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    layer = randomize(DCNv3(8, 2))
    x = torch.randn(1, 6, 7, 8)
    exact = layer(x, sampling_grid(x)).detach()
    seen = []
    sample = dcnv3.sample_levels
    monkeypatch.setattr(
        dcnv3, 'sample_levels', lambda *args: (seen.extend(arg.dtype for arg in args[:3]), sample(*args))[1]
    )
    if how == 'half model':
        layer, x = layer.bfloat16(), x.bfloat16()
    with torch.autocast('cpu', torch.bfloat16, enabled=how == 'autocast'):
        output = layer(x, sampling_grid(x))
    assert seen == [torch.float32] * 3
    assert output.dtype == torch.bfloat16
    assert (output - exact).abs().mean() < 0.05 * exact.abs().mean()


def small(**changes: object) -> InternImage:
    options = dict(channels=8, depths=(1, 2, 2, 1), groups=(1, 2, 4, 8))
    return randomize(InternImage(**{**options, **changes}))


@pytest.mark.parametrize('out_indices', [(0, 1, 2, 3), (1, 2, 3), (3,)])
@pytest.mark.parametrize(('height', 'width'), [(64, 96), (33, 47), (1, 5)])
def test_channels_and_strides(out_indices: tuple[int, ...], height: int, width: int) -> None:
    outputs = small(out_indices=out_indices)(torch.randn(2, 3, height, width))
    assert [tuple(output.shape) for output in outputs] == [
        (2, 8 * 2**i, math.ceil(height / (4 * 2**i)), math.ceil(width / (4 * 2**i))) for i in out_indices
    ]
    assert all(output.isfinite().all() and output.is_contiguous() for output in outputs)


def test_images_do_not_mix() -> None:
    backbone = small().eval().double()
    imgs = torch.randn(2, 3, 40, 52, dtype=torch.float64)
    together, alone = backbone(imgs), backbone(imgs[1:])
    for both, one in zip(together, alone, strict=True):
        torch.testing.assert_close(both[1:], one, rtol=0, atol=1e-10)


@pytest.mark.parametrize('post_norm', [False, True])
def test_checkpointing_changes_nothing(post_norm: bool) -> None:
    plain = small(post_norm=post_norm, drop_path_rate=0.3).double().train()
    saving = small(post_norm=post_norm, drop_path_rate=0.3, with_cp=True).double().train()
    saving.load_state_dict(plain.state_dict())
    imgs = torch.randn(2, 3, 33, 40, dtype=torch.float64)
    results = []
    for backbone in (plain, saving):
        torch.manual_seed(7)
        outputs = backbone(imgs)
        sum(output.square().sum() for output in outputs).backward()
        results.append([*outputs, *(parameter.grad for parameter in backbone.parameters())])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


def test_checkpointing_computes_blocks_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    sample = dcnv3.sample_levels
    monkeypatch.setattr(dcnv3, 'sample_levels', lambda *args: (calls.append(1), sample(*args))[1])
    backbone = small(with_cp=True, depths=(1, 1, 1, 1))
    sum(output.sum() for output in backbone(torch.randn(1, 3, 32, 32))).backward()
    assert len(calls) == 8
    calls.clear()
    backbone.eval()(torch.randn(1, 3, 32, 32))
    assert len(calls) == 4


@pytest.mark.parametrize('post_norm', [False, True])
def test_every_parameter_gets_a_gradient(post_norm: bool) -> None:
    backbone = small(post_norm=post_norm, out_indices=(1, 2, 3))
    sum(output.square().sum() for output in backbone(torch.randn(2, 3, 64, 64))).backward()
    without = [name for name, p in backbone.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0]
    assert not without


@pytest.mark.parametrize('frozen_stages', [-1, 0, 1, 2, 4])
def test_frozen_stages(frozen_stages: int) -> None:
    backbone = small(frozen_stages=frozen_stages)
    parts = {'patch_embed': backbone.patch_embed, **{f'stages.{i}': stage for i, stage in enumerate(backbone.stages)}}
    frozen = list(parts)[: frozen_stages + 1]
    trainable = {name for name, parameter in backbone.named_parameters() if parameter.requires_grad}
    assert trainable == {n for n, _ in backbone.named_parameters() if not n.startswith(tuple(f'{f}.' for f in frozen))}
    for mode in (True, False):
        assert backbone.train(mode) is backbone
        for name, part in parts.items():
            expected = mode and name not in frozen
            assert all(module.training is expected for module in part.modules()), name


def test_drop_path_only_in_training() -> None:
    backbone = small(drop_path_rate=0.9).double()
    plain = small().double()
    plain.load_state_dict(backbone.state_dict())
    imgs = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        expected = plain(imgs)[-1]
        torch.testing.assert_close(backbone.eval()(imgs)[-1], expected)
        assert (backbone.train()(imgs)[-1] - expected).abs().amax() > 0.1


def test_drop_path_rises_linearly() -> None:
    backbone = small(drop_path_rate=0.5)
    rates = [block.drop_path.drop_prob for stage in backbone.stages for block in stage.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4, 0.5])


def test_initialisation() -> None:
    backbone = InternImage(channels=32, depths=(1, 1, 1, 1), groups=(2, 4, 8, 16), layer_scale=0.3)
    for name, parameter in backbone.named_parameters():
        if '.offset.' in name or '.mask.' in name or name.endswith(('proj.bias', 'fc1.bias', 'fc2.bias', 'norm.bias')):
            assert (parameter == 0).all(), name
        elif '.gamma' in name:
            assert (parameter == 0.3).all(), name
        elif name.endswith('proj.weight'):
            bound = math.sqrt(6 / sum(parameter.shape))
            assert 0.95 * bound < parameter.abs().max() <= bound, name
        elif '.mlp.' in name:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.05), name
        elif name.endswith(('norm.weight', 'norm1.weight', 'norm2.weight')):
            assert (parameter == 1).all(), name


@pytest.mark.parametrize(
    ('sizes', 'num_parameters'),
    [
        (dict(), 28769520),
        (dict(channels=80, depths=(4, 4, 21, 4), groups=(5, 10, 20, 40), post_norm=True), 48502560),
        (dict(channels=112, depths=(4, 4, 21, 4), groups=(7, 14, 28, 56), post_norm=True), 94909920),
        (dict(channels=160, depths=(5, 5, 22, 5), groups=(10, 20, 40, 80), post_norm=True), 218952370),
    ],
)
def test_number_of_parameters(sizes: dict, num_parameters: int) -> None:
    with torch.device('meta'):
        backbone = MODELS.build(dict(type='dino_mm.InternImage', **sizes))
    assert all(parameter.is_meta for parameter in backbone.parameters())
    assert sum(parameter.numel() for parameter in backbone.parameters()) == num_parameters


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(groups=(1, 2)), '`groups` has 2 entries, `depths` 4'),
        (dict(out_indices=(1, 4)), r'`out_indices` \(1, 4\) must lie between 0 and 3'),
        (dict(frozen_stages=5), '`frozen_stages` is 5'),
        (dict(groups=(3, 2, 4, 8)), '8 channels into 3 groups'),
    ],
)
def test_contradictions_are_named(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        small(**changes)
