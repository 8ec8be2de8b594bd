# 90000 iterations of 16 images: 12 epochs of COCO.
train_cfg = dict(type='dino_mm.IterBasedTrainLoop', max_iters=90000, val_interval=5000)
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')

param_scheduler = [dict(type='MultiStepLR', begin=0, end=90000, by_epoch=False, milestones=[82500], gamma=0.1)]

optim_wrapper = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=1e-4, betas=(0.9, 0.999), weight_decay=1e-4),
    clip_grad=dict(max_norm=0.1, norm_type=2),
    constructor='dino_mm.ParamGroupConstructor',
    paramwise_cfg=dict(norm_decay_mult=0.0, custom_keys=dict(backbone=dict(lr_mult=0.1))),
)

# 8 GPUs x 2 images.
auto_scale_lr = dict(enable=False, base_batch_size=16)
