_base_ = 'dino_focalnet_tiny_lrf.py'

model = dict(
    backbone=dict(
        model_name='focalnet_base_lrf',
        init_cfg=dict(
            checkpoint='https://github.com/microsoft/FocalNet/releases/download/v1.0.0/focalnet_base_lrf.pth'
        ),
    ),
    neck=dict(in_channels=[256, 512, 1024]),
)
