_base_ = 'dino_focalnet_tiny_lrf.py'

model = dict(
    backbone=dict(
        model_name='focalnet_large_fl3',
        drop_path_rate=0.3,
        init_cfg=dict(
            checkpoint='https://github.com/microsoft/FocalNet/releases/download/v1.0.0/focalnet_large_lrf_384.pth'
        ),
    ),
    neck=dict(in_channels=[384, 768, 1536]),
)
