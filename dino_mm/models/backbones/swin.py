"""Swin Transformer: mmdet's, initialised and frozen as every other backbone is."""

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from mmdet.models.backbones.swin import ShiftWindowMSA
from mmdet.models.backbones.swin import SwinTransformer as _SwinTransformer
from mmdet.models.layers.transformer.utils import AdaptivePadding
from mmdet.utils import OptMultiConfig
from mmengine.model import BaseModule
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dino_mm.registry import MODELS

from ...checkpoints.loading import convert_backbones_on_load
from ...ops.tracing import is_looked_into
from .vitdet import copy, crop, windows_along


@MODELS.register_module()
class SwinTransformer(_SwinTransformer):
    """mmdet's ``SwinTransformer``, with pretrained weights left to mmengine's ``Pretrained`` initialisation.

    mmdet's loads its checkpoint by itself: only tensors that begin with ``backbone.``, and it does not say which it
    left out. Here checkpoints go the same way as for any module, so their naming scheme is recognised and every tensor
    is accounted for. Frozen stages are frozen from construction on, not from the first call of ``train``: optimizers
    and ``DistributedDataParallel`` are made before that.

    Outputs are the maps after ``norm<i>``, (bs, embed_dims * 2 ** i, height, width), i in ``out_indices``, with strides
    4, 8, 16, 32; height and width are rounded up.

    Args:
        with_cp: Activation checkpointing: compute blocks again in the backward pass instead of storing what is in them.
        init_cfg: Initialisation; if None, linear layers are drawn from a truncated normal distribution, as relative
            position tables always are.
        kwargs: Arguments of mmdet's ``SwinTransformer``; ``frozen_stages`` 0 freezes the patch embedding, n > 0 also
            the first n stages and their output norms, -1 nothing.

    Raises:
        TypeError: ``pretrained`` or ``convert_weights`` is given; ``init_cfg`` is the one way to load weights.

    Source: Liu et al., Swin Transformer: Hierarchical Vision Transformer using Shifted Windows.
    """

    def __init__(self, *, with_cp: bool = False, init_cfg: OptMultiConfig = None, **kwargs: Any) -> None:
        for key in ('pretrained', 'convert_weights'):
            if key in kwargs:
                raise TypeError(
                    f'`{key}` of the Swin backbone has no meaning here; remove it, and load weights with '
                    "`init_cfg=dict(type='Pretrained', checkpoint=...)`: naming schemes are recognised."
                )
        # mmdet reads the drop path rates back from a tensor, which the meta device cannot do.
        device = torch.get_default_device()
        with torch.device('cpu'):
            super().__init__(init_cfg=init_cfg or dict(type='TruncNormal', layer='Linear', std=0.02), **kwargs)
        self.to(device)
        use_symbolic_sizes(self)
        self._freeze_stages()
        convert_backbones_on_load(self)
        if with_cp:
            # mmdet's blocks leave the kind of checkpointing to torch's default, which is deprecated.
            for block in (block for stage in self.stages for block in stage.blocks):
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    def init_weights(self) -> None:
        """Initialise by ``init_cfg``."""
        BaseModule.init_weights(self)

    def train(self, mode: bool = True) -> nn.Module:
        """Set training mode; frozen stages stay in evaluation mode."""
        super().train(mode)
        return self


class WindowAttention(ShiftWindowMSA):
    """mmdet's attention in windows; what is recorded of it, by a trace or an export, serves maps of all sizes."""

    def forward(self, query: Tensor, hw_shape: tuple[int, int]) -> Tensor:
        """Tokens (bs, height * width, dim) of a map of ``hw_shape`` to tokens of the same shape."""
        (bs, _, dim), (height, width), size, shift = query.shape, hw_shape, self.window_size, self.shift_size
        rows, columns = windows_along(height, size), windows_along(width, size)
        x = query.view(bs, height, width, dim)
        x = F.pad(x, (0, 0, 0, columns * size - width, 0, rows * size - height))
        mask = None
        if shift:
            x = x.roll((-shift, -shift), (1, 2))
            mask = self._mask(rows, columns, query.device)
        x = copy(x.view(bs, rows, size, columns, size, dim).transpose(2, 3)).view(-1, size**2, dim)
        x = self.w_msa(x, mask=mask).view(-1, rows, columns, size, size, dim)
        x = copy(x.transpose(2, 3)).view(bs, rows * size, columns * size, dim)
        if shift:
            x = x.roll((shift, shift), (1, 2))
        return self.drop(crop(x, height, width).reshape(bs, height * width, dim))

    def _mask(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """(rows * columns, size ** 2, size ** 2), -100 between the tokens of a window that were not neighbours."""
        size = self.window_size
        bands = []
        for length in (rows * size, columns * size):
            place = torch.arange(length, device=device)
            bands.append((place >= length - size).int() + (place >= length - self.shift_size).int())
        regions = (3 * bands[0][:, None] + bands[1]).view(rows, size, columns, size).transpose(1, 2)
        regions = copy(regions).view(rows * columns, size**2)
        return torch.where(regions[:, None] == regions[:, :, None], 0.0, -100.0)


class EdgePadding(AdaptivePadding):
    """mmdet's padding of maps whose sides a stride does not divide; what is recorded of it serves all sizes."""

    def forward(self, x: Tensor) -> Tensor:
        """(bs, dim, height, width) with zeros at the bottom and right."""
        strides, (height, width) = self.stride, x.shape[-2:]
        below = (height + strides[0] - 1) // strides[0] * strides[0] - height
        right = (width + strides[1] - 1) // strides[1] * strides[1] - width
        return F.pad(x, (0, right, 0, below)) if is_looked_into() or below or right else x


def use_symbolic_sizes(module: nn.Module) -> None:
    """Have the parts of ``module`` for whose sizes mmdet computes constants run as ours; names and parameters stay."""
    for child in module.modules():
        if type(child) is ShiftWindowMSA:
            child.__class__ = WindowAttention
        elif type(child) is AdaptivePadding and child.padding == 'corner' and child.kernel_size == child.stride:
            child.__class__ = EdgePadding
