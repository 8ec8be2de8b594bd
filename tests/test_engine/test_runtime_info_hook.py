"""The log has the values of mmengine's, and an iteration waits for the device no more often than it must."""

import copy
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import mmengine.hooks
import pytest
import torch
from faults import tiny, write_config
from mmengine.config import ConfigDict
from mmengine.logging import MessageHub
from torch import Tensor

from dino_mm.benchmark.profiling import OperatorCounter
from dino_mm.datasets.digits import make_digits
from dino_mm.engine import RuntimeInfoHook
from dino_mm.engine.launch import build_runner


def outputs() -> dict[str, object]:
    """Of all kinds, as models of others give them."""
    losses = torch.randn(20).unbind()
    return {f'd{i}.loss': loss for i, loss in enumerate(losses)} | {
        'double': torch.randn(1, dtype=torch.float64) / 3,
        'half': torch.randn((), dtype=torch.bfloat16),
        'count': torch.tensor(2**24 + 1),
        'infinite': torch.tensor(torch.inf),
        'trained': torch.randn((), requires_grad=True),
        'number': 0.5,
    }


def logged(hook: mmengine.hooks.RuntimeInfoHook, values: dict, name: str) -> tuple[dict[str, float], OperatorCounter]:
    hub = MessageHub.get_instance(name)
    with OperatorCounter() as counter:
        hook.after_train_iter(SimpleNamespace(message_hub=hub), 0, None, values)
    return {key: value.current() for key, value in hub.log_scalars.items()}, counter


def test_values_are_mmengines_and_read_at_once(request: pytest.FixtureRequest) -> None:
    values = outputs()
    name = request.node.name
    expected, plain = logged(mmengine.hooks.RuntimeInfoHook(), copy.copy(values), f'{name} mmengine')
    found, ours = logged(RuntimeInfoHook(), values, name)
    assert found == expected
    assert plain.num_waits == 25
    assert ours.num_waits == 4  # one for each precision
    with OperatorCounter() as later:
        assert [value.item() for value in values.values() if isinstance(value, Tensor)] == list(expected.values())[:-1]
    assert later.num_waits == 25  # another counter does not know where they are; on a GPU it sees it
    assert values['double'].dtype is torch.float64


def test_no_outputs_are_no_fault() -> None:
    RuntimeInfoHook().after_train_iter(SimpleNamespace(), 0, None, None)


def test_what_has_several_numbers_is_refused_as_ever(request: pytest.FixtureRequest) -> None:
    with pytest.raises(AssertionError):
        logged(RuntimeInfoHook(), dict(loss=torch.zeros(2)), request.node.name)


def test_an_iteration_with_all_hooks_waits_three_times(tmp_path: Path) -> None:
    """For the costs of the matching, the norm of the gradients, and the losses of the log."""
    data = make_digits(tmp_path / 'data', num_train=4, num_val=1)
    config = write_config(tmp_path / 'config.py', data, [])
    cfg = tiny(config, tmp_path / 'run', {'default_hooks.checkpoint.interval': 100})
    # Adam on a CPU reads its count of steps.
    cfg.optim_wrapper.optimizer = ConfigDict(type='SGD', lr=1e-3, weight_decay=0.0)
    cfg.val_cfg = cfg.val_dataloader = cfg.val_evaluator = None
    runner = build_runner(cfg)
    counters: list[OperatorCounter] = []
    run_iter = runner.train_loop.run_iter

    def counted(batch: dict) -> None:
        # As they come from the workers: the host's.
        batch['inputs'] = [torch.from_numpy(image.numpy()) for image in batch['inputs']]
        with OperatorCounter() as counter:
            for image in batch['inputs']:
                counter._made_by_host[image] = True
            run_iter(batch)
        counters.append(counter)

    runner.train_loop.run_iter = counted
    runner.train()
    for counter in counters[:3]:  # the last one writes a checkpoint
        places = Counter(place.partition(':')[0] for place in counter.places.elements())
        del places['model/utils.py']  # mmengine pads the batch: sizes, which are on the host
        assert places == {
            'task_modules/hungarian_matcher.py': 1,
            'optimizer/optimizer_wrapper.py': 1,
            'engine/runtime_info_hook.py': 1,
        }
    assert len(counters) == 4
