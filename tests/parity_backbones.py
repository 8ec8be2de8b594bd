"""Backbones against the goldens of detrex: weights by rule in detrex's names, converted by our own name maps."""

import numpy as np
import torch
from parity import batch, golden, image, rule_state
from torch import Tensor, nn

from dino_mm.checkpoints.names import NameMap, convert


def load_by_rule(backbone: nn.Module, arch: str, scheme: NameMap) -> None:
    """Give ``backbone`` (made float64) the rule's weights of ``arch``; every tensor must find its place."""
    backbone.double().eval()
    prefix = 'backbone.'
    tensors = {k[len(prefix) :]: v for k, v in rule_state(arch, prefix).items()}
    assert scheme.matches(tensors)
    own = backbone.state_dict()
    result = convert(scheme, tensors, own)
    missing = own.keys() - result.tensors.keys() - result.filled.keys()
    unexpected = result.tensors.keys() - own.keys()
    assert not missing, sorted(missing)[:8]
    assert not unexpected, sorted(unexpected)[:8]
    backbone.load_state_dict(result.tensors, strict=False)


def assert_equals_golden(backbone: nn.Module, arch: str, size: tuple[int, int] = (256, 320)) -> None:
    """Outputs of ``backbone`` for the golden's image: shapes, statistics and 64 values of each."""
    suffix = '' if size == (256, 320) else f'__{size[0]}x{size[1]}'
    expected = golden(f'eval/{arch}{suffix}.npz')
    names = sorted(k.removeprefix('shape_bb_') for k in expected if k.startswith('shape_bb_'))
    with torch.no_grad():
        outputs = backbone(batch([image(2022, *size)])[0])
    assert len(outputs) == len(names)
    for name, output in zip(names, outputs, strict=True):
        _assert_tensor(output, expected, f'bb_{name}')


def _assert_tensor(actual: Tensor, expected: dict[str, np.ndarray], name: str) -> None:
    assert list(actual.shape) == expected[f'shape_{name}'].tolist()
    where = torch.linspace(0, actual.numel() - 1, 64, dtype=torch.float64).long()
    np.testing.assert_allclose(actual.reshape(-1)[where].numpy(), expected[f'sample_{name}'], rtol=0, atol=1e-6)
    stats = [actual.mean(), actual.std(), actual.abs().sum()]
    np.testing.assert_allclose(torch.stack(stats).numpy(), expected[f'stat_{name}'], rtol=1e-6, atol=1e-6)
