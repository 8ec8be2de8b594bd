"""A new model starts as detrex's does."""

import parity
import pytest
import torch
from foreign import detrex_name
from mmengine.config import Config

import dino_mm
from dino_mm.registry import MODELS


def test_statistics_of_initial_weights() -> None:
    cfg = Config.fromfile(dino_mm.cfg('dino-resnet/dino_r50_4scale_12ep.py')).model
    cfg.backbone.init_cfg = None
    model = MODELS.build(cfg)
    model.init_weights()
    ours = {detrex_name(k): v for k, v in model.state_dict().items()}
    stats = parity.golden('init_stats_dino_r50_4scale.json')['stats']
    for name, expected in stats.items():
        name = name.removeprefix('transformer.decoder.') if '_embed.' in name and 'tgt' not in name else name
        tensor = ours[name]
        spread = 4 * expected['std'] / tensor.numel() ** 0.5  # four standard errors
        assert tensor.mean().item() == pytest.approx(expected['mean'], abs=2 * spread + 1e-6), name
        if tensor.numel() >= 1000:
            assert tensor.std().item() == pytest.approx(expected['std'], rel=0.06, abs=1e-6), name
            assert tensor.abs().max().item() == pytest.approx(
                max(abs(expected['min']), abs(expected['max'])), rel=0.25, abs=1e-6
            ), name
    assert len(stats) == 69
    for branches in (model.bbox_head.cls_branches, model.bbox_head.reg_branches):
        for branch in branches[1:]:
            for a, b in zip(branches[0].parameters(), branch.parameters(), strict=True):
                assert torch.equal(a, b)
                assert a is not b
