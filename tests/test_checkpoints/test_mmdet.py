"""A DINO of MMDetection, saved and loaded into ours: equal predictions and losses, in float64."""

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import parity
import pytest
import torch
from foreign import with_mmdets_dino
from mmdet.registry import MODELS as MMDET_MODELS
from mmdet.structures import DetDataSample
from mmengine.config import Config
from mmengine.registry import init_default_scope
from mmengine.runner import load_checkpoint
from torch import Tensor, nn

import dino_mm
from dino_mm.checkpoints.errors import CheckpointError
from dino_mm.registry import MODELS

SHIPPED = 'configs/dino/dino-4scale_r50_8xb2-12e_coco.py'


@pytest.fixture(autouse=True)
def _scope() -> None:
    init_default_scope('mmdet')


@pytest.fixture(scope='module')
def theirs() -> nn.Module:
    """mmdet's own model with random weights that leave no part idle, its denoising without noise."""
    init_default_scope('mmdet')
    torch.manual_seed(0)
    root = Path(find_spec('mmdet').origin).parent / '.mim'
    cfg = Config.fromfile(root / SHIPPED).model
    cfg.backbone.init_cfg = None
    cfg.dn_cfg.update(label_noise_scale=1e-12, box_noise_scale=1e-12)  # it asserts that they are above 0
    model = MMDET_MODELS.build(cfg)
    model.init_weights()  # before, the level embedding is memory as it was found
    generator = torch.Generator().manual_seed(3)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and 'running_var' not in name:
            tensor.add_(torch.randn(tensor.shape, generator=generator) * 0.02)
    return model.double()


@pytest.fixture(scope='module')
def checkpoint(theirs: nn.Module, tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp('mmdet') / 'epoch_12.pth'
    torch.save(dict(meta=dict(epoch=12, iter=90000), state_dict=theirs.state_dict()), path)
    return str(path)


@pytest.fixture
def batch() -> tuple[Tensor, list[DetDataSample]]:
    inputs, samples = parity.batch([parity.image(3001, 192, 256), parity.image(3002, 160, 224)])
    boxes = [[[16, 24, 96, 88], [120, 8, 250, 180], [40, 100, 72, 140]], [[8, 8, 200, 150], [60, 40, 100, 90]]]
    for sample in parity.add_gts(samples, boxes, [[0, 17, 79], [5, 5]]):
        sample.gt_instances.bboxes = sample.gt_instances.bboxes.double()
    return inputs, samples


def ours(config: str, **changes: object) -> nn.Module:
    cfg = Config.fromfile(dino_mm.cfg(config))
    cfg.merge_from_dict({f'model.{key}': value for key, value in changes.items()})
    return MODELS.build(cfg.model).double()


@pytest.fixture(scope='module')
def loaded(checkpoint: str) -> Iterator[nn.Module]:
    """The 24-epoch config has MMDetection's position embedding; its GIoU has no term for small boxes."""
    model = ours(
        'dino-resnet/dino_r50_4scale_24ep.py',
        **{
            'bbox_head.loss_iou': dict(_delete_=True, type='GIoULoss', loss_weight=2.0),
            'denoising.label_noise_ratio': 0.0,
            'denoising.box_noise_scale': 0.0,
        },
    )
    load_checkpoint(model, checkpoint)
    return model


@with_mmdets_dino
def test_every_tensor_is_accounted_for(theirs: nn.Module, loaded: nn.Module) -> None:
    own = loaded.state_dict()
    biases = {name for name in own if name.startswith('neck.') and name.endswith('conv.bias')}
    assert len(biases) == 4
    assert all((own[name] == 0).all() for name in biases)
    assert len(own) == len(theirs.state_dict()) + 4
    assert torch.equal(own['query_selector.memory_trans_fc.weight'], theirs.memory_trans_fc.weight)
    assert torch.equal(own['query_selector.query_embedding.weight'], theirs.query_embedding.weight)
    assert torch.equal(own['denoising.label_embedding.weight'], theirs.dn_query_generator.label_embedding.weight)
    same = own.keys() & theirs.state_dict().keys()
    assert len(same) == len(own) - 4 - 6
    assert all(torch.equal(own[name], theirs.state_dict()[name]) for name in same)


@with_mmdets_dino
def test_predictions_are_equal(theirs: nn.Module, loaded: nn.Module, batch: tuple) -> None:
    inputs, samples = batch
    with torch.no_grad():
        # One image: with padding, mmdet masks in inference as it does in training, which detrex does not.
        one = inputs[:1], samples[:1]
        expected = theirs.eval().predict(*one, rescale=False)[0].pred_instances.clone()
        actual = loaded.eval().predict(*one, rescale=False)[0].pred_instances
    assert len(expected) == len(actual) == 300
    torch.testing.assert_close(actual.scores, expected.scores, rtol=0, atol=1e-5)
    assert torch.equal(actual.labels, expected.labels)
    torch.testing.assert_close(actual.bboxes, expected.bboxes.to(actual.bboxes), rtol=0, atol=1e-3)


@pytest.mark.slow
@with_mmdets_dino
def test_losses_are_equal(theirs: nn.Module, loaded: nn.Module, batch: tuple) -> None:
    torch.set_default_dtype(torch.float64)  # mmdet makes its denoising queries in the default type
    try:
        expected = theirs.train().loss(*batch)
    finally:
        torch.set_default_dtype(torch.float32)
    actual = loaded.train().loss(*batch)
    assert actual.keys() == expected.keys()
    assert len(actual) == 39
    assert {k: v.item() for k, v in actual.items()} == {
        k: pytest.approx(v.item(), rel=1e-5) for k, v in expected.items()
    }


def test_another_position_embedding_is_refused(checkpoint: str) -> None:
    model = ours('dino-resnet/dino_r50_4scale_12ep.py')
    with pytest.raises(CheckpointError, match=r'temperature 20 and\s+offset 0.0; the model has 10000 and -0.5'):
        load_checkpoint(model, checkpoint)
