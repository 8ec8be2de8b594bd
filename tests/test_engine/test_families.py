"""One training iteration of each backbone family from its real config, made small with nothing but config options."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.hooks import Hook
from mmengine.runner import Runner

import dino_mm
from dino_mm.datasets.digits import make_digits

#: Config -> where its pretrained weights are stated.
FAMILIES = {
    'dino-resnet/dino_r50_4scale_12ep.py': 'model.backbone.init_cfg',
    'dino-swin/dino_swin_tiny_224_4scale_12ep.py': 'model.backbone.init_cfg',
    'dino-focal/dino_focal_tiny_lrf_fl3_4scale_12ep.py': 'model.backbone.init_cfg',
    'dino-vitdet/dino_vitdet_base_4scale_12ep.py': 'model.backbone.backbone.init_cfg',
    'dino-convnext/dino_convnext_tiny_384_4scale_12ep.py': 'model.backbone.init_cfg',
    'dino-internimage/dino_internimage_tiny_4scale_12ep.py': 'model.backbone.init_cfg',
}
SMALL = {
    'model.num_queries': 30,
    'model.encoder.num_layers': 1,
    'model.decoder.num_layers': 2,
    'model.denoising.num_dn_queries': 10,
    'model.bbox_head.num_classes': 10,
    'train_dataloader.dataset.metainfo': dict(classes=tuple('0123456789')),
    'train_dataloader.dataset.ann_file': 'annotations/train.json',
    'train_dataloader.dataset.data_prefix.img': 'train/',
    'train_dataloader.dataset.pipeline.3.transforms.0.0.scales': [(96, 160)],
    'train_dataloader.dataset.pipeline.3.transforms.1.0.scales': [(96, 160)],
    'train_dataloader.dataset.pipeline.3.transforms.1.1.crop_size': (64, 96),
    'train_dataloader.dataset.pipeline.3.transforms.1.2.scales': [(96, 160)],
    # A FocalNet without pretrained weights has zero biases, so padding stays zero through all its norms, each of which
    # multiplies the gradient there by 1 / sqrt(eps): one image has no padding.
    'train_dataloader.batch_size': 1,
    'train_dataloader.num_workers': 0,
    'train_dataloader.persistent_workers': False,
    'train_cfg.max_iters': 1,
    'val_cfg': None,
    'val_dataloader': None,
    'val_evaluator': None,
    'default_hooks.logger.interval': 1,
}


@pytest.fixture(scope='module')
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_digits(tmp_path_factory.mktemp('digits') / 'data', num_train=4, num_val=1)


class Watch(Hook):
    """Weights before the first iteration, and what it gave."""

    def before_train_iter(self, runner: Runner, **_: object) -> None:
        self.before = {k: v.clone() for k, v in runner.model.named_parameters()}

    def after_train_iter(self, runner: Runner, outputs: dict, **_: object) -> None:
        self.losses = {k: v for k, v in outputs.items() if 'loss' in k}
        stepped = runner.optim_wrapper.optimizer.state  # has a parameter once it had a gradient
        self.unused = [k for k, v in runner.model.named_parameters() if v.requires_grad and v not in stepped]


def marked(name: str) -> object:
    family = name.split('/')[0]
    return pytest.param(name, marks=pytest.mark.slow if family == 'dino-vitdet' else (), id=family)


@pytest.mark.parametrize('name', map(marked, FAMILIES))
def test_one_iteration(name: str, data: Path, tmp_path: Path) -> None:
    cfg = Config.fromfile(dino_mm.cfg(name))
    options = {FAMILIES[name]: None, 'train_dataloader.dataset.data_root': f'{data}/', 'work_dir': str(tmp_path)}
    cfg.merge_from_dict(SMALL | options)
    cfg.experiment_name = name.replace('/', '_')
    runner = Runner.from_cfg(cfg)
    watch = Watch()
    runner.register_hook(watch, 'VERY_HIGH')
    runner.train()

    assert runner.iter == 1
    assert torch.isfinite(watch.losses['loss'])
    assert len(watch.losses) == 16  # class, box and GIoU loss of 2 layers, of their denoising queries, of the encoder
    assert not watch.unused
    moved = {k for k, v in runner.model.named_parameters() if (v != watch.before[k]).any()}
    assert {k.split('.')[0] for k in moved} >= {
        *('backbone', 'neck', 'encoder', 'decoder', 'query_selector', 'bbox_head', 'denoising')
    }
    assert all(v.requires_grad for k, v in runner.model.named_parameters() if k in moved)
    assert (tmp_path / 'iter_1.pth').is_file()
