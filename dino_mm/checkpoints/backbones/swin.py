"""Swin Transformer: Microsoft's names, which timm and detectron2 took over, and OpenMMLab's, which are ours."""

import math
import re

import torch.nn.functional as F
from torch import Tensor

from ..names import NameMap

_DROPPED = (
    (r'^head\.', 'classification head'),
    (r'\.attn_mask$', 'computed from the size of the image'),
    (r'\.relative_position_index$', 'computed from the window size'),
)
_INITIALISED = (
    (r'^norm\d\.', 'output norms are not part of a classification model; starts as identity'),
    (r'\.relative_position_index$', 'computed from the window size'),
)


def adapt_table(name: str, tensor: Tensor, own: Tensor) -> Tensor:
    """Bring a relative position table to the model's window size.

    Bicubic in the plane of the two offsets, as Swin Transformer's fine-tuning with a larger window does (section 4.1 of
    the paper, ``load_pretrained`` of the release). Other tensors stay as they are, and so do tables of another number
    of heads: they do not fit, which the comparison with the model's shapes tells.

    Args:
        name: Our name.
        tensor: ((2 * window - 1) ** 2, num_heads) if it is such a table.
        own: The model's, of its own window.
    """
    if not name.endswith('.relative_position_bias_table') or tensor.shape[1] != own.shape[1]:
        return tensor
    if tensor.shape == own.shape:
        return tensor
    old, new = (math.isqrt(table.shape[0]) for table in (tensor, own))
    plane = tensor.T.reshape(1, -1, old, old)
    return F.interpolate(plane, size=(new, new), mode='bicubic').flatten(2)[0].T.contiguous()


def adapt_original(name: str, tensor: Tensor, own: Tensor) -> Tensor:
    """Bring a tensor of the original implementation to ours: :func:`adapt_table` and the order of patch merging.

    The original concatenates the maps of the four neighbours: top left, bottom left, top right, bottom right. mmdet's
    ``PatchMerging`` unfolds, so the four neighbours of a channel lie next to each other, row by row.

    Args:
        name: Our name.
        tensor: (out_dim, 4 * dim) or (4 * dim,) if it belongs to patch merging.
        own: The model's tensor.
    """
    if not re.search(r'\.downsample\.(norm|reduction)\.', name) or tensor.shape != own.shape:
        return adapt_table(name, tensor, own)
    neighbours = tensor.unflatten(-1, (4, -1))
    return neighbours[..., [0, 2, 1, 3], :].transpose(-1, -2).flatten(-2)


#: Of Microsoft's releases and of detrex's Swin detectors. timm's models count merging to the next stage: not this one.
ORIGINAL = NameMap(
    title='Swin Transformer (original names)',
    signature=(
        r'^layers\.0\.blocks\.0\.attn\.relative_position_bias_table$',
        r'^layers\.0\.downsample\.reduction\.weight$',
    ),
    renames=(
        (r'^patch_embed\.proj\.', 'patch_embed.projection.'),
        (r'^layers\.', 'stages.'),
        (r'\.attn\.', '.attn.w_msa.'),
        (r'\.mlp\.fc1\.', '.ffn.layers.0.0.'),
        (r'\.mlp\.fc2\.', '.ffn.layers.1.'),
    ),
    dropped=((r'^norm\.', 'norm before the classification head'), *_DROPPED),
    initialised=_INITIALISED,
    adapt=adapt_original,
)

#: Of mmdet's detectors and mmpretrain's classification models; the latter's norm of the last stage is our ``norm3``.
OPENMMLAB = NameMap(
    title='Swin Transformer (OpenMMLab names)',
    signature=(
        r'^stages\.0\.blocks\.0\.attn\.w_msa\.relative_position_bias_table$',
        r'^stages\.0\.downsample\.reduction\.weight$',
    ),
    dropped=_DROPPED,
    initialised=_INITIALISED,
    adapt=adapt_table,
)
