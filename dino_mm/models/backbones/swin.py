"""Swin Transformer: mmdet's, initialised and frozen as every other backbone is."""

from functools import partial
from typing import Any

import torch
from mmdet.models.backbones.swin import SwinTransformer as _SwinTransformer
from mmdet.utils import OptMultiConfig
from mmengine.model import BaseModule
from torch import nn
from torch.utils.checkpoint import checkpoint

from dino_mm.registry import MODELS

from ...checkpoints.loading import convert_backbones_on_load


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
