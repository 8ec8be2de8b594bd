"""ConvNeXt through timm: sizes, initial scales, names of checkpoints."""

import pytest
import torch
from timm.models import create_model
from timm.models.convnext import checkpoint_filter_fn
from torch import Tensor

from dino_mm.checkpoints.backbones.convnext import CONVNEXT, TIMM_CONVNEXT
from dino_mm.checkpoints.names import convert
from dino_mm.models.backbones.timm_backbone import TIMMBackbone

LN = dict(type='LN', eps=1e-6)


def test_starts_as_detrex_does() -> None:
    backbone = TIMMBackbone('test_convnext', (1, 2, 3), output_norm=LN, ls_init_value=1.0)
    scales = [v for k, v in backbone.named_parameters() if k.endswith('.gamma')]
    assert len(scales) == sum(len(stage.blocks) for stage in backbone.body.model.stages)
    assert all(torch.equal(scale, torch.ones_like(scale)) for scale in scales)


@pytest.mark.parametrize('size', [(64, 96), (79, 97), (37, 63)])
def test_odd_sizes_are_rounded_down(size: tuple[int, int]) -> None:
    backbone = TIMMBackbone('test_convnext', (0, 1, 2, 3), output_norm=LN).eval()
    img = torch.randn(1, 3, *size)
    outputs = backbone(img)
    for stride, output in zip(backbone.strides, outputs, strict=True):
        assert output.shape[-2:] == tuple(side // stride for side in size)
    inside = backbone(img[..., : size[0] // 4 * 4, : size[1] // 4 * 4])
    assert all(torch.equal(a, b) for a, b in zip(outputs, inside, strict=True))


def test_facebook_names() -> None:
    backbone = TIMMBackbone('test_convnext', (0, 1, 2, 3), output_norm=LN)
    own = backbone.state_dict()
    original = original_state(own)
    assert CONVNEXT.matches(original)
    assert not TIMM_CONVNEXT.matches(original)
    assert_same(convert(CONVNEXT, original, own).tensors, own)

    release = {k: v for k, v in original.items() if not k.startswith('norm')}
    release |= {k: torch.zeros(3) for k in ('norm.weight', 'norm.bias', 'head.weight', 'head.bias')}
    result = convert(CONVNEXT, release, own)
    assert result.dropped.keys() == release.keys() - original.keys()
    assert result.filled.keys() == {k for k in own if k.startswith('output_norms.')}
    assert_same(result.tensors, {k: v for k, v in own.items() if k not in result.filled})

    # timm reads the same release by itself.
    body = {k: v for k, v in release.items() if k not in result.dropped}
    assert_same(checkpoint_filter_fn(body, backbone.body.model), backbone.body.model.state_dict())


def test_timm_names() -> None:
    own = TIMMBackbone('test_convnext', (1, 2, 3), output_norm=LN).state_dict()
    whole = create_model('test_convnext').state_dict()
    assert TIMM_CONVNEXT.matches(whole)
    assert not CONVNEXT.matches(whole)
    result = convert(TIMM_CONVNEXT, whole, own)
    assert result.dropped.keys() == {'head.norm.weight', 'head.norm.bias', 'head.fc.weight', 'head.fc.bias'}
    assert result.filled.keys() == {k for k in own if k.startswith('output_norms.')}
    assert result.tensors.keys() == own.keys() - result.filled.keys()
    assert all(torch.equal(v, whole[k.removeprefix('body.model.')]) for k, v in result.tensors.items())


def original_state(own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors in the names of the original release, written down by hand."""
    renamed = {'conv_dw': 'dwconv', 'fc1': 'pwconv1', 'fc2': 'pwconv2'}
    state = {}
    for name, tensor in own.items():
        parts = name.removeprefix('body.model.').split('.')
        if parts[0] == 'output_norms':
            parts = [f'norm{parts[1]}', parts[2]]
        elif parts[0] == 'stem':
            parts = ['downsample_layers', '0', *parts[1:]]
        elif parts[2] == 'downsample':
            parts = ['downsample_layers', parts[1], *parts[3:]]
        else:
            parts = [renamed.get(part, part) for part in parts if part not in ('blocks', 'mlp')]
        state['.'.join(parts)] = tensor
    return state


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name
