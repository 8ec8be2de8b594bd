"""Deformable sampling as one operator of torch, ``dino_mm::sample_levels``, which compilers and exporters keep whole.

On a GPU it runs mmcv's compiled kernels, on a CPU the sparse product.
"""

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from mmcv.ops.multi_scale_deform_attn import ext_module
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import sparse_sampling
from .tracing import IS_TORCH_2_7

#: Images that mmcv's kernels take at once; its default.
IM2COL_STEP = 64
Gradients = tuple[Tensor, Tensor, Tensor]


def run_forward(value: Tensor, shape_tensor: Tensor, start_index: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """The forward pass, see :func:`~dino_mm.ops.deformable_sampling.sample_levels`."""
    if not value.is_cuda:
        return sparse_sampling.sample(value, locations, weights, host_shapes(shape_tensor))
    if not locations.shape[1]:  # CUDA starts no kernel for no query
        return like_output(value, shape_tensor, start_index, locations, weights)
    check_kernels(value.device)
    value, locations, weights = value.contiguous(), locations.contiguous(), weights.contiguous()
    return ext_module.ms_deform_attn_forward(
        value, shape_tensor, start_index, locations, weights, im2col_step=IM2COL_STEP
    )


@cache
def check_kernels(device: torch.device) -> None:
    """See once whether mmcv's kernels run on this GPU.

    Kernels that were compiled for other GPUs only print so, and their output is 0 everywhere.

    Raises:
        RuntimeError: They do not run; names the way out.
    """
    one = torch.ones(1, 1, 1, 1, dtype=torch.float32, device=device)  # the value of a map of one pixel
    shape, first = torch.ones(1, 2, dtype=torch.int64, device=device), torch.zeros(1, dtype=torch.int64, device=device)
    center = torch.full((1, 1, 1, 1, 1, 2), 0.5, dtype=torch.float32, device=device)
    try:
        output = ext_module.ms_deform_attn_forward(one, shape, first, center, one[None], im2col_step=IM2COL_STEP)
        fault = None if output.item() == 1 else 'they give wrong numbers'
    except RuntimeError as error:
        fault = str(error).partition('\n')[0]
    if fault:
        raise RuntimeError(
            f"mmcv's kernels for deformable attention do not run on {torch.cuda.get_device_name(device)} ({fault}): "
            'they were compiled for other GPUs. Compile mmcv here (`make setup MMCV=build` in a checkout of dino_mm), '
            'or set DINO_MM_DEFORMABLE=pytorch.'
        )


def run_backward(
    grad: Tensor, value: Tensor, shape_tensor: Tensor, start_index: Tensor, locations: Tensor, weights: Tensor
) -> Gradients:
    """Gradients of value, locations and weights from that of the output, (bs, num_queries, dim)."""
    if not value.is_cuda:
        return sparse_sampling.gradients(grad, value, locations, weights, host_shapes(shape_tensor))
    value, locations, weights = value.contiguous(), locations.contiguous(), weights.contiguous()
    grads = torch.zeros_like(value), torch.zeros_like(locations), torch.zeros_like(weights)  # the kernel adds
    if locations.shape[1]:
        ext_module.ms_deform_attn_backward(
            *(value, shape_tensor, start_index, locations, weights, grad.contiguous(), *grads), im2col_step=IM2COL_STEP
        )
    return grads


def like_output(value: Tensor, shape_tensor: Tensor, start_index: Tensor, locations: Tensor, weights: Tensor) -> Tensor:
    """A tensor like the output, for compilers; `len` would fix the batch size."""
    return value.new_empty(value.shape[0], locations.shape[1], value.shape[2] * value.shape[3])


def like_gradients(
    grad: Tensor, value: Tensor, shape_tensor: Tensor, start_index: Tensor, locations: Tensor, weights: Tensor
) -> Gradients:
    """Tensors like the gradients, for compilers."""
    return value.new_empty(value.shape), locations.new_empty(locations.shape), weights.new_empty(weights.shape)


def host_shapes(shape_tensor: Tensor) -> sparse_sampling.Shapes:
    """(height, width) of each level, from a tensor on the host."""
    return tuple((int(height), int(width)) for height, width in shape_tensor)


def keep_inputs(ctx: Any, inputs: tuple, output: Tensor) -> None:
    """Keep what the backward pass needs."""
    ctx.save_for_backward(*inputs)


def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of all arguments of ``sample``."""
    grad_value, grad_locations, grad_weights = sample_backward(*grads, *ctx.saved_tensors)
    return grad_value, None, None, grad_locations, grad_weights


class Sample(torch.autograd.Function):
    """What stands for the operator where torch is too old for it."""

    forward = staticmethod(run_forward)
    setup_context = staticmethod(keep_inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """See ``backward``."""
        return backward(ctx, *grads)


#: Both passes: operators of torch, or before torch 2.7, where compilers break their graphs here, functions.
sample: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor] = Sample.apply
sample_backward: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor], Gradients] = run_backward


def register() -> None:
    """Make them operators."""
    global sample, sample_backward
    forward_operator = torch.library.custom_op('dino_mm::sample_levels', run_forward, mutates_args=())
    forward_operator.register_fake(like_output)
    forward_operator.register_autograd(backward, setup_context=keep_inputs)
    for device in ('cpu', 'cuda'):  # half precision cannot address the pixels of a large map
        forward_operator.register_autocast(device, torch.float32)
    backward_operator = torch.library.custom_op('dino_mm::sample_levels_backward', run_backward, mutates_args=())
    backward_operator.register_fake(like_gradients)
    sample, sample_backward = torch.ops.dino_mm.sample_levels, torch.ops.dino_mm.sample_levels_backward


if IS_TORCH_2_7:
    register()
