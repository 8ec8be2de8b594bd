"""ViTDet: in detrex's detectors, in detectron2's, and releases of plain ViTs such as MAE's."""

import math
from dataclasses import replace

from timm.layers import resample_abs_pos_embed
from torch import Tensor

from ..names import NameMap

# detectron2 counts a level's layers, the resampling included where there is one, and names it by log2 of its stride.
_PYRAMID = tuple(
    (rf'^simfp_{stage}\.{layer}\.{part}', f'pyramid.{level}.{name}.')
    for level, (stage, first) in enumerate(((3, 1), (4, 0), (5, 1)))
    for layer, part, name in (
        (first, r'norm\.', 'lateral_norm'),
        (first, '', 'lateral'),
        (first + 1, r'norm\.', 'output_norm'),
        (first + 1, '', 'output'),
    )
)

#: `SimpleFeaturePyramid` over `ViTDet` in detrex's detectors, EVA-01's included.
DETREX = NameMap(
    title='ViTDet (detrex names)',
    signature=(r'^net\.patch_embed\.proj\.weight$', r'^simfp_3\.0\.weight$'),
    renames=((r'^simfp_3\.0\.', 'pyramid.0.resample.'), *_PYRAMID),
)

#: The same backbone in detectron2's R-CNNs, which have one level more: ViTDet's releases, EVA-01's `eva_o365.pth`.
DETECTRON2 = replace(
    DETREX,
    title='ViTDet (detectron2 names, of an R-CNN)',
    signature=(r'^backbone\.net\.patch_embed\.proj\.weight$', r'^backbone\.simfp_3\.0\.weight$', r'^roi_heads\.'),
    renames=((r'^backbone\.', ''), *DETREX.renames),
    dropped=(
        (r'^backbone\.simfp_2\.', 'level of stride 4'),
        (r'^(proposal_generator|roi_heads)\.', 'head of another detector'),
        (r'^pixel_(mean|std)$', 'image normalisation'),
    ),
)


def _resize_positions(name: str, tensor: Tensor, own: Tensor) -> Tensor:
    """Position embedding (1, 1 + side * side, dim) at the model's side, resized as `ViTDet` itself does."""
    if not name.endswith('pos_embed') or tensor.shape[1] == own.shape[1]:
        return tensor
    side = math.isqrt(own.shape[1] - 1)
    return resample_abs_pos_embed(tensor, [side, side], num_prefix_tokens=1, antialias=False)


#: Bare `ViTDet` from `mae_pretrain_vit_*.pth`, the full MAE with its decoder, EVA's pretraining, or a ViT of timm.
MAE = NameMap(
    title='plain ViT (names of MAE, EVA and timm)',
    signature=(r'^cls_token$', r'^pos_embed$', r'^patch_embed\.proj\.weight$', r'^blocks\.0\.attn\.qkv\.weight$'),
    dropped=(
        (r'^cls_token$', 'class token'),
        (r'^mask_token$', 'mask token of the pretraining'),
        (r'^decoder_', 'decoder of the pretraining'),
        (r'^(head|lm_head)\.', 'head of the pretraining'),
        (r'^(fc_)?norm\.', 'norm before the head of the pretraining'),
    ),
    initialised=((r'\.rel_pos_[hw]$', 'pretraining has no relative positions'),),
    adapt=_resize_positions,
)

#: The same releases, loaded into a `SimpleFeaturePyramid` over `ViTDet` instead of the `ViTDet`.
MAE_PYRAMID = replace(
    MAE,
    title=f'{MAE.title}, below a feature pyramid',
    renames=((r'^', 'net.'),),
    initialised=(*MAE.initialised, (r'^pyramid\.', 'pretraining has no feature pyramid')),
)
