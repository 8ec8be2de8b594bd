"""FocalNet through timm: a naive forward pass for any size, names of checkpoints."""

import numpy as np
import pytest
import torch
from parity import rule_weights
from timm.models import build_model_with_cfg, register_model
from timm.models.focalnet import FocalNet, checkpoint_filter_fn
from torch import Tensor
from torch.nn import functional as F

from dino_mm.checkpoints.backbones.focalnet import FOCALNET, FOCALNET_POST_NORM, TIMM_FOCALNET
from dino_mm.checkpoints.names import convert
from dino_mm.models.backbones.timm_backbone import TIMMBackbone

LN = dict(type='LN', eps=1e-5)
POST_NORM = dict(use_post_norm=True, use_overlap_down=True, layerscale_value=1e-4, focal_windows=(5, 5, 5, 5))


@register_model
def dino_mm_focalnet(pretrained: bool = False, **kwargs: object) -> FocalNet:
    """Eight channels, one block a stage."""
    sizes = dict(embed_dim=8, depths=(1, 1, 2, 1), focal_levels=(2, 2, 2, 2))
    return build_model_with_cfg(FocalNet, 'dino_mm_focalnet', pretrained, **sizes, **kwargs)


def small(out_indices: tuple[int, ...] = (0, 1, 2, 3), **kwargs: object) -> TIMMBackbone:
    """The small model in float64, with weights of ordinary size."""
    backbone = TIMMBackbone('dino_mm_focalnet', out_indices, output_norm=LN, **kwargs).double().eval()
    for name, tensor in backbone.state_dict().items():
        tensor.copy_(torch.from_numpy(np.asarray(rule_weights(name, tuple(tensor.shape)))))
    return backbone


@pytest.mark.parametrize('post_norm', [False, True])
@pytest.mark.parametrize('size', [(64, 96), (61, 71), (33, 34), (5, 3)])
def test_any_size_equals_naive_forward(post_norm: bool, size: tuple[int, int]) -> None:
    backbone = small(**(POST_NORM if post_norm else {}))
    img = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        outputs = backbone(img)
        expected = naive_forward(original_state(backbone, post_norm), img)
    for level, (output, naive) in enumerate(zip(outputs, expected, strict=True)):
        assert output.shape[-2:] == tuple(-(-side // 2 ** (level + 2)) for side in size)
        torch.testing.assert_close(output, naive, rtol=0, atol=1e-10)


def naive_forward(state: dict[str, Tensor], img: Tensor) -> list[Tensor]:
    """The original model, channels last and in the original's names, from its tensors alone."""
    embed, x, outputs = 'patch_embed', img.permute(0, 2, 3, 1), []
    for stage, depth in enumerate((1, 1, 2, 1)):
        x = naive_embedding(state, embed, x, stride=2 if stage else 4)
        for index in range(depth):
            x = naive_block(state, f'layers.{stage}.blocks.{index}', x)
        outputs.append(naive_norm(state, f'norm{stage}', x).permute(0, 3, 1, 2))
        embed = f'layers.{stage}.downsample'
    return outputs


def naive_embedding(state: dict[str, Tensor], name: str, x: Tensor, stride: int) -> Tensor:
    bs, height, width, channels = x.shape
    padded = x.new_zeros(bs, -(-height // stride) * stride, -(-width // stride) * stride, channels)
    padded[:, :height, :width] = x
    weight, bias = state[f'{name}.proj.weight'], state[f'{name}.proj.bias']
    padding = {7: 2, 3: 1}.get(weight.shape[-1], 0)
    x = F.conv2d(padded.permute(0, 3, 1, 2), weight, bias, stride, padding).permute(0, 2, 3, 1)
    return naive_norm(state, f'{name}.norm', x)


def naive_block(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    if f'{name}.gamma_1' not in state:
        x = x + naive_modulation(state, f'{name}.modulation', naive_norm(state, f'{name}.norm1', x))
        return x + naive_mlp(state, f'{name}.mlp', naive_norm(state, f'{name}.norm2', x))
    modulated = naive_norm(state, f'{name}.norm1', naive_modulation(state, f'{name}.modulation', x))
    x = x + state[f'{name}.gamma_1'] * modulated
    return x + state[f'{name}.gamma_2'] * naive_norm(state, f'{name}.norm2', naive_mlp(state, f'{name}.mlp', x))


def naive_modulation(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    channels = x.shape[-1]
    query, context, gates = naive_linear(state, f'{name}.f', x).split([channels, channels, 3], -1)
    total = torch.zeros_like(context)
    for level in range(2):
        weight = state[f'{name}.focal_layers.{level}.0.weight']
        padding = weight.shape[-1] // 2
        context = F.conv2d(context.permute(0, 3, 1, 2), weight, padding=padding, groups=channels).permute(0, 2, 3, 1)
        context = F.gelu(context)
        total = total + context * gates[..., level, None]
    total = total + F.gelu(context.mean((1, 2), keepdim=True)) * gates[..., 2, None]
    modulator = F.linear(total, state[f'{name}.h.weight'].flatten(1), state[f'{name}.h.bias'])
    return naive_linear(state, f'{name}.proj', query * modulator)


def naive_mlp(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return naive_linear(state, f'{name}.fc2', F.gelu(naive_linear(state, f'{name}.fc1', x)))


def naive_linear(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return F.linear(x, state[f'{name}.weight'], state[f'{name}.bias'])


def naive_norm(state: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    centered = x - x.mean(-1, keepdim=True)
    variance = centered.square().mean(-1, keepdim=True)
    return centered / (variance + 1e-5).sqrt() * state[f'{name}.weight'] + state[f'{name}.bias']


def original_state(backbone: TIMMBackbone, post_norm: bool) -> dict[str, Tensor]:
    """The backbone's tensors in the names and layout of the original release, written down by hand."""
    state = {}
    for name, tensor in backbone.state_dict().items():
        parts = name.removeprefix('body.model.').split('.')
        if parts[0] == 'output_norms':
            parts = [f'norm{parts[1]}', parts[2]]
        elif parts[0] == 'stem':
            parts[0] = 'patch_embed'
        elif parts[2] == 'downsample':
            parts[1] = str(int(parts[1]) - 1)
        elif parts[4] in ('ls1', 'ls2'):
            parts[4:] = [f'gamma_{parts[4][-1]}']
        elif post_norm:
            parts[4] = parts[4].removesuffix('_post')
        original = '.'.join(parts)
        is_linear = original.endswith(('.f.weight', '.modulation.proj.weight', '.fc1.weight', '.fc2.weight'))
        state[original] = tensor[..., 0, 0] if is_linear else tensor
    return state


@pytest.mark.parametrize('post_norm', [False, True])
def test_microsoft_names(post_norm: bool) -> None:
    scheme = FOCALNET_POST_NORM if post_norm else FOCALNET
    backbone = small(**(POST_NORM if post_norm else {}))
    own = backbone.state_dict()
    original = original_state(backbone, post_norm)
    assert FOCALNET_POST_NORM.matches(original) == post_norm
    assert not TIMM_FOCALNET.matches(original)
    assert_same(convert(scheme, original, own).tensors, own)

    release = {k: v for k, v in original.items() if not k.startswith('norm')}
    release |= {k: torch.zeros(3) for k in ('norm.weight', 'norm.bias', 'head.weight', 'head.bias')}
    result = convert(scheme, release, own)
    assert result.dropped.keys() == release.keys() - original.keys()
    assert result.filled.keys() == {k for k in own if k.startswith('output_norms.')}
    assert_same(result.tensors, {k: v for k, v in own.items() if k not in result.filled})

    # timm reads the same release by itself.
    inner = backbone.body.model.state_dict()
    body = {k: v for k, v in release.items() if k not in result.dropped}
    assert_same(checkpoint_filter_fn(body, backbone.body.model), inner)


def test_timm_names() -> None:
    own = small().state_dict()
    whole = dino_mm_focalnet().double().state_dict()
    assert TIMM_FOCALNET.matches(whole)
    assert not FOCALNET.matches(whole)
    result = convert(TIMM_FOCALNET, whole, own)
    assert result.dropped.keys() == {'norm.weight', 'norm.bias', 'head.fc.weight', 'head.fc.bias'}
    assert result.filled.keys() == {k for k in own if k.startswith('output_norms.')}
    assert result.tensors.keys() == own.keys() - result.filled.keys()
    assert all(torch.equal(v, whole[k.removeprefix('body.model.')]) for k, v in result.tensors.items())


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(actual[name], tensor), name
