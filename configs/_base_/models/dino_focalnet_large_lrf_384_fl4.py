_base_ = 'dino_focalnet_large_lrf_384.py'

model = dict(
    backbone=dict(
        model_name='focalnet_large_fl4',
        init_cfg=dict(
            checkpoint='https://github.com/microsoft/FocalNet/releases/download/v1.0.0/focalnet_large_lrf_384_fl4.pth'
        ),
    ),
)
