"""Linear layers on a CPU, and the choice of what runs them."""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .tracing import is_looked_into


def _onednn_is_faster() -> bool:
    """Whether this processor has AVX-512 and is not Intel's: MKL, which runs ``F.linear``, uses it on Intel's only."""
    processor = Path('/proc/cpuinfo')
    return (
        torch.backends.mkldnn.is_available()
        and torch.backends.cpu.get_cpu_capability() == 'AVX512'
        and processor.is_file()
        and 'GenuineIntel' not in processor.read_text()
    )


#: Whether float32 layers run on a CPU as convolutions of one pixel, for which torch asks oneDNN. The numbers are the
#: same up to rounding. Of R50 on an AMD EPYC, a training step takes 13 % less time, and an inference 14 %.
AS_CONVOLUTION = _onednn_is_faster()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``F.linear`` of (..., in_features) to (..., out_features), in the faster way."""
    is_plain = not AS_CONVOLUTION or is_looked_into()
    if is_plain or not x.is_cpu or x.dtype != torch.float32 or not x.numel():
        return F.linear(x, weight, bias)
    # (1, in_features, 1, num_rows), channels last in memory: no copy.
    rows = x.reshape(1, -1, x.shape[-1]).transpose(1, 2).unsqueeze(2)
    output = F.conv2d(rows, weight[..., None, None], bias).permute(0, 2, 3, 1)
    # `view` would do, but mmcv's ReLU writes into the output, and autograd copies where something writes into a view.
    return torch.ops.aten._unsafe_view(output, (*x.shape[:-1], len(weight)))


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
