"""The values of an iteration for the log, read from the device at once."""

from collections import defaultdict
from typing import Any

import mmengine.hooks
import torch
from mmengine.runner import Runner
from torch import Tensor

from dino_mm.registry import HOOKS


@HOOKS.register_module()
class RuntimeInfoHook(mmengine.hooks.RuntimeInfoHook):
    """mmengine's hook, which hands the losses of each iteration to the log, with one wait for the device.

    mmengine's waits for each of DINO's forty losses. Hooks that come later find the losses on the host.
    """

    def after_train_iter(
        self, runner: Runner, batch_idx: int, data_batch: Any = None, outputs: dict[str, Any] | None = None
    ) -> None:
        """Log the losses."""
        read_at_once(outputs or {})
        super().after_train_iter(runner, batch_idx, data_batch, outputs)


def read_at_once(outputs: dict[str, Any]) -> None:
    """Replace the tensors in ``outputs`` that hold one number by tensors of the host."""
    kinds: dict[Any, dict[str, Tensor]] = defaultdict(dict)
    for name, value in outputs.items():
        if isinstance(value, Tensor) and value.numel() == 1:
            kinds[value.device, value.dtype][name] = value.detach().reshape(())
    for (_, dtype), values in kinds.items():
        for name, number in zip(values, torch.stack(list(values.values())).tolist(), strict=True):
            outputs[name] = torch.tensor(number, dtype=dtype)
