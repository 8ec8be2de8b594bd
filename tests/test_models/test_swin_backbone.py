"""Swin: initialisation, freezing, and what checkpoints of other implementations become."""

import copy
import math

import pytest
import timm
import torch
from mmdet.models.backbones.swin import ShiftWindowMSA
from mmdet.models.layers.transformer.utils import AdaptivePadding
from torch import nn

from dino_mm.checkpoints.backbones.swin import OPENMMLAB, ORIGINAL
from dino_mm.checkpoints.names import convert
from dino_mm.models.backbones.swin import EdgePadding, SwinTransformer, WindowAttention, use_symbolic_sizes

TINY = dict(embed_dims=8, depths=(2, 1), num_heads=(1, 2), strides=(4, 2), window_size=4, out_indices=(0, 1))
#: The original's names of what the tiny model has twice, in blocks 0 and 1 of stage 0 and block 0 of stage 1.
BLOCK = {
    'norm1.weight': 'norm1.weight',
    'norm1.bias': 'norm1.bias',
    'attn.relative_position_bias_table': 'attn.w_msa.relative_position_bias_table',
    'attn.qkv.weight': 'attn.w_msa.qkv.weight',
    'attn.qkv.bias': 'attn.w_msa.qkv.bias',
    'attn.proj.weight': 'attn.w_msa.proj.weight',
    'attn.proj.bias': 'attn.w_msa.proj.bias',
    'norm2.weight': 'norm2.weight',
    'norm2.bias': 'norm2.bias',
    'mlp.fc1.weight': 'ffn.layers.0.0.weight',
    'mlp.fc1.bias': 'ffn.layers.0.0.bias',
    'mlp.fc2.weight': 'ffn.layers.1.weight',
    'mlp.fc2.bias': 'ffn.layers.1.bias',
}
NAMES = {
    'patch_embed.proj.weight': 'patch_embed.projection.weight',
    'patch_embed.proj.bias': 'patch_embed.projection.bias',
    'patch_embed.norm.weight': 'patch_embed.norm.weight',
    'patch_embed.norm.bias': 'patch_embed.norm.bias',
    'layers.0.downsample.norm.weight': 'stages.0.downsample.norm.weight',
    'layers.0.downsample.norm.bias': 'stages.0.downsample.norm.bias',
    'layers.0.downsample.reduction.weight': 'stages.0.downsample.reduction.weight',
    **{
        f'layers.{stage}.blocks.{block}.{theirs}': f'stages.{stage}.blocks.{block}.{ours}'
        for stage, block in ((0, 0), (0, 1), (1, 0))
        for theirs, ours in BLOCK.items()
    },
}


def original_release(backbone):
    """Random tensors under the names of a classification model of the original."""
    own = backbone.state_dict()
    tensors = {theirs: torch.randn_like(own[ours]) for theirs, ours in NAMES.items()}
    for block in ('0.blocks.0', '0.blocks.1', '1.blocks.0'):
        tensors[f'layers.{block}.attn.relative_position_index'] = torch.zeros(16, 16, dtype=torch.long)
    tensors['layers.0.blocks.1.attn_mask'] = torch.zeros(4, 16, 16)
    return tensors | {'norm.weight': torch.ones(16), 'norm.bias': torch.ones(16), 'head.weight': torch.ones(10, 16)}


def test_every_tensor_of_an_original_release_is_accounted_for():
    backbone = SwinTransformer(**TINY)
    tensors, own = original_release(backbone), backbone.state_dict()
    assert ORIGINAL.matches(tensors)
    assert not OPENMMLAB.matches(tensors)
    result = convert(ORIGINAL, tensors, own)
    assert {theirs: ours for ours, theirs in result.origin.items()} == NAMES
    assert result.dropped.keys() == tensors.keys() - NAMES.keys()
    indices = {name for name in own if name.endswith('relative_position_index')}
    assert len(indices) == 3
    assert result.filled.keys() == indices | {f'norm{i}.{kind}' for i in (0, 1) for kind in ('weight', 'bias')}
    for theirs, ours in NAMES.items():
        if 'downsample' not in theirs:
            assert torch.equal(result.tensors[ours], tensors[theirs])


@pytest.mark.parametrize('size', [(6, 8), (5, 7)])
def test_patch_merging_equals_the_original(size):
    """The original, written out: four strided maps, concatenated, normalised, reduced."""
    backbone = SwinTransformer(**TINY).double()
    tensors = {name: tensor.double() for name, tensor in original_release(backbone).items()}
    result = convert(ORIGINAL, tensors, backbone.state_dict())
    backbone.load_state_dict(result.tensors, strict=False)
    height, width = size
    x = torch.randn(2, height, width, 8, dtype=torch.float64)
    actual, out_size = backbone.stages[0].downsample(x.flatten(1, 2), size)

    padded = nn.functional.pad(x, (0, 0, 0, width % 2, 0, height % 2))
    maps = [padded[:, row::2, column::2] for row, column in ((0, 0), (1, 0), (0, 1), (1, 1))]
    weight, bias = (tensors[f'layers.0.downsample.norm.{kind}'] for kind in ('weight', 'bias'))
    merged = nn.functional.layer_norm(torch.cat(maps, -1), (32,), weight, bias, eps=1e-5)
    expected = merged @ tensors['layers.0.downsample.reduction.weight'].T
    assert out_size == expected.shape[1:3]
    torch.testing.assert_close(actual, expected.flatten(1, 2))


def cubic(distance):
    """Keys' kernel with the slope of -0.75 at 1 that torch and OpenCV use."""
    a, t = -0.75, abs(distance)
    if t <= 1:
        return (a + 2) * t**3 - (a + 3) * t**2 + 1
    return a * t**3 - 5 * a * t**2 + 8 * a * t - 4 * a if t < 2 else 0.0


def resample(plane, size):
    """Bicubic resampling of one square plane: half-pixel centres, borders repeated."""
    old, scale = len(plane), len(plane) / size
    result = torch.zeros(size, size, dtype=plane.dtype)
    for i in range(size):
        for j in range(size):
            y, x = (i + 0.5) * scale - 0.5, (j + 0.5) * scale - 0.5
            for row in range(math.floor(y) - 1, math.floor(y) + 3):
                for column in range(math.floor(x) - 1, math.floor(x) + 3):
                    value = plane[min(max(row, 0), old - 1), min(max(column, 0), old - 1)]
                    result[i, j] += cubic(y - row) * cubic(x - column) * value
    return result


@pytest.mark.parametrize('scheme', [ORIGINAL, OPENMMLAB], ids=lambda scheme: scheme.title)
@pytest.mark.parametrize('window_size', [3, 6])
def test_relative_position_tables_of_another_window_are_interpolated(scheme, window_size):
    own = SwinTransformer(**dict(TINY, window_size=window_size)).double().state_dict()
    name = 'stages.1.blocks.0.attn.w_msa.relative_position_bias_table'
    table = torch.randn(7 * 7, 2, dtype=torch.float64)
    theirs = {ours: theirs for theirs, ours in NAMES.items()}[name] if scheme is ORIGINAL else name
    actual = convert(scheme, {theirs: table}, own).tensors[name]
    size = 2 * window_size - 1
    expected = [resample(table[:, head].view(7, 7), size).flatten() for head in (0, 1)]
    torch.testing.assert_close(actual, torch.stack(expected, 1))


def test_tensors_of_another_width_are_left_to_the_comparison_of_shapes():
    own = SwinTransformer(**TINY).state_dict()
    wider = SwinTransformer(**dict(TINY, embed_dims=12, num_heads=(2, 4)))
    tensors = original_release(wider)
    result = convert(ORIGINAL, tensors, own)
    for theirs, ours in NAMES.items():
        assert result.tensors[ours].shape == tensors[theirs].shape
    assert result.tensors['stages.0.downsample.norm.weight'].shape != own['stages.0.downsample.norm.weight'].shape


def test_openmmlab_names_are_ours():
    backbone = SwinTransformer(**TINY)
    tensors = {name: torch.randn(value.shape) for name, value in backbone.state_dict().items()}
    tensors |= {'head.fc.weight': torch.ones(10, 16), 'stages.0.blocks.1.attn.attn_mask': torch.zeros(4, 16, 16)}
    assert OPENMMLAB.matches(tensors)
    assert not ORIGINAL.matches(tensors)
    result = convert(OPENMMLAB, tensors, backbone.state_dict())
    parameters = {name for name, _ in backbone.named_parameters()}
    assert result.tensors.keys() == parameters
    assert all(torch.equal(result.tensors[name], tensors[name]) for name in parameters)
    assert result.dropped.keys() == tensors.keys() - parameters


def test_timm_counts_patch_merging_to_the_next_stage():
    with torch.device('meta'):
        names = timm.create_model('swin_tiny_patch4_window7_224').state_dict()
    assert 'layers.1.downsample.reduction.weight' in names
    assert not ORIGINAL.matches(names)
    assert not OPENMMLAB.matches(names)


def test_initialisation():
    backbone = SwinTransformer(embed_dims=64, depths=(2, 2), num_heads=(4, 8), strides=(4, 2), out_indices=(0, 1))
    convolution = backbone.patch_embed.projection.weight.clone()
    backbone.init_weights()
    for name, parameter in backbone.named_parameters():
        if name.startswith('patch_embed.projection.'):
            continue
        if name.endswith('.bias'):
            assert (parameter == 0).all(), name
        elif parameter.ndim == 1:
            assert (parameter == 1).all(), name
        else:
            # Within four standard errors, of the mean and of the standard deviation.
            count = math.sqrt(parameter.numel())
            assert parameter.mean().item() == pytest.approx(0, abs=4 * 0.02 / count), name
            assert parameter.std().item() == pytest.approx(0.02, rel=4 / count / math.sqrt(2)), name
    assert torch.equal(backbone.patch_embed.projection.weight, convolution)


def test_pretrained_weights_go_through_mmengine(tmp_path):
    """So that hooks before loading see them; mmdet's own way takes only what begins with `backbone.`."""
    source = SwinTransformer(**TINY)
    torch.save(source.state_dict(), tmp_path / 'swin.pth')
    backbone = SwinTransformer(**TINY, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'swin.pth')))
    seen = []
    backbone.register_load_state_dict_pre_hook(lambda module, state, *_: seen.append(set(state)))
    backbone.init_weights()
    assert seen == [set(source.state_dict())]
    for name, tensor in backbone.state_dict().items():
        assert torch.equal(tensor, source.state_dict()[name]), name


def test_an_original_release_loads_by_init_cfg(tmp_path):
    tensors = original_release(SwinTransformer(**TINY))
    torch.save({'model': tensors}, tmp_path / 'swin.pth')
    backbone = SwinTransformer(**TINY, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'swin.pth')))
    backbone.init_weights()
    expected = convert(ORIGINAL, tensors, backbone.state_dict()).tensors
    for name, parameter in backbone.named_parameters():
        output_norm = float(name.endswith('weight')) * torch.ones_like(parameter)
        assert torch.equal(parameter, expected.get(name, output_norm)), name


@pytest.mark.parametrize('key', ['pretrained', 'convert_weights'])
def test_other_ways_to_load_weights_are_refused(key):
    with pytest.raises(TypeError, match=rf'^`{key}` .* `init_cfg='):
        SwinTransformer(**TINY, **{key: None})


@pytest.mark.parametrize(
    ('frozen_stages', 'prefixes'),
    [
        (-1, ()),
        (0, ('patch_embed.', 'drop_after_pos.')),
        (1, ('patch_embed.', 'drop_after_pos.', 'stages.0.', 'norm0.')),
    ],
)
def test_frozen_stages(frozen_stages, prefixes):
    backbone = SwinTransformer(**TINY, frozen_stages=frozen_stages, drop_path_rate=0.5)
    for model in (backbone, backbone.train()):
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        assert frozen == {name for name, _ in backbone.named_parameters() if name.startswith(prefixes)}
        for name, module in model.named_modules():
            assert module.training != f'{name}.'.startswith(prefixes), name


def test_a_copy_with_checkpointing_is_independent():
    """As averaging hooks make one: its blocks must not run the original's."""
    backbone = SwinTransformer(**TINY, with_cp=True)
    copied = copy.deepcopy(backbone)
    for parameter in backbone.parameters():
        torch.nn.init.zeros_(parameter)
    sum(output.sum() for output in copied(torch.randn(1, 3, 32, 32))).backward()
    assert all(parameter.grad is not None for parameter in copied.parameters())
    assert all(parameter.grad is None for parameter in backbone.parameters())


@pytest.mark.parametrize('shift', [False, True])
@pytest.mark.parametrize('size', [(4, 4), (3, 9), (8, 13), (16, 4)])
def test_attention_in_windows_is_mmdets(shift: bool, size: tuple[int, int]) -> None:
    own = ShiftWindowMSA(8, 2, window_size=4, shift_size=2 if shift else 0)
    torch.nn.init.normal_(own.w_msa.relative_position_bias_table)
    x = torch.randn(2, size[0] * size[1], 8)
    expected = own(x, size)
    use_symbolic_sizes(own)
    assert type(own) is WindowAttention
    torch.testing.assert_close(own(x, size), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize('size', [(8, 8), (9, 8), (8, 11), (1, 3)])
@pytest.mark.parametrize('stride', [2, 4])
def test_padding_is_mmdets(stride: int, size: tuple[int, int]) -> None:
    padding = AdaptivePadding(kernel_size=stride, stride=stride, padding='corner')
    x = torch.randn(2, 3, *size)
    expected = padding(x)
    use_symbolic_sizes(padding)
    assert type(padding) is EdgePadding
    assert torch.equal(padding(x), expected)
