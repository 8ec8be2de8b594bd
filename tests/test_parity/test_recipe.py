"""Every config's training recipe equals detrex's."""

from functools import cache

import numpy as np
import pytest
import torch
from mmengine.config import ConfigDict
from mmengine.optim import build_optim_wrapper
from mmengine.registry import PARAM_SCHEDULERS, TRANSFORMS
from parity import golden
from torch import nn
from zoo import ENTRIES, RECIPES, Entry, build, detrex_names, load

import dino_mm

each_config = pytest.mark.parametrize('entry', ENTRIES, ids=[entry.name for entry in ENTRIES])
each_arch = pytest.mark.parametrize('entry', {e.arch: e for e in ENTRIES}.values(), ids=lambda e: e.arch)
TRAINER = 'tools/train_net.py'
HACKED = 'projects/dino/train_net.py (hacked)'


def is_hacked(entry: Entry) -> bool:
    """Whether the row was trained with ``projects/dino/train_net.py``."""
    return entry.name.endswith('_hacked_trainer')


def build_optimizer(model: nn.Module, optim_wrapper: ConfigDict) -> torch.optim.Optimizer:
    # AMP's wrapper asks for a GPU; what groups there are does not depend on it.
    cfg = {k: v for k, v in optim_wrapper.items() if k != 'loss_scale'}
    return build_optim_wrapper(model, ConfigDict(cfg, type='OptimWrapper')).optimizer


def settings(optimizer: torch.optim.Optimizer, names: dict[int, str]) -> dict[str, tuple[float, float]]:
    """Learning rate and weight decay of every parameter that is trained."""
    return {
        names[id(p)]: (group['lr'], group['weight_decay']) for group in optimizer.param_groups for p in group['params']
    }


def reference_settings(entry: Entry, trainer: str) -> dict[str, tuple]:
    """The same in detrex, under the canonical names."""
    aliases = golden(f'keys/{entry.arch}.json')['aliases']
    return {
        aliases.get(name, name): (pytest.approx(group['lr'], rel=1e-12), group['weight_decay'])
        for group in golden(RECIPES[entry.recipe]['optim_groups_file'])[trainer]
        for name in group['names']
    }


@each_config
def test_optimizer_groups(entry: Entry) -> None:
    model = build(entry.config)
    optimizer = build_optimizer(model, load(entry.config).optim_wrapper)
    origin = detrex_names(entry.config, entry.arch)
    ours = settings(optimizer, {id(p): origin[name] for name, p in model.named_parameters()})
    expected = reference_settings(entry, HACKED if is_hacked(entry) else TRAINER)
    assert ours == expected
    assert len(optimizer.param_groups) == len({(g['lr'], g['weight_decay']) for g in optimizer.param_groups})
    assert type(optimizer) is torch.optim.AdamW


@each_arch
def test_optimizer_groups_of_the_hacked_trainer(entry: Entry) -> None:
    model = build(entry.config)
    schedule = load('configs/_base_/schedules/schedule_12ep_hacked_trainer.py')
    origin = detrex_names(entry.config, entry.arch)
    ours = settings(
        build_optimizer(model, schedule.optim_wrapper), {id(p): origin[name] for name, p in model.named_parameters()}
    )
    assert ours == reference_settings(entry, HACKED)


@cache
def learning_rates(config: str) -> np.ndarray:
    """The factor of the learning rate at every iteration, as the runner's hook steps mmengine's schedulers."""
    cfg = load(config)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    schedulers = [PARAM_SCHEDULERS.build(dict(s, optimizer=optimizer)) for s in cfg.param_scheduler]
    optimizer.step()
    rates = np.empty(cfg.train_cfg.max_iters)
    for iteration in range(len(rates)):
        rates[iteration] = optimizer.param_groups[0]['lr']
        for scheduler in schedulers:
            scheduler.step()
    return rates


@each_config
def test_learning_rate_at_every_iteration(entry: Entry) -> None:
    recipe = RECIPES[entry.recipe]
    iterations = np.arange(recipe['max_iter'])
    expected = np.ones(len(iterations))
    for start, factor in recipe['lr_mult_changes_iter_value']:
        expected[start:] = factor
    warmup = recipe['warmup']
    if warmup is not None:
        start, length = warmup['mult_at_0'], warmup['first_full_lr_iter']
        expected[:length] = start + (1 - start) * iterations[:length] / length
        known = {int(k.removeprefix('mult_at_')): v for k, v in warmup.items() if k.startswith('mult_at_')}
        np.testing.assert_allclose(expected[list(known)], list(known.values()), rtol=1e-12)
    np.testing.assert_allclose(learning_rates(entry.config), expected, rtol=1e-9)


@each_config
def test_schedule_optimizer_and_batch(entry: Entry) -> None:
    cfg, recipe = load(entry.config), RECIPES[entry.recipe]
    optimizer = recipe['optimizer']
    assert cfg.train_cfg.max_iters == recipe['max_iter']
    assert cfg.train_cfg.val_interval == recipe['eval_period']
    assert cfg.default_hooks.checkpoint.interval == recipe['checkpointer']['period']
    assert cfg.default_hooks.checkpoint.max_keep_ckpts == recipe['checkpointer']['max_to_keep']
    assert cfg.default_hooks.logger.interval == recipe['log_period']
    assert cfg.optim_wrapper.optimizer.type == optimizer['type'].rpartition('.')[2]
    assert cfg.optim_wrapper.optimizer.lr == (2e-4 if is_hacked(entry) else optimizer['lr'])
    assert list(cfg.optim_wrapper.optimizer.betas) == optimizer['betas']
    assert cfg.optim_wrapper.optimizer.weight_decay == optimizer['weight_decay']
    assert dict(cfg.optim_wrapper.clip_grad) == recipe['clip_grad']['params']
    assert cfg.auto_scale_lr.base_batch_size == recipe['total_batch_size'] == 8 * cfg.train_dataloader.batch_size
    assert cfg.val_dataloader.batch_size == 1
    assert 'randomness' not in cfg  # a seed of -1 is a random one
    assert recipe['seed'] == -1


@each_config
def test_mixed_precision(entry: Entry) -> None:
    wrapper = load(entry.config).optim_wrapper
    amp = RECIPES[entry.recipe]['amp'] or entry.name.endswith('_amp')
    expected = ('AmpOptimWrapper', 'dynamic') if amp else ('OptimWrapper', None)
    assert (wrapper.type, wrapper.get('loss_scale')) == expected


@each_config
def test_moving_average_of_the_weights(entry: Entry) -> None:
    recipe = RECIPES[entry.recipe]['model_ema']
    hooks = [hook for hook in load(entry.config).custom_hooks if hook.type == 'EMAHook']
    if recipe['enabled'] or entry.name.endswith('_ema'):
        assert hooks == [dict(type='EMAHook', momentum=pytest.approx(1 - recipe['decay'], rel=1e-12))]
    else:
        assert not hooks


@each_config
def test_augmentation(entry: Entry) -> None:
    cfg, recipe = load(entry.config), RECIPES[entry.recipe]
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
    assert pipeline['LoadImageFromFile'].imdecode_backend == 'pillow'
    test = cfg.test_dataloader.dataset.pipeline[1]
    resize = recipe['test_mapper']['augmentation'][0]
    assert (test.type, test._scope_) == ('Resize', 'dino_mm')
    assert type(TRANSFORMS.build(test)) is dino_mm.ResizeShortestEdge
    assert tuple(test.scale) == (resize['short_edge_length'], resize['max_size'])


@each_config
def test_images_without_boxes(entry: Entry) -> None:
    cfg, recipe = load(entry.config), RECIPES[entry.recipe]
    kept = recipe['train_filter_empty'] is False  # else the string 'default=True'
    assert cfg.train_dataloader.dataset.filter_cfg.filter_empty_gt is not kept
    assert cfg.train_dataloader.batch_sampler.type == 'AspectRatioBatchSampler'
    assert 'filter_cfg' not in cfg.test_dataloader.dataset
    assert recipe['test_filter_empty'] is False


@each_config
def test_architecture_is_stated_as_in_the_recipe(entry: Entry) -> None:
    model, reference = load(entry.config).model, RECIPES[entry.recipe]['model']
    encoder, decoder = reference['transformer']['encoder'], reference['transformer']['decoder']
    for ours, theirs in ((model.encoder, encoder), (model.decoder, decoder)):
        assert ours.num_layers == theirs['num_layers']
        assert ours.num_heads == theirs['num_heads']
        assert ours.feedforward_channels == theirs['feedforward_dim']
        assert ours.dropout == theirs['ffn_dropout'] == theirs['attn_dropout']
    levels = {part['num_feature_levels'] for part in (encoder, decoder, reference['transformer'])}
    assert {model.num_feature_levels, model.neck.num_outs} == levels == {reference['neck']['num_outs']}
    position = reference['position_embedding']
    assert model.positional_encoding.normalize is position['normalize']
    assert model.positional_encoding.temperature == position['temperature']
    assert model.positional_encoding.offset == position['offset']
    assert model.num_queries == reference['num_queries'] == reference['transformer']['two_stage_num_proposals']
    assert model.embed_dims == reference['embed_dim']
    assert model.denoising.num_dn_queries == reference['dn_number']
    assert model.denoising.label_noise_ratio == reference['label_noise_ratio']
    assert model.denoising.box_noise_scale == reference['box_noise_scale']
    assert model.data_preprocessor.mean == reference['pixel_mean']
    assert model.data_preprocessor.std == reference['pixel_std']
    assert model.data_preprocessor.bgr_to_rgb is (reference['input_format'] == 'RGB')
    channels = [shape['channels'] for shape in reference['neck']['input_shapes'].values()]
    assert model.neck.in_channels == channels


@each_config
def test_losses_and_matching_costs(entry: Entry) -> None:
    model, criterion = load(entry.config).model, RECIPES[entry.recipe]['model']['criterion']
    head, weights = model.bbox_head, criterion['weight_dict']
    denoising = head.get('loss_dn_cls') or head.loss_cls
    for suffix in ('', '_enc', *(f'_{layer}' for layer in range(model.decoder.num_layers - 1))):
        assert head.loss_cls.loss_weight == weights[f'loss_class{suffix}']
        assert denoising.loss_weight == weights[f'loss_class_dn{suffix}']
        assert head.loss_bbox.loss_weight == weights[f'loss_bbox{suffix}'] == weights[f'loss_bbox_dn{suffix}']
        assert head.loss_iou.loss_weight == weights[f'loss_giou{suffix}'] == weights[f'loss_giou_dn{suffix}']
    for loss in (head.loss_cls, denoising):
        assert (loss.alpha, loss.gamma) == (criterion['alpha'], criterion['gamma'])
    assert head.num_classes == criterion['num_classes']
    matcher = {k: v for k, v in criterion['matcher'].items() if k in model.train_cfg.assigner}
    assert matcher == {k: v for k, v in model.train_cfg.assigner.items() if k != 'type'}


@each_config
def test_drop_path_grows_linearly_to_the_recipe_s_rate(entry: Entry) -> None:
    recipe = RECIPES[entry.recipe]
    rate, backbone = recipe['drop_path_rate'] or 0.0, recipe['model']['backbone']
    depths = backbone.get('depths') or [backbone.get('net', {}).get('depth', 1)]
    modules = build(entry.config).backbone.modules()
    rates = {m.drop_prob for m in modules if type(m).__name__ == 'DropPath'}
    expected = np.linspace(0, rate, sum(depths)) if rate else [0.0]
    np.testing.assert_allclose(sorted(rates | {0.0}), expected, rtol=0, atol=1e-6)


@each_config
def test_what_is_frozen(entry: Entry) -> None:
    model, recipe = build(entry.config), RECIPES[entry.recipe]
    origin = detrex_names(entry.config, entry.arch)
    buffers = golden(f'keys/{entry.arch}.json')['buffers']  # frozen norms have no parameters in detectron2
    frozen = {origin[name] for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen - set(buffers) == set(recipe['frozen_params'])


def test_recipes_without_a_config() -> None:
    empty = 'dino-eva-01/dino_eva_01_1536_4scale_12ep.py'
    assert set(RECIPES) - {entry.recipe for entry in ENTRIES} == {empty}
    assert set(RECIPES[empty]) == {'error'}
