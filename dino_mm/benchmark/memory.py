"""How much memory of a GPU a training step will take, estimated on the host: tensors are counted, nothing is computed.

The model runs on tensors without data, forward and backward. Where a CPU takes another way than a GPU, the estimate
takes the GPU's: mmcv's operator samples, attention keeps no weights, norms and softmax run in float32 under autocast.
Not counted are the work space of cuDNN and cuBLAS and what the allocator leaves unused, see :func:`usable`.
"""

import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import cache, partial
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.nn.functional as F
from mmengine.config import ConfigDict
from mmengine.registry import init_default_scope
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dino_mm.models.layers import attention, dcnv3, transformer
from dino_mm.models.task_modules.hungarian_matcher import HungarianMatcher
from dino_mm.registry import MODELS

from .comparison import Setting, make_batch, read_config

#: Ways to train: whether encoder and decoder, and whether the backbone are checkpointed.
WAYS = {'as configured': (False, False), 'num_cp': (True, False), 'num_cp, with_cp': (True, True)}
#: The caching allocator gives out memory in multiples of this.
BLOCK = 512
#: What CUDA's autocast runs in float32 and a CPU's does not, of what keeps large tensors.
FLOAT32_FUNCTIONS = [(F, 'layer_norm'), (F, 'group_norm'), (F, 'softmax'), (torch, 'softmax'), (Tensor, 'softmax')]


class Peak(NamedTuple):
    """Memory of a training step, bytes."""

    model: int
    """Parameters, buffers and AdamW's two moments: there all the time."""
    step: int
    """The highest sum of everything else: images, activations, gradients."""

    @property
    def total(self) -> int:
        """All of it."""
        return self.model + self.step


class LiveBytes(TorchDispatchMode):
    """Counts, while active, the bytes of all tensors that operators made and that are still there.

    Attributes:
        now: Bytes of those there now.
        peak: The most that ``now`` was.
    """

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run one operator and count what it makes."""
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._add(leaf.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, -(-storage.nbytes() // BLOCK) * BLOCK
        if key in self._alive:  # a view, or written in place
            return

        def remove(_: weakref.ref) -> None:
            del self._alive[key]
            self.now -= size

        self._alive[key] = weakref.ref(storage, remove)
        self.now += size
        self.peak = max(self.peak, self.now)


class Sampling(torch.autograd.Function):
    """Keeps and makes the tensors that mmcv's operator keeps and makes."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
        """As :func:`~dino_mm.ops.deformable_sampling.sample_levels`."""
        ctx.save_for_backward(value, locations, weights)
        return value.new_empty(*locations.shape[:2], value.shape[2] * value.shape[3])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        """Gradients of all three."""
        return tuple(torch.zeros_like(tensor) for tensor in ctx.saved_tensors)


def sample(value: Tensor, locations: Tensor, weights: Tensor, levels: Any) -> Tensor:
    """Stands in for :func:`~dino_mm.ops.deformable_sampling.sample_levels`."""
    return Sampling.apply(value, locations, weights)


def attend(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, **more: Any
) -> Tensor:
    """Stands in for ``scaled_dot_product_attention``: a GPU's kernels, which keep no attention weights."""
    if attn_mask is not None:
        bias = query.new_empty(attn_mask.shape) if attn_mask.dtype == torch.bool else attn_mask.to(query.dtype)
        attn_mask = bias.expand(*query.shape[:-1], key.shape[-2])
    attention = torch.ops.aten._scaled_dot_product_efficient_attention
    return attention(query, key, value, attn_mask, torch.is_grad_enabled(), dropout_p, **more)[0]


def match(matcher: HungarianMatcher, scores: Any, boxes: Tensor, targets: Any) -> Tensor:
    """Stands in for the matcher: its costs, and any match."""
    matcher.cost(scores, boxes, targets)
    return boxes.new_zeros(*boxes.shape[:2], targets.boxes.shape[1], dtype=torch.long)


def in_float32(function: Callable) -> Callable:
    """``function`` of its first argument in float32."""
    return lambda x, *args, **kwargs: function(x.float(), *args, **kwargs)


@contextmanager
def gpu_without_data(half: bool) -> Iterator[LiveBytes]:
    """Within it, tensors have no data and operators keep what they keep on a GPU.

    Args:
        half: Run under autocast.
    """
    stand_ins: list[tuple[Any, str, Callable]] = [
        (attention, 'sample_levels', sample),
        (dcnv3, 'sample_levels', sample),
        (F, 'scaled_dot_product_attention', attend),
        (HungarianMatcher, '__call__', match),
        (transformer, 'is_cheaper_to_compute_again', lambda x: True),
    ]
    if half:
        stand_ins += [(owner, name, in_float32(getattr(owner, name))) for owner, name in FLOAT32_FUNCTIONS]
    with ExitStack() as stack:
        for owner, name, stand_in in stand_ins:
            stack.enter_context(mock.patch.object(owner, name, stand_in))
        stack.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        yield stack.enter_context(LiveBytes())


def checkpointed(model: ConfigDict, transformer: bool, backbone: bool) -> ConfigDict:
    """The model's config with activation checkpointing in all layers of encoder and decoder, or in the backbone."""
    model = ConfigDict(model.to_dict())
    if transformer:
        for part in (model.encoder, model.decoder):
            part.num_cp = part.num_layers
    if backbone:
        # A ViT stands within its pyramid.
        model.backbone.get('backbone', model.backbone).with_cp = True
    return model


def training_peak(config: ConfigDict, setting: Setting, half: bool = False) -> Peak:
    """Memory of a training step with AdamW.

    Args:
        config: Of the model.
        setting: Images and boxes; what it says of config, precision and device does not count.
        half: Run under autocast, weights stay in float32.
    """
    init_default_scope('mmdet')
    with torch.device('meta'):  # copies of modules, which the head makes, cannot be made of tensors without data
        model = MODELS.build(config).train()
    with gpu_without_data(half) as live:
        model.to_empty(device='cpu')
        weights = live.now
        trained = sum(p.nbytes for p in model.parameters() if p.requires_grad)
        batch = make_batch(setting, model.bbox_head.num_classes)
        with torch.autocast('cpu', torch.bfloat16) if half else nullcontext():
            loss = sum(model(*batch, mode='loss').values())
        loss.backward()
    return Peak(weights + 2 * trained, live.peak - weights)


def largest_batch(peak: Callable[[int], Peak], budget: int) -> int:
    """The most images whose ``peak(images)`` is within ``budget`` bytes; 0 if one is too many already.

    Memory grows in proportion to the images, or faster where another moment of the step becomes the highest.
    """
    one, two = peak(1).total, peak(2).total
    if one > budget:
        return 0
    images = 1 + (budget - one) // max(two - one, 1)
    low, high = 1, images + 1  # what fits, and what does not
    while high - low > 1:
        low, high = (images, high) if peak(images).total <= budget else (low, images)
        images = (low + high) // 2
    return low


def usable(gpu_bytes: int) -> int:
    """What a step may take of a GPU: 95 % but for 1 GiB, as CUDA itself, work space and gaps take memory too."""
    return int(0.95 * gpu_bytes) - 2**30


class Row(NamedTuple):
    """One line of the estimate."""

    way: str
    """One of ``WAYS``."""
    amp: bool
    """Whether it is half precision."""
    peak: Peak
    """Of a batch of ``setting.batch`` images."""
    largest_batch: int
    """The most images that fit."""


def estimate(setting: Setting, gpu_bytes: int) -> Iterator[Row]:
    """Memory of a training step and the largest batch, with and without checkpointing and half precision.

    Args:
        setting: ``config``, ``cfg_options``, ``height``, ``width``, ``batch`` and ``boxes``.
        gpu_bytes: Memory of the GPU.
    """
    model = read_config(setting.config, setting.cfg_options).model
    for way, amp in itertools.product(WAYS, (False, True)):
        config = checkpointed(model, *WAYS[way])
        peak = cache(partial(_peak, config, setting, amp))
        yield Row(way, amp, peak(setting.batch), largest_batch(peak, usable(gpu_bytes)))


def _peak(config: ConfigDict, setting: Setting, amp: bool, images: int) -> Peak:
    return training_peak(config, replace(setting, batch=images), amp)


def heading(setting: Setting, gpu_bytes: int) -> str:
    """What the rows of the table are about."""
    return (
        f'{setting.config}: training on images of {setting.height}x{setting.width}, {setting.boxes} boxes each,\n'
        f'with AdamW; estimates, not measurements, for a GPU of {gpu_bytes / 2**30:g} GiB\n'
        f'{"":<16} {"precision":<9} {f"{setting.batch} images":>10} {"largest batch":>14}'
    )


def line(row: Row) -> str:
    """A row of the table."""
    precision = 'AMP' if row.amp else 'float32'
    return f'{row.way:<16} {precision:<9} {row.peak.total / 2**30:>6.1f} GiB {row.largest_batch:>14}'
