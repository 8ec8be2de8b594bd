"""Branches that run together give what each gives by itself."""

import copy

import pytest
import torch
from torch import Tensor, nn

from dino_mm.benchmark.profiling import OperatorCounter
from dino_mm.ops.branches import run_branches


def mlp() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


class Adapted(nn.Linear):
    """A layer that someone has changed."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + 1


def hooked() -> nn.Sequential:
    branch = mlp()
    branch[0].register_forward_hook(lambda module, args, output: output * 2)
    return branch


def called() -> nn.Sequential:
    branch = mlp()
    branch.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    return branch


TOGETHER = {'linear': lambda: nn.Linear(4, 3), 'mlp': mlp}
BY_ITSELF = {
    'hook': hooked,
    'hook of the whole': called,
    'other class': lambda: Adapted(4, 3),
    'other layer': lambda: nn.Sequential(nn.Linear(4, 3), nn.Tanh()),
    'no bias': lambda: nn.Linear(4, 3, bias=False),
}


@pytest.mark.parametrize('kind', [*TOGETHER, *BY_ITSELF])
@pytest.mark.parametrize('shape', [(2, 5), (7,), (2, 0)])
def test_values_and_gradients_are_those_of_each(kind: str, shape: tuple[int, ...]) -> None:
    branches = nn.ModuleList((TOGETHER | BY_ITSELF)[kind]() for _ in range(3)).double()
    inputs = torch.randn(3, *shape, 4, dtype=torch.float64, requires_grad=True)
    single = torch.stack([branch(x) for branch, x in zip(branches, inputs, strict=True)])
    goal = torch.randn_like(single)
    variables = [inputs, *branches.parameters()]
    expected = torch.autograd.grad(single, variables, goal)
    with OperatorCounter() as counter:
        together = run_branches(list(branches), inputs)
    torch.testing.assert_close(together, single)
    torch.testing.assert_close(torch.autograd.grad(together, variables, goal), expected)
    assert bool(counter.calls['baddbmm']) is (kind in TOGETHER)


def test_branches_of_several_shapes_or_one_alone_run_by_themselves() -> None:
    for branches in ([nn.Linear(4, 3), nn.Linear(4, 3, bias=False)], [mlp()], [copy.deepcopy(hooked()), mlp()]):
        inputs = torch.randn(len(branches), 2, 4)
        expected = torch.stack([branch(x) for branch, x in zip(branches, inputs, strict=True)])
        torch.testing.assert_close(run_branches(branches, inputs), expected)
