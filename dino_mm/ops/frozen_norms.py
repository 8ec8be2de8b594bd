"""Batch norms that are frozen, as a part of the convolutions before them."""

from collections.abc import Iterator
from typing import Any

import torch
from mmdet.models.backbones.resnet import BasicBlock, Bottleneck, ResNet
from torch import Tensor, nn
from torch.nn.modules.module import _has_any_global_hook

from .branches import has_hooks
from .tracing import IS_TORCH_2_7, is_looked_into

#: Since torch 2.7 it can be asked whether something watches what is kept for the gradients.
CAN_FOLD = IS_TORCH_2_7


class FrozenNorm:
    """A batch norm that may be frozen, and the convolution before it, which can then do the work of both.

    With fixed statistics, weight and bias, a norm is a product and a sum for each channel. The product goes into the
    weight of the convolution, and the sum is its bias. So the map between the two is not kept for the gradients, and
    there is one operator less, forward and backward. The parameters of both stay in their place.

    mmengine's ``efficient_conv_bn_eval`` does this too, with several kernels for each pair and a traced backbone.

    Args:
        parent: Holds both, under ``names``.
        within: The backbone, and its block that holds ``parent`` or is it.
    """

    def __init__(self, parent: nn.Module, names: tuple[str, str], *within: nn.Module) -> None:
        self.parent = parent
        self.names = names
        self.within = within
        self.conv: Any
        self.norm: Any
        self.conv, self.norm = map(parent._modules.get, names)
        self._forget()

    def _forget(self) -> None:
        self._kept: tuple[Any, Any, Tensor, Tensor] | None = None
        self._folded: tuple[Tensor, Tensor] | None = None
        self._output: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies, which make their own tensors."""
        return vars(self) | dict(_kept=None, _folded=None, _output=None)

    def is_plain(self) -> bool:
        """Whether both are torch's own, in their place, called as ever, and nobody looks between them."""
        conv, norm = self.conv, self.norm
        return (
            (type(conv), type(norm)) == (nn.Conv2d, nn.BatchNorm2d)
            and list(map(self.parent._modules.get, self.names)) == [conv, norm]
            and conv.bias is None
            and all(number is not None for number in _numbers(norm))
            # mmengine's `efficient_conv_bn_eval`, among others, puts a function in the place of `forward`.
            and not any('forward' in vars(module) for module in (conv, norm, *self.within))
            and not (has_hooks(conv) or has_hooks(norm) or _has_any_global_hook())
        )

    def is_frozen(self) -> bool:
        """Whether the norm can be folded now: both are plain, the norm is fixed, and neither is to run twice."""
        if not CAN_FOLD or not self.is_plain() or any(getattr(module, 'with_cp', False) for module in self.within):
            return False
        return not (self.norm.training or self.norm.weight.requires_grad or self.norm.bias.requires_grad)

    def scale(self) -> Tensor:
        """What the convolution's weight is multiplied by, in its shape."""
        return self._scale_and_shift()[0]

    def shift(self) -> Tensor:
        """What is added to each channel, (out_channels,)."""
        return self._scale_and_shift()[1]

    def _scale_and_shift(self) -> tuple[Tensor, Tensor]:
        """Kept from the last call, unless what they are made of has changed since.

        Changes in place through ``.data`` go by unnoticed until ``eval()`` and ``train()`` of the detector are called.
        """
        weight, numbers = self.conv.weight, _numbers(self.norm)
        state = (weight.device, weight.dtype, weight.stride(), self.norm.eps, *(number._version for number in numbers))
        if self._kept is None or self._kept[1] != state or not _are_same(self._kept[0], numbers):
            mean, var, factor, bias = (number.detach() for number in numbers)
            factor = factor / (var + self.norm.eps).sqrt()
            # With the weight's strides, without which each weight would have a kernel of its own.
            scale = torch.empty_like(weight.detach()).copy_(factor.view(-1, 1, 1, 1))
            self._kept = (numbers, state, scale, (bias - mean * factor).to(weight.dtype))
        return self._kept[2:]

    def fold(self, weight: Tensor, bias: Tensor) -> None:
        """Let the convolution do the work of both with this scaled weight and this bias."""
        self._folded = weight, bias
        vars(self.conv)['forward'] = self._convolve
        vars(self.norm)['forward'] = self._normalize

    def unfold(self) -> None:
        """Let each module do its own work again."""
        self._folded = self._output = None
        for module in (self.conv, self.norm):
            vars(module).pop('forward', None)

    def _convolve(self, x: Tensor) -> Tensor:
        # Activation checkpointing turns gradients off, or watches what is kept. It calls this again after `unfold`.
        if is_looked_into() or self._folded is None or not torch.is_grad_enabled() or _is_watched():
            return nn.Conv2d.forward(self.conv, x)
        self._output = self.conv._conv_forward(x, *self._folded)
        return self._output

    def _normalize(self, x: Tensor) -> Tensor:
        if is_looked_into() or x is not self._output:
            return nn.BatchNorm2d.forward(self.norm, x)
        self._output = None
        return x


def _numbers(norm: nn.BatchNorm2d) -> tuple[Any, ...]:
    return norm.running_mean, norm.running_var, norm.weight, norm.bias


def _are_same(some: tuple[Any, ...], others: tuple[Any, ...]) -> bool:
    return all(one is other for one, other in zip(some, others, strict=True))


def _is_watched() -> bool:
    return torch._C._autograd._top_saved_tensors_default_hooks(False) is not None


def frozen_norms(backbone: nn.Module) -> list[FrozenNorm]:
    """The norms of mmdet's ResNets that :class:`FrozenNorm` can stand for; of other backbones none."""
    pairs = (FrozenNorm(*pair, backbone, block) for block in backbone.modules() for pair in _pairs(block))
    return [pair for pair in pairs if pair.is_plain()]


def _pairs(module: nn.Module) -> Iterator[tuple[nn.Module, tuple[str, str]]]:
    """Convolutions of a ResNet, or a block of it, with the norms that take their outputs: parent and names."""
    is_block = type(module).forward in (BasicBlock.forward, Bottleneck.forward)
    if is_block or type(module).forward is ResNet.forward:
        for i in (1, 2, 3):
            yield module, (f'conv{i}', getattr(module, f'norm{i}_name', ''))
    if is_block and isinstance(module.downsample, nn.Sequential) and len(module.downsample) > 1:
        conv, norm = list(module.downsample._modules)[-2:]
        yield module.downsample, (conv, norm)
