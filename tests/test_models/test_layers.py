"""Noise, masks, query selection, attention, tokens."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from mmcv.ops import MultiScaleDeformableAttention
from mmdet.models.layers.transformer.utils import coordinate_to_encoding
from mmdet.structures import DetDataSample
from mmdet.structures.bbox import bbox_xyxy_to_cxcywh
from torch import nn

from dino_mm.models.box_ops import box_logits, center_size, cut_off, encode_boxes, wavelengths
from dino_mm.models.layers.attention import DeformableAttention, SelfAttention, attention_mask
from dino_mm.models.layers.denoising import CDNGenerator, noise_boxes, noise_labels, visible_queries
from dino_mm.models.layers.query_selector import encoder_proposals
from dino_mm.models.layers.tokens import flatten_levels


@settings(max_examples=20, deadline=None)
@given(num_groups=st.integers(0, 4), slots=st.integers(1, 3), num_queries=st.integers(1, 5))
def test_visible_queries_truth_table(num_groups, slots, num_queries):
    size = 2 * slots
    visible = visible_queries(num_groups, size, num_queries, torch.device('cpu'))
    num_dn = num_groups * size
    assert visible.shape == (num_dn, num_dn + num_queries)
    for i in range(num_dn):
        for j in range(num_dn + num_queries):
            assert visible[i, j].item() == (j >= num_dn or i // size == j // size), (i, j)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10000), scale=st.floats(0.1, 2.0))
def test_box_noise_keeps_positives_near_and_negatives_apart(seed, scale):
    generator = torch.Generator().manual_seed(seed)
    shape = (2, 3, 2, 4, 4)
    center = torch.rand(*shape[:-1], 2, generator=generator) * 0.2 + 0.4
    size = torch.rand(*shape[:-1], 2, generator=generator) * 0.1 + 0.05
    boxes = torch.cat([center, size], -1).double()
    sign = torch.randint(2, shape, generator=generator) * 2 - 1
    draw = torch.rand(shape, generator=generator).double()
    noised = noise_boxes(boxes, sign * draw, scale)

    def sorted_corners(cxcywh):
        a, b = cxcywh[..., :2] - cxcywh[..., 2:] / 2, cxcywh[..., :2] + cxcywh[..., 2:] / 2
        return torch.cat([a, b], -1)

    shift = (sorted_corners(noised) - sorted_corners(boxes)).abs() / (boxes[..., 2:].tile(2) / 2 * scale)
    expected = draw + torch.tensor([0.0, 1.0], dtype=torch.float64).view(2, 1, 1)
    torch.testing.assert_close(shift, expected)
    assert (shift[:, :, 0] <= 1).all()
    assert (shift[:, :, 1] >= 1).all()


def test_box_noise_clips_to_the_image():
    boxes = torch.tensor([0.05, 0.95, 0.1, 0.1], dtype=torch.float64).expand(1, 1, 2, 1, 4)
    sign = torch.tensor([-1.0, -1.0, 1.0, 1.0])
    noised = noise_boxes(boxes, (0.5 * sign).expand_as(boxes), 1.0)
    # Positive: corners move by a quarter of the size, (-0.025, 0.875, 0.125, 1.025), clipped.
    torch.testing.assert_close(noised[0, 0, 0, 0], torch.tensor([0.0625, 0.9375, 0.125, 0.125]).double())


def test_box_noise_is_drawn_evenly_in_both_directions():
    # A tenth of the image around its centre: corners move by at most a tenth, so nothing is clipped.
    boxes = torch.tensor([0.5, 0.5, 0.1, 0.1], dtype=torch.float64).expand(1, 1, 2, 20000, 4)
    labels = torch.zeros(boxes.shape[:-1], dtype=torch.long)
    torch.manual_seed(0)
    _, noised = CDNGenerator(5, 8).add_noise(labels, boxes)
    # Corners may swap, as boxes of negatives turn inside out, but not their sum: twice the centre.
    centers = noised[0, 0, ..., :2]
    torch.testing.assert_close(centers.mean(1), torch.full((2, 2), 0.5, dtype=torch.float64), rtol=0, atol=5e-4)
    # The mean of two corners, each moved by a uniform draw from -0.05 to 0.05: 0.1 / sqrt(12) / sqrt(2).
    torch.testing.assert_close(centers[0].std(0), torch.full((2,), 0.0204, dtype=torch.float64), rtol=0, atol=2e-4)


def test_label_noise_replaces_below_the_probability():
    labels, replacement = torch.tensor([1, 1, 1]), torch.tensor([2, 3, 1])
    noised = noise_labels(labels, torch.tensor([0.1, 0.25, 0.0]), replacement, 0.25)
    assert noised.tolist() == [2, 1, 1]


def make_tokens(sizes, img_shapes=None, dim=8):
    feats = [torch.randn(2, dim, *size) for size in sizes]
    samples = [DetDataSample(metainfo=dict(img_shape=shape, batch_input_shape=(32, 48))) for shape in img_shapes or []]

    class NoPositions(nn.Module):
        def forward(self, mask, input):
            return torch.zeros_like(input)

    return feats, flatten_levels(feats, samples, NoPositions(), torch.randn(len(sizes), dim))


def test_tokens_are_rows_of_all_levels_with_centers_in_the_image():
    feats, tokens = make_tokens([(4, 6), (2, 3)], [(32, 48), (16, 24)])
    assert tokens.levels.shapes == ((4, 6), (2, 3))
    assert tokens.levels.start_index.tolist() == [0, 24]
    torch.testing.assert_close(tokens.features[:, 24 + 3], feats[1][:, :, 1, 0])
    # Image 1 fills half of each map: ratios 0.5, and centres relative to that half.
    assert tokens.levels.valid_ratios.tolist() == [
        [[1.0, 1.0], [1.0, 1.0]],
        [[0.5, 0.5], [pytest.approx(2 / 3), 0.5]],
    ]
    torch.testing.assert_close(tokens.centers[0, 0], torch.tensor([0.5 / 6, 0.5 / 4]))
    torch.testing.assert_close(tokens.centers[1, 7], torch.tensor([1.5 / 3, 1.5 / 2]))
    expected = torch.ones(4, 6, dtype=torch.bool)
    expected[:2, :3] = False
    assert torch.equal(tokens.padding_mask[1, :24].view(4, 6), expected)
    assert not tokens.padding_mask[0].any()


def test_batch_without_padding_has_no_mask():
    assert make_tokens([(4, 6)], [(32, 48), (32, 48)])[1].padding_mask is None
    assert make_tokens([(4, 6)])[1].padding_mask is None


def test_proposals_double_their_size_per_level_and_avoid_the_edge():
    _, tokens = make_tokens([(128, 2), (2, 3)], [(32, 48), (32, 48)])
    logits, valid = encoder_proposals(tokens)
    boxes = logits.sigmoid()
    assert valid[0, :256].view(128, 2).all(1).tolist() == [False] + [True] * 126 + [False]
    torch.testing.assert_close(boxes[0, 2], torch.tensor([0.25, 1.5 / 128, 0.05, 0.05]))
    torch.testing.assert_close(boxes[0, -1], torch.tensor([2.5 / 3, 0.75, 0.1, 0.1]))
    assert boxes[0, 0].tolist() == [1.0, 1.0, 1.0, 1.0]


def test_deformable_attention_equals_mmcvs_forward():
    _, tokens = make_tokens([(4, 6), (2, 3)], [(32, 48), (16, 24)])
    ours = DeformableAttention(8, num_heads=2, num_levels=2).double()
    theirs = MultiScaleDeformableAttention(8, 2, 2, dropout=0.0, batch_first=True).double()
    for parameter in ours.parameters():
        nn.init.normal_(parameter)
    theirs.load_state_dict(ours.state_dict())
    query, query_pos = torch.randn(2, 2, 5, 8, dtype=torch.float64)
    for size in (2, 4):
        reference = torch.rand(2, 5, 2, size, dtype=torch.float64)
        value = tokens.features.double()
        expected = theirs(
            query,
            value=value,
            query_pos=query_pos,
            key_padding_mask=tokens.padding_mask,
            reference_points=reference,
            spatial_shapes=tokens.levels.shape_tensor,
            level_start_index=tokens.levels.start_index,
        )
        actual = ours(query, query_pos, value, reference, tokens.levels, tokens.padding_mask)
        torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize('num_feats', [2, 128])
def test_encoding_of_boxes_equals_mmdets(num_feats):
    boxes = torch.rand(2, 7, 4, dtype=torch.float64)
    expected = coordinate_to_encoding(boxes, num_feats=num_feats)
    torch.testing.assert_close(encode_boxes(boxes, wavelengths(num_feats, boxes.device)), expected, rtol=0, atol=1e-14)


def test_center_and_size_equal_mmdets():
    boxes = torch.rand(2, 7, 4)
    torch.testing.assert_close(center_size(boxes), bbox_xyxy_to_cxcywh(boxes), rtol=0, atol=0)


def test_cut_off_boxes_are_those_of_their_logits():
    boxes = torch.tensor([-0.5, 0.0, 0.0005, 0.001, 0.3, 0.9995, 1.0, 1.5, torch.nan], dtype=torch.float64)
    expected = box_logits(boxes).sigmoid()
    torch.testing.assert_close(cut_off(boxes), expected, rtol=0, atol=1e-15, equal_nan=True)


@pytest.mark.parametrize('num_dn', [None, 0, 2, 4])
def test_self_attention_equals_the_formula(num_dn):
    attention = SelfAttention(8, num_heads=2).double()
    query, query_pos = torch.randn(2, 1, 5, 8, dtype=torch.float64)
    visible = None if num_dn is None else (torch.rand(num_dn, 5) < 0.6) | torch.eye(5, dtype=torch.bool)[:num_dn]
    mask = None if visible is None else attention_mask(visible, torch.float64)
    blocked = torch.zeros(5, 5, dtype=torch.bool)
    if num_dn:
        blocked[:, :num_dn] = True
        blocked[:num_dn] = ~visible
    weight, bias = attention.attn.in_proj_weight, attention.attn.in_proj_bias
    located = query + query_pos
    q, k, v = (
        (x @ w.T + b).view(5, 2, 4).transpose(0, 1)
        for x, w, b in zip((located, located, query), weight.chunk(3), bias.chunk(3), strict=True)
    )
    scores = (q @ k.transpose(1, 2) / 2).masked_fill(blocked, -torch.inf)
    mixed = (scores.softmax(-1) @ v).transpose(0, 1).reshape(1, 5, 8)
    expected = query + attention.attn.out_proj(mixed)
    torch.testing.assert_close(attention(query, query_pos, mask), expected)

    seen = []
    attention.attn.register_forward_hook(lambda attn, args, output: seen.append(output[1]))
    torch.testing.assert_close(attention(query, query_pos, mask), expected)
    torch.testing.assert_close(seen, [scores.softmax(-1).mean(0, keepdim=True)])
