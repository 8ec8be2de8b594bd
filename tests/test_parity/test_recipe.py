"""The config's training recipe equals detrex's."""

import parity
import pytest
import torch
from mmengine.config import Config
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS, init_default_scope
from parity import golden

import dino_mm
from dino_mm.registry import MODELS

RECIPE = 'dino-resnet/dino_r50_4scale_12ep.py'


@pytest.fixture(scope='module')
def cfg() -> Config:
    cfg = Config.fromfile(dino_mm.cfg(RECIPE))
    cfg.model.backbone.init_cfg = None
    return cfg


@pytest.fixture(scope='module')
def recipe() -> dict:
    return golden('recipes.json')[RECIPE]


def test_optimizer_groups(cfg: Config) -> None:
    init_default_scope('mmdet')
    model = MODELS.build(cfg.model)
    optimizer = build_optim_wrapper(model, cfg.optim_wrapper).optimizer
    names = {id(p): parity.detrex_name(k) for k, p in model.named_parameters()}
    ours = {
        names[id(p)]: (group['lr'], group['weight_decay'])
        for group in optimizer.param_groups
        for p in group['params']
        if p.requires_grad
    }
    groups = golden('optim_groups/dino_r50_4scale_12ep.json')['tools/train_net.py']
    expected = {
        name.replace('transformer.decoder.class_embed', 'class_embed').replace(
            'transformer.decoder.bbox_embed', 'bbox_embed'
        ): (pytest.approx(group['lr']), group['weight_decay'])
        for group in groups
        for name in group['names']
    }
    assert ours == expected
    assert len(ours) == 365
    assert type(optimizer) is torch.optim.AdamW


def test_learning_rate_at_every_iteration(cfg: Config, recipe: dict) -> None:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedulers = [PARAM_SCHEDULERS.build(dict(s, optimizer=optimizer)) for s in cfg.param_scheduler]
    changes = dict(map(tuple, recipe['lr_mult_changes_iter_value']))
    value = None
    for iteration in range(recipe['max_iter']):
        value = changes.get(iteration, value)
        assert optimizer.param_groups[0]['lr'] == pytest.approx(value), iteration
        optimizer.step()
        for scheduler in schedulers:
            scheduler.step()


def test_schedule_optimizer_and_batch(cfg: Config, recipe: dict) -> None:
    optimizer = recipe['optimizer']
    assert cfg.train_cfg.max_iters == recipe['max_iter']
    assert cfg.train_cfg.val_interval == recipe['eval_period']
    assert cfg.default_hooks.checkpoint.interval == recipe['checkpointer']['period']
    assert cfg.default_hooks.checkpoint.max_keep_ckpts == recipe['checkpointer']['max_to_keep']
    assert cfg.default_hooks.logger.interval == recipe['log_period']
    assert cfg.optim_wrapper.optimizer.lr == optimizer['lr']
    assert list(cfg.optim_wrapper.optimizer.betas) == optimizer['betas']
    assert cfg.optim_wrapper.optimizer.weight_decay == optimizer['weight_decay']
    assert dict(cfg.optim_wrapper.clip_grad) == recipe['clip_grad']['params']
    assert cfg.optim_wrapper.type == 'OptimWrapper'  # no AMP
    assert cfg.auto_scale_lr.base_batch_size == recipe['total_batch_size'] == 8 * cfg.train_dataloader.batch_size
    assert cfg.train_dataloader.dataset.filter_cfg.filter_empty_gt is True
    assert cfg.val_dataloader.batch_size == 1


def test_augmentation(cfg: Config, recipe: dict) -> None:
    pipeline = {t.type: t for t in cfg.train_dataloader.dataset.pipeline}
    assert list(pipeline)[:4] == ['LoadImageFromFile', 'LoadAnnotations', 'RandomFlip', 'RandomChoice']
    plain, cropped = pipeline['RandomChoice'].transforms
    mapper = recipe['train_mapper']
    flip, resize = mapper['augmentation']
    sizes = [(short, resize['max_size']) for short in resize['short_edge_length']]
    assert flip['_target_'].endswith('RandomFlip')
    assert [(t.type, t.scales, t.resize_type) for t in plain] == [
        ('RandomChoiceResize', sizes, 'dino_mm.ResizeShortestEdge')
    ]
    _, first, crop, _ = mapper['augmentation_with_crop']
    assert [short for short, _ in cropped[0].scales] == first['short_edge_length']
    assert (cropped[1].crop_type, list(cropped[1].crop_size)) == (crop['crop_type'], crop['crop_size'])
    assert cropped[2] == plain[0]
    test = cfg.test_dataloader.dataset.pipeline[1]
    resize = recipe['test_mapper']['augmentation'][0]
    assert tuple(test.scale) == (resize['short_edge_length'], resize['max_size'])


def test_architecture_is_stated_as_in_the_recipe(cfg: Config, recipe: dict) -> None:
    model, reference = cfg.model, recipe['model']
    encoder, decoder = reference['transformer']['encoder'], reference['transformer']['decoder']
    for ours, theirs in ((model.encoder, encoder), (model.decoder, decoder)):
        assert ours.num_layers == theirs['num_layers']
        assert ours.num_heads == theirs['num_heads']
        assert ours.feedforward_channels == theirs['feedforward_dim']
        assert ours.dropout == theirs['ffn_dropout'] == theirs['attn_dropout']
    assert model.num_queries == reference['num_queries']
    assert model.denoising.num_dn_queries == reference['dn_number']
    assert model.denoising.label_noise_ratio == reference['label_noise_ratio']
    assert model.denoising.box_noise_scale == reference['box_noise_scale']
    assert model.data_preprocessor.mean == reference['pixel_mean']
    assert model.data_preprocessor.std == reference['pixel_std']
    weights = reference['criterion']['weight_dict']
    assert model.bbox_head.loss_cls.loss_weight == weights['loss_class']
    assert model.bbox_head.loss_bbox.loss_weight == weights['loss_bbox']
    assert model.bbox_head.loss_iou.loss_weight == weights['loss_giou']
    matcher = {k: v for k, v in reference['criterion']['matcher'].items() if k in model.train_cfg.assigner}
    assert matcher == {k: v for k, v in model.train_cfg.assigner.items() if k != 'type'}
