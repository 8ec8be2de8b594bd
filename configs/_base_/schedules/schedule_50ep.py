_base_ = 'schedule_12ep.py'

train_cfg = dict(max_iters=375000)
param_scheduler = [dict(type='MultiStepLR', begin=0, end=375000, by_epoch=False, milestones=[300000], gamma=0.1)]
