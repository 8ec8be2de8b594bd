"""Whether torch runs the code, or looks into it."""

from collections.abc import Callable

import torch

#: Its public place since torch 2.3, or the one before.
is_compiling: Callable[[], bool] = getattr(torch.compiler, 'is_compiling', None) or torch._dynamo.is_compiling
#: Whether torch is 2.7 or newer, told by what our operator needs of it.
IS_TORCH_2_7 = hasattr(torch.library, 'register_autocast')


def is_looked_into() -> bool:
    """Whether torch records what runs, to compile, trace or export it: operators should be plain ones then."""
    return is_compiling() or torch.jit.is_tracing()
