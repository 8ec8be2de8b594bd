_base_ = 'schedule_12ep.py'

train_cfg = dict(max_iters=270000)
param_scheduler = [dict(type='MultiStepLR', begin=0, end=270000, by_epoch=False, milestones=[225000], gamma=0.1)]
