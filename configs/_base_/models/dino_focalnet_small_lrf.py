_base_ = 'dino_focalnet_tiny_lrf.py'

model = dict(
    backbone=dict(
        model_name='focalnet_small_lrf',
        init_cfg=dict(
            checkpoint='https://github.com/microsoft/FocalNet/releases/download/v1.0.0/focalnet_small_lrf.pth'
        ),
    ),
)
