"""ViTDet and its feature pyramid: attention against loops, sizes, freezing, checkpoints of plain ViTs."""

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dino_mm.checkpoints.backbones.vitdet import DETECTRON2, DETREX, MAE, MAE_PYRAMID
from dino_mm.checkpoints.names import convert
from dino_mm.models.backbones.simple_feature_pyramid import SimpleFeaturePyramid
from dino_mm.models.backbones.vitdet import RelativeAttention, ViTDet, ViTDetBlock, from_windows, to_windows

TINY = dict(
    embed_dims=8,
    depth=3,
    num_heads=2,
    patch_size=4,
    img_size=32,
    window_size=3,
    global_attn_indexes=(1,),
    pretrain_img_size=16,
)


def tiny(**changes: Any) -> ViTDet:
    """A small ViTDet in float64 whose parameters are all random, the relative positions too."""
    net = ViTDet(**(TINY | changes)).double()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.3)
    return net


def random_attention(table_size: int, key_bias: bool = True) -> RelativeAttention:
    attn = RelativeAttention(8, 2, table_size, key_bias).double()
    for parameter in attn.parameters():
        nn.init.normal_(parameter, std=0.5)
    return attn


def naive_row(table: Tensor, distance: int, length: int) -> Tensor:
    """Row of ``distance`` (query minus key) in a table brought to ``2 * length - 1`` rows, pixel centres aligned."""
    wanted, given = 2 * length - 1, len(table)
    at = (distance + length - 1 + 0.5) * given / wanted - 0.5
    at = min(max(at, 0.0), given - 1.0)
    low = math.floor(at)
    high = min(low + 1, given - 1)
    return table[low] * (1 - (at - low)) + table[high] * (at - low)


def naive_attention(attn: RelativeAttention, x: Tensor) -> Tensor:
    """One rectangle (height, width, dim), one head and one query at a time."""
    height, width, dim = x.shape
    places = [(i, j) for i in range(height) for j in range(width)]
    output, head_dim = torch.zeros_like(x), dim // attn.num_heads
    query, key, value = (x @ attn.qkv.weight.T + attn.qkv.bias).split(dim, -1)
    for head in range(attn.num_heads):
        part = slice(head * head_dim, (head + 1) * head_dim)
        for i, j in places:
            q, logits = query[i, j, part], []
            for m, n in places:
                position = naive_row(attn.rel_pos_h, i - m, height) + naive_row(attn.rel_pos_w, j - n, width)
                logits.append(q @ key[m, n, part] / math.sqrt(head_dim) + q @ position)
            weights = torch.stack(logits).softmax(0)
            output[i, j, part] = sum(w * value[m, n, part] for w, (m, n) in zip(weights, places, strict=True))
    return attn.proj(output)


@pytest.mark.parametrize('size', [(3, 3), (2, 4), (5, 3)])
def test_attention_equals_loops(size: tuple[int, int]) -> None:
    """Tables of 3 x 3 tokens: used as they are, shrunk, and stretched."""
    attn, x = random_attention(3), torch.randn(2, *size, 8, dtype=torch.float64)
    expected = torch.stack([naive_attention(attn, image) for image in x])
    torch.testing.assert_close(attn(x), expected)


def test_windows_equal_loops_over_padded_windows() -> None:
    attn, x = random_attention(3), torch.randn(2, 4, 5, 8, dtype=torch.float64)
    block = ViTDetBlock(attn, 8, 16, 0.0, window_size=3).double()
    nn.init.normal_(block.norm1.weight)
    nn.init.normal_(block.norm1.bias)  # so that a zero before the norm differs from one after it
    normed = torch.zeros(2, 6, 6, 8, dtype=torch.float64)
    normed[:, :4, :5] = block.norm1(x)
    attended = torch.zeros_like(normed)
    for image in range(2):
        for i in (0, 3):
            for j in (0, 3):
                window = (image, slice(i, i + 3), slice(j, j + 3))
                attended[window] = naive_attention(attn, normed[window])
    hidden = x + attended[:, :4, :5]
    torch.testing.assert_close(block(x), hidden + block.mlp(block.norm2(hidden)))


@pytest.mark.parametrize(('height', 'width', 'num_windows'), [(6, 6, 4), (7, 3, 3), (1, 10, 4), (3, 3, 1)])
def test_windows_come_back(height: int, width: int, num_windows: int) -> None:
    x = torch.randn(2, height, width, 5)
    windows = to_windows(x, 3)
    assert windows.shape == (2 * num_windows, 3, 3, 5)
    assert windows.sum() == pytest.approx(x.sum().item(), abs=1e-4)
    assert torch.equal(from_windows(windows, height, width), x)


def test_no_key_bias_is_a_key_bias_of_zero() -> None:
    """And any other would change nothing: softmax does not see what all keys have in common."""
    with_bias, without = random_attention(3), random_attention(3, key_bias=False)
    assert without.qkv.bias is None
    state = without.state_dict()
    bias = [state.pop('q_bias'), torch.randn(8, dtype=torch.float64), state.pop('v_bias')]
    with_bias.load_state_dict(state | {'qkv.bias': torch.cat(bias)})
    x = torch.randn(2, 3, 3, 8, dtype=torch.float64)
    torch.testing.assert_close(without(x), with_bias(x))


@pytest.mark.parametrize('size', [(16, 16), (17, 31), (40, 12), (5, 66)])
def test_pixels_beyond_the_last_patch_are_not_seen(size: tuple[int, int]) -> None:
    net, (height, width) = tiny(), size
    inputs = torch.randn(2, 3, height, width, dtype=torch.float64)
    (output,) = net(inputs)
    assert output.shape == (2, 8, height // 4, width // 4)
    (cropped,) = net(inputs[..., : height // 4 * 4, : width // 4 * 4])
    torch.testing.assert_close(output, cropped)


@pytest.mark.parametrize('size', [(16, 16), (8, 12), (35, 64)])
def test_positions_are_resized_without_the_class_token(size: tuple[int, int]) -> None:
    net = tiny(depth=0, global_attn_indexes=())
    tokens = (size[0] // 4, size[1] // 4)
    grid = net.pos_embed[0, 1:].T.reshape(1, 8, 4, 4)
    if tokens != (4, 4):
        grid = F.interpolate(grid, tokens, mode='bicubic')
    inputs = torch.randn(2, 3, *size, dtype=torch.float64)
    torch.testing.assert_close(net(inputs)[0], net.patch_embed.proj(inputs) + grid)


def test_stochastic_depth_grows_linearly() -> None:
    net = ViTDet(**(TINY | dict(depth=5)), drop_path_rate=0.4)
    assert [block.drop_path.drop_prob for block in net.blocks] == pytest.approx([0.0, 0.1, 0.2, 0.3, 0.4])


def test_initialisation() -> None:
    net = ViTDet(**(TINY | dict(embed_dims=128, depth=2)))
    net.init_weights()
    for name, parameter in net.named_parameters():
        last = name.split('.')[-1]
        if 'norm' in name:
            assert torch.equal(parameter, torch.full_like(parameter, last == 'weight')), name
        elif last.startswith('rel_pos') or (last == 'bias' and 'patch_embed' not in name):
            assert not parameter.any(), name
        elif 'patch_embed' not in name:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.06), name
            assert parameter.mean().item() == pytest.approx(0.0, abs=2e-3), name


@pytest.mark.parametrize('drop_path_rate', [0.0, 0.5])
def test_checkpointing_changes_nothing(drop_path_rate: float) -> None:
    net = tiny(drop_path_rate=drop_path_rate).train()
    inputs = torch.randn(2, 3, 20, 28, dtype=torch.float64)
    results = []
    for net.with_cp in (False, True):
        net.zero_grad()
        torch.manual_seed(1)
        (output,) = net(inputs)
        output.square().sum().backward()
        results.append([output.detach(), *(p.grad.clone() for p in net.parameters())])
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


def test_every_parameter_has_the_gradient_of_finite_differences() -> None:
    net = tiny(key_bias=False)
    inputs = torch.randn(1, 3, 20, 28, dtype=torch.float64)
    goal = torch.randn(1, 8, 5, 7, dtype=torch.float64)
    (net(inputs)[0] * goal).sum().backward()
    for name, parameter in net.named_parameters():
        direction = torch.randn_like(parameter)
        values = []
        for step in (1e-5, -1e-5):
            moved = {name: parameter.detach() + step * direction}
            with torch.no_grad():
                values.append((torch.func.functional_call(net, moved, inputs)[0] * goal).sum().item())
        expected = (values[0] - values[1]) / 2e-5
        assert (parameter.grad * direction).sum().item() == pytest.approx(expected, rel=1e-5, abs=1e-6), name
    assert not net.pos_embed.grad[:, 0].any()


@pytest.mark.parametrize(
    ('frozen_stages', 'expected'),
    [
        (-1, ()),
        (0, ('patch_embed.',)),
        (2, ('patch_embed.', 'pos_embed', 'blocks.0.', 'blocks.1.')),
    ],
)
def test_frozen_before_the_optimizer_and_after_train(frozen_stages: int, expected: tuple[str, ...]) -> None:
    net = tiny(frozen_stages=frozen_stages, drop_path_rate=0.9, with_cp=True)
    for _ in range(2):
        frozen = {name for name, parameter in net.named_parameters() if not parameter.requires_grad}
        assert frozen == {name for name, _ in net.named_parameters() if name.startswith(expected)}
        net.train()
        assert [block.training for block in net.blocks] == [index >= frozen_stages for index in range(3)]
        assert net.patch_embed.training == (frozen_stages < 0)
    net(torch.randn(1, 3, 16, 16, dtype=torch.float64))[0].sum().backward()
    assert {name for name, parameter in net.named_parameters() if parameter.grad is None} == frozen


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(num_heads=3), '`embed_dims` is 8: make it a multiple of `num_heads`, 3'),
        (dict(global_attn_indexes=(1, 3)), r'`global_attn_indexes` has \[3\]: with `depth` 3 use 0 to 2'),
        (dict(frozen_stages=4), '`frozen_stages` is 4: with `depth` 3 use'),
    ],
)
def test_errors(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ViTDet(**(TINY | changes))


def pyramid(**changes: Any) -> SimpleFeaturePyramid:
    return SimpleFeaturePyramid(**(dict(backbone=dict(type='dino_mm.ViTDet', **TINY), in_channels=8) | changes))


def test_pyramid_levels() -> None:
    model = pyramid(out_channels=6, scale_factors=(4.0, 2.0, 1.0, 0.5), num_outs=6)
    outputs = model(torch.randn(2, 3, 30, 47))
    assert [tuple(x.shape) for x in outputs] == [
        (2, 6, *size) for size in [(28, 44), (14, 22), (7, 11), (3, 5), (2, 3), (1, 2)]
    ]
    for finer, coarser in pairwise(outputs[3:]):
        assert torch.equal(coarser, finer[..., ::2, ::2])
    for level in outputs:  # each ends in a norm over channels
        torch.testing.assert_close(level.mean(1), torch.zeros_like(level[:, 0]), rtol=0, atol=1e-5)
        torch.testing.assert_close(level.var(1, correction=0), torch.ones_like(level[:, 0]), rtol=0, atol=2e-2)


def test_pyramid_gives_every_parameter_a_gradient() -> None:
    model = pyramid()
    sum((x * torch.randn_like(x)).sum() for x in model(torch.randn(1, 3, 33, 48))).backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_pyramid_over_another_backbone() -> None:
    resnet = dict(type='mmdet.ResNet', depth=18, out_indices=(2,), frozen_stages=1)
    model = pyramid(backbone=resnet, in_channels=256, out_channels=32)
    shapes = [tuple(x.shape) for x in model.eval()(torch.randn(1, 3, 64, 96))]
    assert shapes == [(1, 32, 8, 12), (1, 32, 4, 6), (1, 32, 2, 3), (1, 32, 1, 2)]
    model = pyramid(backbone=dict(resnet, out_indices=(1, 2)), in_channels=256)
    with pytest.raises(ValueError, match='`backbone` returned 2 maps: let its `out_indices` name the one'):
        model(torch.randn(1, 3, 64, 96))


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        (dict(scale_factors=(3.0,)), '`scale_factors` has 3.0: use 4.0, 2.0, 1.0 or 0.5'),
        (dict(num_outs=2), '`num_outs` is 2, but `scale_factors` has 3: drop some'),
    ],
)
def test_pyramid_errors(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pyramid(**changes)


def mae_release(side: int) -> dict[str, Tensor]:
    """A full MAE of the tiny model's size, pretrained on ``side`` x ``side`` patches."""
    state = {name: torch.randn_like(x) for name, x in ViTDet(**TINY).state_dict().items() if 'rel_pos' not in name}
    state['pos_embed'] = torch.randn(1, 1 + side * side, 8)
    extra = dict(cls_token=(1, 1, 8), mask_token=(1, 1, 4), decoder_pos_embed=(1, 17, 4))
    extra |= {'norm.weight': (8,), 'norm.bias': (8,), 'decoder_embed.weight': (4, 8), 'decoder_norm.bias': (4,)}
    extra |= {'decoder_blocks.0.attn.qkv.weight': (12, 4), 'decoder_pred.bias': (48,), 'head.weight': (10, 8)}
    return state | {name: torch.randn(shape) for name, shape in extra.items()}


@pytest.mark.parametrize('side', [4, 3, 7])
def test_mae_names(side: int) -> None:
    own, release = ViTDet(**TINY).state_dict(), mae_release(side)
    assert MAE.matches(release)
    result = convert(MAE, release, own)
    assert result.tensors.keys() | result.filled.keys() == own.keys()
    assert result.filled.keys() == {name for name in own if 'rel_pos' in name}
    assert set(result.dropped) == release.keys() - own.keys()
    positions = result.tensors.pop('pos_embed')
    for name, tensor in result.tensors.items():
        assert torch.equal(tensor, release[name]), name
    grid = release['pos_embed'][0, 1:].T.reshape(1, 8, side, side)
    if side != 4:
        grid = F.interpolate(grid, (4, 4), mode='bicubic', align_corners=False)
    torch.testing.assert_close(positions[:, 1:], grid.flatten(2).transpose(1, 2))
    assert torch.equal(positions[:, 0], release['pos_embed'][:, 0])


def test_mae_names_below_a_pyramid() -> None:
    own, release = pyramid().state_dict(), mae_release(3)
    result = convert(MAE_PYRAMID, release, own)
    bare = convert(MAE, release, ViTDet(**TINY).state_dict())
    assert result.tensors.keys() == {f'net.{name}' for name in bare.tensors}
    assert all(torch.equal(result.tensors[f'net.{name}'], tensor) for name, tensor in bare.tensors.items())
    assert result.filled.keys() == {name for name in own if 'rel_pos' in name or name.startswith('pyramid.')}
    assert result.dropped == bare.dropped


def test_eva_pretraining_has_names_of_mae() -> None:
    own = ViTDet(**TINY, key_bias=False).state_dict()
    release = {name: x for name, x in own.items() if 'rel_pos' not in name}
    release |= dict(cls_token=torch.zeros(1, 1, 8), mask_token=torch.zeros(1, 1, 8))
    release |= {'lm_head.weight': torch.zeros(9, 8), 'norm.weight': torch.ones(8)}
    assert MAE.matches(release)
    assert 'blocks.0.attn.q_bias' in convert(MAE, release, own).tensors
    assert convert(MAE, release, own).tensors.keys() == {name for name in own if 'rel_pos' not in name}


def test_pretrained_file_of_mae_inside_a_pyramid(tmp_path: Path) -> None:
    release = mae_release(4)
    path = tmp_path / 'mae_pretrain_vit_tiny.pth'
    torch.save(dict(model=release), path)
    net = dict(type='dino_mm.ViTDet', init_cfg=dict(type='Pretrained', checkpoint=str(path)), **TINY)
    model = pyramid(backbone=net)
    model.init_weights()
    for name, tensor in model.net.state_dict().items():
        expected = torch.zeros_like(tensor) if 'rel_pos' in name else release[name]
        assert torch.equal(tensor, expected), name


def test_detectron2_release_is_detrex_backbone_with_more_around_it() -> None:
    own = pyramid().state_dict()
    ours = {name: torch.randn_like(tensor) for name, tensor in own.items()}
    detrex = {_detrex_name(name): tensor for name, tensor in ours.items()}
    assert DETREX.matches(detrex)
    release = {f'backbone.{name}': tensor for name, tensor in detrex.items()}
    release |= {name: torch.zeros(1) for name in ('pixel_mean', 'roi_heads.mask_head.deconv.weight')}
    release['backbone.simfp_2.4.norm.weight'] = torch.zeros(1)
    assert DETECTRON2.matches(release)
    assert not DETREX.matches(release)
    for result in (convert(DETREX, detrex, own), convert(DETECTRON2, release, own)):
        assert result.tensors.keys() == own.keys()
        assert all(torch.equal(result.tensors[name], ours[name]) for name in ours)


def _detrex_name(name: str) -> str:
    if not name.startswith('pyramid.'):
        return name
    _, level, layer, last = name.split('.')
    stage, layers = {
        '0': ('simfp_3', ['resample', 'lateral', 'output']),
        '1': ('simfp_4', ['lateral', 'output']),
        '2': ('simfp_5', ['max pooling', 'lateral', 'output']),
    }[level]
    norm = '.norm' if layer.endswith('_norm') else ''
    return f'{stage}.{layers.index(layer.removesuffix("_norm"))}{norm}.{last}'
