"""Small networks of one shape, each with an input of its own, as one: a GPU takes longer to start them than to run."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .tracing import is_looked_into


def run_branches(branches: Sequence[nn.Module], inputs: Tensor) -> Tensor:
    """The output of each branch for its own input, all products of one depth together where the branches are plain.

    Args:
        branches: n linear layers, or n sequences of linear layers and ReLUs; others, and those with hooks, run one by
            one.
        inputs: (n, ..., dim).

    Returns:
        (n, ..., out_dim).
    """
    depths = list(zip(*map(_steps, branches), strict=True))
    if len(branches) == 1 or is_looked_into() or not depths or not all(map(_are_plain, depths)):
        return torch.stack([branch(x) for branch, x in zip(branches, inputs, strict=True)])
    # With columns, the gradients of the weights have the strides of the weights. With rows, each would be copied.
    x = inputs.flatten(1, -2).transpose(1, 2)
    for steps in depths:
        if isinstance(steps[0], nn.ReLU):
            x = x.relu()
        else:
            weight, bias = (torch.stack([getattr(step, name) for step in steps]) for name in ('weight', 'bias'))
            x = torch.baddbmm(bias[..., None], weight, x)
    return x.transpose(1, 2).unflatten(1, inputs.shape[1:-1])


def _steps(branch: nn.Module) -> list[nn.Module]:
    """The layers of a branch; none where calling them would leave something out."""
    if type(branch) is nn.Sequential:
        return [] if has_hooks(branch) else list(branch)
    return [branch]


def _are_plain(steps: Sequence[nn.Module]) -> bool:
    kinds = {type(step) for step in steps}
    sizes = {step.weight.shape for step in steps if type(step) is nn.Linear}
    return (
        kinds in ({nn.Linear}, {nn.ReLU})
        and len(sizes) < 2
        and all(getattr(step, 'bias', sizes) is not None for step in steps)
        and not any(map(has_hooks, steps))
    )


def has_hooks(module: nn.Module) -> bool:
    """Whether someone wants to be told of calls of ``module``, so that its weights alone will not do."""
    return bool(
        module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks
    )
