# detrex gives the milestones of 50 epochs here too; it takes them relative to the end: at 0.8 of the iterations.
_base_ = 'schedule_12ep.py'

param_scheduler = [
    dict(type='LinearLR', begin=0, end=251, by_epoch=False, start_factor=0.001),  # full from iteration 250 on
    dict(type='MultiStepLR', begin=0, end=90000, by_epoch=False, milestones=[72000], gamma=0.1),
]
