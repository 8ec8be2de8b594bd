"""The zoo's configs, what detrex says of each, and their models on the meta device, where they cost no memory."""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from commands import ROOT
from mmengine.config import Config
from parity import golden
from torch import nn

from dino_mm.checkpoints.conversion import convert_detector
from dino_mm.registry import MODELS

ROWS = {row['config']: row for row in golden('zoo.json')}
RECIPES = golden('recipes.json')


class Entry(NamedTuple):
    """A config of the zoo.

    Attributes:
        config: Path below the repository.
        recipe: Name of detrex's training facts, in ``RECIPES``.
        arch: Name of the architecture's goldens.
    """

    config: str
    recipe: str
    arch: str

    @property
    def name(self) -> str:
        """File name without suffix."""
        return Path(self.config).stem


def _entry(config: str) -> Entry:
    """Configs that detrex's tables do not have are named as its own."""
    recipe = config.removeprefix('configs/')
    row = ROWS.get(config) or dict(recipe=recipe, arch=RECIPES[recipe]['arch'])
    return Entry(config, row['recipe'], row['arch'])


ENTRIES = [
    _entry(str(path.relative_to(ROOT)))
    for path in sorted(ROOT.glob('configs/dino-*/*.py'))
    if path.parent.name != 'dino-demo'
]
EXTRAS = [entry for entry in ENTRIES if entry.config not in ROWS]


@cache
def load(config: str) -> Config:
    """A config, not to be changed."""
    return Config.fromfile(ROOT / config)


@cache
def build(config: str) -> nn.Module:
    """A config's model on the meta device, not to be changed."""
    with torch.device('meta'):
        return MODELS.build(load(config).model)


@cache
def detrex_names(config: str, arch: str) -> dict[str, str]:
    """Our name of every tensor of a config's model that detrex has too -> detrex's."""
    keys = golden(f'keys/{arch}.json')
    tensors = {
        name: torch.empty(shape, device='meta')
        for name, shape in keys['tensors'].items()
        if name not in keys['aliases']
    }
    converted = convert_detector(tensors, build(config))
    assert not converted.problems
    return converted.conversion.origin
