"""Simple feature pyramid: several scales out of the one map of a plain backbone."""

from collections import OrderedDict
from collections.abc import Sequence

import torch.nn.functional as F
from mmengine.model import BaseModule
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from dino_mm.registry import MODELS

from ...checkpoints.loading import convert_backbones_on_load


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """A backbone of one map, made into a pyramid; each level is computed from that map alone.

    It holds its backbone (as ``net``), for detrex trains the pyramid at the backbone's learning rate and saves it
    under ``backbone.``; the neck of the detector stays a ``ChannelMapper``.

    Any backbone fits that returns one map (bs, in_channels, height, width), alone or in a tuple: ``ViTDet``, or the
    vision transformers of mmpretrain with ``out_type='featmap'``. Its own config says what is frozen or recomputed, and
    with ``init_cfg=dict(type='Pretrained', checkpoint=...)`` which pretrained ViT it starts from.

    The pyramid's norms are ``nn.LayerNorm`` over channels. detrex's optimizer does not know its own for norms, so they
    decay there: say so with ``custom_keys={'backbone.pyramid': dict(decay_mult=1.0)}``.

    Source: Li et al., Exploring Plain Vision Transformer Backbones for Object Detection (ViTDet), section 3.

    Args:
        backbone: Config of the plain backbone.
        in_channels: Channels of its map.
        out_channels: Channels of every level.
        scale_factors: Size of a level in sizes of the map: 4.0, 2.0, 1.0 or 0.5. For a map of stride 16, (2.0, 1.0,
            0.5) gives strides 8, 16 and 32.
        num_outs: Number of levels; those beyond ``scale_factors`` take every second pixel of the level before.
        init_cfg: mmengine's initialisation; None: PyTorch's own, as in detectron2.

    Raises:
        ValueError: A scale factor is another one, or there are more of them than ``num_outs``.
    """

    def __init__(
        self,
        backbone: dict,
        in_channels: int = 768,
        out_channels: int = 256,
        scale_factors: Sequence[float] = (2.0, 1.0, 0.5),
        num_outs: int = 4,
        init_cfg: dict | list[dict] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if num_outs < len(scale_factors):
            raise ValueError(f'`num_outs` is {num_outs}, but `scale_factors` has {len(scale_factors)}: drop some.')
        self.num_outs = num_outs
        self.net = MODELS.build(backbone)
        convert_backbones_on_load(self.net)  # its `init_cfg` may name a pretrained ViT
        self.pyramid = nn.ModuleList(_level(in_channels, out_channels, scale) for scale in scale_factors)
        convert_backbones_on_load(self)

    def forward(self, inputs: Tensor) -> tuple[Tensor, ...]:
        """Feature pyramid of images.

        Args:
            inputs: (bs, channels, height, width).

        Returns:
            ``num_outs`` maps (bs, out_channels, level height, level width).

        Raises:
            ValueError: The backbone returned several maps.
        """
        feature = _only_map(self.net(inputs))
        levels = [level(feature) for level in self.pyramid]
        while len(levels) < self.num_outs:
            levels.append(F.max_pool2d(levels[-1], kernel_size=1, stride=2))
        return tuple(levels)


def _level(in_channels: int, out_channels: int, scale: float) -> nn.Sequential:
    resample, channels = _resample(in_channels, scale)
    return nn.Sequential(
        OrderedDict(
            resample=resample,
            lateral=nn.Conv2d(channels, out_channels, kernel_size=1, bias=False),
            lateral_norm=LayerNorm2d(out_channels, eps=1e-6),
            output=nn.Conv2d(out_channels, out_channels, kernel_size=3, padding=1, bias=False),
            output_norm=LayerNorm2d(out_channels, eps=1e-6),
        )
    )


def _resample(channels: int, scale: float) -> tuple[nn.Module, int]:
    """What brings a map to ``scale`` of its size, and the number of channels after it."""
    if scale == 4.0:
        first = nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2)
        second = nn.ConvTranspose2d(channels // 2, channels // 4, kernel_size=2, stride=2)
        return nn.Sequential(first, LayerNorm2d(channels // 2, eps=1e-6), nn.GELU(), second), channels // 4
    if scale == 2.0:
        return nn.ConvTranspose2d(channels, channels // 2, kernel_size=2, stride=2), channels // 2
    if scale == 1.0:
        return nn.Identity(), channels
    if scale == 0.5:
        return nn.MaxPool2d(kernel_size=2, stride=2), channels
    raise ValueError(f'`scale_factors` has {scale}: use 4.0, 2.0, 1.0 or 0.5.')


def _only_map(outputs: Tensor | Sequence[Tensor]) -> Tensor:
    if isinstance(outputs, Tensor):
        return outputs
    if len(outputs) != 1:
        raise ValueError(f'`backbone` returned {len(outputs)} maps: let its `out_indices` name the one to use.')
    return outputs[0]
