"""Mixed precision: losses are finite on inputs made to overflow, and steps that a scaler skips are counted once."""

import pytest
import torch
from conftest import make_samples, tiny_model_cfg
from mmengine.optim import AmpOptimWrapper
from mmengine.optim.optimizer import amp_optimizer_wrapper
from torch import nn

from dino_mm.engine import SkipNotFiniteHook
from dino_mm.models.losses.focal_loss import FocalLoss
from dino_mm.models.losses.giou_loss import NormalizedGIoULoss
from dino_mm.models.structures import Predictions, collate_targets
from dino_mm.registry import MODELS

both = pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])


def detector():
    torch.manual_seed(0)
    model = MODELS.build(tiny_model_cfg())
    model.init_weights()
    return model.train()


@both
@pytest.mark.parametrize('logit', [6e4, -6e4])
@pytest.mark.parametrize('box', [0.0, 1.0])
def test_extreme_predictions_have_finite_losses(dtype: torch.dtype, logit: float, box: float) -> None:
    """Logits at the edge of float16; boxes at 0, which have no area, and at 1; gradients are finite too."""
    model = detector()
    _, samples = make_samples((2, 1))
    scores = torch.full((3, 2, 12, 5), logit, dtype=dtype).float().requires_grad_()
    boxes = torch.full((3, 2, 12, 4), box, dtype=dtype).float().requires_grad_()
    with torch.autocast('cpu', dtype):
        losses, dn_losses = model.bbox_head.criterion(
            Predictions(scores, boxes), None, collate_targets(samples, 5), num_dn_groups=0
        )
        (losses.sum() + dn_losses.sum()).backward()
    assert losses.isfinite().all()
    assert scores.grad.isfinite().all()
    assert boxes.grad.isfinite().all()


@both
def test_focal_loss_of_half_precision_logits(dtype: torch.dtype) -> None:
    logits = torch.tensor([[6e4, -6e4], [-6e4, 6e4], [0.0, 6e4]], dtype=dtype)
    loss = FocalLoss()(logits.float(), torch.tensor([0, 0, 2]), reduction_override='none')
    big = logits[0, 0].float().item()
    expected = [0.0, 0.25 * big + 0.75 * big, 0.75 * big + 0.75 * 0.25 * 0.6931472]
    torch.testing.assert_close(loss, torch.tensor(expected), rtol=1e-5, atol=1e-6)


def test_giou_of_boxes_without_area_is_finite() -> None:
    boxes = torch.tensor([[0.0, 0, 0, 0], [1.0, 1, 1, 1], [0.5, 0.5, 0.5, 0.5]], requires_grad=True)
    targets = torch.tensor([[0.0, 0, 0, 0], [0.0, 0, 1, 1], [0.5, 0.5, 0.5, 0.5]])
    loss = NormalizedGIoULoss()(boxes, targets, reduction_override='none')
    loss.sum().backward()
    assert loss.isfinite().all()
    assert boxes.grad.isfinite().all()


@both
@pytest.mark.parametrize('size', [(64, 96), (8, 8)])
def test_a_detector_of_huge_logits_has_finite_losses(dtype: torch.dtype, size: tuple[int, int]) -> None:
    """Class logits of 6e4 out of the branches; on 8 x 8 pixels each map is one token or few."""
    model = detector()
    for branch in model.bbox_head.cls_branches:
        nn.init.constant_(branch.bias, 6e4)
    inputs, samples = make_samples((1, 1), [size, size])
    for sample in samples:
        sample.gt_instances.bboxes = torch.tensor([[1.0, 1.0, 7.0, 6.0]])
    with torch.autocast('cpu', dtype):
        losses = model.loss(inputs, samples)
    assert all(loss.isfinite() for loss in losses.values()), losses
    sum(losses.values()).backward()
    # A CPU's bfloat16 convolution of 3 x 3 has a gradient of NaN on maps of 1 x 1, whatever its loss.
    above = [p.grad for name, p in model.named_parameters() if not name.startswith('backbone') and p.grad is not None]
    assert all(gradient.isfinite().all() for gradient in above)


class Runner:
    """What the hook asks of one."""

    def __init__(self, wrapper: AmpOptimWrapper, model: nn.Module) -> None:
        self.optim_wrapper, self.model, self.message_hub, self.iter = wrapper, model, wrapper.message_hub, 0


@pytest.mark.skipif(not hasattr(torch.amp, 'GradScaler'), reason='older torch has no scaler for CPUs')
@pytest.mark.parametrize('fused', [False, True])
@pytest.mark.parametrize('clip', [None, dict(max_norm=1.0)])
def test_steps_that_the_scaler_skips_are_counted_once(
    fused: bool, clip: dict | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They end the run only when the scale has come down to 1: here from 4, after 2 more."""
    monkeypatch.setattr(amp_optimizer_wrapper, 'is_cuda_available', lambda: True)
    model = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused or None)
    wrapper = AmpOptimWrapper(optimizer=optimizer, clip_grad=clip and dict(clip))
    wrapper.loss_scaler = torch.amp.GradScaler('cpu', init_scale=4.0)
    runner, hook = Runner(wrapper, model), SkipNotFiniteHook(max_skipped=2)
    wrapper.message_hub.runtime_info.clear()
    hook.before_train(runner)
    start = model.weight.detach().clone()

    def step(factor: float) -> None:
        hook.before_train_iter(runner, runner.iter)
        loss = (model(torch.ones(1, 2)) * factor).sum()
        wrapper.update_params(loss)
        hook.after_train_iter(runner, runner.iter, None, dict(loss=loss.detach()))
        runner.iter += 1

    step(torch.inf)
    assert torch.equal(model.weight, start)
    assert wrapper.loss_scaler.get_scale() == 2.0
    assert hook._in_a_row == 0
    step(1.0)
    assert not torch.equal(model.weight, start)
    after = model.weight.detach().clone()
    step(torch.inf)
    with pytest.raises(FloatingPointError, match='2 steps in a row and 2 of the last 3 were skipped'):
        step(torch.inf)
    assert torch.equal(model.weight, after)
    assert wrapper.message_hub.get_info('dino_mm_skipped_steps') == 3
    assert wrapper.loss_scaler.get_scale() == 0.5
