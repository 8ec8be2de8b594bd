# Training by epochs. The lines below `_base_` go over any other config as well, with its epochs and milestones.
_base_ = '../dino_r50_4scale_12ep.py'

max_epochs = 12
train_cfg = dict(_delete_=True, type='dino_mm.EpochBasedTrainLoop', max_epochs=max_epochs, val_interval=1)
train_dataloader = dict(sampler=dict(type='DefaultSampler'))  # InfiniteSampler's epochs do not end
param_scheduler = [dict(type='MultiStepLR', begin=0, end=max_epochs, by_epoch=True, milestones=[11], gamma=0.1)]
default_hooks = dict(logger=dict(log_metric_by_epoch=True), checkpoint=dict(by_epoch=True, interval=1))
log_processor = dict(by_epoch=True)
