"""Steps whose numbers are not finite are left out, so that weights never become NaN."""

import logging
import math
from collections import deque
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim import Optimizer

from dino_mm.registry import HOOKS

from ..models.losses.set_criterion import SetCriterion
from ..models.structures import name_image

#: Updates over which ``max_share`` is taken.
WINDOW = 1000
#: The message hub's entry, which checkpoints hold: steps that were skipped since the training began.
SKIPPED = 'dino_mm_skipped_steps'


@HOOKS.register_module()
class SkipNotFiniteHook(Hook):
    """Skips optimizer steps whose losses, predictions or gradients are NaN or infinite, in all processes alike.

    The norm of the gradients tells. Clipping by norm computes it anyway, the log shows it, and it is the same in every
    process, because gradients are averaged: nothing is waited for. Losses that are not finite make it NaN, see
    ``SetCriterion.nan_where_not_finite``. Without ``clip_grad`` of type 'norm' the hook computes the norm itself,
    of what ``clip_grad`` of type 'value' leaves.

    A step that is skipped leaves weights, moments of the optimizer and statistics of batch norms as they were. With
    ``accumulative_counts`` all iterations of the step are lost. Each skip is logged with its iteration, the images and
    the losses that are not finite.

    A gradient scaler of AMP skips steps to find its scale. Such skips are logged, and count towards the limits only
    when the scale is no longer above 1, or fixed.

    Args:
        max_skipped: Steps skipped in a row that end the run.
        max_share: Share of the last 1,000 steps that ends the run when more were skipped.

    Raises:
        FloatingPointError: A limit is passed. Nothing is saved then: the latest checkpoint stays.
    """

    # After the loss is known to the log, before averages of the weights are updated and checkpoints are written.
    priority = 'HIGH'

    def __init__(self, max_skipped: int = 10, max_share: float = 0.01) -> None:
        self.max_skipped = max_skipped
        self.max_share = max_share

    def before_train(self, runner: Runner) -> None:
        """Watch the optimizer.

        Raises:
            TypeError: There are several optimizers.
        """
        if not isinstance(runner.optim_wrapper, OptimWrapper):
            raise TypeError(
                f'dino_mm.SkipNotFiniteHook watches one optimizer, and `optim_wrapper` is a '
                f'{type(runner.optim_wrapper).__name__}. Take the hook out of `default_hooks`.'
            )
        self._wrapper = runner.optim_wrapper
        self._criteria = [module for module in runner.model.modules() if isinstance(module, SetCriterion)]
        for criterion in self._criteria:
            criterion.nan_where_not_finite = True
        self._statistics: Statistics | None = None
        self._faults: list[str] = []
        self._in_a_row = 0
        self._recent: deque[bool] = deque(maxlen=WINDOW)
        self._finite: bool | None = None
        self._watch = self._wrapper.optimizer.register_step_pre_hook(self._before_step)

    def after_train(self, runner: Runner) -> None:
        """Leave the optimizer and the losses as they were."""
        self._watch.remove()
        for criterion in self._criteria:
            criterion.nan_where_not_finite = False

    def before_train_iter(self, runner: Runner, batch_idx: int, data_batch: Any = None) -> None:
        """Remember what a forward pass changes."""
        if self._statistics is None:  # only now the model is in training mode
            self._statistics = Statistics(runner.model)
        self._statistics.keep()

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Tensor] | None = None
    ) -> None:
        """Count and log a step that was skipped."""
        outputs = outputs or {}
        # One value alone: mmengine's log has read it just before.
        if 'loss' in outputs and not math.isfinite(outputs['loss'].item()):
            self._restore()
            self._faults.append(self._describe(runner.iter + 1, outputs, data_batch))
        if not self._wrapper.should_update():
            return
        # A gradient scaler does not call the optimizer where it skips.
        finite, self._finite = bool(self._finite), None
        faults, self._faults = self._faults, []
        if finite:
            self._in_a_row = 0
            self._recent.append(False)
            return
        self._restore()
        self._count(runner, faults, data_batch)

    def _restore(self) -> None:
        if self._statistics is not None:
            self._statistics.restore()

    def _before_step(self, optimizer: Optimizer, args: tuple, kwargs: dict) -> None:
        """Take the gradients away if they are not finite: an optimizer passes over parameters without."""
        self._finite = math.isfinite(self._grad_norm(optimizer))
        if not self._finite:
            optimizer.zero_grad(set_to_none=True)

    def _grad_norm(self, optimizer: Optimizer) -> float:
        if self._wrapper.clip_grad_kwargs and self._wrapper.grad_name == 'grad_norm':
            return float(self._wrapper.message_hub.get_scalar('train/grad_norm').current())
        parameters = [parameter for group in optimizer.param_groups for parameter in group['params']]
        return float(nn.utils.clip_grad_norm_(parameters, math.inf))

    def _count(self, runner: Runner, faults: list[str], data_batch: Any) -> None:
        total = runner.message_hub.get_info(SKIPPED, 0) + 1
        runner.message_hub.update_info(SKIPPED, total)
        scale = self._searched_scale()
        if scale is None:
            self._in_a_row += 1
            self._recent.append(True)
            own = f"the gradients are not finite, this process's losses are; {describe_images(data_batch)}"
            why = '; '.join(faults) or own
        else:
            why = f'the scale of the gradients was too large and is now {scale:g}'
        print_log(
            f'Iteration {runner.iter + 1}: the step is skipped, number {total} of the training, {self._in_a_row} in a '
            f'row: {why}',
            logger='current',
            # A process other than the first prints nothing below.
            level=logging.ERROR if faults else logging.WARNING,
        )
        if self._in_a_row >= self.max_skipped or sum(self._recent) > self.max_share * WINDOW:
            last = runner.message_hub.get_info('last_ckpt')
            raise FloatingPointError(
                f'Training ends at iteration {runner.iter + 1}: {self._in_a_row} steps in a row and '
                f'{sum(self._recent)} of the last {len(self._recent)} were skipped, as numbers were not finite. '
                f'{f"The latest checkpoint is {last}. " if last else "There is no checkpoint yet. "}'
                'Look at the images that the log names; lower the learning rate, check `clip_grad`; under AMP try '
                'bfloat16.'
            )

    def _searched_scale(self) -> float | None:
        """The scale that a gradient scaler goes on with, if it is still its choice that explains a skip."""
        scaler = getattr(self._wrapper, 'loss_scaler', None)
        if scaler is None or not scaler.is_enabled() or self._wrapper._scale_update_param is not None:
            return None
        scale = scaler.get_scale()
        return scale if scale > 1 else None

    def _describe(self, iteration: int, outputs: dict[str, Tensor], data_batch: Any) -> str:
        names = [name for name, value in outputs.items() if name != 'loss' and not math.isfinite(value.item())]
        terms = 'all losses' if len(names) == len(outputs) - 1 else ', '.join(names)
        causes = [criterion.not_finite for criterion in self._criteria if criterion.not_finite]
        return ' '.join([f'iteration {iteration}: {terms} not finite; {describe_images(data_batch)}.', *causes])


class Statistics:
    """Running statistics of a model's batch norms, which a forward pass changes before anyone knows its loss.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.track_running_stats]
        buffers = [buffer for norm in norms if norm.training for buffer in norm.buffers(recurse=False)]
        self._buffers = [buffer for buffer in buffers if buffer.is_floating_point()]
        self._kept = [buffer.clone() for buffer in self._buffers]

    def keep(self) -> None:
        """Remember the present values."""
        if self._buffers:
            torch._foreach_copy_(self._kept, self._buffers)

    def restore(self) -> None:
        """Go back to the values kept if those since are not finite."""
        if not all(bool(buffer.isfinite().all()) for buffer in self._buffers):
            torch._foreach_copy_(self._buffers, self._kept)


def describe_images(data_batch: Any) -> str:
    """Ids and files of a batch's images, as far as known."""
    samples = data_batch.get('data_samples') if isinstance(data_batch, dict) else None
    return 'images: ' + (', '.join(map(name_image, samples)) if samples else 'unknown')
