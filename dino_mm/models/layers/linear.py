"""Linear layers of tokens, and the choice of what runs them."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...ops.tracing import is_looked_into


def _onednn_is_faster() -> bool:
    """Whether this processor has AVX-512 that MKL, which runs ``F.linear``, leaves alone: all but Intel's own."""
    processor = Path('/proc/cpuinfo')
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == 'AVX512'
        and processor.is_file()
        and 'GenuineIntel' not in processor.read_text()
    )


#: Run float32 linear layers on the CPU as 1 x 1 convolutions, for which torch asks oneDNN: the same numbers up to
#: rounding in half of the time where :func:`_onednn_is_faster`.
LINEAR_AS_CONVOLUTION = _onednn_is_faster()


def runs_as_convolution(x: Tensor) -> bool:
    """Whether a linear layer of ``x`` is a convolution: see ``LINEAR_AS_CONVOLUTION``."""
    if not LINEAR_AS_CONVOLUTION or is_looked_into():
        return False
    return x.device.type == 'cpu' and x.dtype == torch.float32 and x.dim() == 3 and x.numel() > 0


def as_map(tokens: Tensor) -> Tensor:
    """Tokens (bs, num_tokens, dim) as a map (bs, dim, 1, num_tokens), which in memory is channels-last: no copy."""
    return tokens.transpose(1, 2).unsqueeze(2)


def as_tokens(maps: Tensor) -> Tensor:
    """The reverse of :func:`as_map`."""
    return maps.squeeze(2).transpose(1, 2)


def as_kernel(weight: Tensor) -> Tensor:
    """A linear layer's weight, (out_features, in_features), as that of a 1 x 1 convolution."""
    return weight.view(*weight.shape, 1, 1)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` of tokens (bs, num_tokens, dim), in the faster way."""
    if runs_as_convolution(x):
        return as_tokens(F.conv2d(as_map(x), as_kernel(weight), bias))
    return F.linear(x, weight, bias)


class Linear(nn.Linear):
    """``nn.Linear`` by :func:`linear`."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., in_features) to (..., out_features)."""
        return linear(input, self.weight, self.bias)


def use_fast_linear(module: nn.Module) -> None:
    """Have all linear layers of ``module`` run as :class:`Linear`; names and parameters stay."""
    for child in module.modules():
        if isinstance(child, nn.Linear):
            child.__class__ = Linear
