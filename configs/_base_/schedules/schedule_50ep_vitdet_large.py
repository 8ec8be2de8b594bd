_base_ = 'schedule_50ep.py'

param_scheduler = [
    dict(type='LinearLR', begin=0, end=251, by_epoch=False, start_factor=0.001),  # full from iteration 250 on
    dict(type='MultiStepLR', begin=0, end=375000, by_epoch=False, milestones=[300000], gamma=0.1),
]
