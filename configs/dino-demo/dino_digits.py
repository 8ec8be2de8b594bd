# A small DINO that learns the digits scenes on two CPU cores in minutes: the same parts, fewer and narrower.
_base_ = [
    '../_base_/models/dino_r50.py',
    '../_base_/datasets/digits_detection.py',
    '../_base_/schedules/schedule_12ep.py',
    '../_base_/default_runtime.py',
]
model = dict(
    num_queries=40,
    num_feature_levels=3,
    embed_dims=128,
    backbone=dict(
        depth=18, base_channels=32, frozen_stages=-1, norm_cfg=dict(requires_grad=True), norm_eval=False, init_cfg=None
    ),
    neck=dict(in_channels=[64, 128, 256], out_channels=128, num_outs=3),
    encoder=dict(num_layers=2, feedforward_channels=512),
    decoder=dict(num_layers=3, feedforward_channels=512),
    denoising=dict(num_dn_queries=60),
    bbox_head=dict(num_classes=10),
    test_cfg=dict(max_per_img=40),
)

train_cfg = dict(max_iters=800, val_interval=200)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=30),
    dict(type='CosineAnnealingLR', T_max=770, by_epoch=False, begin=30, end=800),
]
# Nothing is pretrained, so the backbone learns as fast as the rest.
optim_wrapper = dict(
    optimizer=dict(lr=1.5e-3), clip_grad=dict(max_norm=1.0), paramwise_cfg=dict(_delete_=True, norm_decay_mult=0.0)
)
default_hooks = dict(checkpoint=dict(interval=400, max_keep_ckpts=1))
randomness = dict(seed=0)
