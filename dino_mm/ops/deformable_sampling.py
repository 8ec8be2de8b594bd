"""Weighted bilinear samples of feature maps, the core of deformable attention, and the choice of what runs them."""

import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import NamedTuple, Protocol

import torch
from mmcv.ops import get_compiling_cuda_version
from mmcv.ops.multi_scale_deform_attn import multi_scale_deformable_attn_pytorch
from torch import Tensor

from . import gather_sampling, sampling_operator
from .tracing import is_looked_into

#: The environment variable that chooses a back-end; :func:`use_backend` does so in code.
VARIABLE = 'DINO_MM_DEFORMABLE'


class Levels(Protocol):
    """Geometry of the feature maps whose pixels, one map after the other, are the tokens."""

    @property
    def shapes(self) -> tuple[tuple[int, int], ...]:
        """(height, width) of every level, known to the host."""

    @property
    def shape_tensor(self) -> Tensor:
        """The same, (num_levels, 2) int64, on the device."""

    @property
    def start_index(self) -> Tensor:
        """(num_levels,) int64, index of each level's first token, on the device."""


def by_operator(value: Tensor, locations: Tensor, weights: Tensor, levels: Levels) -> Tensor:
    """See :func:`sample_levels`: an operator of torch for mmcv's kernels on a GPU, the sparse product on a CPU."""
    return sampling_operator.sample(value, levels.shape_tensor, levels.start_index, locations, weights)


def by_deformops(value: Tensor, locations: Tensor, weights: Tensor, levels: Levels) -> Tensor:
    """See :func:`sample_levels`: the kernels of deformops, which Triton compiles as they are first used."""
    from deformops.registry import msda

    if not locations.shape[1]:  # its Triton code has no gradient then
        return by_pytorch(value, locations, weights, levels)
    return msda(value, levels.shape_tensor, levels.start_index, locations, weights)


def by_pytorch(value: Tensor, locations: Tensor, weights: Tensor, levels: Levels) -> Tensor:
    """See :func:`sample_levels`: mmcv's plain PyTorch code, slower, but torch can look into it."""
    return multi_scale_deformable_attn_pytorch(value, levels.shapes, locations, weights)


def by_gathers(value: Tensor, locations: Tensor, weights: Tensor, levels: Levels) -> Tensor:
    """See :func:`sample_levels`: for exports to where `grid_sample` is missing or wrong."""
    return gather_sampling.sample(value, levels.shape_tensor, levels.start_index, locations, weights).flatten(2)


Sampler = Callable[[Tensor, Tensor, Tensor, Levels], Tensor]


class Backend(NamedTuple):
    """A way to sample."""

    sample: Sampler
    devices: tuple[str, ...]
    """Types of the devices that it is for."""
    dtypes: tuple[torch.dtype, ...]
    is_here: bool
    """Whether what it needs is installed."""
    way_to_get: str


HALF, FULL = (torch.float16, torch.bfloat16), (torch.float32, torch.float64)
#: By name; without a choice, the first one runs that is here and is for the values' device and precision.
BACKENDS = {
    'mmcv': Backend(
        by_operator,
        ('cuda',),
        # Not float64: its kernel rounds down in float32, so just below the lower edge of a map it reads the next one.
        (torch.float16, torch.float32),
        get_compiling_cuda_version() != 'not available',
        "needs mmcv's operators compiled for CUDA: `make setup MMCV=build` in a checkout of dino_mm",
    ),
    'deformops': Backend(
        by_deformops,
        ('cuda',),
        (*HALF, *FULL),
        importlib.util.find_spec('deformops') is not None,
        'needs deformops: `pip install deformops`, on Python 3.12 or newer with torch 2.11 or newer',
    ),
    'sparse': Backend(by_operator, ('cpu',), FULL, True, 'comes with dino_mm'),
    'pytorch': Backend(by_pytorch, ('cpu', 'cuda'), (*HALF, *FULL), True, 'comes with dino_mm'),
}
_chosen: str | None = None
_recorded: Sampler | None = None


def use_backend(name: str | None) -> None:
    """Have one back-end sample from now on.

    Args:
        name: One of ``BACKENDS``; None: the best for each device and precision.

    Raises:
        ValueError: There is no such back-end.
        RuntimeError: It is not installed here; names what gets it.
    """
    global _chosen
    if name is not None:
        if name not in BACKENDS:
            raise ValueError(
                f'Deformable attention has no back-end {name!r} ({VARIABLE} or `use_backend`): '
                f'it has {", ".join(BACKENDS)}.'
            )
        if not BACKENDS[name].is_here:
            here = ', '.join(known for known, backend in BACKENDS.items() if backend.is_here)
            raise RuntimeError(
                f'The back-end {name!r} of deformable attention ({VARIABLE} or `use_backend`) '
                f'{BACKENDS[name].way_to_get}. Here are: {here}.'
            )
    _chosen = name


def backend_for(device: str, dtype: torch.dtype = torch.float32) -> str:
    """Name of the back-end that samples values of a device type, such as 'cpu', 'cuda', and a precision.

    Raises:
        ValueError: The chosen one is not for these.
    """
    suitable = [
        name for name, of in BACKENDS.items() if of.is_here and device in of.devices and dtype in of.dtypes
    ] or ['pytorch']  # of another device, torch is asked
    if _chosen is None:
        return suitable[0]
    if _chosen not in suitable:
        raise ValueError(
            f'The back-end {_chosen!r} of deformable attention ({VARIABLE} or `use_backend`) does not sample '
            f'{str(dtype).removeprefix("torch.")} on a {device} device: choose {" or ".join(suitable)}, or none.'
        )
    return _chosen


@contextmanager
def recorded_as(sample: Sampler) -> Iterator[None]:
    """Have the traces and exported programs that are made within hold ``sample``; what runs stays the same."""
    global _recorded
    before, _recorded = _recorded, sample
    try:
        yield
    finally:
        _recorded = before


@cache
def warn_of_plain_code() -> None:
    """Tell once how a GPU samples faster."""
    others = '; '.join(f'{name!r} {of.way_to_get}' for name, of in BACKENDS.items() if 'cuda' in of.devices[:1])
    warnings.warn(
        f"Deformable attention runs mmcv's PyTorch code on this GPU, which takes more time and memory. {others}.",
        stacklevel=2,
    )


def sample_levels(value: Tensor, locations: Tensor, weights: Tensor, levels: Levels) -> Tensor:
    """Weighted sum of bilinear samples, by the back-end of :func:`backend_for`.

    Compiled and exported programs have the back-end as one operator; traces, which are for other libraries, have the
    operators of mmcv's PyTorch code, and so has whatever runs on the meta device. :func:`recorded_as` has another say.

    Args:
        value: (bs, num_tokens, num_heads, dim / num_heads); 0 is read outside of a level.
        locations: (bs, num_queries, num_heads, num_levels, num_points, 2), (x, y) in [0, 1] of the level.
        weights: (bs, num_queries, num_heads, num_levels, num_points).
        levels: Geometry of the tokens.

    Returns:
        (bs, num_queries, dim).
    """
    if _recorded is not None and is_looked_into():
        return _recorded(value, locations, weights, levels)
    if value.is_meta or torch.jit.is_tracing():
        return by_pytorch(value, locations, weights, levels)
    name = backend_for(value.device.type, value.dtype)
    if name == 'pytorch' and value.is_cuda and _chosen is None:
        warn_of_plain_code()
    return BACKENDS[name].sample(value, locations, weights, levels)


use_backend(os.environ.get(VARIABLE) or None)
