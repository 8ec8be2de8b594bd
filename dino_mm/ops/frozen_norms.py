"""Batch norms that are frozen, as a part of the convolutions before them."""

from collections.abc import Iterator
from typing import Any

import torch
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn

from .branches import has_hooks


class FrozenNorm:
    """A batch norm that may be frozen, and the convolution before it, which can then do the work of both.

    With fixed statistics, weight and bias, a norm is a product and a sum for each channel. The product goes into the
    weight of the convolution, and the sum is its bias. So the map between the two is not kept for the gradients, and
    there is one operator less, forward and backward.
    """

    def __init__(self, conv: nn.Conv2d, norm: nn.BatchNorm2d, *within: nn.Module) -> None:
        """A pair, and the modules that hold it, the inmost last."""
        self.conv = conv
        self.norm = norm
        self.within = within
        self._made_of: tuple | None = None

    def is_frozen(self) -> bool:
        """Whether the norm is fixed now, and both modules run once, as torch's do, seen by nobody between them."""
        norm = self.norm
        learns = norm.training or norm.weight.requires_grad or norm.bias.requires_grad
        # As a conversion to `SyncBatchNorm` does. mmengine's `efficient_conv_bn_eval` replaces `forward`.
        is_replaced = all(module is not norm for module in self.within[-1].modules())
        is_changed = any('forward' in vars(module) for module in (self.conv, norm, *self.within))
        is_seen = has_hooks(self.conv) or has_hooks(norm)
        # With activation checkpointing, they run again when the step is over.
        runs_again = any(getattr(module, 'with_cp', False) for module in self.within)
        is_other = learns or is_replaced or is_changed or is_seen or runs_again
        return not is_other and isinstance(self.conv.weight, nn.Parameter)

    def scale(self) -> Tensor:
        """What the convolution's weight is multiplied by, in its shape."""
        return self._numbers()[0]

    def shift(self) -> Tensor:
        """What is added to each channel, (out_channels,)."""
        return self._numbers()[1]

    def _numbers(self) -> tuple[Tensor, Tensor]:
        """Scale and shift, kept from the last call unless the norm's numbers have changed since.

        Changes through ``.data`` go by unnoticed until the detector is in training anew, see ``DINO.train``.
        """
        norm, weight = self.norm, self.conv.weight
        numbers: tuple[Any, ...] = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        made_of = (weight.device, weight.dtype, weight.stride(), *(number._version for number in numbers))
        if made_of != self._made_of:
            mean, var, factor, bias = (number.detach() for number in numbers)
            factor = factor / (var + norm.eps).sqrt()
            # With the weight's strides, without which each weight would have a kernel of its own.
            scale = torch.empty_like(weight.detach()).copy_(factor.view(-1, 1, 1, 1))
            self._made_of, self._made = made_of, (scale, (bias - mean * factor).to(weight.dtype))
        return self._made

    def fold(self, shift: Tensor) -> None:
        """Let the convolution, whose weight is scaled already, do the work of both."""
        vars(self.conv)['_parameters']['bias'] = shift  # past `setattr`, which takes parameters only
        vars(self.norm)['forward'] = _same

    def unfold(self) -> None:
        """Let each module do its own work again."""
        vars(self.conv)['_parameters']['bias'] = None
        vars(self.norm).pop('forward', None)


def _same(x: Tensor) -> Tensor:
    return x


def frozen_norms(backbone: nn.Module) -> list[FrozenNorm]:
    """The norms of mmdet's ResNets that :class:`FrozenNorm` can stand for; of other backbones none."""
    return [
        FrozenNorm(*pair, backbone, module)
        for module in backbone.modules()
        for pair in _pairs(module)
        if _are_plain(*pair)
    ]


def _pairs(module: nn.Module) -> Iterator[tuple[Any, Any]]:
    """Convolutions of a ResNet, or a block of it, with the norms that take their outputs."""
    is_block = type(module).forward in (BasicBlock.forward, Bottleneck.forward)
    if is_block or type(module).forward is ResNet.forward:
        for i in (1, 2, 3):
            yield getattr(module, f'conv{i}', None), getattr(module, getattr(module, f'norm{i}_name', ''), None)
    if is_block and isinstance(module.downsample, nn.Sequential):
        yield module.downsample[-2], module.downsample[-1]


def _are_plain(conv: Any, norm: Any) -> bool:
    kinds = type(conv), type(norm)
    return kinds == (nn.Conv2d, nn.BatchNorm2d) and conv.bias is None and norm.affine and norm.track_running_stats
