# Deformable DETR's groups: sampling offsets learn as slowly as the backbone, norms decay as all do.
_base_ = 'schedule_12ep.py'

optim_wrapper = dict(
    optimizer=dict(lr=2e-4),
    paramwise_cfg=dict(_delete_=True, custom_keys=dict(backbone=dict(lr_mult=0.1), sampling_offsets=dict(lr_mult=0.1))),
)
