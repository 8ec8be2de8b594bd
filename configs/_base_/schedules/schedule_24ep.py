_base_ = 'schedule_12ep.py'

train_cfg = dict(max_iters=180000)
param_scheduler = [dict(type='MultiStepLR', begin=0, end=180000, by_epoch=False, milestones=[150000], gamma=0.1)]
